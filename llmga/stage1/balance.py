"""Which forward pass of a step gets which of its examples: about as many tokens in each.

Ranks wait for the slowest, and memory must hold the longest row, so rows of a step should be equally long. Only the
examples of one step change places: a step trains on the same examples, in total, as without balancing, whatever the
number of ranks, and resuming stays exact. Lengths are estimated from the records; tokens and pictures are not needed.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from llmga.records import Record
from llmga.stage1.data import Stage1Dataset

CHARACTERS_PER_TOKEN = 4  # of English; how well rows are balanced hangs on it, nothing else does
INSTRUCTION_TOKENS = 20  # template, system text and instruction, about


class BalancedDataset(Dataset[dict[str, Any]]):
    """The examples of a dataset, each step's in an order that makes its forward passes equally long.

    Place i of a step goes to forward pass i // batch_size. Longest first: passes that run at the same time on several
    ranks are the most alike, and a step that does not fit into memory fails in its first pass.

    Args:
        data: as long as a whole number of steps.
        batch_size: examples per forward pass.
        examples_per_step: over all forward passes and ranks.
    """

    def __init__(self, data: Stage1Dataset, batch_size: int, examples_per_step: int) -> None:
        assert examples_per_step % batch_size == 0 and len(data) % examples_per_step == 0
        self.data, self.batch_size, self.examples_per_step = data, batch_size, examples_per_step
        self._step = lru_cache(maxsize=8)(self._places_of_step)  # one worker meets a step again for its next batch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """What `Stage1Dataset` gives for the example at this place; its `sample_id` says which one that is."""
        return self.data[self.index_at(place)]

    def index_at(self, place: int) -> int:
        """Index of the example that is trained on at `place` of the run."""
        step, within = divmod(place, self.examples_per_step)
        return step * self.examples_per_step + int(self._step(step)[within])

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache, which a loading worker cannot be sent."""
        return {name: value for name, value in self.__dict__.items() if name != "_step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._step = lru_cache(maxsize=8)(self._places_of_step)

    def _places_of_step(self, step: int) -> np.ndarray:
        first = step * self.examples_per_step
        rows = (self.data.order[index] for index in range(first, first + self.examples_per_step))
        records = (self.data.sources[source][row] for source, row, _ in rows)
        lengths = [estimated_tokens(record, self.data.num_image_tokens) for record in records]
        return balanced_order(np.array(lengths), self.batch_size)


def balanced_order(lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Divide examples into groups of `batch_size` with sums as equal as a greedy choice makes them.

    The longest example left goes to the group with the smallest sum that still has room.

    Args:
        lengths: (N,) tokens, N a multiple of `batch_size`.
    Returns:
        (N,) indices, group after group, the group with the largest sum first; inside a group in their own order.
    """
    num_groups = len(lengths) // batch_size
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    sums = np.zeros(num_groups)
    for index in np.argsort(-lengths, kind="stable"):
        smallest = int(sums.argmin())
        groups[smallest].append(int(index))
        sums[smallest] += lengths[index]
        if len(groups[smallest]) == batch_size:
            sums[smallest] = np.inf  # full
    totals = np.array([lengths[group].sum() for group in groups])
    by_size = np.argsort(-totals, kind="stable")
    return np.concatenate([sorted(groups[number]) for number in by_size])


def estimated_tokens(record: Record, num_image_tokens: int) -> float:
    """About how many tokens a record's conversation has."""
    texts = [record.short_caption, record.caption, record.instruction, record.target_caption]
    texts += [message["content"] for message in record.messages or ()]
    characters = sum(len(text) for text in texts if text)
    pictures = num_image_tokens if record.image is not None else 0
    return INSTRUCTION_TOKENS + pictures + characters / CHARACTERS_PER_TOKEN
