"""Make or mend the cache of a config: any number of processes, each its own shards; killed ones lose one shard."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmga.checkpoint import sha256
from llmga.files import atomic_write
from llmga.images import PictureError, open_picture, picture_path
from llmga.memory import explaining_memory
from llmga.progress import RunProgress
from llmga.runtime import Interrupted, Ranks, StopSignal
from llmga.stage2.buckets import bucket_table
from llmga.stage2.cache import SourceCache, cache_facts, variant_crop, variants
from llmga.stage2.config import Stage2Config
from llmga.stage2.data import sizes_of
from llmga.stage2.parts import Parts, load_parts
from llmga.stage2.pixels import crop_picture, to_unit_range
from llmga.stage2.shards import CacheError, Shards, check_facts_of
from llmga.stage2.sources import open_sources
from llmga.stage2.text_cache import TextShards, text_facts, write_text_shard

logger = logging.getLogger(__name__)
Cuts = list[tuple[np.ndarray, np.ndarray]]  # a picture in every variant, each with its time ids
_AT_ONCE = 32  # pictures that are decoded and encoded together
_DTYPES = {"fp16": np.float16, "fp32": np.float32}


def make_cache(cfg: Stage2Config, ranks: Ranks, anew: bool = False) -> Path:
    """Make what is missing, damaged or stale in the cache of a config, this process's share of it.

    Args:
        ranks: shards are shared out by their number; processes do not wait for each other.
        anew: forget a cache that was made with other settings.
    Raises:
        CacheError: `cache.path` is not set, or holds a cache of other settings.
        Interrupted: stopped by a signal; whole shards stay.
    """
    if cfg.cache.path is None:
        raise CacheError("cache.path is not set; add it to the config, or as cache.path=FOLDER")
    cfg.cache.path.mkdir(parents=True, exist_ok=True)
    for facts in facts_of(cfg):
        facts.write(anew)
    shards = source_caches(cfg)
    todo = list(shards_to_make(shards, ranks))
    total = sum(len(cache.rows(number)) for cache, number in todo)
    whole = sum(cache.num_shards for cache in shards)
    logger.info("%d of %d shards are to be made here: %d rows", len(todo), whole, total)
    if not todo:
        return cfg.cache.path
    signals = StopSignal()
    try:
        with explaining_memory(cfg.run), RunProgress(total, shown=ranks.is_main) as progress:
            parts = load_parts(cfg, _device(ranks))
            _make(cfg, parts, todo, progress, total, signals)
    finally:
        signals.close()
    return cfg.cache.path


def source_caches(cfg: Stage2Config) -> list[Shards]:
    """The shards that a config's sources need, made or not: latents, and where they are asked for texts."""
    sizes = sizes_of(cfg)
    sources = open_sources(cfg.data.sources, "data.sources")
    latents = [
        SourceCache(cfg, source, number, bucket_table(source, sizes) if cfg.data.aspect_buckets else None)
        for number, source in enumerate(sources)
    ]
    texts = [TextShards(cfg, source, number) for number, source in enumerate(sources) if cfg.cache.text]
    return [*latents, *texts]


def shards_to_make(caches: Sequence[Shards], ranks: Ranks) -> Iterator[tuple[Shards, int]]:
    """Shards that are missing, damaged or stale, of those that fall to this process."""
    for cache in caches:
        mine = range(ranks.rank, cache.num_shards, ranks.world_size)
        for bad in cache.bad_shards(mine):
            if "missing" not in bad.reason:
                logger.warning("%s; it is made again", bad.reason)
            yield cache, bad.number


def _make(
    cfg: Stage2Config,
    parts: Parts,
    todo: list[tuple[Shards, int]],
    progress: RunProgress,
    total: int,
    signals: StopSignal,
) -> None:
    done, begin = 0, time.perf_counter()
    for cache, number in todo:
        write_shard(cfg, parts, cache, number)
        done += len(cache.rows(number))
        speed = done / (time.perf_counter() - begin)
        progress.advance(done)
        progress.report(done, {"samples_per_s": round(speed, 2), "eta_s": (total - done) / speed})
        if signals.received and done < total:
            raise Interrupted(
                f"stopped by {signals.received}; {done} of {total} rows are kept, and the same command goes on"
            )


