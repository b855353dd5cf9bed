"""Guards that rows of one step are about equally long, and that balancing moves examples inside a step only.

Run: pytest tests/unit/test_balance.py
"""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmga.records import Record
from llmga.stage1.balance import BalancedDataset, balanced_order, estimated_tokens

RECORDS = [
    Record(f"r{i}", "similar_image", image="a.png" if i % 3 else None, caption="x" * (40 + 97 * i % 1500))
    for i in range(96)
]


class Dataset:
    """The three things of a Stage1Dataset that balancing reads."""

    num_image_tokens = 100

    def __init__(self) -> None:
        self.order = [(0, row, 0) for row in range(len(RECORDS))]
        self.sources = [RECORDS]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        return {"sample_id": index}


@settings(deadline=None)
@given(st.lists(st.integers(1, 2048), min_size=1, max_size=40), st.integers(1, 6))
def test_each_example_has_one_place_and_no_group_stands_out(lengths, batch_size):
    lengths = np.array(lengths * batch_size)
    order = balanced_order(lengths, batch_size)
    assert sorted(order) == list(range(len(lengths)))
    sums = lengths[order].reshape(-1, batch_size).sum(axis=1)
    assert (np.diff(sums) <= 0).all()
    assert sums[0] - sums[-1] <= lengths.max()


def test_rows_of_long_tailed_lengths_become_almost_equal():
    rng = np.random.default_rng(0)
    lengths = np.clip(576 + rng.lognormal(np.log(230), 0.7, 128).astype(int), 0, 2048)
    lengths[:10] -= 576
    rng.shuffle(lengths)

    def longest_over_mean(order):
        sums = lengths[order].reshape(-1, 4).sum(axis=1)
        return sums.max() / sums.mean()

    assert longest_over_mean(np.arange(128)) > 1.25
    assert longest_over_mean(balanced_order(lengths, 4)) < 1.05


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_a_step_has_its_own_examples_whatever_the_batches(batch_size):
    balanced = BalancedDataset(Dataset(), batch_size, examples_per_step=16)
    for step in range(6):
        places = range(16 * step, 16 * step + 16)
        assert sorted(balanced[place]["sample_id"] for place in places) == list(places)
    lengths = [estimated_tokens(RECORDS[balanced.index_at(place)], 100) for place in range(96)]
    sums = np.array(lengths).reshape(6, -1, batch_size).sum(axis=2)
    assert (np.diff(sums, axis=1) <= 0).all()  # each step's longest first
    copy = pickle.loads(pickle.dumps(balanced))  # as a loading worker receives it
    assert [copy.index_at(place) for place in range(96)] == [balanced.index_at(place) for place in range(96)]


def test_estimates_are_close_enough_to_balance_by():
    turns = ({"role": "user", "content": "q" * 40}, {"role": "assistant", "content": "a" * 360})
    assert estimated_tokens(Record("a", "qa", messages=turns), 576) == 120
    assert estimated_tokens(Record("b", "vqa", image="b.png", messages=turns), 576) == 696
    editing = Record("c", "editing", image="c.png", instruction="i" * 80, target_caption="t" * 320)
    assert estimated_tokens(editing, 16) == 136
