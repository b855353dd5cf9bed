"""Where settings come from: a YAML file that remembers its lines, and dotted overrides from the command line.

A file may begin where another one ends: `base: shared/llmga.yaml`, counted from its own folder, gives what the file
itself does not say. Sections are merged key by key, lists and values replaced whole. One level: a base has no base.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llmga.config_report import ConfigError, Key, Report, dotted, shown
from llmga.files import no_such_file

COMMAND_LINE = "command line"
BASE = "base"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `2e-5` and `1e5` are numbers and a date stays text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - this is PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _exponent_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    number = float(node.value)
    whole = "." not in node.value and "-" not in node.value[1:] and number.is_integer()
    return int(number) if whole else number  # so that max_steps=1e5 is a count


_Loader.add_implicit_resolver("!exponent", re.compile(rf"^(?:{_EXPONENT.pattern})$"), list("-+0123456789."))
_Loader.add_constructor("!exponent", _exponent_number)


def read_yaml(path: Path, report: Report) -> tuple[Any, dict[Key, str]]:
    """Read a file, and the one it names as its base.

    Returns:
        Their content, and for every key the line it stands on, with the file's name where that is the base. Keys that
        are given twice, and a base that cannot be one, are added to the report.
    Raises:
        ConfigError: there is no such file, it is not text, or it is not YAML (with the line).
    """
    data, places = _read_one(path, report)
    if not isinstance(data, dict) or BASE not in data:
        return data, places
    name = data.pop(BASE)
    report.places = places
    base = path.parent / name if isinstance(name, str) else None
    if base is None or not base.is_file():
        found = f"found {shown(name)}, expected a YAML file" if base is None else no_such_file(base)
        report.add((BASE,), f"{found}; it counts from {path.parent}")
        return data, places
    given, base_places = _read_one(base, report)
    if not isinstance(given, dict) or BASE in given:
        what = "has a base of its own" if isinstance(given, dict) else f"holds {shown(given)}, expected sections"
        report.add((BASE,), f"{base} {what}; one file may build on one other")
        return data, places
    kept = {
        key: f"{place} of {base}"
        for key, place in base_places.items()
        if all(part not in places or _both_sections(given, data, part) for part in _outwards(key))
    }
    places.update({key: place for key, place in kept.items() if key not in places})
    return _merged(given, data), places


def _outwards(key: Key) -> list[Key]:
    """The key and every section or list it is in."""
    return [key[:length] for length in range(1, len(key) + 1)]


def _both_sections(one: Any, other: Any, key: Key) -> bool:
    """Whether a key holds a section in both."""
    for part in key:
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return False
        one, other = one.get(part), other.get(part)
    return isinstance(one, dict) and isinstance(other, dict)


def _merged(base: dict[Any, Any], top: dict[Any, Any]) -> dict[Any, Any]:
    """The base with everything of the top in it."""
    merged = dict(base)
    for name, value in top.items():
        below = base.get(name)
        merged[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _read_one(path: Path, report: Report) -> tuple[Any, dict[Key, str]]:
    """One file as it stands."""
    if not path.is_file():
        raise ConfigError(str(path), [no_such_file(path)])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read as UTF-8 text: {error}"]) from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        places: dict[Key, str] = {}
        if node is None:
            return {}, places
        _note_places(node, (), places, report)
        return yaml.load(text, Loader=_Loader), places  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [_yaml_complaint(error)]) from error


def _yaml_complaint(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}not YAML: {getattr(error, 'problem', None) or error}"


def _note_places(node: yaml.Node, at: Key, places: dict[Key, str], report: Report) -> None:
    """Note the line of every key below the node, and report keys given twice (YAML itself keeps the last)."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*at, index)] = _line(item)
            _note_places(item, (*at, index), places, report)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = (*at, name.value)
            if key in places:
                report.add(key, f"given twice, on {places[key]} and {_line(name)}; keep one")
            places[key] = _line(name)
            _note_places(value, key, places, report)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def apply_overrides(data: Any, overrides: Sequence[str], places: dict[Key, str], report: Report) -> Any:
    """Set each `a.b=value` in the data that a file gave; the value is read as YAML.

    List items are named by their index. What cannot be set is added to the report.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        key = tuple(int(part) if part.isdecimal() else part for part in name.strip().split("."))
        if not equals or "" in key:
            report.add((override,), "an override is written key=value, such as optim.lr=1e-5")
            continue
        try:
            value = yaml.load(text, Loader=_Loader)  # a SafeLoader
        except yaml.YAMLError as error:
            report.add(key, f"{COMMAND_LINE}: {_yaml_complaint(error)}")
            continue
        places[key] = COMMAND_LINE
        data = _with_value(data, key, value, (), report)
    return data


def _with_value(data: Any, key: Key, value: Any, at: Key, report: Report) -> Any:
    """The data with the value at the key; sections on the way that are absent or empty are made."""
    if not key:
        return value
    part, rest = key[0], key[1:]
    if isinstance(data, list):
        if not isinstance(part, int) or part >= len(data):
            report.add((*at, *key), f"{dotted(at)} is a list of {len(data)}; name an item by its index, from 0")
            return data
        return [
            _with_value(item, rest, value, (*at, part), report) if index == part else item
            for index, item in enumerate(data)
        ]
    if data is None:
        data = {}
    if not isinstance(data, dict):
        report.add((*at, *key), f"{dotted(at)} is {shown(data)} and has no parts")
        return data
    return {**data, part: _with_value(data.get(part), rest, value, (*at, part), report)}
