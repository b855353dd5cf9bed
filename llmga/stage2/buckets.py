"""Which rectangle each row's picture is cut to: found from the files' headers once, kept in the user's cache folder."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from llmga.files import built_from, cache_folder, path_key, written_aside
from llmga.images import PictureError, picture_path, read_orientation
from llmga.stage2.pixels import Size, nearest_bucket
from llmga.stage2.sources import Source

logger = logging.getLogger(__name__)
_THREADS = 16  # opening headers is waiting for the disk
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations whose height is the file's width


def bucket_table(source: Source, sizes: Sequence[Size]) -> np.ndarray:
    """(rows,) int16: for each row of a source the index of the size nearest to its picture's aspect ratio.

    A picture that cannot be opened counts as square; whoever loads it says what is wrong with it.
    """
    stat = source.path.stat()
    key = path_key(source.path, stat.st_size, stat.st_mtime_ns, source.image_root, len(source), list(sizes))
    home = cache_folder("buckets") / f"{source.path.stem}-{key}.npy"

    def build(path: Path) -> None:
        logger.info("%s: reading the sizes of %d pictures", source.path, len(source))
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(lambda row: _bucket(source, row, list(sizes)), range(len(source))))
        with written_aside(path) as aside, open(aside, "wb") as file:
            np.save(file, np.array(found, np.int16))

    return np.asarray(np.load(built_from(source.path, [home], build), mmap_mode="r"))


def _bucket(source: Source, row: int, sizes: list[Size]) -> int:
    try:
        with Image.open(picture_path(source.image_root, source[row].image or "")) as picture:
            width, height = picture.size
            sideways = read_orientation(picture) in _SIDEWAYS
    except (PictureError, OSError, ValueError):
        return 0
    return nearest_bucket(*((width, height) if sideways else (height, width)), sizes)
