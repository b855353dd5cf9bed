"""The rows of any file, read by number and one by one, so that a bad row hides no other.

JSON Lines manifests are indexed as the loader indexes them. Of a published file the start of every row is noted once,
while it streams past. Parquet is unpacked once to JSON Lines, without the loader's demand that every row be good.
"""

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmga import parquet_rows
from llmga.check.sets import RowSet
from llmga.files import HEAD_BYTES, no_such_file, what_it_is, written_aside
from llmga.json_stream import StreamError, stream_rows
from llmga.problem import Problem
from llmga.published import record_of
from llmga.published_rows import Note, SkipRow
from llmga.records import FIELDS, Record, record_from_row, row_problem
from llmga.row_index import row_offsets
from llmga.strict_json import DECODER, decode_line, encode_line

_SCAN_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Where the rows of a set are.

    Attributes:
        rows_path: the file they are read from: the set's own, or the unpacked one.
        offsets_path: the stored starts of rows, rows + 1 unsigned 64-bit integers; None where `row_index` keeps them.
        fault: what ends the file before its end, if anything.
        unwritable: rows of a Parquet file that have no JSON, with the reason.
    """

    rows_path: Path
    offsets_path: Path | None
    rows: int
    fault: Problem | None = None
    unwritable: tuple[tuple[int, str], ...] = ()


def index_rows(source: RowSet, work: Path, number: int) -> RowIndex:
    """Find the rows of a set; what is stored for it goes to `work`, under the set's number."""
    if source.format == "manifest":
        return _unpack(source, work, number) if source.path.suffix == ".parquet" else _lines(source.path)
    starts, fault = array("Q"), None
    try:
        for row in stream_rows(source.path):
            starts.append(row.offset)
    except StreamError as problem:
        fault = Problem(problem.code, str(problem))
    if fault is None and source.format == "unknown":
        fault = Problem("unknown_format", f"{source.path} has the fields of no known format in its first row")
        del starts[:]
    rows = len(starts)
    starts.append(source.path.stat().st_size)
    offsets_path = work / f"offsets-{number}.bin"
    with written_aside(offsets_path) as aside:
        aside.write_bytes(starts.tobytes())
    return RowIndex(source.path, offsets_path, rows, fault)


def _lines(path: Path) -> RowIndex:
    """A JSON Lines manifest."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            if found := what_it_is(head):
                reason = f"{path} is {found}; expected a manifest, one JSON object per line"
                return RowIndex(path, None, 0, Problem("unreadable_file", reason))
            if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                reason = f"{path} is one JSON array, expected a manifest with one JSON object per line"
                return RowIndex(path, None, 0, Problem("not_json", f"{reason}; data_tools/convert.py makes one"))
            return RowIndex(path, None, len(row_offsets(path, file.fileno())) - 1)
    except PermissionError:
        return RowIndex(path, None, 0, Problem("unreadable_file", f"{path} cannot be read: permission denied"))
    except OSError:
        return RowIndex(path, None, 0, Problem("unreadable_file", no_such_file(path)))


def _unpack(source: RowSet, work: Path, number: int) -> RowIndex:
    """A Parquet manifest as JSON Lines, row by row; a row without JSON becomes `null` and is named."""
    rows_path, fault, count = work / f"rows-{number}.jsonl", None, 0
    unwritable: list[tuple[int, str]] = []
    with written_aside(rows_path) as aside, open(aside, "wb") as file:
        try:
            for row in parquet_rows.read(source.path, FIELDS):
                try:
                    file.write(encode_line(row))
                except ValueError as problem:
                    unwritable.append((count, str(problem)))
                    file.write(b"null\n")
                count += 1
        except parquet_rows.ParquetError as problem:
            fault = Problem("unknown_field" if "unknown column" in str(problem) else "unreadable_file", str(problem))
    return RowIndex(rows_path, None, count, fault, tuple(unwritable))


class RowFile:
    """Rows of an indexed set by number; opened anew in each process.

    Args:
        source: the set.
        index: as `index_rows` made it.
    """

    def __init__(self, source: RowSet, index: RowIndex) -> None:
        self.source, self.index = source, index
        self._unwritable = dict(index.unwritable)
        self._file = open(index.rows_path, "rb", buffering=0)  # noqa: SIM115 (stays open with the object)
        if index.offsets_path is None:
            self._offsets: memoryview | array[int] = row_offsets(index.rows_path, self._file.fileno())
        else:
            self._offsets = array("Q", index.offsets_path.read_bytes())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def record(self, row: int, note: Note) -> Record | Problem:
        """The record that the loader makes of a row, or what keeps it from making one.

        Args:
            note: is told what the reader of a published format changes.
        """
        if row in self._unwritable:
            return Problem("wrong_type", self._unwritable[row])
        start, end = self._offsets[row], self._offsets[row + 1]
        line = os.pread(self._file.fileno(), end - start, start)
        try:
            if self.source.format == "manifest":
                return record_from_row(decode_line(line))
            # Behind the value stands what separates it from the next one, so its own end is found by decoding.
            return record_of(self.source.format, row, DECODER.raw_decode(line.decode())[0], note)
        except SkipRow as skip:
            return Problem(skip.code, str(skip))
        except (ValueError, RecursionError) as problem:
            return row_problem(line, start, problem)

    def places(self, rows: Iterable[int]) -> Iterator[str]:
        """Where rows stand, for messages: `FILE:LINE`, or `FILE[ROW]` where rows are not lines; ascending rows."""
        path = self.source.path
        if self.source.format != "manifest" or path.suffix == ".parquet":
            yield from (f"{path}[{row}]" for row in rows)
            return
        line, done = 1, 0
        for row in rows:
            while done < (target := self._offsets[row]):  # one pass over the file for all of them
                block = os.pread(self._file.fileno(), min(_SCAN_BYTES, target - done), done)
                line += block.count(b"\n")
                done += len(block)
            yield f"{path}:{line}"
