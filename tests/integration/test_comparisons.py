"""Permutation tests must raise as few false alarms as they claim, and see what is there; Holm by hand.

Run: pytest tests/integration/test_comparisons.py
"""

import numpy as np
import pytest
from scipy.stats import kstest, permutation_test

from llmga.metrics.comparisons import (
    half_sample_contrast,
    half_sample_difference,
    holm,
    holm_levels,
    permute_distances,
    permute_means,
)
from llmga.metrics.features import MetricError
from llmga.metrics.frechet import FrechetReference, feature_frechet_distance
from llmga.metrics.kernel_distance import KernelReference, kernel_distance

REFERENCES = [FrechetReference.from_features, KernelReference]


def systems(seed: int, count: int, shift: float, dim: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference, and two systems whose outputs for one prompt resemble each other; b is off by `shift`."""
    rng = np.random.default_rng(seed)
    prompt = rng.normal(size=(count, dim))
    a, b = (0.8 * prompt + 0.6 * rng.normal(size=(count, dim)) for _ in range(2))
    return rng.normal(size=(count, dim)), a, b + shift


def test_scipy_agrees_on_means() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.25, 1, 40), rng.normal(0, 1, 40)
    found = permute_means(a, b)
    theirs = permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
    )
    assert found.difference == pytest.approx(theirs.statistic)
    assert found.p == pytest.approx(theirs.pvalue, abs=0.02)
    assert 0.02 < found.p < 0.98  # the comparison means something


def test_p_of_means_is_uniform_without_an_effect_and_small_with_one() -> None:
    def p(seed: int, effect: float) -> float:
        rng = np.random.default_rng(seed)
        return permute_means(rng.exponential(size=30) + effect, rng.exponential(size=30), draws=199, seed=seed).p

    assert kstest([p(seed, 0) for seed in range(400)], "uniform").pvalue > 0.01
    assert np.mean([p(seed, 1) <= 0.05 for seed in range(50)]) > 0.8


@pytest.mark.parametrize("reference", REFERENCES)
def test_p_of_distances_is_uniform_without_an_effect_and_small_with_one(reference: type) -> None:
    def p(seed: int, shift: float) -> float:
        target, a, b = systems(seed, 60, shift)
        return permute_distances(a, b, reference(target), draws=39, seed=seed).p

    found = [p(seed, 0) for seed in range(200)]
    assert kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) < 0.09
    assert np.mean([p(seed, 0.6) <= 0.05 for seed in range(20)]) > 0.9


def test_the_difference_is_that_of_the_distances() -> None:
    target, a, b = systems(1, 50, 0.4)
    frechet = permute_distances(a, b, FrechetReference.from_features(target), draws=99)
    expected = feature_frechet_distance(a, target) - feature_frechet_distance(b, target)
    assert frechet.difference == pytest.approx(expected, rel=1e-9)
    kernel = permute_distances(a, b, KernelReference(target), draws=99)
    assert kernel.difference == pytest.approx(kernel_distance(a, target) - kernel_distance(b, target), rel=1e-9)
    assert (frechet.n, frechet.draws, frechet.p) == (50, 99, 0.01)
    swapped = permute_distances(b, a, FrechetReference.from_features(target), draws=99)
    assert (swapped.difference, swapped.p) == (pytest.approx(-frechet.difference), frechet.p)


def test_rows_of_one_prompt_change_sides_together() -> None:
    """Six copies of each of 5 prompts' outputs are 5 units, and 2^5 exchanges allow no p below 1 / 16."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 0.1, 5), rng.normal(0, 0.1, 5)
    prompts = [f"prompt {number}" for number in range(5)] * 6
    alone = permute_means(np.tile(a, 6), np.tile(b, 6))
    found = permute_means(np.tile(a, 6), np.tile(b, 6), clusters=prompts)
    assert (alone.p, alone.n, found.n) == (1e-4, 30, 5)
    assert found.p == pytest.approx(2 / 32, abs=0.01)
    assert found.difference == pytest.approx(alone.difference) == pytest.approx(a.mean() - b.mean())
    target, first, second = systems(2, 30, 3)
    reference = KernelReference(target)
    assert permute_distances(first, second, reference).p < 0.01
    assert permute_distances(first, second, reference, clusters=[i % 4 for i in range(30)]).p > 2 / 16 - 0.04


def test_half_samples_give_an_interval_of_the_right_width() -> None:
    covered, widths, values = [], [], []
    truth = -(0.4**2) * 4  # of the populations: b's mean is off by 0.4 in 4 directions
    reference = FrechetReference.from_gaussian(np.zeros(4), np.eye(4))
    for seed in range(60):
        _, a, b = systems(seed, 200, 0.4)
        found = half_sample_difference(a, b, reference, draws=50, seed=seed)
        covered.append(found.low <= truth <= found.high)
        widths.append(found.high - found.low)
        values.append(found.value)
    assert np.mean(covered) > 0.85  # 94 % in 180 repeats
    assert 0.8 < np.mean(widths) / (2 * 1.96 * np.std(values)) < 1.5
    assert (found.n, found.method) == (200, "50 paired half-samples, undivided")


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm_levels([0.01, 0.04, 0.03, 0.005], 0.96) == pytest.approx([1 - 0.04 / 3, 0.96, 0.98, 0.99])
    with pytest.raises(MetricError, match="nan is no p-value"):
        holm([0.1, float("nan")])


def test_what_cannot_be_compared() -> None:
    target, a, b = systems(1, 30, 0.1)
    with pytest.raises(MetricError, match="a has 30 pictures and b 29; pair them"):
        permute_distances(a, b[:-1], KernelReference(target))
    with pytest.raises(MetricError, match="there are 3 clusters for 30 rows"):
        permute_distances(a, b, KernelReference(target), clusters=[1, 2, 3])
    with pytest.raises(MetricError, match="a paired test has 1 pictures; at least 2 are needed"):
        permute_distances(a, b, KernelReference(target), clusters=[1] * 30)
    with pytest.raises(MetricError, match="a or b is not finite at 1"):
        permute_means([1, np.nan], [1, 2])
    with pytest.raises(MetricError, match=r"a is \(2,\) and b \(3,\)"):
        permute_means([1, 2], [1, 2, 3])
    with pytest.raises(MetricError, match="0 draws; expected 1 or more"):
        permute_means([1, 2], [1, 2], draws=0)
    with pytest.raises(MetricError, match="a has 7 pictures; at least 8 are needed"):
        half_sample_difference(a[:7], b[:7], KernelReference(target))
    with pytest.raises(MetricError, match=r"level 95 and 100 draws"):
        half_sample_difference(a, b, KernelReference(target), level=95)


def test_an_interaction_of_distances_is_the_sum_of_its_parts() -> None:
    target, a, b = systems(0, 40, 0.5)
    _, c, d = systems(1, 40, 1.0)
    reference = FrechetReference.from_features(target)
    found = half_sample_contrast({"a": a, "b": b, "c": c, "d": d}, (1, -1, -1, 1), reference, draws=20)
    parts = [reference.distance_to(each) for each in (a, b, c, d)]
    assert found.value == pytest.approx(parts[0] - parts[1] - parts[2] + parts[3])
    assert found.low < found.value < found.high and found.n == 40
    same = half_sample_contrast({"a": a, "b": a}, (1, -1), reference, draws=20)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(MetricError, match="2 sets and 3 weights"):
        half_sample_contrast({"a": a, "b": b}, (1, -1, 1), reference)
    with pytest.raises(MetricError, match="a has 40 pictures and b 39; pair them"):
        half_sample_contrast({"a": a, "b": b[1:]}, (1, -1), reference)