def write_shard(cfg: Stage2Config, parts: Parts, shards: Shards, number: int) -> None:
    """Encode the rows of a shard and write it."""
    if isinstance(shards, TextShards):
        write_text_shard(cfg, parts.encoder, shards, number)
        return
    assert isinstance(shards, SourceCache)
    kept: dict[str, dict[str, list[np.ndarray]]] = {}
    entries: list[dict[str, Any]] = []
    rows = shards.rows(number)
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(rows), _AT_ONCE):
            loaded = list(pool.map(partial(_load, cfg, shards), rows[start : start + _AT_ONCE]))
            _encode(parts, cfg, loaded, kept)
            entries += [entry for entry, _ in loaded]
    tensors = {
        f"{name}.{key}": np.ascontiguousarray(np.stack(values))
        for name, by_key in kept.items()
        for key, values in by_key.items()
    }
    shards.write(number, tensors, entries)


def _load(cfg: Stage2Config, cache: SourceCache, row: int) -> tuple[dict[str, Any], Cuts]:
    """A row's entry, and its picture in every variant with its time ids; none when it cannot be read."""
    record, size = cache.source[row], cache.size_of(row)
    entry: dict[str, Any] = {"id": record.id, "image": record.image, "size": list(size), "problem": None}
    try:
        path = picture_path(cache.source.image_root, record.image or "")
        stat = path.stat() if path.exists() else None
        entry["state"] = [stat.st_size, stat.st_mtime_ns] if stat else None
        picture = open_picture(path)
        entry["sha256"] = sha256(path)
    except PictureError as error:
        return entry | {"problem": error.reason, "state": entry.get("state"), "sha256": None}, []
    return entry, [crop_picture(picture, variant_crop(cfg, record.id, variant, size)) for variant in variants(cfg)]


def _encode(
    parts: Parts,
    cfg: Stage2Config,
    loaded: list[tuple[dict[str, Any], Cuts]],
    kept: dict[str, dict[str, list[np.ndarray]]],
) -> None:
    """Encode the pictures of some rows, those of a size together, and append them to what is kept."""
    by_size: dict[str, list[tuple[dict[str, Any], Cuts]]] = {}
    for entry, cuts in loaded:
        if cuts:
            by_size.setdefault(f"{entry['size'][0]}x{entry['size'][1]}", []).append((entry, cuts))
    for name, group in by_size.items():
        pixels = np.stack([to_unit_range(cut) for _, cuts in group for cut, _ in cuts])
        device = parts.pipeline.vae.device
        mean, std = parts.encode_pixels(torch.from_numpy(pixels).to(device))
        moments = torch.stack([mean, std], dim=1).cpu().numpy().astype(_DTYPES[cfg.cache.precision])
        if not np.isfinite(moments).all():
            raise CacheError(
                "the autoencoder gave values that are not finite; set run.precision=fp32 or cache.precision=fp32"
            )
        count = len(group[0][1])
        store = kept.setdefault(name, {"moments": [], "time_ids": []})
        for place, (entry, cuts) in enumerate(group):
            entry["place"] = len(store["moments"])
            store["moments"].append(moments[place * count : (place + 1) * count])
            store["time_ids"].append(np.stack([time_ids for _, time_ids in cuts]))


@dataclass(frozen=True)
class Facts:
    """What shards of one kind are made with.

    Attributes:
        file: where it is written down.
        made_with: the settings' answer.
        kind: of the shards' files.
    """

    file: Path
    made_with: dict[str, Any]
    kind: str

    def fit(self) -> None:
        """Raise a CacheError where the file is there and says otherwise."""
        if self.file.is_file():
            check_facts_of(self.file, self.made_with)

    def write(self, anew: bool) -> None:
        """Write them down, or find that they are the same.

        Args:
            anew: forget the shards that were made with others, instead of raising.
        """
        try:
            self.fit()
        except CacheError:
            if not anew:
                raise
        else:
            if self.file.is_file():
                return  # made, perhaps a moment ago by a process beside this one, with these settings
        for shard in self.file.parent.glob(f"source-*/{self.kind}-*"):
            shard.unlink(missing_ok=True)
        atomic_write(self.file, json.dumps(self.made_with, indent=1))


def facts_of(cfg: Stage2Config) -> list[Facts]:
    """Of everything that a config caches."""
    assert cfg.cache.path is not None
    latents = Facts(cfg.cache.path / "cache.json", cache_facts(cfg), SourceCache.kind)
    if not cfg.cache.text:
        return [latents]
    return [latents, Facts(cfg.cache.path / "text.json", text_facts(cfg), TextShards.kind)]


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
