"""What a run draws from its data: steps, examples and tokens per source, the longest batch, the first one in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmga.mixture import Mixture, rows_per_epoch
from llmga.stage1.config import SourceConfig, Stage1Config
from llmga.stage1.data import Stage1Dataset, build_datasets
from llmga.stage1.feed import make_feed
from llmga.stage1.plan.rehearsal import BatchShape
from llmga.stage1.preview import Chip, token_chips
from llmga.stage1.sources import Source
from llmga.stage1.start import load_start_processor
from llmga.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class SourcePlan:
    """What one source gives to the run.

    Attributes:
        rows: in it; None when it could not be read.
        share: of the weights; None while another source's rows are unknown.
        draws: examples in the run.
        epochs: how often each row comes.
        looked_at: examples that the following figures are means of; 0 when none could be made.
        tokens, trained: per example, picture placeholders included.
    """

    name: str
    rows: int | None
    share: float | None = None
    draws: int | None = None
    epochs: float | None = None
    looked_at: int = 0
    tokens: float = 0.0
    trained: float = 0.0


@dataclass(frozen=True)
class DataPlan:
    """What is known of a run's data on this machine.

    Attributes:
        sources: in the order of the config.
        examples: in the whole run; None when rows are unknown and epochs decide.
        steps: of the optimizer.
        epochs: passes over all sources that are drawn from.
        tokens, trained: per example of the mixture, None when no example could be made.
        pictures: per example.
        longest: micro-batch among those looked at.
        first: the first micro-batch of the first device, each example as readable tokens.
        looked_at: examples.
        left_out: of them, for want of room in packed rows.
        notes: what could not be read.
    """

    sources: list[SourcePlan]
    examples: int | None = None
    steps: int | None = None
    epochs: float | None = None
    tokens: float | None = None
    trained: float | None = None
    pictures: float | None = None
    longest: BatchShape | None = None
    first: list[list[Chip]] = field(default_factory=list)
    looked_at: int = 0
    left_out: int = 0
    notes: list[str] = field(default_factory=list)


def plan_data(cfg: Stage1Config, devices: int, num_looked: int = 64) -> DataPlan:
    """Read what is here of a run's data, and make its first examples where tokenizer and data are.

    Args:
        devices: that take a micro-batch each.
        num_looked: examples made, at least one micro-batch for each device.
    Raises:
        ValueError: data that are here and that training would stop at.
    """
    per_step = cfg.run.batch_size * cfg.run.accumulation_steps * devices
    opened, notes = _open(cfg.data.sources)
    if any(source is None for source in opened):
        plans = [
            SourcePlan(source.name or source.path.stem, None if found is None else len(found))
            for source, found in zip(cfg.data.sources, opened, strict=True)
        ]
        steps = cfg.run.max_steps
        return DataPlan(plans, steps and steps * per_step, steps, notes=notes)
    sources = [source for source in opened if source is not None]
    rows = rows_per_epoch([len(source) for source in sources], [source.weight for source in sources])
    steps = cfg.run.max_steps or math.ceil(math.ceil((cfg.run.epochs or 1.0) * rows) / per_step)
    total = steps * per_step
    folders = [folder for folder in (cfg.model.path, cfg.model.llm, cfg.model.vision_tower) if folder is not None]
    absent = [str(folder) for folder in folders if not (folder / "config.json").is_file()]
    if absent:
        notes.append(f"{' and '.join(absent)}: no tokenizer or picture processor here, so no example can be made")
        order = Mixture([len(s) for s in sources], [s.weight for s in sources], total, cfg.run.seed)
        plans = [
            SourcePlan(source.name, share.rows, share.weight, share.draws, share.epochs)
            for source, share in zip(sources, order.summary(), strict=True)
        ]
        return DataPlan(plans, total, steps, total / rows, notes=notes)
    data = build_datasets(cfg, load_start_processor(cfg.model), total)[0]
    num_looked = min(max(num_looked, cfg.run.batch_size * devices), total)
    return _look_at(cfg, data, num_looked, per_step, DataPlan([], total, steps, total / rows, notes=notes))


def _open(configs: Sequence[SourceConfig]) -> tuple[list[Source | None], list[str]]:
    """Each source, None where its file is not here; and a note for each of those."""
    opened: list[Source | None] = []
    notes = []
    for config in configs:
        if config.path.is_file():
            opened.append(Source(config))
        else:
            opened.append(None)
            notes.append(f"{config.path} is not here: its rows are unknown")
    return opened, notes


def _look_at(cfg: Stage1Config, data: Stage1Dataset, count: int, per_step: int, known: DataPlan) -> DataPlan:
    """Make the first examples, and batches of them as the run would."""
    assert isinstance(data.order, Mixture)
    feed, size = make_feed(cfg, data, per_step), cfg.run.batch_size
    longest: BatchShape | None = None
    first: list[list[Chip]] = []
    lengths: list[tuple[int, int, int, int]] = []  # source, tokens, trained, pictures
    left_out = 0
    for begin in range(0, count, size):
        drawn = [feed.data[index] for index in range(begin, min(begin + size, count))]
        examples = feed.choose(drawn)
        left_out += len(drawn) - len(examples)
        for example in examples:
            tokens, untrained = len(example["labels"]), example["labels"].count(IGNORE_INDEX)
            has_picture = example["pixel_values"] is not None
            lengths.append((data.order[example["sample_id"]][0], tokens, tokens - untrained, int(has_picture)))
        batch = feed.collate(examples)
        trained = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        packed = len(batch["cu_seq_lens_q"]) - 1 if cfg.data.packing else 0
        rows, tokens = batch["input_ids"].shape
        shape = BatchShape(rows, tokens, len(batch["pixel_values"]), trained, packed)
        if len(drawn) == size and (longest is None or shape.rows * shape.tokens > longest.rows * longest.tokens):
            longest = shape
        if begin == 0:
            first = [_chips(data, example) for example in examples]
    return DataPlan(
        sources=[
            SourcePlan(share.name, share.rows, share.weight, share.draws, share.epochs, *_means(lengths, number))
            for number, share in enumerate(data.order.summary())
        ],
        examples=known.examples,
        steps=known.steps,
        epochs=known.epochs,
        tokens=sum(one[1] for one in lengths) / len(lengths),
        trained=sum(one[2] for one in lengths) / len(lengths),
        pictures=sum(one[3] for one in lengths) / len(lengths),
        longest=longest,
        first=first,
        looked_at=len(lengths) + left_out,
        left_out=left_out,
        notes=known.notes,
    )


def _means(lengths: Sequence[tuple[int, int, int, int]], source: int) -> tuple[int, float, float]:
    """(examples looked at, tokens, trained tokens) of one source."""
    own = [one for one in lengths if one[0] == source]
    return len(own), sum(one[1] for one in own) / max(len(own), 1), sum(one[2] for one in own) / max(len(own), 1)


def _chips(data: Stage1Dataset, example: dict[str, Any]) -> list[Chip]:
    image_token_id = data.tokenizer.convert_tokens_to_ids(data.image_token)
    return token_chips(data.tokenizer, example["input_ids"], example["labels"], image_token_id)
