"""Readers of published formats: LLMGA-datasetv2, LLaVA and ShareGPT-style JSON become manifest records.

A row that cannot train is skipped and named with its reason, never silently; what a reader changes in the others is
counted. The published code trains editing without its picture and cuts the last character off each instruction;
neither happens here: the picture is put in when the example is loaded, and only a trailing comma goes.
"""

import json
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmga.files import atomic_write, built_from, cache_folder, no_such_file, path_key
from llmga.json_stream import stream_rows
from llmga.published_rows import FORMATS, Note, SkipRow, guess_formats
from llmga.records import (
    Manifest,
    Record,
    check_image_root,
    check_unchanged,
    open_manifest,
    record_from_row,
    write_manifest,
)

log = logging.getLogger(__name__)

_VERSION = 2  # raise it when a reader gives other records, so that cached manifests are made again
_LOGGED_ROWS = 20
_PATIENCE_ROWS = 1000  # after so many rows without one good one the format is taken to be wrong


class PublishedError(ValueError):
    """A published file that cannot be read in the format it is said to have."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was skipped: `json.load(file)[row]`, which starts at byte `offset`."""

    row: int
    offset: int
    reason: str


@dataclass
class Report:
    """What became of a published file.

    Attributes:
        rows: rows met, good and bad.
        records: rows that became records.
        bad: the others, each with its reason.
        notes: how often a reader changed or noticed something in a good row.
    """

    path: Path
    format: str
    rows: int = 0
    records: int = 0
    bad: list[BadRow] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line: rows, records, and the skipped ones."""
        return (
            f"{self.path} as {self.format}: {self.records} of {self.rows} rows became records, {len(self.bad)} skipped"
        )

    def name_bad(self) -> Iterator[str]:
        """Each skipped row as one line: `FILE[ROW]: reason`."""
        return (f"{self.path}[{bad.row}]: {bad.reason}" for bad in self.bad)

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        stored = {**vars(self), "path": str(self.path), "bad": [asdict(row) for row in self.bad]}
        atomic_write(path, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read what `save` wrote."""
        stored = json.loads(path.read_text("utf-8"))
        bad = [BadRow(**row) for row in stored.pop("bad")]
        return cls(**{**stored, "path": Path(stored["path"]), "bad": bad, "notes": Counter(stored["notes"])})


def read_published(path: Path, format: str, report: Report | None = None) -> Iterator[Record]:
    """The records of a published file, in order; memory does not grow with the file.

    Args:
        path: one JSON array, or JSON Lines.
        format: one of `FORMATS`.
        report: filled while the records are drawn; without one, skipped rows are logged.
    Raises:
        PublishedError: unknown format, or no row of the file has it.
        StreamError: the file is missing, not JSON, not UTF-8 or cut short.
    """
    if format not in FORMATS:
        close = get_close_matches(str(format), FORMATS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(FORMATS)}"
        raise PublishedError(f"unknown format {format!r} for {path}; {hint}")
    return _read(Path(path), format, report)


def _read(path: Path, format: str, given: Report | None) -> Iterator[Record]:
    report = given or Report(path, format)
    first: object = None
    for row, offset, value in stream_rows(path):
        first = value if report.rows == 0 else first
        report.rows += 1
        notes: list[str] = []
        try:
            record = record_of(format, row, value, notes.append)
        except SkipRow as skip:
            report.bad.append(BadRow(row, offset, str(skip)))
            if given is None and len(report.bad) <= _LOGGED_ROWS:
                log.warning("%s[%d] skipped: %s", path, row, skip)
            if report.rows == _PATIENCE_ROWS and not report.records:
                raise _wrong_format(report, first) from None
            continue
        report.records += 1
        report.notes.update(notes)
        yield record
    if report.rows and not report.records:
        raise _wrong_format(report, first)
    if given is None and report.bad:
        log.warning("%s", report.summary())


def convert_published(path: Path, format: str, out: Path) -> Report:
    """Turn a published file into a manifest (`.jsonl` or `.parquet`); returns what became of its rows.

    Raises:
        PublishedError, StreamError: as `read_published`; `out` is then as it was.
    """
    report = Report(Path(path), format)
    write_manifest(out, read_published(path, format, report))
    return report


