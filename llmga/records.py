"""The manifest: what one row means for every task; read and written here and nowhere else.

One row per example, as JSON Lines or Parquet. Readers of published formats (`llmga.published`) make such rows;
templates, tags and masks are applied when an example is loaded. What a task needs of a row: `llmga.record_check`.
"""

import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict, get_args, overload

from llmga import parquet_rows
from llmga.files import HEAD_BYTES, built_from, cache_folder, no_such_file, path_key, what_it_is, written_aside
from llmga.problem import Problem
from llmga.row_index import file_state, line_number, row_offsets
from llmga.strict_json import decode_line, encode_line

GenerationTask = Literal["prompt_refinement", "similar_image", "inpainting", "outpainting", "editing"]
Task = Literal[GenerationTask, "vqa", "qa"]
GENERATION_TASKS: tuple[GenerationTask, ...] = get_args(GenerationTask)
TASKS: tuple[Task, ...] = get_args(Task)
ROLES = ("user", "assistant")


class Message(TypedDict):
    """One turn of a conversation; a picture is put in front of the first turn when the example is loaded."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a manifest. Everything but `id` and `task` may be missing; `record_check` says what a task needs.

    Attributes:
        id: unique in its manifest.
        task: one of `TASKS`.
        image: path of the picture below the manifest's `image_root`, with forward slashes.
        mask: path of a mask below `image_root`; without one, masks are drawn when the example is loaded.
        short_caption: the few words that prompt refinement starts from.
        caption: the long description of the picture: what a generation prompt should say.
        instruction: the change that editing asks for.
        target_caption: the description of the edited picture.
        messages: the turns of a conversation, users and assistants in alternation.
        prompt: a generation prompt recorded from a trained model, for stage 2.
        source: the set the row comes from.
        licence: the licence of the picture or text.
        split: train, validation or test.
        meta: JSON values that are kept and never interpreted by training.
    """

    id: str
    task: str
    image: str | None = None
    mask: str | None = None
    short_caption: str | None = None
    caption: str | None = None
    instruction: str | None = None
    target_caption: str | None = None
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    source: str | None = None
    licence: str | None = None
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.messages, list):
            object.__setattr__(self, "messages", tuple(self.messages))


FIELDS = tuple(f.name for f in fields(Record))
TEXT_FIELDS = frozenset(FIELDS) - {"messages", "meta"}
_KNOWN = frozenset(FIELDS)


class RecordError(ValueError):
    """A manifest, or a row of one, that cannot be read or written; the message names file and line.

    Attributes:
        code: what kind of problem it is, as in the table of `llmga.check.kinds`.
    """

    def __init__(self, message: str, code: str = "unreadable_file") -> None:
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------- one row


def record_from_row(row: object) -> Record:
    """The record that a decoded row stands for.

    Raises:
        RecordError: the row is not an object, has an unknown field, lacks `id` or `task`, or a value has the wrong
            type. The message does not know the file; `Manifest` puts that in front.
    """
    if row.__class__ is not dict:
        raise RecordError(f"a row must be a JSON object, found {_kind(row)}", "wrong_type")
    assert isinstance(row, dict)
    if not row.keys() <= _KNOWN:
        unknown = next(name for name in row if name not in _KNOWN)
        close = get_close_matches(str(unknown), FIELDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(FIELDS)};"
        raise RecordError(
            f"unknown field {unknown!r}; {hint} what else belongs to the row goes into 'meta'", "unknown_field"
        )
    for name, value in row.items():
        if name in TEXT_FIELDS and value.__class__ is not str and value is not None:
            raise RecordError(f"field {name!r} must be text, found {_kind(value)}", "wrong_type")
    task = row.get("task")
    if task not in TASKS:
        close = get_close_matches(task or "", TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(TASKS)}"
        if task:
            raise RecordError(f"unknown task {task!r}; {hint}", "unknown_task")
        raise RecordError(f"field 'task' is missing; {hint}", "missing_field")
    if not row.get("id"):
        raise RecordError("field 'id' is missing or empty; give each row a text of its own", "missing_field")
    if (messages := row.get("messages")) is not None:
        _check_messages(messages)
    if (meta := row.get("meta", _NO_META)).__class__ is not dict:
        if meta is not None:
            raise RecordError(f"field 'meta' must be a JSON object, found {_kind(meta)}", "wrong_type")
        row = {**row, "meta": {}}
    return Record(**row)


_NO_META: dict[str, Any] = {}


