"""Large JSON arrays read row by row, in memory that does not grow with the file."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from llmga.files import HEAD_BYTES, no_such_file, what_it_is
from llmga.strict_json import DECODER

_READ_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = codecs.BOM_UTF8
# An error this close to the end of what has been read may come from a value that goes on in what has not.
_NEAR_END = 64
_LONGEST_LITERAL = 12  # two escapes of a surrogate pair


class StreamError(ValueError):
    """A file that is not the JSON it should be; the message names the file, the row and the byte.

    Attributes:
        code: what kind of problem it is, as in the table of `llmga.check.kinds`.
    """

    def __init__(self, message: str, code: str = "unreadable_file") -> None:
        super().__init__(message)
        self.code = code


class StreamedRow(NamedTuple):
    """One value of an array: `json.load(file)[row]`, which starts at byte `offset` of the file."""

    row: int
    offset: int
    value: object


def stream_rows(path: Path, read_bytes: int = _READ_BYTES) -> Iterator[StreamedRow]:
    """The values of a JSON array, or of a file with one JSON value after another (JSON Lines), in order.

    Args:
        path: the file, UTF-8 with or without byte order mark.
        read_bytes: how much is read at a time; one value may be larger.
    Raises:
        StreamError: the file is missing, not UTF-8, not JSON, cut short, or goes on after its array.
    """
    path = Path(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except PermissionError:
        raise StreamError(f"{path} cannot be read: permission denied") from None
    except OSError:
        raise StreamError(no_such_file(path)) from None
    with file:
        if found := what_it_is(file.read(HEAD_BYTES)):
            raise StreamError(f"{path} is {found}; expected JSON text")
        file.seek(0)
        yield from _Reader(path, file, read_bytes).rows()


class _Reader:
    """A window of decoded text over a file, and where in the file it starts."""

    def __init__(self, path: Path, file: BinaryIO, read_bytes: int) -> None:
        self.path, self.file, self.read_bytes = path, file, read_bytes
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text = ""
        self.at = 0  # next character of `text`
        # The character `mark` of the text is the byte `mark_offset` of the file; it moves up with each row.
        self.mark, self.mark_offset = 0, len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(self.mark_offset)
        self.ended = False
        self.index = 0

    def rows(self) -> Iterator[StreamedRow]:
        """All values; see `stream_rows`."""
        first = self.peek()
        in_array = first == "["
        self.at += in_array
        if first not in ("[", "{"):
            self.fail("expected a JSON array of objects" + ("" if first else "; the file is empty"))
        while True:
            char = self.peek()
            if char == "]" and in_array and self.index == 0:
                break
            if not char and not in_array:
                return
            yield self.value()
            self.index += 1
            if in_array:
                char = self.peek()
                if char == "]":
                    break
                if char != ",":
                    if not char:
                        self.fail("the file ends inside the array", "cut_short")
                    self.fail("expected ',' or ']' after a row")
                self.at += 1
        self.at += 1
        if self.peek():
            self.fail("the file goes on after its array")

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.read_more(self.read_bytes)

    def value(self) -> StreamedRow:
        """Decode the value at the next character, reading on, twice as much each time, until it is whole."""
        wanted = self.read_bytes
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as problem:
                left = len(self.text[problem.pos :].strip())
                unfinished = problem.msg.startswith("Unterminated") or left < _NEAR_END
                if self.ended or not unfinished:
                    self.explain(problem)
            except (ValueError, RecursionError) as problem:
                self.fail(str(problem) if isinstance(problem, ValueError) else "values nested too deep to read")
            else:
                if end < len(self.text) or self.ended:  # a number at the very end of the text may go on
                    self.mark, self.mark_offset = self.at, self.offset(self.at)
                    self.at = end
                    return StreamedRow(self.index, self.mark_offset, value)
            self.read_more(wanted)
            wanted *= 2

    def read_more(self, num_bytes: int) -> None:
        """Drop what has been used and append the next bytes of the file."""
        self.mark, self.mark_offset = 0, self.offset(self.at)
        self.text, self.at = self.text[self.at :], 0
        block = self.file.read(num_bytes)
        self.ended = not block
        try:
            self.text += self.decode(block, final=self.ended)
        except UnicodeDecodeError as problem:
            position = self.file.tell() - len(problem.object) + problem.start
            raise StreamError(
                f"{self.path}[{self.index}] or soon after: byte 0x{problem.object[problem.start]:02x} at position "
                f"{position} is not UTF-8 ({problem.reason}); save the file as UTF-8",
                "not_utf8",
            ) from None

    def offset(self, at: int) -> int:
        """Byte of the file at which a character of the window starts."""
        passed = self.text[self.mark : at]
        return self.mark_offset + (len(passed) if passed.isascii() else len(passed.encode()))

    def explain(self, problem: json.JSONDecodeError) -> NoReturn:
        """Raise what keeps the value from being read: broken in the middle, or cut off at the end."""
        left = len(self.text[problem.pos :].strip())
        unfinished = problem.msg.startswith("Unterminated") or left < _LONGEST_LITERAL
        if self.ended and unfinished and (not left or not self.text.rstrip().endswith("]")):
            size = self.offset(len(self.text))
            self.fail(f"the file ends at byte {size} in the middle of this row; fetch it again", "cut_short")
        near = self.text[max(self.at, problem.pos - 20) : problem.pos + 20].strip()
        self.fail(f"not valid JSON at byte {self.offset(problem.pos)} ({problem.msg}), near {near!r}")

    def fail(self, reason: str, code: str = "not_json") -> NoReturn:
        """Raise an error at the row that is being read."""
        raise StreamError(f"{self.path}[{self.index}] (byte {self.offset(self.at)}): {reason}", code) from None
