"""Latents made once, ahead of training: shards of rows, memory-mapped, checked before they are trained on.

    cache/cache.json                    what all entries were made with; another autoencoder or crop is another cache
    cache/source-0/shard-00000.safetensors  per size "HxW": moments (n, V, 2, C, h, w), time ids (n, V, 6)
    cache/source-0/shard-00000.json     for each row its picture, the state and hash of its bytes, and where it lies

V counts the crops of a picture, each as it is and, where pictures are mirrored, mirrored: crop k has the variants
(k, False) and (k, True). Beside them may lie what the text encoders say of the prompts, see `text_cache`.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmga.checkpoint import sha256
from llmga.images import PictureError, picture_path
from llmga.stage2.config import Stage2Config
from llmga.stage2.data import sizes_of
from llmga.stage2.pixels import Crop, Size
from llmga.stage2.shards import CacheError, ShardReader, Shards, check_facts_of, hash_of
from llmga.stage2.sources import Source

FORMAT = 1
Variant = tuple[int, bool]  # number of the crop, mirrored


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
    return hash_of(files)


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


class SourceCache(Shards):
    """The latents of one source.

    Args:
        buckets: of each row, where pictures keep their shapes.
    """

    kind, what = "shard", "pictures"

    def __init__(self, cfg: Stage2Config, source: Source, number: int, buckets: np.ndarray | None) -> None:
        super().__init__(cfg, source, number)
        self.buckets = buckets

    def size_of(self, row: int) -> Size:
        """The rectangle that a row's picture is cut to."""
        return sizes_of(self.cfg)[0 if self.buckets is None else int(self.buckets[row])]

    def stale(self, row: int, entry: dict[str, Any]) -> str | None:
        """Whether a row names another picture or size, or its picture's bytes are others."""
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


# ---------------------------------------------------------------- reading


class LatentCache(ShardReader):
    """The latents of one source, read by position."""

    shards: SourceCache

    def __init__(self, shards: SourceCache) -> None:
        super().__init__(shards)
        self.crops = shards.cfg.cache.crops
        self._place = {variant: number for number, variant in enumerate(variants(shards.cfg))}

    def read(self, row: int, variant: Variant) -> tuple[np.ndarray, np.ndarray]:
        """(2, C, h, w) mean and standard deviation, and (6,) time ids, both float32.

        Raises:
            PictureError: the picture could not be read when the cache was made.
        """
        file, entry = self.entry(row)
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
        if not checked:
            shards.refuse_bad()
        opened.append(LatentCache(shards))
    return opened


def check_facts(cfg: Stage2Config) -> None:
    """Raise a CacheError when the cache was made with other settings than the run's."""
    assert cfg.cache.path is not None
    check_facts_of(cfg.cache.path / "cache.json", cache_facts(cfg))
