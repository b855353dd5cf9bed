"""Rows that could not be used: written down by whoever meets them, counted for all to see, and too many end the run.

`bad_samples.jsonl` has one line per row that was replaced or left out. It is cut back when a run resumes, as the
metrics are, so a resumed run counts, shows and decides as an unbroken one; a picture that was mended in between counts
no more.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from llmga.files import atomic_write
from llmga.runtime import RunFailed

BAD_SAMPLES_FILE = "bad_samples.jsonl"
TRAIN = "train"  # the set whose bad samples count against data.max_bad_share
Kind = Literal["picture", "too_long", "no_room"]
KINDS: tuple[Kind, ...] = ("picture", "too_long")  # why a row is replaced
NO_ROOM: Kind = "no_room"  # why an example is left out of a packed row
_BY_CHANCE = 1e-6  # what is less likely than this in a run that keeps to its share is no accident


class TooManyBadSamples(RunFailed):
    """More examples had an unreadable picture than `data.max_bad_share` allows."""


def write_down(path: Path, entry: dict[str, Any]) -> None:
    """Append one line. It is one write to a file opened for appending: lines of all workers and ranks stay whole."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape"))
    finally:
        os.close(handle)


class BadSampleBudget:
    """Watches `bad_samples.jsonl` and ends a run that replaces more pictures than it may.

    A run may replace `max_share` of all its examples, one at least unless the share is 0, and stops with the first one
    above. It need not come so far: a few bad pictures in the first steps say little, but when so many among so few are
    less likely than one in a million at the share allowed, the path is wrong and not the luck bad.

    Args:
        path: the file; it may not exist yet.
        max_share: of the examples.
        total: examples in the whole run.
    """

    def __init__(self, path: Path, max_share: float, total: int) -> None:
        self.path, self.max_share = Path(path), max_share
        self.allowed = max(1, math.floor(max_share * total + 1e-9)) if max_share else 0
        self._read = 0  # bytes
        self._entries: dict[int, dict[str, Any]] = {}  # by index; an example may have needed several attempts

    def forget_after(self, seen: int) -> None:
        """Drop what was written down past the first `seen` examples; the resumed run will meet those again."""
        self._read, self._entries = 0, {}
        if not self.path.exists():
            return
        kept = [line for line in self._lines() if line["set"] != TRAIN or line["index"] < seen]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        atomic_write(self.path, text.encode("utf-8", "surrogateescape"))
        self._read = 0

    def check(self, seen: int) -> None:
        """Raise when too many of the first `seen` examples of the run had an unreadable picture.

        Raises:
            TooManyBadSamples: names the file, the counts, the first bad picture and the setting.
        """
        bad = [entry for entry in self.replaced(seen) if entry["kind"] == "picture"]
        if len(bad) > self.allowed:
            verdict = f"data.max_bad_share = {self.max_share:g} allows {self.allowed} in the whole run"
        elif len(bad) > 1 and _chance(len(bad), seen, self.max_share) < _BY_CHANCE:
            verdict = f"at data.max_bad_share = {self.max_share:g} that is no accident"
        else:
            return
        first = bad[0]
        raise TooManyBadSamples(
            f"{len(bad)} of the first {seen} examples had a picture that cannot be read, and {verdict}; {self.path} "
            f"names them all, the first is {first['picture']} ({first['path']} row {first['row']}): {first['reason']}. "
            "Mend or remove them, or raise data.max_bad_share"
        )

    def counts(self, seen: int) -> Counter[str]:
        """How many of the first `seen` examples were replaced, or left out of a packed row, by kind."""
        return Counter(entry["kind"] for entry in self.replaced(seen))

    def replaced(self, seen: int) -> list[dict[str, Any]]:
        """One entry per example not used among the first `seen`, in order; workers have logged later ones ahead."""
        if self.path.exists():
            for entry in self._lines():
                if entry["set"] == TRAIN and (entry["kind"] == "picture" or entry["index"] not in self._entries):
                    self._entries[entry["index"]] = entry
        return [self._entries[index] for index in sorted(self._entries) if index < seen]

    def _lines(self) -> list[dict[str, Any]]:
        """The lines that were added since the last call; one that is half written comes with the next."""
        with open(self.path, "rb") as file:
            file.seek(self._read)
            whole_lines, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole_lines) + len(newline)
        return [json.loads(line.decode("utf-8", "surrogateescape")) for line in whole_lines.splitlines()]


def _chance(bad: int, seen: int, share: float) -> float:
    """The most that the probability of `bad` or more among `seen` can be when each is bad with probability `share`.

    Source: Chernoff's bound, exp(-n KL(k/n || p)); 1 where k/n does not exceed p.
    """
    found = bad / seen
    if found <= share:
        return 1.0
    if share == 0:
        return 0.0
    rest = (1 - found) * math.log((1 - found) / (1 - share)) if found < 1 else 0.0
    return math.exp(-seen * (found * math.log(found / share) + rest))
