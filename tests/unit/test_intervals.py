"""Intervals must cover as often as they claim, on known distributions; Wilson must equal its closed form."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from llmga.metrics.intervals import (
    Interval,
    bootstrap_difference,
    bootstrap_rate_difference,
    bootstrap_ratio,
    bootstrap_runs,
    wilson,
)

quick = {"draws": 300}


def mean(values: ArrayLike, **options: Any) -> Interval:
    """The interval of a plain mean: every total is 1."""
    return bootstrap_ratio(values, np.ones(np.shape(values)), **options)


def coverage(truth: float, measure: Callable[[np.random.Generator], Interval], experiments: int = 1000) -> float:
    """Share of repeated experiments whose interval contains the truth."""
    intervals = [measure(np.random.default_rng([7, number])) for number in range(experiments)]
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def test_mean_covers_as_claimed_at_50_units() -> None:
    assert 0.93 <= coverage(0.5, lambda rng: mean(rng.random(50), **quick)) <= 0.96
    assert 0.88 <= coverage(0.5, lambda rng: mean(rng.random(50), level=0.9, **quick)) <= 0.92


def test_difference_covers_as_claimed_and_gains_from_pairing() -> None:
    def paired(rng: np.random.Generator) -> Interval:
        difficulty = rng.normal(0, 1, 50)  # common to both systems, cancels in the difference
        first, second = difficulty + rng.normal(0.1, 0.2, 50), difficulty + rng.normal(0, 0.2, 50)
        return bootstrap_difference(first, second, **quick)

    assert 0.93 <= coverage(0.1, paired) <= 0.96
    found = paired(np.random.default_rng(0))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.2 * np.sqrt(2 / 50), rel=0.25)


def clustered_answers(rng: np.random.Generator, by_scene: bool) -> Interval:
    """60 scenes of 4 questions; scenes are easy or hard, so answers within one hang together. True rate 0.5."""
    rates = rng.choice([0.1, 0.9], 60).repeat(4)
    right = (rng.random(240) < rates).astype(float)
    scenes = np.arange(60).repeat(4)
    return bootstrap_ratio(
        right, np.ones(240), clusters=[f"scene {scene}" for scene in scenes] if by_scene else None, **quick
    )


def test_questions_about_one_scene_are_not_independent() -> None:
    assert 0.93 <= coverage(0.5, partial(clustered_answers, by_scene=True), 500) <= 0.965
    assert coverage(0.5, partial(clustered_answers, by_scene=False), 200) < 0.85  # what clustering is for


def test_ratio_weighs_by_totals_and_leaves_out_units_without_any() -> None:
    found = bootstrap_ratio([1, 8, 0], [1, 10, 0])
    assert found.value == pytest.approx(9 / 11)
    assert found.n == 2
    assert (found.low, found.high) == (pytest.approx(0.8), pytest.approx(1.0))


def test_clusters_are_one_unit_each() -> None:
    by_scene = bootstrap_ratio([1, 0, 3, 2], [1, 1, 4, 4], clusters=["a", "a", "b", "b"])
    assert by_scene == bootstrap_ratio([1, 5], [2, 8], clusters=["a", "b"])
    assert (by_scene.value, by_scene.n) == (0.6, 2)
    assert mean([1, 3, 5], clusters=[0, 0, 1]).value == 3.0


def test_a_rate_of_one_or_zero_keeps_a_width() -> None:
    z2 = 1.959963984540054**2
    all_right = bootstrap_ratio(np.full(200, 3), np.full(200, 3))
    assert (all_right.value, all_right.high, all_right.n) == (1.0, 1.0, 200)
    assert all_right.low == pytest.approx(200 / (200 + z2))
    none_right = bootstrap_ratio(np.zeros(100), np.ones(100), clusters=np.arange(50).repeat(2).tolist())
    assert (none_right.value, none_right.low, none_right.n) == (0.0, 0.0, 50)
    assert none_right.high == pytest.approx(z2 / (50 + z2))
    assert "Wilson" in none_right.method


def test_a_mean_of_zero_is_no_rate() -> None:
    no_tokens = bootstrap_ratio(np.zeros(50), np.ones(50), rate=False)
    assert (no_tokens.low, no_tokens.high) == (0, 0) and "Wilson" not in no_tokens.method
    one_each = bootstrap_ratio([2, 0, 2, 0], [1, 1, 1, 1], clusters=["a", "a", "b", "b"])
    assert (one_each.value, one_each.low) == (1, 1) and "Wilson" not in one_each.method


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(10, 20, 0.29930, 0.70070), (1, 10, 0.01788, 0.40415), (95, 100, 0.88825, 0.97846), (0, 10, 0.0, 0.27753)],
)
def test_wilson_equals_published_values(successes: int, n: int, low: float, high: float) -> None:
    found, mirrored = wilson(successes, n), wilson(n - successes, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))
    assert (1 - mirrored.high, 1 - mirrored.low) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))
    # Its ends solve |rate - p| = z * sqrt(p * (1 - p) / n), which defines it.
    for p in {found.low, found.high} - {0.0, 1.0}:
        assert abs(successes / n - p) == pytest.approx(1.959963984540054 * np.sqrt(p * (1 - p) / n))


def test_same_seed_same_interval_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(80)
    first = mean(values, seed=3)
    assert first == mean(values, seed=3)
    assert first != mean(values, seed=4)
    monkeypatch.setattr("llmga.metrics.intervals._CHUNK_NUMBERS", 1000)
    assert first == mean(values, seed=3)


def test_a_single_unit_has_no_interval_and_says_so() -> None:
    assert mean([0.3]) == Interval(0.3, 0.3, 0.3, 1, "none: a single unit has no spread")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean([]), "nothing to average"),
        (lambda: bootstrap_ratio([0, 0], [0, 0]), "nothing to average"),
        (lambda: mean([0.1, float("nan")]), r"successes\[1\] is not finite"),
        (lambda: mean([[0.1]]), r"successes has shape \(1, 1\)"),
        (lambda: bootstrap_difference([1], [1, 2]), "a has 1 values, b has 2"),
        (lambda: bootstrap_ratio([1], [1, 2]), "1 successes for 2 totals"),
        (lambda: bootstrap_ratio([1, 1], [1, -1]), "a total is -1"),
        (lambda: mean([1, 2], clusters=["a"]), "1 clusters for 2 values"),
        (lambda: mean([1, 2], level=95), "level is 95"),
        (lambda: wilson(3, 2), "3 successes out of 2"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Interval], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_few_runs_that_disagree_make_a_wide_interval() -> None:
    rng = np.random.default_rng(0)
    units = rng.normal(0, 0.1, 200)
    agreeing = bootstrap_runs(np.stack([units + 1, units + 1, units + 1]), np.zeros((3, 200)), draws=2000)
    disagreeing = bootstrap_runs(np.stack([units + 0.5, units + 1, units + 1.5]), np.zeros((3, 200)), draws=2000)
    assert agreeing.value == pytest.approx(disagreeing.value) == pytest.approx(1 + units.mean())
    assert agreeing.high - agreeing.low == pytest.approx(2 * 1.96 * units.std() / math.sqrt(200), rel=0.1)
    assert disagreeing.high - disagreeing.low > 20 * (agreeing.high - agreeing.low)
    assert agreeing.n == 200 and agreeing.method == "paired percentile bootstrap over 3 runs, then 200 units"


def test_runs_that_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"a is \(2, 3\) and b \(3, 3\); expected \(runs, units\) twice"):
        bootstrap_runs(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="holds values that are not finite"):
        bootstrap_runs([[math.nan]], [[1.0]])


def test_a_difference_of_rates_weighs_facts_alike_and_is_paired() -> None:
    totals = np.array([1, 4, 0, 5])
    a, b = np.array([1, 3, 0, 2]), np.array([0, 3, 0, 1])
    assert bootstrap_rate_difference(a, b, totals, **quick).value == pytest.approx(0.2)
    assert bootstrap_rate_difference(a, b, totals, **quick).n == 3  # one asks for nothing
    equal = bootstrap_rate_difference(a, a, totals, **quick)
    assert (equal.value, equal.low, equal.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="a has 4 values, b 4 and totals 3"):
        bootstrap_rate_difference(a, b, totals[:3])

    def measure(rng: np.random.Generator) -> Interval:
        total = rng.integers(1, 9, 60)
        both = rng.binomial(total, 0.5)
        return bootstrap_rate_difference(both, rng.binomial(both, 0.8), total, **quick)

    assert 0.91 < coverage(0.1, measure, 300) < 0.98
