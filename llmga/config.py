"""Typed settings: one YAML file, dotted overrides on top, and every mistake in one report.

A schema is a pydantic dataclass whose fields are values, sections (other such dataclasses) or lists of sections.
Nothing here imports torch, so a misspelt key costs a moment and not a minute. Relative paths count from the folder the
command is started in.
"""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic import Field as Limits
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from llmga.config_report import ConfigError, Key, Report, nearest_word, shown
from llmga.config_source import apply_overrides, read_yaml
from llmga.files import atomic_write, no_folder_to_write, no_such_file

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Schema = TypeVar("Schema")
AtLeastOne = Annotated[int, Limits(ge=1)]
NotNegative = Annotated[int, Limits(ge=0)]
Share = Annotated[float, Limits(ge=0, le=1)]


@plain_dataclass(frozen=True)
class Combination:
    """A check of several keys of a section against each other, or of one key against the disk.

    Attributes:
        keys: dotted names that the check reads; it is not asked while one of them has a mistake of its own.
        check: takes the section, returns one sentence when the keys do not fit together, else None.
        machine: the answer depends on this machine's files and packages, not on the settings alone.
    """

    keys: tuple[str, ...]
    check: Callable[[Any], str | None]
    machine: bool = False


def combination(*keys: str, machine: bool = False) -> Callable[[Callable[[Any], str | None]], Combination]:
    """Make a method of a section a `Combination`."""
    return lambda check: Combination(keys, check, machine)


