"""JSON as the standard has it: no NaN, no halves of surrogate pairs, UTF-8, one value per line; and settings files."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from llmga.files import HEAD_BYTES, no_such_file, what_it_is

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; write null or leave the value out")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def decode_line(line: bytes) -> object:
    """The JSON value of one line of UTF-8.

    Raises:
        ValueError: it is not valid JSON (`json.JSONDecodeError`) or UTF-8 (`UnicodeDecodeError`), or holds NaN,
            Infinity or half a surrogate pair.
        RecursionError: values are nested too deep.
    """
    value = DECODER.decode(line.decode().rstrip())
    if _SURROGATE.search(line):
        encode_line(value)
    return value


def encode_line(value: object) -> bytes:
    """One line of UTF-8 that holds a value, line break included.

    Raises:
        ValueError: the value is not JSON, or a text is not Unicode.
    """
    try:
        return _ENCODER.encode(value).encode() + b"\n"
    except UnicodeEncodeError as problem:
        half = problem.object[problem.start]
        raise ValueError(f"a text holds {half!r}, half of a surrogate pair, which is not a character") from None
    except (TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"a value is not JSON: {problem}") from None


def read_object(path: Path, error: type[ValueError], way_out: str) -> dict[str, Any]:
    """The JSON object in a file of settings, as other libraries write them: Infinity, which they write, is a number.

    Args:
        error: what is raised, with one sentence, for a file that is missing, damaged or something else.
        way_out: the end of that sentence.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise error(no_such_file(path)) from None
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); {way_out}") from None
    if found := what_it_is(content[:HEAD_BYTES]):
        raise error(f"{path} is {found}")
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read as JSON ({problem}); {way_out}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, expected an object; {way_out}")
    return value
