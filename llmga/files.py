"""Care with files: written aside and then renamed, built once by many processes, named when they are not what they
should be."""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: builders do not wait for each other, the last rename wins
    fcntl = None  # type: ignore[assignment]

HEAD_BYTES = 64  # enough of a file's start for `what_it_is`
# A file written again within one tick of the file system's clock keeps its modification time. What is built from a
# file so soon after it is therefore built again at the next use, as git does with its own index.
RACY_NS = 100_000_000

_SIGNATURES = {
    b"\x1f\x8b": "gzip-compressed: unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it first (unzstd)",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "a Parquet file: give it the suffix .parquet",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer and not the data itself: fetch it with `git lfs pull`",
    b"<": "a web page or XML, often an error page saved by a download: fetch the file again",
}


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` when the block ends well, else it goes.

    Raises:
        OSError: the folder cannot be written, or the disk is full; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one and nothing between."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def one_builder(folder: Path) -> Iterator[None]:
    """Let one process at a time build files in `folder`, where the file system can lock; others wait here.

    It only saves work: whoever comes in looks again whether the file is there, and writes it aside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else -1
    try:
        if fcntl:
            with suppress(OSError):  # some network file systems cannot lock a folder
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def built_from(source: Path, homes: Sequence[Path], build: Callable[[Path], None]) -> Path:
    """The first of `homes` that holds what `build` makes of `source`, built now where none does.

    The names of the homes must carry the state of the source. A file built within a clock tick of the source's last
    change is not believed: the source may have changed again without showing it.

    Args:
        source: the file that is read.
        homes: where the result may lie; it is built in the first whose folder can be written.
        build: writes the result to the path it is given, aside and then renamed.
    Raises:
        OSError: none of the folders can be written, or the disk is full.
    """
    for home in homes:
        if _is_settled(home, source):
            return home
    home = next((home for home in homes if _can_write(home.parent)), homes[-1])
    with one_builder(home.parent):
        if not _is_settled(home, source):
            build(home)
    return home


def _is_settled(built: Path, source: Path) -> bool:
    return built.is_file() and built.stat().st_mtime_ns - source.stat().st_mtime_ns > RACY_NS


def _can_write(folder: Path) -> bool:
    return os.access(nearest_there(folder), os.W_OK)


def nearest_there(path: Path) -> Path:
    """The path itself, or the first of its parents that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))


def no_folder_to_write(path: Path) -> str | None:
    """One sentence for a folder in which nothing could be written, there or yet to be made; None where it could."""
    found = nearest_there(path)
    if not found.is_dir():
        return f"{found} is a file, expected a folder there, or nothing yet"
    return None if os.access(found, os.W_OK | os.X_OK) else f"nothing can be written to {found}; give another folder"


def no_file_to_write(path: Path) -> str | None:
    """One sentence for a file that could not be written, to be said before the work that fills it; None if it could."""
    return f"{path} is a folder, expected a file to write" if path.is_dir() else no_folder_to_write(path.parent)


def cache_folder(kind: str) -> Path:
    """The user's folder for what can be built again: $LLMGA_CACHE_DIR, or llmga in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("LLMGA_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "llmga") / kind


def path_key(path: Path, *parts: object) -> str:
    """16 hexadecimal digits that stand for an absolute path and anything else that makes a cached file another one."""
    return sha256("\0".join(map(str, (path.absolute(), *parts))).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def what_it_is(head: bytes) -> str | None:
    """What a file is that should be JSON text but starts with `head`, and what to do about it; None if it may be."""
    return next((name for signature, name in _SIGNATURES.items() if head.startswith(signature)), None)


def no_such_file(path: Path) -> str:
    """One sentence for a file that cannot be opened: whether it is missing or a folder, and what is there instead."""
    if path.is_dir():
        shown = (entry.name for entry in path.iterdir() if entry.suffix in (".jsonl", ".json", ".parquet"))
        inside = sorted(name for name in shown if not name.startswith("."))  # ours are caches
        return f"{path} is a folder, expected a file" + (f"; it holds {', '.join(inside[:5])}" if inside else "")
    if not path.parent.is_dir():
        return f"{path} does not exist, and neither does its folder; relative paths count from {Path.cwd()}"
    beside = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    close = get_close_matches(path.name, beside, n=1)
    return f"{path} does not exist" + (f"; did you mean {path.parent / close[0]}?" if close else "")
