"""Where each row of a JSON Lines file starts: found by one fast scan, kept beside the file, memory-mapped."""

import mmap
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmga.files import RACY_NS, cache_folder, path_key, written_aside

if TYPE_CHECKING:
    import numpy as np

_MAGIC = b"LLMGAIX1"
_HEADER = struct.Struct("<8sQqqQ24x")  # magic, size, mtime_ns, built_ns, rows; 64 bytes keep the offsets aligned
_SCAN_BYTES = 16 << 20
_BLANKS = b" \t\r\v\f"
_BOM = b"\xef\xbb\xbf"


def row_offsets(path: Path, handle: int) -> memoryview:
    """Offsets of the rows of an open file: `offsets[i]` to `offsets[i + 1]` holds row i and blanks after it.

    The index lies beside the file (`.NAME.index`), or in the user's cache folder where that cannot be written. It is
    rebuilt when the file's size or modification time differ from those it was built for. Any number of processes may
    build it at once: each writes its own aside and renames it.

    Args:
        path: the JSON Lines file.
        handle: a descriptor open on it.
    Returns:
        rows + 1 unsigned 64-bit integers; memory-mapped, so that processes share them.
    Raises:
        ValueError: the file changes while it is scanned.
    """
    homes = (path.with_name(f".{path.name.lstrip('.')}.index"), cache_folder("index") / f"{path_key(path)}.index")
    state = file_state(handle)
    for home in homes:
        if (offsets := _load(home, state)) is not None:
            return offsets
    starts = scan_rows(handle)
    if file_state(handle) != state:
        raise ValueError(f"{path} changed while its rows were counted; wait until it is written, then open it again")
    header = _HEADER.pack(_MAGIC, *state, time.time_ns(), len(starts) - 1)
    for home in homes:
        try:
            with written_aside(home) as aside:
                aside.write_bytes(header + starts.tobytes())
        except OSError:  # read-only folder or full disk
            continue
        break
    return memoryview(starts.tobytes()).cast("Q")


def file_state(handle: int) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds: a file with another state is another file."""
    stat = os.fstat(handle)
    return stat.st_size, stat.st_mtime_ns


def scan_rows(handle: int, scan_bytes: int = _SCAN_BYTES) -> "np.ndarray":
    """Starts of all lines that are not blank, then the file's size, as uint64; a byte order mark is passed over."""
    import numpy as np  # only to build an index: opening one needs half the memory without it

    base = len(_BOM) if os.pread(handle, len(_BOM), 0) == _BOM else 0
    starts_here = True  # a line starts at `base`
    found = []
    while block := os.pread(handle, scan_bytes, base):
        data = np.frombuffer(block, np.uint8)
        starts = np.flatnonzero(data == ord("\n")) + 1
        if starts_here:
            starts = np.concatenate(([0], starts))
        starts_here = starts.size > 0 and int(starts[-1]) == data.size
        if starts_here:
            starts = starts[:-1]
        first = data[starts]
        kept = first > ord(" ")
        for doubtful in np.flatnonzero((first <= ord(" ")) & (first != ord("\n"))):
            kept[doubtful] = not _is_blank(handle, base + int(starts[doubtful]))
        found.append(starts[kept].astype(np.uint64) + np.uint64(base))
        base += data.size
    return np.concatenate([*found, np.array([base], np.uint64)])


def line_number(handle: int, offset: int) -> int:
    """Line (from 1) in which a byte offset lies; reads everything before it, so it is for error messages."""
    newlines = done = 0
    while block := os.pread(handle, min(_SCAN_BYTES, offset - done), done):
        newlines += block.count(b"\n")
        done += len(block)
    return newlines + 1


def _is_blank(handle: int, start: int) -> bool:
    """Whether nothing but white space stands between `start` and the end of its line."""
    while block := os.pread(handle, 4096, start):
        if rest := block.lstrip(_BLANKS):
            return rest.startswith(b"\n")
        start += len(block)
    return True


def _load(home: Path, state: tuple[int, int]) -> memoryview | None:
    """The stored offsets, or None where there are none, or they belong to another state of the file."""
    try:
        with open(home, "rb") as file:
            if os.fstat(file.fileno()).st_size < _HEADER.size:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return None
    magic, size, mtime_ns, built_ns, rows = _HEADER.unpack_from(mapped)
    complete = len(mapped) == _HEADER.size + 8 * (rows + 1)
    settled = abs(built_ns - mtime_ns) > RACY_NS
    if magic != _MAGIC or (size, mtime_ns) != state or not complete or not settled:
        return None
    return memoryview(mapped)[_HEADER.size :].cast("Q")
