"""A run told before it runs: `llmga plan CONFIG`, and `--dry-run` of the recipe."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from llmga.config import ConfigError, load_config
from llmga.stage1.config import Stage1Config
from llmga.stage1.plan.architecture import Architecture, UnknownArchitecture, read_architecture
from llmga.stage1.plan.disk import Disk, disk_use
from llmga.stage1.plan.examples import DataPlan, plan_data
from llmga.stage1.plan.memory import DeviceMemory, MemoryModel
from llmga.stage1.plan.rehearsal import BatchShape
from llmga.stage1.plan.speed import Speed, card_here, check_card, flops_per_token, speed_from_share, speed_of_run


@dataclass(frozen=True)
class Asked:
    """What a plan is asked beside the config.

    Attributes:
        devices: that share the work.
        card: a row of `speed.CARDS`; None for the one of this machine, if any.
        tokens_per_s: over all devices, where it is known.
        like: a former run of the same shape, whose throughput is taken.
        share_of_peak: 0 to 1, of the card's peak.
        examples: in the run, where its data are not here.
    """

    devices: int = 1
    card: str | None = None
    tokens_per_s: float | None = None
    like: Path | None = None
    share_of_peak: float | None = None
    examples: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run beforehand.

    Attributes:
        missing: what a run would stop at on this machine, and what could not be read for the plan.
        memory: at the longest batch seen, if any, and at the largest allowed; empty without an architecture.
        tokens_per_example: of the mixture; the limit where no example could be made.
        hours: None without throughput or length.
    """

    cfg: Stage1Config
    asked: Asked
    data: DataPlan
    architecture: Architecture | None
    model: MemoryModel | None
    memory: list[DeviceMemory]
    disk: Disk | None
    speed: Speed | None
    tokens_per_example: float
    hours: float | None
    missing: list[str] = field(default_factory=list)


def make_plan(path: Path, overrides: list[str], asked: Asked) -> Plan:
    """Plan a run as far as this machine can tell.

    Raises:
        ConfigError: mistakes in the settings themselves; what is merely not on this machine is a note of the plan.
        ValueError: data that are here and that training would stop at.
    """
    check_card(asked.card)
    asked = replace(asked, card=asked.card or card_here())
    cfg = load_config(Stage1Config, path, overrides, check_machine=False)
    missing = _missing(path, overrides)
    data = plan_data(cfg, asked.devices)
    missing += [note for note in data.notes if note.partition(" ")[0] not in " ".join(missing)]
    examples = data.examples if data.examples is not None else asked.examples
    tokens = data.tokens if data.tokens is not None else float(cfg.data.max_length)
    try:
        architecture = read_architecture(cfg.model)
    except UnknownArchitecture as unknown:
        missing.append(str(unknown))
        speed = _speed(cfg, asked, None, data, tokens)
        return Plan(cfg, asked, data, None, None, [], None, speed, tokens, _hours(speed, examples, tokens), missing)
    model = MemoryModel(cfg, architecture, asked.devices)
    speed = _speed(cfg, asked, model, data, tokens)
    return Plan(
        cfg,
        asked,
        data,
        architecture,
        model,
        _memory(model, data.longest, largest_allowed(cfg, model.num_image_tokens)),
        disk_use(cfg, model),
        speed,
        tokens,
        _hours(speed, examples, tokens),
        missing,
    )


def _missing(path: Path, overrides: list[str]) -> list[str]:
    """What a run would be refused for here although its settings are sound."""
    try:
        load_config(Stage1Config, path, overrides)
    except ConfigError as error:
        return list(error.mistakes)
    return []


def largest_allowed(cfg: Stage1Config, num_image_tokens: int) -> list[BatchShape]:
    """The largest batches that the settings allow: one with a picture in every example, and one of texts alone.

    Texts alone get the placeholders of a black picture on top, so that batch has more tokens and fewer pictures.

    Args:
        num_image_tokens: placeholders of a picture.
    """
    rows, length = cfg.run.batch_size, cfg.data.max_length
    if cfg.data.packing:
        limit = cfg.data.max_tokens or rows * length + num_image_tokens
        pictures, texts = min(rows * length, limit), min(rows * length + num_image_tokens, limit)
        return [
            BatchShape(1, pictures, rows, pictures, packed=rows),
            BatchShape(1, texts, 1, max(texts - num_image_tokens, 0), packed=rows + 1),
        ]
    return [
        BatchShape(rows, length, rows, rows * length),
        BatchShape(rows, length + num_image_tokens, 1, rows * length),
    ]


def _memory(model: MemoryModel, seen: BatchShape | None, allowed: list[BatchShape]) -> list[DeviceMemory]:
    """At the longest batch seen, if any and if it is another one, and at the one that needs most of those allowed."""
    largest = max(
        (model.at(shape) for shape in allowed),
        key=lambda memory: (memory.total, memory.batch.rows * memory.batch.tokens),
    )
    return [largest] if seen in (None, largest.batch) else [model.at(seen), largest]


def _speed(cfg: Stage1Config, asked: Asked, model: MemoryModel | None, data: DataPlan, tokens: float) -> Speed | None:
    """Given first, then measured, then a share of the peak of a card that is named or here."""
    if asked.tokens_per_s is not None:
        return Speed(asked.tokens_per_s, "given with --tokens-per-s")
    if asked.like is not None:
        return speed_of_run(asked.like, cfg, asked.devices)
    if asked.card is None or model is None:
        return None
    pictures = data.pictures if data.pictures is not None else 1.0
    share = 1.0 if data.trained is None or not data.tokens else data.trained / data.tokens
    flops = flops_per_token(cfg, model.architecture.config, model.counts, tokens, pictures, share)
    return speed_from_share(flops, asked.card, asked.devices, asked.share_of_peak)


def _hours(speed: Speed | None, examples: int | None, tokens: float) -> float | None:
    return None if speed is None or examples is None else examples * tokens / speed.tokens_per_s / 3600
