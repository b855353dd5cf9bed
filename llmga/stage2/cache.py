"""Latents made once, ahead of training: shards of rows, memory-mapped, checked before they are trained on.

    cache/cache.json                    what all entries were made with; another autoencoder or crop is another cache
    cache/source-0/shard-00000.safetensors  per size "HxW": moments (n, V, 2, C, h, w), time ids (n, V, 6)
    cache/source-0/shard-00000.json     for each row its picture, the state and hash of its bytes, and where it lies

V counts the crops of a picture, each as it is and, where pictures are mirrored, mirrored: crop k has the variants
(k, False) and (k, True). A shard is written aside and renamed, so that it is whole or absent; processes share shards
out by number and never talk to each other.
"""

import contextlib
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from llmga.checkpoint import sha256
from llmga.files import atomic_write
from llmga.images import PictureError, picture_path
from llmga.stage2.config import Stage2Config
from llmga.stage2.data import sizes_of
from llmga.stage2.pixels import Crop, Size
from llmga.stage2.sources import Source

logger = logging.getLogger(__name__)
FORMAT = 1
_THREADS = 16
_REBUILD = "run scripts/cache_stage2.py with the same settings to make them again"
Variant = tuple[int, bool]  # number of the crop, mirrored


class CacheError(ValueError):
    """A cache that does not fit the run, or entries in it that must not be trained on."""


@dataclass(frozen=True)
class BadShard:
    """A shard that has to be made again, and why."""

    number: int
    reason: str


def cache_facts(cfg: Stage2Config) -> dict[str, Any]:
    """What every entry of a cache depends on beside its picture."""
    return {
        "format": FORMAT,
        "vae": vae_hash(cfg.model.path),
        "sizes": [list(size) for size in sizes_of(cfg)],
        "crop": cfg.data.crop,
        "crops": cfg.cache.crops,
        "mirrored": cfg.data.flip_share > 0,
        "precision": cfg.cache.precision,
        "computed_in": cfg.run.precision,
        "rows_per_shard": cfg.cache.rows_per_shard,
    }


def vae_hash(pipeline: Path) -> str:
    """Of an autoencoder's weights and settings: 16 hexadecimal digits."""
    files = sorted(path for path in (pipeline / "vae").glob("*") if path.suffix in (".safetensors", ".bin", ".json"))
    if not files:
        raise CacheError(f"{pipeline} has no autoencoder in vae/; expected a pipeline saved by diffusers")
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()[:16]


def variants(cfg: Stage2Config) -> list[Variant]:
    """What is kept of each picture, in the order of the shards."""
    return [(k, flipped) for k in range(cfg.cache.crops) for flipped in (False, True)[: 1 + (cfg.data.flip_share > 0)]]


def variant_crop(cfg: Stage2Config, record_id: str, variant: Variant, size: Size) -> Crop:
    """The crop of a variant: the centre, or a place that follows from the row's id and the number of the crop."""
    number, flipped = variant
    if cfg.data.crop == "center":
        return Crop(size, flipped=flipped)
    vertical, horizontal = np.random.default_rng([zlib.crc32(record_id.encode()), number]).random(2)
    return Crop(size, (float(vertical), float(horizontal)), flipped)


class SourceCache:
    """The shards of one source: where they are, and which of them must be made.

    Args:
        number: of the source in `data.sources`.
    """

    def __init__(self, cfg: Stage2Config, source: Source, number: int, buckets: np.ndarray | None) -> None:
        assert cfg.cache.path is not None
        self.cfg, self.source, self.buckets = cfg, source, buckets
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
        return self.folder / f"shard-{shard:05d}.safetensors"

    def size_of(self, row: int) -> Size:
        """The rectangle that a row's picture is cut to."""
        return sizes_of(self.cfg)[0 if self.buckets is None else int(self.buckets[row])]

    def bad_shards(self, shards: Sequence[int] | None = None) -> Iterator[BadShard]:
        """Shards that are missing, damaged, or made from other pictures than lie there now."""
        with ThreadPoolExecutor(_THREADS) as pool:
            numbers = range(self.num_shards) if shards is None else shards
            for number, reason in zip(numbers, pool.map(self._fault, numbers), strict=True):
                if reason is not None:
                    yield BadShard(number, reason)

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
            if (reason := self._stale(row, entry)) is not None:
                return f"{path}: {reason}"
        return None

    def _stale(self, row: int, entry: dict[str, Any]) -> str | None:
        record = self.source[row]
        if entry["id"] != record.id or entry["image"] != record.image:
            return f"was made for {entry['image']} (id {entry['id']!r}), row {row} is now {record.image}"
        if list(self.size_of(row)) != entry["size"]:
            return f"{record.image} was cut to {entry['size']}, and is to be {list(self.size_of(row))}"
        try:
            path = picture_path(self.source.image_root, record.image or "")
            stat = path.stat()
        except (OSError, PictureError):
            return None if entry["problem"] else f"{record.image} is no longer there"
        if [stat.st_size, stat.st_mtime_ns] == entry["state"]:
            return None
        if not entry["problem"] and sha256(path) == entry["sha256"]:
            return None  # touched or copied, with the same content
        return f"{record.image} has changed since"


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


