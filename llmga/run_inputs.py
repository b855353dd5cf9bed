"""What a run is made from, and whether it still is: settings that decide the result, and the content of its files."""

from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmga.config import each_setting, paths_in

_DECISIVE = ("run.seed", "data.*", "model.*")
_MAY_CHANGE = (  # of those: other values compute the same, or something beside the training
    "data.validation*",
    "data.sources.*.name",
    "data.max_bad_share",
    "data.packing",
    "model.attention",
    "model.cross_entropy",
    "model.liger",
)
_WHOLE_BYTES = 1 << 30  # larger files are sampled: a shard of weights on a network disk takes a minute to read
_SAMPLE_BYTES = 1 << 20
_SAMPLES = 64
_SHOWN = 4  # differences named in one message
_BESIDE = ("provenance.json", "*.md", ".*")  # in a model folder, but no part of the model

Fingerprint = dict[str, Any]
Changes = dict[str, tuple[Any, Any]]


def fingerprints(config: Any) -> dict[str, Fingerprint]:
    """Size and hash of each file and model folder that a setting names which decides the result.

    Pictures are not looked at, nor folders of them: a data set of millions would take longer than the run's start may.

    Returns:
        dotted setting -> `path`, `bytes`, `sha256`. Of a file above 1 GiB the hash covers its size and 64 samples of
        1 MiB; of a model folder, its files without provenance and README.
    """
    found = {}
    for key, path in paths_in(config):
        if _decides(key) and (path.is_file() or _is_model(path)):
            with suppress(OSError):  # whoever reads it for the run says why it cannot be read
                found[key] = _fingerprint(path)
    return found


def other_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Settings that differ between two dumped configurations: dotted key to (then, now)."""
    then, present = dict(each_setting(before)), dict(each_setting(now))
    keys = dict.fromkeys((*then, *present))
    return {key: (then.get(key), present.get(key)) for key in keys if then.get(key) != present.get(key)}


def decisive_changes(
    settings: Changes,
    before: Mapping[str, Any],
    files_then: Mapping[str, Fingerprint],
    files_now: Mapping[str, Fingerprint],
) -> list[str]:
    """What makes a run another one, in words with both values.

    Args:
        settings: as `other_settings` gives them, of `before` and now. A path alone decides nothing when what it names
            is known then and now: data may move. A key that the folder's configuration does not know yet is new in
            this version, and does not count.
        before: the configuration that the folder holds.
        files_then, files_now: as `fingerprints` gives them.
    """
    known = dict(each_setting(before))
    sections = {key.rpartition(".")[0] for key in known}
    said = []
    for key, (then, now) in settings.items():
        section, _, name = key.rpartition(".")
        is_new = key not in known and section in sections and not name.isdecimal()
        if _decides(key) and not is_new and not (key in files_then and key in files_now):
            said.append(f"{key} was {_plain(then)} and is {_plain(now)} now")
    for key in files_then.keys() & files_now.keys():
        then, now = files_then[key], files_now[key]
        if (then["bytes"], then["sha256"]) != (now["bytes"], now["sha256"]):
            said.append(f"{key} was {_content(then)} and is {_content(now)} now")
    return sorted(said)


def in_one_clause(changes: list[str]) -> str:
    """The first few changes, and how many more there are."""
    more = len(changes) - _SHOWN
    return ", ".join(changes[:_SHOWN]) + (f", and {more} more" if more > 0 else "")


def _decides(key: str) -> bool:
    return any(fnmatch(key, pattern) for pattern in _DECISIVE) and not any(fnmatch(key, p) for p in _MAY_CHANGE)


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "model_index.json").is_file()


def _fingerprint(path: Path) -> Fingerprint:
    if path.is_file():
        return {"path": str(path), "bytes": path.stat().st_size, "sha256": _digest(path)}
    found = [*path.iterdir(), *path.glob("*/*")] if (path / "model_index.json").is_file() else path.iterdir()
    files = sorted(file for file in found if _is_content(file))
    parts = [(str(file.relative_to(path)), file.stat().st_size, _digest(file)) for file in files]
    return {
        "path": str(path),
        "bytes": sum(size for _, size, _ in parts),
        "sha256": sha256(repr(parts).encode()).hexdigest(),
    }


def _is_content(file: Path) -> bool:
    return file.is_file() and not any(fnmatch(file.name, pattern) for pattern in _BESIDE)


def _digest(file: Path) -> str:
    size = file.stat().st_size
    digest = sha256()
    with file.open("rb") as opened:
        if size <= _WHOLE_BYTES:
            while block := opened.read(_SAMPLE_BYTES):
                digest.update(block)
        else:
            digest.update(str(size).encode())
            for number in range(_SAMPLES):
                opened.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _content(found: Fingerprint) -> str:
    return f"{found['path']} ({found['bytes']:,} bytes, sha256 {found['sha256'][:12]})"


def _plain(value: Any) -> str:
    return "not set" if value is None else str(value)