def row_of(record: Record) -> dict[str, Any]:
    """The fields of a record that say something, as they are written; the reverse of `record_from_row`."""
    row = {name: value for name in FIELDS if (value := getattr(record, name)) is not None}
    if not row["meta"]:
        del row["meta"]
    return row


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list | tuple):
        raise RecordError(f"field 'messages' must be a list of turns, found {_kind(messages)}", "wrong_type")
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            found = f"the keys {sorted(map(str, message))}" if isinstance(message, dict) else _kind(message)
            raise RecordError(f"messages[{turn}] must hold exactly 'role' and 'content', found {found}", "wrong_type")
        if message["role"] not in ROLES:
            reason = f"messages[{turn}].role is {message['role']!r}, expected 'user' or 'assistant'"
            raise RecordError(reason, "broken_turns")
        if not isinstance(message["content"], str):
            reason = f"messages[{turn}].content must be text, found {_kind(message['content'])}"
            raise RecordError(reason, "wrong_type")


def _kind(value: object) -> str:
    """How JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


# ---------------------------------------------------------------- reading


class Manifest(Sequence[Record]):
    """The records of a manifest, each decoded when asked for.

    Row offsets are memory-mapped and rows are read by position: memory does not grow with what has been read, a file
    that is cut short beneath us is an error and not a crash, and forked DataLoader workers share one descriptor.
    Pickles as path and state; the worker opens it again and refuses when the file has changed in between.

    Attributes:
        path: the file that was opened.
        image_root: the folder that `image` and `mask` of its records count from.
        state: size and modification time of the file when it was opened.
    """

    __slots__ = ("_file", "_handle", "_length", "_offsets", "_rows_state", "image_root", "path", "state")

    def __init__(self, path: Path, image_root: Path, rows_path: Path) -> None:
        self.path = path
        self.image_root = image_root
        self.state = _state_of(path)
        self._file = open(rows_path, "rb", buffering=0)  # noqa: SIM115 (stays open as long as the manifest)
        self._handle = self._file.fileno()
        self._rows_state = file_state(self._handle)
        try:
            self._offsets = row_offsets(rows_path, self._handle)
        except ValueError as problem:
            raise RecordError(str(problem)) from None
        self._length = len(self._offsets) - 1

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        row = operator.index(index)
        if row < 0:
            row += self._length
        if not 0 <= row < self._length:
            raise IndexError(f"row {index} of {self.path}, which has {self._length} rows")
        start, end = self._offsets[row], self._offsets[row + 1]
        line = os.pread(self._handle, end - start, start)
        try:
            return record_from_row(decode_line(line))
        except (ValueError, RecursionError) as problem:
            self._explain(row, start, end, line, problem)

    def __reduce__(self) -> tuple[Callable[..., "Manifest"], tuple[Path, Path, tuple[int, int]]]:
        return _reopen, (self.path, self.image_root, self.state)

    def find_row(self, row: int) -> int | None:
        """The index of the record that row `row` of the file became; None where it became none."""
        return row if 0 <= row < self._length else None

    def where(self, index: int) -> str:
        """The place of a row for messages: `FILE:LINE`, or `FILE[ROW]` of a Parquet file."""
        return self._place(index)

    def _place(self, index: int) -> str:
        if self.path.suffix == ".parquet":
            return f"{self.path}[{index}]"
        return f"{self.path}:{line_number(self._handle, self._offsets[index])}"

    def _explain(self, row: int, start: int, end: int, line: bytes, problem: Exception) -> NoReturn:
        """Raise the error of one row with its place in the file."""
        if len(line) != end - start or file_state(self._handle) != self._rows_state:
            raise RecordError(f"{self.path} changed after it was opened; open it again") from None
        reason = row_problem(line, start, problem)
        raise RecordError(f"{self._place(row)}: {reason}", reason.code) from None


def row_problem(line: bytes, start: int, problem: Exception) -> Problem:
    """What `decode_line` or `record_from_row` found wrong with the line that starts at byte `start` of a file."""
    if isinstance(problem, json.JSONDecodeError):
        near = problem.doc[max(0, problem.pos - 20) : problem.pos + 20].strip()
        reason = f"not valid JSON at column {problem.colno} ({problem.msg}), near {near!r}"
        return Problem("not_json", f"{reason}; expected one complete JSON object per line")
    if isinstance(problem, UnicodeDecodeError):
        reason = f"byte 0x{line[problem.start]:02x} at position {start + problem.start} of the file"
        return Problem("not_utf8", f"{reason} (column {problem.start + 1}) is not UTF-8; save the file as UTF-8")
    if isinstance(problem, RecursionError):
        return Problem("not_json", "values nested too deep to read")
    return Problem(getattr(problem, "code", "not_json"), str(problem))


def open_manifest(path: Path, image_root: Path | None = None) -> Manifest:
    """Open a manifest, JSON Lines or Parquet, for random access.

    JSON Lines is indexed once (`llmga.row_index`). Parquet, which is compressed in blocks, is unpacked once to JSON
    Lines beside it, or in the user's cache folder, so that there is one way to read and one set of errors.

    Args:
        path: the manifest.
        image_root: the folder its pictures count from; without one, the manifest's own folder.
    Raises:
        RecordError: the file or folder does not exist, or the file is something else than a manifest.
    """
    path = Path(path)
    check_image_root(path, image_root)
    root = path.parent if image_root is None else Path(image_root)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except PermissionError:
        raise RecordError(f"{path} cannot be read: permission denied") from None
    except OSError:
        raise RecordError(no_such_file(path)) from None
    if path.suffix == ".parquet":
        return Manifest(path, root, _unpacked(path))
    if found := what_it_is(head):
        raise RecordError(f"{path} is {found}; expected a manifest, one JSON object per line")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        raise RecordError(
            f"{path} is one JSON array, expected a manifest with one JSON object per line; if it is a published set, "
            "say so with its `format` (llmga_t2i, llmga_sg, llmga_inpainting, llmga_edit, llava, sharegpt), or turn "
            f"it into a manifest with: python data_tools/convert.py {path} --format FORMAT --out NEW.jsonl "
            "(format manifest for rows of ours)"
        )
    if start and not start.startswith(b"{"):
        raise RecordError(f"{path}:1 starts with {start[:12]!r}, expected a manifest with one JSON object per line")
    return Manifest(path, root, path)


def check_image_root(path: Path, image_root: Path | None) -> None:
    """Raise a RecordError when a picture folder is given that does not exist."""
    if image_root is not None and not Path(image_root).is_dir():
        raise RecordError(f"image_root {image_root} is not a folder; it is where the pictures of {path} count from")


def _reopen(path: Path, image_root: Path, state: tuple[int, int]) -> Manifest:
    """Unpickle a manifest: the same file, in the same state."""
    check_unchanged(path, state)
    return open_manifest(path, image_root)


def check_unchanged(path: Path, state: tuple[int, int]) -> None:
    """Raise a RecordError unless a file still has this size and modification time."""
    if not path.is_file() or _state_of(path) != state:
        raise RecordError(f"{path} changed after it was opened; start again so that all processes read the same rows")


def _state_of(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _unpacked(path: Path) -> Path:
    """The JSON Lines copy of a Parquet manifest, written now where there is none of its present state."""
    key = path_key(path, *_state_of(path))
    homes = (path.with_name(f".{path.name}.{key}.jsonl"), cache_folder("manifests") / f"{path.stem}-{key}.jsonl")

    def unpack(home: Path) -> None:
        with written_aside(home) as aside, open(aside, "wb") as file:
            for index, row in enumerate(parquet_rows.read(path, FIELDS)):
                try:
                    file.write(encode_line(row_of(record_from_row(row))))
                except ValueError as problem:
                    raise RecordError(f"{path}[{index}]: {problem}") from None

    try:
        return built_from(path, homes, unpack)
    except parquet_rows.ParquetError as problem:
        raise RecordError(str(problem)) from None


# ---------------------------------------------------------------- writing


def write_manifest(path: Path, records: Iterable[Record]) -> int:
    """Write records as JSON Lines (`.jsonl`) or Parquet (`.parquet`), aside and then renamed.

    Args:
        path: the file; its folder is made.
        records: any number of them; they are not held in memory.
    Returns:
        The number of rows written.
    Raises:
        RecordError: another suffix, or a record that could not be read back; nothing is left behind.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise RecordError(f"a manifest ends in .jsonl or .parquet, found {path.name!r}")
    with written_aside(path) as aside:
        if path.suffix == ".parquet":
            return parquet_rows.write(aside, (row for row, _ in _checked_rows(path, records)))
        count = 0
        with open(aside, "wb") as file:
            for _, line in _checked_rows(path, records):
                file.write(line)
                count += 1
        return count


def _checked_rows(path: Path, records: Iterable[Record]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each record as a row and as a line, once it is known to read back."""
    for index, record in enumerate(records):
        row = row_of(record)
        try:
            record_from_row(row)
            yield row, encode_line(row)
        except ValueError as problem:
            raise RecordError(f"record {index} (id {record.id!r}) for {path}: {problem}") from None
