"""PNG files of flat drawings, written fast and small."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def encode_png(picture: np.ndarray) -> bytes:
    """A picture as PNG with unfiltered rows, which on flat drawings halves both Pillow's time and its bytes.

    Args:
        picture: (H, W, 3) uint8 RGB.
    """
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row behind its filter number, 0
    rows[:, 1:] = picture.reshape(height, -1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 6)),
        (b"IEND", b""),
    )
    framed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)
