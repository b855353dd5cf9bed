"""What making a cache would do, without making it: which shards are whole, how many pictures, how many bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmga.recipe import plan_page
from llmga.records import RecordError
from llmga.runtime import Ranks
from llmga.stage2.cache import SourceCache, variants
from llmga.stage2.config import Stage2Config
from llmga.stage2.data import sizes_of
from llmga.stage2.make_cache import facts_of, shards_to_make, source_caches
from llmga.stage2.parts import PipelineError, read_part_config
from llmga.stage2.shards import CacheError
from llmga.stage2.sources import Stage2DataError

_VALUE_BYTES = {"fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class SourcePlan:
    """The shards of one kind of one source.

    Attributes:
        what: that they hold, pictures or prompts.
        rows: of the whole source; to_make: those in shards that are missing, damaged or stale.
    """

    path: str
    what: str
    shards: int
    rows: int
    shards_to_make: int
    to_make: int


@dataclass(frozen=True)
class CachePlan:
    """Everything that is told.

    Attributes:
        picture_bytes: of one picture in all its variants; None where the autoencoder is not on this machine.
        missing: what is not on this machine.
    """

    cfg: Stage2Config
    sources: Sequence[SourcePlan]
    picture_bytes: int | None
    missing: Sequence[str]


def plan_cache(cfg: Stage2Config, anew: bool = False) -> CachePlan:
    """Look at a cache as making it would; what is not on this machine is named in `missing`.

    Args:
        anew: a cache that was made with other settings would be forgotten.
    Raises:
        CacheError: `cache.path` is not set, or holds a cache of other settings.
    """
    if cfg.cache.path is None:
        raise CacheError("cache.path is not set; add it to the config, or as cache.path=FOLDER")
    missing: list[str] = []
    picture_bytes = _picture_bytes(cfg, missing)
    forgotten = _forgotten(cfg, anew) if picture_bytes is not None else set()
    return CachePlan(cfg, _sources(cfg, forgotten, missing), picture_bytes, missing)


def _forgotten(cfg: Stage2Config, anew: bool) -> set[str]:
    """Kinds of shards that were made with other settings."""
    kinds = set()
    for facts in facts_of(cfg):
        try:
            facts.fit()
        except CacheError:
            if not anew:
                raise
            kinds.add(facts.kind)
    return kinds


def _picture_bytes(cfg: Stage2Config, missing: list[str]) -> int | None:
    """Of mean and standard deviation in all variants, for the average size."""
    try:
        vae = read_part_config(cfg.model.path, "vae")
    except PipelineError as error:
        missing.append(str(error))
        return None
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    sizes = sizes_of(cfg)
    area = sum(height * width for height, width in sizes) / len(sizes) / factor**2
    return round(len(variants(cfg)) * 2 * vae["latent_channels"] * area * _VALUE_BYTES[cfg.cache.precision])


def _sources(cfg: Stage2Config, forgotten: set[str], missing: list[str]) -> list[SourcePlan]:
    try:
        caches = source_caches(cfg)
    except (RecordError, Stage2DataError, OSError) as error:
        missing.append(str(error))
        return []
    plans = []
    for cache in caches:
        stale = (number for _, number in shards_to_make([cache], Ranks()))
        shards = list(range(cache.num_shards) if cache.kind in forgotten else stale)
        to_make = sum(len(cache.rows(number)) for number in shards)
        path, rows = str(cache.source.path), len(cache.source)
        plans.append(SourcePlan(path, cache.what, cache.num_shards, rows, len(shards), to_make))
    return plans


def plan_text(plan: CachePlan) -> str:
    """A plan as text for a terminal."""
    cfg = plan.cfg
    sections = {
        "cache": [
            f"{cfg.cache.path}: {', '.join(f'{height} x {width}' for height, width in sizes_of(cfg))} px, "
            f"{len(variants(cfg))} variants of each picture, {cfg.cache.precision}",
            *(
                f"{source.shards_to_make:,} of {source.shards:,} shards are to be made: {source.to_make:,} of "
                f"{source.rows:,} {source.what} of {source.path}"
                for source in plan.sources
            ),
            *_disk(plan),
        ],
        "not on this machine": [f"- {note}" for note in plan.missing],
    }
    return plan_page(cfg, sections, "no shard was made")


def _disk(plan: CachePlan) -> list[str]:
    if plan.picture_bytes is None or not plan.sources:
        return []
    pictures = [source for source in plan.sources if source.what == SourceCache.what]
    made, whole = sum(source.to_make for source in pictures), sum(source.rows for source in pictures)
    return [
        f"{plan.picture_bytes / 1e3:,.1f} kB a picture: {made * plan.picture_bytes / 1e9:,.3f} GB to write, "
        f"{whole * plan.picture_bytes / 1e9:,.3f} GB in all"
    ]
