"""JSON as the standard has it: no NaN, no halves of surrogate pairs, UTF-8, one value per line."""

import json
import re
from typing import NoReturn

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