def manifest_of(
    path: Path, format: str = "manifest", cache_dir: Path | None = None, image_root: Path | None = None
) -> Manifest:
    """Open a manifest, or convert a published file once and open the result.

    The result is cached under the file's path, size, modification time and format, with its report beside it
    (`.report.json`). Any number of processes may ask for it at once.

    Args:
        path: the file.
        format: "manifest" or one of `FORMATS`.
        cache_dir: where converted manifests lie; without one, in the user's cache folder.
        image_root: the folder pictures count from; without one, the folder of `path`.
    Raises:
        RecordError, PublishedError, StreamError: the file cannot be read as what it is said to be.
    """
    path = Path(path)
    if format == "manifest":
        return open_manifest(path, image_root)
    if not path.is_file():
        raise PublishedError(no_such_file(path))
    check_image_root(path, image_root)
    stat = path.stat()
    name = f"{format}-{path.stem}-{path_key(path, stat.st_size, stat.st_mtime_ns, format, _VERSION)}"
    folder = cache_folder("manifests") if cache_dir is None else Path(cache_dir)
    manifest_path, report_path = folder / f"{name}.jsonl", folder / f"{name}.report.json"

    def build(report_path: Path) -> None:  # the report is written last: where it is, the manifest is whole
        convert_published(path, format, manifest_path).save(report_path)

    built_from(path, [report_path], build)
    report = Report.load(report_path)
    if report.bad:
        log.warning("%s (each named in %s)", report.summary(), report_path)
    return PublishedManifest(path, manifest_path, path.parent if image_root is None else Path(image_root))


class PublishedManifest(Manifest):
    """A manifest made from a published file, which names rows by their place in that file.

    Attributes:
        origin: the published file.
    """

    __slots__ = ("origin",)

    def __init__(self, origin: Path, path: Path, image_root: Path) -> None:
        super().__init__(path, image_root, path)
        self.origin = origin

    def where(self, index: int) -> str:
        """The place of a row for messages: `FILE[ROW]` of the published file."""
        return f"{self.origin}[{self._origin_row(index)}]"

    def find_row(self, row: int) -> int | None:
        """The index of the record that row `row` of the published file became; None where the reader skipped it."""
        index = bisect_left(range(len(self)), row, key=self._origin_row)  # rows keep their order
        return index if index < len(self) and self._origin_row(index) == row else None

    def _origin_row(self, index: int) -> int:
        return int(self[index].id.rsplit("-", 1)[1])

    def __reduce__(self) -> tuple[Callable[..., Manifest], tuple[Any, ...]]:
        return _reopen, (self.origin, self.path, self.image_root, self.state)


def _reopen(origin: Path, path: Path, image_root: Path, state: tuple[int, int]) -> PublishedManifest:
    """Unpickle a manifest: the same file, in the same state."""
    check_unchanged(path, state)
    return PublishedManifest(origin, path, image_root)


def _wrong_format(report: Report, first: object) -> PublishedError:
    """The error of a file without a good row, with the format its first row seems to have."""
    bad = report.bad[0]
    others = [name for name in guess_formats(first) if name != report.format] if isinstance(first, dict) else []
    hint = f"; it looks like format {' or '.join(map(repr, others))}" if others else ""
    return PublishedError(
        f"none of the first {report.rows} rows of {report.path} can be read as {report.format!r} "
        f"([{bad.row}]: {bad.reason}){hint}"
    )


def record_of(format: str, row: int, value: object, note: Note) -> Record:
    """The record that row `row` of a published file stands for.

    It gets an id of its own (published ones repeat), its source, and where it came from.

    Args:
        format: one of `FORMATS`.
        value: the decoded row.
        note: is told what is changed or noticed in a good row.
    Raises:
        SkipRow: the row cannot become a record.
    """
    if not isinstance(value, dict):
        raise SkipRow(f"a row must be an object, found {type(value).__name__}", "wrong_type")
    found = FORMATS[format](value, note)
    folder = (found.get("image") or "").split("/")[0] if "/" in (found.get("image") or "") else ""
    meta = {"id": value["id"]} if isinstance(value.get("id"), str | int) else {}
    source = f"{format}/{folder}" if folder else format
    return record_from_row({"id": f"{format}-{row:07d}", "source": source, "split": "train", "meta": meta, **found})