@dataclass(config=STRICT)
class OptimConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Limits(gt=0)] = 2e-5
    weight_decay: Annotated[float, Limits(ge=0)] = 0.0
    betas: tuple[Annotated[float, Limits(ge=0, lt=1)], Annotated[float, Limits(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Limits(gt=0)] = 1e-8
    warmup: Annotated[float, Limits(ge=0)] = 0.03  # below 1: share of all steps; else a number of steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Annotated[float, Limits(ge=0)] = 1.0  # 0 does not clip

    @combination("warmup")
    def _warmup_is_share_or_count(self) -> str | None:
        if self.warmup > 1 and self.warmup != int(self.warmup):
            return f"found {self.warmup}, expected a share below 1 or a whole number of steps"
        return None


@dataclass(config=STRICT)
class RunConfig:
    """How long, how big, where to, and what is written on the way."""

    output_dir: Path  # the run folder; made if missing
    seed: Annotated[int, Limits(ge=0, lt=2**32)] = 0
    max_steps: AtLeastOne | None = None  # optimizer steps; max_steps or epochs decides the length
    epochs: Annotated[float, Limits(gt=0)] | None = None  # passes over the data; 1 when neither is given
    batch_size: AtLeastOne = 4  # examples per device and forward pass
    accumulation_steps: AtLeastOne = 1  # forward passes per optimizer step
    loss_average: Literal["token", "micro_batch"] = (
        "token"  # over a step's trained tokens, or of means per forward pass
    )
    precision: Literal["bf16", "fp32"] = "bf16"  # of the arithmetic; trained weights are kept in fp32
    gradient_checkpointing: bool = False  # less memory, about a third more time
    deepspeed: Path | None = None  # a DeepSpeed JSON file; "auto" values in it are filled from here
    num_workers: NotNegative = 2  # processes that load data, per device
    log_every_steps: AtLeastOne = 10
    save_every_steps: NotNegative = 500  # 0: at the end only
    keep_last: AtLeastOne = 2  # checkpoints kept
    eval_every_steps: NotNegative = 0  # held-out loss; 0: at the end only
    sample_every_steps: NotNegative = 0  # sample replies; 0: never
    resume: bool = True  # go on from the newest whole checkpoint in output_dir
    resume_anyway: bool = False  # also where data, mixture, seed or model are not those it was trained with
    trackers: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    record_sample_ids: bool = False  # write the sample ids of every step, to compare two runs
    compile: bool = False  # torch.compile
    threads: AtLeastOne | None = None  # CPU threads per process; None leaves torch's choice
    preflight: Literal["stop", "warn", "skip"] = "stop"  # what a fault that several processes find at the start does
    join_timeout_s: AtLeastOne = 300  # seconds that the processes wait for each other at the start

    def __post_init__(self) -> None:
        if self.max_steps is None and self.epochs is None:
            self.epochs = 1.0

    @combination("max_steps", "epochs")
    def _one_length(self) -> str | None:
        if self.max_steps is None or self.epochs is None:
            return None
        return f"found {self.max_steps} and {self.epochs}, expected one of the two; remove one, or set it to null"

    @combination("output_dir", machine=True)
    def _output_dir_can_be_written(self) -> str | None:
        return no_folder_to_write(self.output_dir)

    @combination("deepspeed", "precision", machine=True)
    def _deepspeed_file(self) -> str | None:
        return None if self.deepspeed is None else _deepspeed_complaint(self.deepspeed, self.precision)

    @combination("trackers", machine=True)
    def _trackers_installed(self) -> str | None:
        absent = [name for name in self.trackers if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} is not installed; pip install {' '.join(absent)}" if absent else None


def _deepspeed_complaint(path: Path, precision: str) -> str | None:
    if not path.is_file():
        return f"{no_such_file(path)}; configs/deepspeed/zero2.json and zero3.json come with the repository"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{path} is not JSON: {error}"
    if not isinstance(settings, dict):
        return f"{path} holds {shown(settings)}, expected a JSON object"
    for name, wanted in (("fp16", False), ("bf16", precision == "bf16")):
        section = settings.get(name, {})
        if not isinstance(section, dict):
            return f'{path} sets {name} to {shown(section)}, expected an object such as {{"enabled": "auto"}}'
        enabled = section.get("enabled", "auto")
        if enabled != "auto" and enabled != wanted:
            return f'{path} sets {name}.enabled to {shown(enabled)}, but precision is {precision}; write "auto" there'
    return None


def load_config(
    schema: type[Schema], path: Path | None, overrides: Sequence[str] = (), *, check_machine: bool = True
) -> Schema:
    """Read settings and check all of them.

    Args:
        schema: a dataclass made with `pydantic.dataclasses.dataclass(config=STRICT)`.
        path: YAML file with the keys that differ from the defaults, or None for overrides alone.
        overrides: `a.b=value`, the value read as YAML; list items by index (`data.sources.0.weight=2`).
        check_machine: also check what depends on this machine, such as files that must exist.
    Returns:
        An instance of the schema.
    Raises:
        ConfigError: with every mistake: its key and line, what was found and expected, and the key probably meant.
    """
    report = Report(str(path) if path else "settings", list(_known_keys(schema, ())))
    data, places = read_yaml(path, report) if path else ({}, {})
    report.places = places
    data = apply_overrides(data, overrides, places, report)
    config = _Reader(report, check_machine).section(schema, data, ())
    report.raise_if_any()
    return config


def load_config_or_exit(
    schema: type[Schema], path: Path | None, overrides: Sequence[str] = (), check_machine: bool = True
) -> Schema:
    """`load_config` for entry points: prints the report to stderr and exits with code 2 instead of raising."""
    try:
        return load_config(schema, path, overrides, check_machine=check_machine)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # a launcher starts several, and one report is enough
            sys.stderr.write(f"{error}\n")
        raise SystemExit(EXIT_BAD_INPUT) from None


def dump_config(config: Any) -> dict[str, Any]:
    """All settings, defaults included, as plain values that `load_config` reads back."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def each_setting(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dumped settings one by one, as (dotted key, value); items of lists by their number."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield key, value
        return
    for name, inner in pairs:
        yield from each_setting(inner, f"{key}.{name}" if key else str(name))


def paths_in(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """Every path in a configuration, with its dotted key."""
    if isinstance(value, Path):
        yield key, value
    elif is_dataclass(value):
        for item in fields(value):
            yield from paths_in(getattr(value, item.name), f"{key}.{item.name}" if key else item.name)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from paths_in(inner, f"{key}.{number}")


def save_config(config: Any, path: Path) -> None:
    """Write all settings as YAML, aside and then renamed."""
    atomic_write(path, yaml.safe_dump(dump_config(config), sort_keys=False, allow_unicode=True))


def _section_type(hint: Any) -> type | None:
    """The section that a field holds, itself or as `Section | None`."""
    if get_origin(hint) in (Union, UnionType):
        hint = next((arm for arm in get_args(hint) if arm is not NoneType), hint)
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def _item_type(hint: Any) -> type | None:
    """The section that a list field holds."""
    return _section_type(get_args(hint)[0]) if get_origin(hint) is list else None


def _known_keys(schema: type, at: Key) -> Iterator[Key]:
    """Every key of the schema, outermost first; list items as 0."""
    for name, hint in _hints(schema).items():
        key: Key = (*at, name)
        yield key
        if section := _section_type(hint):
            yield from _known_keys(section, key)
        elif item := _item_type(hint):
            yield from _known_keys(item, (*key, 0))


def _hints(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema, include_extras=True)
    return {item.name: hints[item.name] for item in fields(schema)}


@plain_dataclass(frozen=True)
class _Reader:
    """Walks the schema and the data side by side, so that one mistake hides no other."""

    report: Report
    check_machine: bool

    def section(self, schema: type, data: Any, at: Key) -> Any:
        """An instance of the schema; where the report has mistakes in it, an object with the sound keys only."""
        data = {} if data is None else data  # `optim:` with nothing under it
        partial: Any = object.__new__(schema)
        hints = _hints(schema)
        if not isinstance(data, dict):
            self.report.add(at, f"found {shown(data)}, expected a section with the keys {', '.join(hints)}")
            return partial
        for name in data:
            if name not in hints:
                meant = self.report.add_unknown((*at, name), data[name])
                if meant is not None and meant[:-1] == at and meant[-1] not in data:
                    self.report.bad_keys.append(meant)  # it is not missing, only misspelt
        values = partial.__dict__
        for item in fields(schema):
            given = data.get(item.name, MISSING)
            values[item.name] = self._value(item, hints[item.name], given, (*at, item.name))
        self._combinations(schema, partial, at)
        return schema(**values) if self.report.sound(at) else partial

    def _value(self, item: Field[Any], hint: Any, given: Any, key: Key) -> Any:
        section, item_section = _section_type(hint), _item_type(hint)
        optional = NoneType in get_args(hint)
        if section and not (optional and given in (None, MISSING)):
            return self.section(section, None if given is MISSING else given, key)
        if given is MISSING:
            return self._default(item, key)
        if item_section and isinstance(given, list):
            return [self.section(item_section, part, (*key, index)) for index, part in enumerate(given)]
        return self._leaf(hint, given, key)

    def _default(self, item: Field[Any], key: Key) -> Any:
        if item.default_factory is not MISSING:
            return item.default_factory()
        if item.default is MISSING and self.report.sound(key):
            self.report.add(key, "missing, and it has no default")
        return item.default

    def _leaf(self, hint: Any, given: Any, key: Key) -> Any:
        # Strict JSON is the mode that takes text for a path and a list for a tuple, but no text or bool for a number.
        try:
            return TypeAdapter(hint, config=STRICT).validate_json(json.dumps(given, default=str), strict=True)
        except ValidationError as error:
            for problem in error.errors():
                found = shown(problem["input"])
                self.report.add((*key, *problem["loc"]), f"found {found}, {_expected(problem)}")
        return MISSING

    def _combinations(self, schema: type, section: Any, at: Key) -> None:
        for asked in vars(schema).values():
            if not isinstance(asked, Combination) or (asked.machine and not self.check_machine):
                continue
            keys: list[Key] = [(*at, *key.split(".")) for key in asked.keys]
            if all(self.report.sound(key) for key in keys) and (complaint := asked.check(section)):
                self.report.add_combination(keys, complaint)


PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "a valid dictionary": "a section",
}


def _expected(problem: ErrorDetails) -> str:
    """What pydantic expected, in the words of a YAML file."""
    if problem["type"] == "missing":  # in a list of fixed length, such as betas
        return "expected one more item"
    message = problem["msg"].removeprefix("Input should be ")
    if message == problem["msg"]:
        return message[0].lower() + message[1:]
    choices = re.findall(r"'([^']*)'", problem.get("ctx", {}).get("expected", ""))
    return f"expected {PLAIN_WORDS.get(message, message)}{nearest_word(problem['input'], choices)}"
