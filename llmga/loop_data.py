"""Where the shared loop's batches come from: loading workers, and one batch ahead of the step that needs it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.utils.data import DataLoader

from llmga.config import RunConfig
from llmga.runtime import Ranks, outlive_terminate

Batch = dict[str, Any]


def batches_of(
    examples: Sequence[Batch],
    collate: Callable[[list[Batch]], Batch],
    run: RunConfig,
    ranks: Ranks,
    passes: range,
    pinned: bool,
) -> Iterator[Batch]:
    """This process's batches.

    Args:
        examples: those of the whole run, of all processes.
        passes: numbers of the forward passes that want a batch.
        pinned: keep batches where a GPU can copy them from while it computes.
    """
    workers = run.num_workers
    loader = DataLoader(
        examples,
        batch_sampler=_Positions(run.batch_size, ranks, passes),
        collate_fn=_Collate(collate),
        num_workers=workers,
        pin_memory=pinned,
        prefetch_factor=4 if workers else None,
    )
    return _taken_ahead(iter(loader)) if workers else iter(loader)


def _taken_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, each taken from the loading workers while the step before is made; a thread waits for it."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


class _Positions:
    """For each forward pass of this process, the positions of its examples in the run."""

    def __init__(self, batch_size: int, ranks: Ranks, passes: range) -> None:
        self.batch_size, self.ranks, self.passes = batch_size, ranks, passes

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.passes:
            start = (number * self.ranks.world_size + self.ranks.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


class _Collate:
    """A collator that works on in a loading worker while the process finishes its step after a signal."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        outlive_terminate()
        return self.collate(examples)
