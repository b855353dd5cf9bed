"""What a run draws batches from, and what makes them: padded rows, or packed ones of balanced and bounded length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from llmga.stage1.balance import BalancedDataset
from llmga.stage1.config import Stage1Config
from llmga.stage1.data import Collator, Stage1Dataset
from llmga.stage1.packing import PackingCollator, RowLimit

Examples = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Feed:
    """How examples become the batches of a run.

    Attributes:
        data: examples in the order in which they are trained on.
        choose: those of a batch that its row has room for.
        collate: makes a batch of them.
    """

    data: Dataset[dict[str, Any]]
    choose: Callable[[Examples], Examples]
    collate: Callable[[Examples], dict[str, Any]]


def make_feed(cfg: Stage1Config, data: Stage1Dataset, examples_per_step: int) -> Feed:
    """The batches of a run.

    Args:
        data: as long as a whole number of steps.
        examples_per_step: over all forward passes and ranks.
    """
    padding = Collator.of(data)
    if not cfg.data.packing:
        return Feed(data, take_all, padding)
    balanced = BalancedDataset(data, cfg.run.batch_size, examples_per_step)
    choose = take_all if cfg.data.max_tokens is None else RowLimit(data, cfg.data.max_tokens)
    return Feed(balanced, choose, PackingCollator(padding))


def take_all(examples: Examples) -> Examples:
    """A batch as it comes."""
    return examples
