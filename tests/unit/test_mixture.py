"""Guards the order of training examples: a weight that drifts, a row seen twice, or an order that a resume changes."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmga.mixture import Mixture, MixtureError, rows_per_epoch

sources = st.lists(
    st.tuples(st.integers(1, 60), st.one_of(st.none(), st.just(0.0), st.floats(0.01, 50.0))), min_size=1, max_size=6
).filter(lambda rows: any(weight is None or weight > 0 for _, weight in rows))
seeds = st.integers(0, 2**31)


def build(rows: list[tuple[int, float | None]], total: int, seed: int = 0) -> Mixture:
    return Mixture([length for length, _ in rows], [weight for _, weight in rows], total, seed)


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(1, 700), seeds)
def test_every_stretch_follows_the_weights(rows, total, seed):
    mixture = build(rows, total, seed)
    drawn = sum(share > 0 for share in mixture.shares)
    steps = np.arange(1, total + 1)
    for k, share in enumerate(mixture.shares):
        excess = np.cumsum(mixture.source == k) - share * steps
        assert np.abs(excess).max() < 1 + share * drawn  # any prefix, at any length
        stretches = excess[:, None] - excess[None, :]
        assert np.abs(stretches).max() < 2 * (1 + share * drawn)  # hence any stretch


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(1, 700), seeds)
def test_every_row_comes_exactly_once_per_epoch(rows, total, seed):
    mixture = build(rows, total, seed)
    for k, (length, _) in enumerate(rows):
        at = mixture.source == k
        row, epoch = mixture.row[at], mixture.epoch[at]
        assert (np.diff(epoch) >= 0).all()
        for walk in range(len(row) // length):
            assert sorted(row[epoch == walk]) == list(range(length))
        assert len(np.unique(row[epoch == len(row) // length])) == len(row) % length  # the walk that the run cut off


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(1, 300), st.integers(1, 300), seeds)
def test_a_longer_run_begins_with_the_shorter_one(rows, total, more, seed):
    short, long = build(rows, total, seed), build(rows, total + more, seed)
    assert [short[i] for i in range(total)] == [long[i] for i in range(total)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), seeds)
def test_weights_by_rows_give_every_row_exactly_once(lengths, seed):
    mixture = Mixture(lengths, None, sum(lengths), seed)
    assert len(set(zip(mixture.source.tolist(), mixture.row.tolist(), strict=True))) == sum(lengths)
    assert mixture.epoch.max() == 0


def test_a_source_with_weight_zero_is_never_drawn_and_may_be_empty():
    mixture = Mixture([50, 50, 0], [1.0, 0.0, 0.0], 500, seed=1)
    assert set(mixture.source) == {0}


def test_same_seed_same_order_other_seed_other_order():
    first, again, other = (Mixture([300, 200], [2, 1], 2000, seed) for seed in (7, 7, 8))
    order = [first[i] for i in range(2000)]
    assert order == [again[i] for i in range(2000)]
    assert (first.source != other.source).mean() > 0.2
    assert (first.row == other.row).mean() < 0.05


def test_two_sources_do_not_share_their_permutation():
    mixture = Mixture([400, 400], [1, 1], 800, seed=3)
    first, second = (mixture.row[mixture.source == k][:300] for k in (0, 1))
    assert (first == second).mean() < 0.05


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_sees_every_source_in_proportion(ranks):
    """Equal weights in a fixed pattern (A B A B) would give one rank A alone and the other B alone."""
    mixture = Mixture([1000, 1000], [1, 1], 16_000, seed=0)
    for rank in range(ranks):
        assert (mixture.source[rank::ranks] == 0).mean() == pytest.approx(0.5, abs=0.03)


def test_neighbouring_examples_are_not_neighbouring_rows():
    mixture = Mixture([5000], None, 5000, seed=0)
    assert np.corrcoef(mixture.row[:-1], mixture.row[1:])[0, 1] == pytest.approx(0, abs=0.05)


def test_a_tiny_source_is_shuffled_anew_in_each_of_many_epochs():
    mixture = Mixture([3, 100_000], [1, 1], 60_000, seed=0)
    walks = mixture.row[mixture.source == 0].reshape(-1, 3)[:9000]
    assert mixture.epoch.max() >= 9999
    _, counts = np.unique(walks, axis=0, return_counts=True)
    assert len(counts) == 6 and counts.min() > 1300  # all six orders, 1500 each but for chance


def test_one_and_a_half_million_rows_are_ordered_at_once():
    started = time.process_time()
    mixture = Mixture([665_000, 300_000, 300_000, 200_000, 35_000], None, 1_500_000, seed=0)
    assert time.process_time() - started < 3.0  # 0.4 s on an idle core; a Python loop takes longer than 3
    assert np.bincount(mixture.source).tolist() == [665_000, 300_000, 300_000, 200_000, 35_000]


def test_summary_says_what_each_source_gives():
    shares = Mixture([100, 50, 9], [3, 1, 0], 400, seed=0, names=["pictures", "chat", "alpaca"]).summary()
    assert [share.name for share in shares] == ["pictures", "chat", "alpaca"]
    assert [share.weight for share in shares] == [0.75, 0.25, 0.0]
    assert sum(share.draws for share in shares) == 400
    assert shares[0].epochs == pytest.approx(3.0, abs=0.05) and shares[2].draws == 0


def test_summary_up_to_an_index_counts_what_was_seen():
    mixture = Mixture([100, 50], [3, 1], 400, seed=0)
    assert sum(share.draws for share in mixture.summary(until=40)) == 40


def test_rows_per_epoch_counts_the_rows_of_weighted_sources():
    assert rows_per_epoch([10, 20, 40], [None, 0.5, 0]) == 30
    assert rows_per_epoch([10, 20], None) == 30


@pytest.mark.parametrize(
    ("lengths", "weights", "total", "match"),
    [
        ([5, 5], [1, -1], 10, "chat has the weight -1.0, expected a number that is 0 or more"),
        ([5, 5], [1, float("nan")], 10, "chat has the weight nan"),
        ([5, 0], [1, 1], 10, "chat has no rows but the weight 1.0; give it weight 0"),
        ([5, 5], [0, 0], 10, "no source can be drawn from: toy, chat"),
        ([5, 5], [1, 1], 0, "a mixture of 0 examples.*run.max_steps"),
        ([5, 5], [1], 10, "2 sources, 1 weights and 2 names do not match"),
    ],
)
def test_what_cannot_be_drawn_from_is_named(lengths, weights, total, match):
    with pytest.raises(MixtureError, match=match):
        Mixture(lengths, weights, total, seed=0, names=["toy", "chat"])


def test_no_source_at_all_is_named():
    with pytest.raises(MixtureError, match="no source can be drawn from: none was given"):
        Mixture([], None, 10, seed=0)
