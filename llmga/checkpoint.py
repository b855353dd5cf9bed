"""Folders that are whole or absent: checkpoints that prove they are complete, and which of them to resume from.

A checkpoint is the folder `checkpoint-<step>`. Its last file is `complete`, written when all others are on the disk;
it lists them with their sizes, so a folder that a crash or a full disk cut short is told apart at a glance.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmga.files import atomic_write

MARKER = "complete"
_PREFIX = "checkpoint-"
_STEP = re.compile(re.escape(_PREFIX) + r"(\d+)")
_HASHED_BYTES = 1 << 20  # files up to this size are verified by content, larger ones by size


@contextlib.contextmanager
def write_folder_atomically(folder: Path, durable: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` when the block ends well, and vanishes when it does not.

    Args:
        durable: force every file to the disk first; False for many small files that are quickly made again.
    Raises:
        FileExistsError: `folder` is there already and not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists already and is not empty; move it away or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.partial")  # a fixed name: what a killed run left is replaced, not kept
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in _files(aside):
            path.chmod(aside.stat().st_mode & 0o666)  # safetensors writes for the owner alone, whatever the umask
            if durable:
                _fsync(path)
        os.replace(aside, folder)
        if durable:
            _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint taken after `step` optimizer steps."""
    return output_dir / f"{_PREFIX}{step}"


def checkpoint_step(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    match = _STEP.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not a checkpoint: its name should read {_PREFIX}<step>")
    return int(match[1])


def mark_complete(folder: Path, **facts: Any) -> None:
    """Bring every file of a checkpoint to the disk, then write its marker.

    Args:
        folder: `checkpoint-<step>`, all of whose files are written and closed.
        facts: stored beside the step and the list of files, for `read_marker`: numbers, strings, lists.
    """
    files = {}
    for path in _files(folder):
        if path.name == MARKER and path.parent == folder:
            continue
        _fsync(path)
        size = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {"bytes": size} | (
            {"sha256": sha256(path)} if size <= _HASHED_BYTES else {}
        )
    _fsync(folder)
    atomic_write(folder / MARKER, json.dumps({"step": checkpoint_step(folder), **facts, "files": files}, indent=1))
    _fsync(folder)
    _fsync(folder.parent)


def read_marker(folder: Path) -> dict[str, Any]:
    """What `mark_complete` wrote: `step`, `files` and the facts; empty when the marker is missing or unreadable."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its marker, and every file the marker lists with its size (small ones: its content)."""
    marker = read_marker(folder)
    if marker.get("step") != checkpoint_step(folder) or not isinstance(marker.get("files"), dict):
        return False
    for name, expected in marker["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            return False
        if "sha256" in expected and sha256(path) != expected["sha256"]:
            return False
    return True


def checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint folder of a run, complete or not, by step."""
    found = [path for path in output_dir.glob(f"{_PREFIX}*") if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_complete(path)), None)


def remove_incomplete(output_dir: Path) -> list[Path]:
    """Delete what an interrupted save left behind, and return the names of the folders."""
    broken = [path for path in checkpoints(output_dir) if not is_complete(path)]
    for path in broken:
        shutil.rmtree(path)
    return broken


def keep_last(output_dir: Path, count: int) -> list[Path]:
    """Delete all complete checkpoints but the last `count`, and return those deleted.

    The marker goes first: killed halfway, a deletion leaves an incomplete checkpoint and not a damaged one.
    """
    outdated = [path for path in checkpoints(output_dir) if is_complete(path)][: -count or None]
    for path in outdated:
        (path / MARKER).unlink()
        shutil.rmtree(path)
    return outdated


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one it was raised from, says that no more could be written (disk, quota or file limit).

    Libraries wrap the system's error: safetensors and torch raise types of their own with its text or less.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(sign in str(seen) for sign in _DISK_FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


_DISK_FULL_TEXTS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",  # torch.save says no more than that, or less:
    "iostream error",
)


def _files(folder: Path) -> list[Path]:
    """Every regular file below a folder, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
