"""The work in progress: one file for each process, of whole lines, and the settings that all of them share.

`<out>.parts/` holds `settings.json` and `part-<rank>-of-<processes>.jsonl`. A line says what became of one row:

    {"row": 12, "id": "train-0000012", "prompt": "...", "recorded": {"seed": ..., "attempt": 0, ...}}
    {"row": 13, "id": "train-0000013", "rejected": "unbalanced_tags", "replies": ["..."]}

A batch is appended in one write and brought to the disk, so that a killed process loses at most the batch it was
about to write. Rows are done when any part has them: the number of processes may change from one start to the next.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llmga.files import atomic_write

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes of one rank apart
    fcntl = None  # type: ignore[assignment]

SETTINGS_FILE = "settings.json"


class PartsError(ValueError):
    """Work in progress that does not fit what is asked now."""


def parts_folder(out: Path) -> Path:
    """Where the work in progress on a manifest lies."""
    return out.with_name(f"{out.name}.parts")


def agree_on_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what decides the prompts, or find that earlier or neighbouring processes wrote the same.

    Raises:
        PartsError: they were started with other settings.
    """
    path = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings, default=str))
    if not path.exists():
        atomic_write(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise PartsError(f"{path} is damaged; delete {folder} and record again") from None
    changed = [
        f"{key} ({found.get(key)} there, {settings.get(key)} now)"
        for key in sorted(found.keys() | settings.keys())
        if found.get(key) != settings.get(key)
    ]
    if changed:
        raise PartsError(
            f"{folder} holds prompts recorded with other settings: {', '.join(changed)}; "
            "choose another out, or delete the folder"
        )


def done_rows(folder: Path) -> set[int]:
    """Rows that some part has."""
    return {line["row"] for line in read_lines(folder)}


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of all parts; a line that a killed process left half written is passed over.

    Raises:
        PartsError: a line within a part is damaged.
    """
    for path in sorted(folder.glob("part-*.jsonl")):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    entry["row"], entry["id"]
                except (ValueError, KeyError, TypeError):
                    raise PartsError(
                        f"{path}:{number} is damaged; delete that line, its row is recorded again"
                    ) from None
                yield entry


class PartWriter:
    """Appends to the part of one process, which no other process may write at the same time."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        """Open the part, once the line that a killed process left half written is cut off.

        Raises:
            PartsError: another process writes it.
        """
        self.path = folder / f"part-{rank:05d}-of-{world_size:05d}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(self.path, "ab+")  # noqa: SIM115 (open as long as the writer)
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PartsError(
                    f"{self.path} is being written by another process; start each process with a rank of its own, "
                    f"or stop the other one"
                ) from None
            except OSError:
                pass  # some network file systems cannot lock
        self._cut_torn_line()

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write lines together and wait until the disk has them."""
        self._file.write(b"".join(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if line.endswith(b"\n"):
                whole += len(line)
        self._file.truncate(whole)
