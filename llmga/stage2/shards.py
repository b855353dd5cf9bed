"""Shards of a cache on the disk: rows of tensors with an index beside them, whole or absent, checked before use.

    shard-00000.safetensors  tensors of the rows
    shard-00000.json         {"file": {"bytes": ..., "sha256": ...}, "rows": [what each row was made from, ...]}
    shard-00000.checked      a stamp: these bytes were read and found right

A shard is written aside and renamed. Processes share shards out by number and never talk to each other.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from llmga.checkpoint import sha256
from llmga.files import atomic_write, written_aside
from llmga.stage2.config import Stage2Config
from llmga.stage2.sources import Source

REBUILD = "run scripts/cache_stage2.py with the same settings to make them again"
_THREADS = 16


class CacheError(ValueError):
    """A cache that does not fit the run, or entries in it that must not be trained on."""


@dataclass(frozen=True)
class BadShard:
    """A shard that has to be made again, and why."""

    number: int
    reason: str


class Shards:
    """The shards of one kind of one source: where they are, and which of them must be made.

    Args:
        number: of the source in `data.sources`.
    """

    kind: str  # how the files are called
    what: str  # that the rows hold, in words

    def __init__(self, cfg: Stage2Config, source: Source, number: int) -> None:
        assert cfg.cache.path is not None
        self.cfg, self.source = cfg, source
        self.folder = cfg.cache.path / f"source-{number}"
        self.rows_per_shard = cfg.cache.rows_per_shard

    @property
    def num_shards(self) -> int:
        """As many as the rows need."""
        return -(-len(self.source) // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """The source's rows in a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, len(self.source)))

    def shard_path(self, shard: int) -> Path:
        """The tensors of a shard; its index has the suffix .json."""
        return self.folder / f"{self.kind}-{shard:05d}.safetensors"

    def bad_shards(self, shards: Sequence[int] | None = None) -> Iterator[BadShard]:
        """Shards that are missing, damaged, or made from other rows than stand there now."""
        with ThreadPoolExecutor(_THREADS) as pool:
            numbers = range(self.num_shards) if shards is None else shards
            for number, reason in zip(numbers, pool.map(self._fault, numbers), strict=True):
                if reason is not None:
                    yield BadShard(number, reason)

    def refuse_bad(self) -> None:
        """Raise a CacheError that names a shard which cannot be used, if there is one."""
        if bad := list(self.bad_shards()):
            more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise CacheError(
                f"{self.folder.parent}: {len(bad)} of {self.num_shards} shards of {self.source.path} cannot be used "
                f"({bad[0].reason}{more}); {REBUILD}"
            )

    def _fault(self, shard: int) -> str | None:
        """What is wrong with a shard, or None."""
        path = self.shard_path(shard)
        if not path.is_file() or not path.with_suffix(".json").is_file():
            return f"{path} is missing"
        try:
            index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            entries, facts = index["rows"], index["file"]
        except (ValueError, KeyError, TypeError):
            return f"{path.with_suffix('.json')} cannot be read"
        if path.stat().st_size != facts["bytes"] or not _bytes_are(path, facts["sha256"]):
            return f"{path} is damaged: its bytes are not those that were written"
        rows = self.rows(shard)
        if len(entries) != len(rows):
            return f"{path} holds {len(entries)} rows, {len(rows)} are expected"
        for row, entry in zip(rows, entries, strict=True):
            if (reason := self.stale(row, entry)) is not None:
                return f"{path}: {reason}"
        return None

    def stale(self, row: int, entry: dict[str, Any]) -> str | None:
        """Why a row's entry is not what would be made of it now, or None."""
        raise NotImplementedError

    def write(self, shard: int, tensors: Mapping[str, np.ndarray], entries: Sequence[dict[str, Any]]) -> None:
        """Write a shard with its index."""
        path = self.shard_path(shard)
        # safetensors writes memory as it lies, and an autoencoder's output may lie with its channels last.
        assert all(tensor.flags.c_contiguous for tensor in tensors.values())
        path.with_suffix(".json").unlink(missing_ok=True)  # an index never stands beside another shard's tensors
        with written_aside(path) as aside:
            save_file(dict(tensors), aside)
            aside.chmod(0o644)
            facts = {"bytes": aside.stat().st_size, "sha256": sha256(aside)}
        atomic_write(path.with_suffix(".json"), json.dumps({"file": facts, "rows": list(entries)}, ensure_ascii=False))


class ShardReader:
    """Opens shards as rows are asked for, memory-mapped; pickles as paths."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self._open: dict[int, tuple[Any, list[dict[str, Any]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def entry(self, row: int) -> tuple[Any, dict[str, Any]]:
        """The tensors of a row's shard, and the row's line of the index."""
        number, within = divmod(row, self.shards.rows_per_shard)
        if number not in self._open:
            path = self.shards.shard_path(number)
            entries = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
            self._open[number] = safe_open(path, framework="np"), entries
        file, entries = self._open[number]
        return file, entries[within]


def _bytes_are(path: Path, expected: str) -> bool:
    """Whether a shard's bytes have a hash; a stamp beside it saves reading it again while nothing touches it."""
    stat = path.stat()
    stamp, state = path.with_suffix(".checked"), f"{expected} {stat.st_size} {stat.st_mtime_ns}"
    try:
        if stamp.read_text() == state:
            return True
    except OSError:
        pass
    if sha256(path) != expected:
        return False
    with contextlib.suppress(OSError):  # a cache on a read-only disk is read each time
        atomic_write(stamp, state)
    return True


# ---------------------------------------------------------------- what a cache was made with


def check_facts_of(path: Path, wanted: Mapping[str, Any]) -> None:
    """Compare what a cache's file says that it was made with, and what a run would make it with.

    Raises:
        CacheError: there is no such file, or the two differ; the first difference is named.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        holds = "no cache" if path.stem == "cache" else "no hidden states of prompts"
        other = "leave cache.path away" if path.stem == "cache" else "set cache.text=false"
        raise CacheError(f"{path.parent} holds {holds}; make it with scripts/cache_stage2.py, or {other}") from None
    except ValueError as error:
        raise CacheError(f"{path} is no JSON ({error}); {REBUILD}") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise CacheError(
                f"{path.parent} was made with {key} {found.get(key)!r:.60}, this run has {value!r:.60}; give "
                "another cache.path, set it as it was, or make the cache anew"
            )


def hash_of(files: Iterable[Path]) -> str:
    """Of the bytes of files, whatever they are called: 16 hexadecimal digits."""
    return hashlib.sha256("".join(sha256(path) for path in sorted(files)).encode()).hexdigest()[:16]
