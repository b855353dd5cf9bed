"""Rows of a file that are left out of training: a list that `llmga check` writes and the loader reads.

A quarantine is JSON Lines. The first line names the file and its state; each other line names one row by its number,
with the codes of what is wrong with it:

    {"quarantine": 1, "file": "train.json", "bytes": 885, "ends": "9f2c..."}
    {"row": 3, "codes": ["picture_missing"]}

The state guards against a list that was made for another version of the file: its size, and a hash of both its ends.
"""

import json
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from llmga.files import no_such_file, written_aside

VERSION = 1
_END_BYTES = 1 << 16


class QuarantineError(ValueError):
    """A quarantine list that cannot be read, or was made for other files."""


def write_quarantine(path: Path, source: Path, rows: Iterable[tuple[int, list[str]]]) -> int:
    """Write the list of rows of `source` to leave out, aside and then renamed.

    Args:
        path: the list; its folder is made.
        rows: (number of the row, codes), in order.
    Returns:
        The number of rows on it.
    """
    count = 0
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        head = {"quarantine": VERSION, "file": source.name, **_state(source)}
        file.write(json.dumps(head, ensure_ascii=False) + "\n")
        for row, codes in rows:
            file.write(json.dumps({"row": row, "codes": codes}) + "\n")
            count += 1
    return count


def read_quarantine(path: Path, source: Path) -> list[int]:
    """The rows of `source` to leave out, ascending.

    Raises:
        QuarantineError: the list is missing, not a quarantine, or was made for another file or state of it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        reason = no_such_file(path) if isinstance(problem, OSError) else f"{path} is not UTF-8"
        raise QuarantineError(f"{reason}; expected a quarantine list as `llmga check` writes it") from None
    try:
        head, *entries = [json.loads(line) for line in lines]
        if head["quarantine"] != VERSION:
            raise QuarantineError(f"{path} is a quarantine list of version {head['quarantine']}, expected {VERSION}")
        made_for = {"bytes": head["bytes"], "ends": head["ends"]}
        rows = sorted({int(entry["row"]) for entry in entries})
    except (ValueError, KeyError, TypeError) as problem:
        if isinstance(problem, QuarantineError):
            raise
        raise QuarantineError(f"{path} is not a quarantine list as `llmga check` writes it ({problem!r})") from None
    if made_for != _state(source):
        made = f"{path} was made for another state of {head['file']} than {source} has now"
        raise QuarantineError(f"{made}; run `llmga check {source}` again")
    return rows


def _state(source: Path) -> dict[str, object]:
    """What tells one version of a file from another without reading all of it."""
    with open(source, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = sha256(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return {"bytes": size, "ends": digest.hexdigest()[:32]}