# ---------------------------------------------------------------- reading


class LatentCache:
    """The latents of one source, read by position from memory-mapped shards; pickles as paths."""

    def __init__(self, shards: SourceCache) -> None:
        self.shards = shards
        self.crops = shards.cfg.cache.crops
        self._place = {variant: number for number, variant in enumerate(variants(shards.cfg))}
        self._open: dict[int, tuple[Any, list[dict[str, Any]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, row: int, variant: Variant) -> tuple[np.ndarray, np.ndarray]:
        """(2, C, h, w) mean and standard deviation, and (6,) time ids, both float32.

        Raises:
            PictureError: the picture could not be read when the cache was made.
        """
        number, within = divmod(row, self.shards.rows_per_shard)
        if number not in self._open:
            path = self.shards.shard_path(number)
            entries = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
            self._open[number] = safe_open(path, framework="np"), entries
        file, entries = self._open[number]
        entry = entries[within]
        if entry["problem"]:
            raise PictureError(self.shards.source.image_root / (entry["image"] or ""), entry["problem"])
        name = f"{entry['size'][0]}x{entry['size'][1]}"
        place = self._place[variant]
        moments = file.get_slice(f"{name}.moments")[entry["place"], place]
        time_ids = file.get_slice(f"{name}.time_ids")[entry["place"], place]
        return moments.astype(np.float32), time_ids.astype(np.float32)

    def crop_of(self, row: int, variant: Variant, size: Size) -> Crop:
        """The crop whose latents `read` gives."""
        return variant_crop(self.shards.cfg, self.shards.source[row].id, variant, size)


def open_caches(
    cfg: Stage2Config, sources: Sequence[Source], buckets: Sequence[np.ndarray] | None, *, checked: bool = False
) -> list[LatentCache]:
    """The caches of a run, once it is known that they hold what the run expects.

    Args:
        checked: another process has looked already.
    Raises:
        CacheError: made with other settings or another autoencoder, or with missing, damaged or stale entries.
    """
    check_facts(cfg)
    opened = []
    for number, source in enumerate(sources):
        shards = SourceCache(cfg, source, number, None if buckets is None else buckets[number])
        if not checked and (bad := list(shards.bad_shards())):
            more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise CacheError(
                f"{cfg.cache.path}: {len(bad)} of {shards.num_shards} shards of {source.path} cannot be used "
                f"({bad[0].reason}{more}); {_REBUILD}"
            )
        opened.append(LatentCache(shards))
    return opened


def check_facts(cfg: Stage2Config) -> None:
    """Raise a CacheError when the cache was made with other settings than the run's."""
    assert cfg.cache.path is not None
    path = cfg.cache.path / "cache.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError(
            f"{cfg.cache.path} holds no cache; make it with scripts/cache_stage2.py, or leave cache.path away"
        ) from None
    except ValueError as error:
        raise CacheError(f"{path} is no JSON ({error}); {_REBUILD}") from None
    for key, wanted in cache_facts(cfg).items():
        if found.get(key) != wanted:
            raise CacheError(
                f"{cfg.cache.path} was made with {key} {found.get(key)!r:.60}, this run has {wanted!r:.60}; give "
                "another cache.path, set it as it was, or make the cache anew"
            )
