"""One result is one document: a system measured on a set, every number with its interval, and the whole protocol.

Sections are JSON objects. `data` says which pictures and texts were asked for, `protocol` how they were measured,
`generation` how they were made, `system` who made them. Two documents compare where the first two are equal, and of
the third all but what is being compared.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, each_setting
from llmga.config_report import shown
from llmga.environment import commit
from llmga.files import atomic_write, no_such_file
from llmga.machine import machine_in_words
from llmga.metrics.intervals import Interval

SCHEMA_VERSION = 1
FILE = "result.json"
_NAMED = 4  # differences in one message
_LIBRARIES = ("torch", "torchvision", "transformers", "diffusers", "open_clip_torch", "numpy", "pillow")


class ResultError(ValueError):
    """A document that cannot be read, or two that do not compare."""


@dataclass(config=STRICT)
class Metric:
    """One number.

    Attributes:
        ci_low, ci_high: ends of its 95 % interval, where it has one.
        ci_method: how they were found; for numbers without, what they need instead.
        n: independent units behind it.
        higher_is_better: None where neither is.
    """

    name: str
    value: float
    n: int
    unit: str = ""
    higher_is_better: bool | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    ci_method: str | None = None


@dataclass(config=STRICT)
class Preset:
    """Which settings were used, and a sentence for each thing that the paper leaves open and they had to fill in."""

    name: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(config=STRICT)
class Result:
    """One system on one set; sections as above.

    Attributes:
        name: of the system and the condition, such as "tuned-refined".
        task: what was measured, such as "text_to_image".
        per_item: file beside the document with the numbers of every picture.
        warnings: what a reader has to know before quoting a number.
    """

    name: str
    task: str
    system: dict[str, Any]
    data: dict[str, Any]
    generation: dict[str, Any]
    protocol: dict[str, Any]
    metrics: list[Metric]
    per_item: str | None = None
    warnings: list[str] = field(default_factory=list)
    preset: Preset = field(default_factory=Preset)
    schema_version: int = SCHEMA_VERSION
    created: str = ""
    code: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, if it was measured."""
        return next((metric for metric in self.metrics if metric.name == name), None)


def with_interval(name: str, found: Interval, unit: str = "", higher_is_better: bool | None = None) -> Metric:
    """A measured interval as a metric."""
    return Metric(name, found.value, found.n, unit, higher_is_better, found.low, found.high, found.method)


def origin() -> dict[str, Any]:
    """When, by what and on what a document is made: the fields of that kind of `Result` and of comparisons."""
    made_by, changed = ((commit() or "") + "+").split("+")[:2]
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": {"commit": made_by or None, "dirty": bool(changed)},
        "environment": {"machine": machine_in_words(*_LIBRARIES)},
    }


def write_document(path: Path, document: Any) -> None:
    """Write a `Result`, or another document made of pydantic dataclasses, aside and then renamed.

    Raises:
        ResultError: a section holds what JSON does not, NaN among it.
    """
    adapter = TypeAdapter(type(document))
    try:
        checked = adapter.validate_python(adapter.dump_python(document))
        text = adapter.dump_json(checked, indent=1).decode()
    except ValueError as error:
        raise ResultError(f"{path} cannot be written: {error}") from error
    atomic_write(path, text + "\n")


def read_result(path: Path) -> Result:
    """Read a document.

    Raises:
        ResultError: no such file, not JSON, fields that are unknown or missing, or another version of the format.
    """
    return read_document(path, Result)


def read_document(path: Path, schema: type[Any]) -> Any:
    """Read a document of any schema; errors as `read_result`."""
    try:
        found = TypeAdapter(schema).validate_json(path.read_bytes(), strict=True)
    except OSError:
        raise ResultError(no_such_file(path)) from None
    except ValidationError as error:
        said = [f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in error.errors()]
        more = f", and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
        raise ResultError(
            f"{path} is no document of this version ({'; '.join(said[:_NAMED])}{more}); measure again, or use the "
            "code that wrote it"
        ) from None
    if found.schema_version != SCHEMA_VERSION:
        raise ResultError(
            f"{path} has schema_version {found.schema_version}, expected {SCHEMA_VERSION}; measure again, or use the "
            "code that wrote it"
        )
    return found


def require_comparable(a: Result, b: Result, varied: Sequence[str] = ()) -> None:
    """Refuse two results of which something else differs than what is compared.

    How pictures were made is compared where both say it: of folders from elsewhere it may not be known.

    Args:
        varied: keys of `generation` that the comparison is about, such as "prompts".
    Raises:
        ResultError: it names the fields that differ, with both values.
    """
    found = list(_differences(a, b, varied))
    if found:
        more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ResultError(
            f"{a.name} and {b.name} do not compare: {', '.join(found[:_NAMED])}{more}; measure both alike"
        )


def _differences(a: Result, b: Result, varied: Sequence[str]) -> Iterator[str]:
    left_out = {f"generation.{key}" for key in varied}
    sections = ("task", "data", "protocol", *(("generation",) if a.generation and b.generation else ()))
    for section in sections:
        first, second = (_flat(getattr(result, section), section) for result in (a, b))
        for key in dict.fromkeys((*first, *second)):
            if first.get(key) != second.get(key) and ".".join(key.split(".")[:2]) not in left_out:
                yield f"{key} is {shown(first.get(key))} and {shown(second.get(key))}"


def _flat(value: Any, key: str) -> Mapping[str, Any]:
    return dict(each_setting(value, key))
