"""Measuring many pictures by many processes, resumable.

A cell is one system under one condition, such as "tuned-refined": pictures by id. A meter turns some of them into
columns of numbers. Rank r of n measures every n-th id and keeps what it found in a store; ranks are only numbers, and
whoever finds that nothing is missing any more writes the results.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmga.metrics.features import MetricError
from llmga.metrics.item_store import ItemStore, file_states
from llmga.progress import duration
from llmga.runtime import Interrupted, Ranks, StopSignal

logger = logging.getLogger(__name__)
_LOG_EVERY_S = 10.0

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Score:
    """What a column of a meter is: one number for each picture, or a pair (right, all)."""

    unit: str = ""
    higher_is_better: bool | None = True


@dataclass(frozen=True)
class Meter:
    """A way to measure pictures.

    Attributes:
        name: in documents.
        made_by: all that decides its numbers: networks, texts, sizes; part of the protocol.
        measure: some of a cell's ids, with their files, to columns of as many rows.
        scores: the columns that are scores, and what they are; others, such as features, are for whole sets.
    """

    name: str
    made_by: Mapping[str, Any]
    measure: Callable[[Mapping[str, Path]], Columns]
    scores: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """Pictures by id, and files that are measured beside each, such as its target: role -> id -> file."""

    name: str
    files: Mapping[str, Path]
    beside: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)

    def states(self, ids: Sequence[str]) -> dict[str, str]:
        """What tells the files of each id from later versions of them."""
        roles = [self.files, *self.beside.values()]
        parts = [file_states({id: files[id] for id in ids if id in files}) for files in roles]
        return {id: " ".join(part.get(id, "none") for part in parts) for id in ids}


class Work:
    """This process's share of the ids, and a bar that can be stopped: Ctrl-C and SIGTERM end it behind a batch."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._stop = StopSignal()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.close()

    def mine(self, ids: Sequence[str]) -> list[str]:
        """Every n-th id."""
        return list(ids[self.ranks.rank :: self.ranks.world_size])

    def batches(self, what: str, ids: Sequence[str], size: int) -> Iterator[list[str]]:
        """The ids in batches, with a line now and then of how far it is.

        Raises:
            Interrupted: a signal came; what is written stays.
        """
        started = told = time.monotonic()
        rest, done = iter(ids), 0
        while batch := list(islice(rest, size)):
            if self._stop.received is not None:
                raise Interrupted(f"stopped while {what}, {done} of {len(ids)} done; the same command goes on")
            yield batch
            done += len(batch)
            now = time.monotonic()
            if now - told >= _LOG_EVERY_S or done == len(ids):
                told, seconds = now, max(now - started, 1e-9)
                left = duration(seconds / done * (len(ids) - done))
                logger.info("%s: %d of %d, %.1f a second, %s left", what, done, len(ids), done / seconds, left)


class Bench:
    """Measures cells and remembers.

    Args:
        folder: where numbers are kept.
        batch_size: pictures measured, and written, together.
    """

    def __init__(self, folder: Path, work: Work, batch_size: int) -> None:
        self.folder, self.work, self.batch_size = folder, work, batch_size

    def measure(self, cell: Cell, meters: Sequence[Meter]) -> None:
        """Measure this process's share of a cell, as far as its numbers are not there."""
        states = cell.states(self.work.mine(list(cell.files)))
        for meter in meters:
            store = self._store(cell, meter)
            missing = store.missing(states)
            for batch in self.work.batches(f"measuring {cell.name}, {meter.name}", missing, self.batch_size):
                columns = meter.measure({id: cell.files[id] for id in batch})
                store.add({id: states[id] for id in batch}, columns)

    def is_measured(self, cell: Cell, meters: Sequence[Meter]) -> bool:
        """Whether all processes together have all numbers of a cell."""
        states = cell.states(list(cell.files))
        return not any(self._store(cell, meter).missing(states) for meter in meters)

    def read(self, cell: Cell, meters: Sequence[Meter]) -> Columns:
        """The columns of all meters, in the order of the cell's ids.

        Raises:
            StoreError: something is not measured.
            MetricError: pictures differ in size.
        """
        states, columns = cell.states(list(cell.files)), {}
        for meter in meters:
            columns.update(self._store(cell, meter).read(states))
        if "size" in columns and len(sizes := np.unique(columns["size"], axis=0)) > 1:
            odd = int((columns["size"] != columns["size"][0]).any(axis=1).argmax())
            raise MetricError(
                f"{cell.name} has pictures of {len(sizes)} sizes: {list(cell.files.values())[odd]} is "
                f"{' x '.join(map(str, columns['size'][odd]))}, the first {' x '.join(map(str, columns['size'][0]))}; "
                "bring all to one size by one rule first"
            )
        return columns

    def _store(self, cell: Cell, meter: Meter) -> ItemStore:
        return ItemStore(self.folder / cell.name, {"meter": meter.name, **meter.made_by})
