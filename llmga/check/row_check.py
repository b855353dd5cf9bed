"""One row: what is wrong with its fields and texts, which pictures it uses, and what it may be a duplicate of."""

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from llmga.check.lengths import LengthCounter
from llmga.check.row_file import RowFile
from llmga.problem import Problem
from llmga.record_check import check_record
from llmga.records import Record
from llmga.tokens import IMAGE_TOKEN, TAG_LITERALS

_NOTE_CODES = {
    "picture without placeholder": "picture_without_placeholder",
    "picture ignored": "picture_not_used",
}
# Control characters, the replacement character, and UTF-8 that was once read as Latin-1 ("Ã©", "â€™").
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]|[ÃÂ][\u0080-\u00bf]|â€[\u0080-\u2122]")
_SCRIPTS = (
    ("latin", re.compile("[A-Za-z\u00c0-\u024f]")),
    ("chinese", re.compile("[\u4e00-\u9fff]")),
    ("japanese", re.compile("[\u3040-\u30ff]")),
    ("korean", re.compile("[\uac00-\ud7af]")),
    ("cyrillic", re.compile("[\u0400-\u04ff]")),
    ("arabic", re.compile("[\u0600-\u06ff]")),
    ("devanagari", re.compile("[\u0900-\u097f]")),
)


class Finding(NamedTuple):
    """One problem of one row."""

    row: int
    code: str
    detail: str


class Use(NamedTuple):
    """A picture or mask that a row names; `split` and `task` are the row's."""

    row: int
    role: str
    name: str
    split: str
    task: str


class Key(NamedTuple):
    """A 64-bit hash of something that should not occur twice: an id, a whole row, or its caption."""

    row: int
    kind: str
    key: int


@dataclass
class RowResults:
    """What was found in a range of rows."""

    findings: list[Finding] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, dict[int, int]] = field(default_factory=dict)


def joined(first: RowResults, second: RowResults) -> RowResults:
    """What was found in two ranges, as if they had been one."""
    lengths = {name: dict(counts) for name, counts in first.lengths.items()}
    for name, counts in second.lengths.items():
        of_name = lengths.setdefault(name, {})
        for length, count in counts.items():
            of_name[length] = of_name.get(length, 0) + count
    return RowResults(
        first.findings + second.findings,
        first.uses + second.uses,
        first.keys + second.keys,
        first.counts + second.counts,
        lengths,
    )


def check_rows(file: RowFile, start: int, stop: int, counter: LengthCounter) -> RowResults:
    """Check the rows [start, stop) of a file.

    Returns:
        Findings in order of rows; `counts` has "records", "task ...", "script ...", and "note ..." of the reader.
    """
    found = RowResults()
    for row in range(start, stop):
        notes: list[str] = []
        record = file.record(row, notes.append)
        if isinstance(record, Problem):
            found.findings.append(Finding(row, record.code, str(record)))
            continue
        found.counts["records"] += 1
        found.counts[f"task {record.task}"] += 1
        found.counts.update(f"note {note}" for note in notes)
        for note in notes:
            found.findings.append(Finding(row, _NOTE_CODES.get(note, "changed_by_reader"), note))
        problems = [*check_record(record), *text_problems(record)]
        problems += counter.count(record)
        found.findings += [Finding(row, problem.code, str(problem)) for problem in problems]
        found.uses += _uses(row, record, {problem.code for problem in problems})
        found.keys += _keys(row, record)
        found.counts[f"script {main_script(record)}"] += 1
    found.lengths = counter.taken()
    return found


def text_problems(record: Record) -> Iterator[Problem]:
    """What deserves a look in the texts of a record that can be trained on."""
    for name, text in texts_of(record):
        if odd := _ODD.search(text):
            yield Problem("odd_characters", f"{name} holds {odd[0]!r} at character {odd.start()}")
    for turn, message in enumerate(record.messages or ()):
        content = message["content"]
        if IMAGE_TOKEN in content:
            yield Problem("placeholder_in_text", f"messages[{turn}] holds {IMAGE_TOKEN!r}")
        if tag := next((tag for tag in TAG_LITERALS if tag in content), None):
            yield Problem("tag_in_conversation", f"messages[{turn}] holds {tag!r}")


def texts_of(record: Record) -> Iterator[tuple[str, str]]:
    """Every text of a record that people wrote, with the name of its field."""
    for name in ("short_caption", "caption", "instruction", "target_caption", "prompt"):
        if text := getattr(record, name):
            yield name, text
    for turn, message in enumerate(record.messages or ()):
        yield f"messages[{turn}]", message["content"]


def main_script(record: Record) -> str:
    """The script most letters of a record are written in; "none" without letters, "other" for scripts not listed."""
    text = " ".join(text for _, text in texts_of(record))
    if text.isascii():
        return "latin" if any(map(str.isalpha, text)) else "none"
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS}
    counts["other"] = sum(map(str.isalpha, text)) - sum(counts.values())
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] > 0 else "none"


def _uses(row: int, record: Record, codes: set[str]) -> Iterator[Use]:
    """Pictures to open; a path that is wrong by itself has been told already."""
    if record.task == "qa" or codes & {"picture_path", "picture_outside"}:
        return
    for role in ("image", "mask"):
        if name := getattr(record, role):
            yield Use(row, role, posixpath.normpath(name), record.split or "", record.task)


def _keys(row: int, record: Record) -> Iterator[Key]:
    """Hashes by which rows are compared; where a caption repeats with its picture, the row itself does."""
    yield Key(row, "id", _hash(record.id))
    texts = [text for _, text in texts_of(record)]
    yield Key(row, "row", _hash(record.task, record.image, record.mask, *texts))
    if record.task != "editing" and (caption := record.caption):
        yield Key(row, "text", _hash(record.task, caption))


def _hash(*parts: Any) -> int:
    digest = blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)  # SQLite's integers are signed


def merge_lengths(parts: Sequence[dict[str, dict[int, int]]]) -> dict[str, Counter[int]]:
    """Histograms of several ranges as one."""
    merged: dict[str, Counter[int]] = {}
    for part in parts:
        for name, histogram in part.items():
            counts = merged.setdefault(name, Counter())
            counts.update({int(length): count for length, count in histogram.items()})
    return merged
