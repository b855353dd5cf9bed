"""Kernel distance, Inception score, and what no metric takes. Run: pytest tests/unit/test_set_metrics.py"""

import numpy as np
import pytest

from llmga.metrics.features import (
    MetricError,
    checked_features,
    paired_cosine,
    paired_rows,
    require_disjoint,
    require_equal_counts,
    require_frechet_samples,
)
from llmga.metrics.frechet import feature_frechet_distance
from llmga.metrics.inception_score import inception_score
from llmga.metrics.kernel_distance import KernelReference, kernel_distance, subset_kernel_distance


def drawn(seed: int, count: int, dim: int = 16, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, dim))


# ---------------------------------------------------------------- kernel distance


def test_kernel_distance_is_its_definition_written_out() -> None:
    a, b = drawn(1, 7, 3), drawn(2, 5, 3, shift=0.5)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 3 + 1) ** 3

    within_a = [k(a[i], a[j]) for i in range(7) for j in range(7) if i != j]
    within_b = [k(b[i], b[j]) for i in range(5) for j in range(5) if i != j]
    across = [k(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(across)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
    rows = np.array([[0, 1, 2], [6, 3, 4]])
    pool = KernelReference(b).pool(a)
    np.testing.assert_allclose(pool.distances(rows), [kernel_distance(a[subset], b) for subset in rows], rtol=1e-10)


def test_kernel_distance_is_unbiased_where_the_frechet_distance_is_not() -> None:
    kernel, frechet = [], []
    for seed in range(60):
        a, b = drawn(2 * seed, 60), drawn(2 * seed + 1, 60)
        kernel.append(kernel_distance(a, b))
        frechet.append(feature_frechet_distance(a, b))
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / np.sqrt(60)
    assert np.mean(frechet) > 20 * np.std(frechet) / np.sqrt(60)


def test_subsets_scatter_around_the_whole_and_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = drawn(5, 400), drawn(6, 400, shift=0.2)
    found = subset_kernel_distance(a, b, subsets=200, subset_size=50, seed=1)
    assert found == subset_kernel_distance(a, b, subsets=200, subset_size=50, seed=1)
    assert found != subset_kernel_distance(a, b, subsets=200, subset_size=50, seed=2)
    whole = kernel_distance(a, b)
    assert found.mean == pytest.approx(whole, abs=4 * found.sd / np.sqrt(200))
    monkeypatch.setattr("llmga.metrics.kernel_distance._BLOCK_NUMBERS", 1000)
    assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(MetricError, match="reference has 400 pictures; at least 1,000 are needed: add 600 more"):
        subset_kernel_distance(drawn(0, 1000), b)
    with pytest.raises(MetricError, match="0 subsets of 10: expected 1 or more of 2 or more"):
        subset_kernel_distance(a, b, subsets=0, subset_size=10)


# ---------------------------------------------------------------- Inception score


def test_inception_score_of_known_classes() -> None:
    assert inception_score(np.full((40, 8), 3.0)) == pytest.approx((1, 0))
    certain = np.tile(1e4 * np.eye(8), (5, 1))  # every class five times, without a doubt: a probability is exactly 0
    assert inception_score(certain, splits=1) == pytest.approx((8, 0))
    half = np.log([[0.75, 0.25], [0.25, 0.75]])
    divergence = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert inception_score(half, splits=1).mean == pytest.approx(np.exp(divergence))


def test_the_seed_deals_pictures_to_splits() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (505, 12))
    assert inception_score(logits, seed=7) == inception_score(logits, seed=7)
    assert inception_score(logits, seed=7).mean != inception_score(logits, seed=8).mean
    assert inception_score(logits, splits=1, seed=7).mean == pytest.approx(inception_score(logits, 1, seed=8).mean)


def test_too_few_logits() -> None:
    with pytest.raises(MetricError, match="Inception score of 10 splits has 19 pictures; at least 20 are needed"):
        inception_score(np.zeros((19, 4)))
    with pytest.raises(MetricError, match="1 splits of 1 classes; expected 1 split and 2 classes or more"):
        inception_score(np.zeros((19, 1)), splits=1)


# ---------------------------------------------------------------- what no metric takes


def test_features_that_cannot_be_measured() -> None:
    fine = drawn(1, 30)
    broken = drawn(2, 30)
    broken[[4, 9], 3] = np.nan
    with pytest.raises(MetricError, match="features holds values that are not finite in 2 of 30 rows, first in row 4"):
        feature_frechet_distance(broken, fine)
    with pytest.raises(MetricError, match="all 30 rows of reference are the same; either every picture is the same"):
        kernel_distance(fine, np.full((30, 16), 0.3))
    with pytest.raises(MetricError, match=r"features is empty \(\(0, 16\)\); expected features of 2 or more pictures"):
        kernel_distance(fine[:0], fine)
    with pytest.raises(MetricError, match="features has 1 pictures; at least 2 are needed: add 1 more"):
        kernel_distance(fine[:1], fine)
    with pytest.raises(MetricError, match="features has 16 dimensions and reference 8; extract both with the same"):
        feature_frechet_distance(fine, drawn(3, 30, 8))
    with pytest.raises(MetricError, match=r"shape \(30,\); expected \(pictures, dimensions\)"):
        checked_features(fine[:, 0])


def test_sample_sizes_of_a_frechet_distance() -> None:
    assert "319 pictures are less than 5 for each of 64" in str(require_frechet_samples({"a": 319, "b": 319}, 64))
    assert require_frechet_samples({"a": 320, "reference": 320}, 64) is None
    with pytest.raises(MetricError, match=r"a has 60 pictures for 64 .* needs 64 at least and 320 to be steady: add 4"):
        require_frechet_samples({"a": 60, "reference": 60}, 64)
    with pytest.raises(MetricError, match="sets differ in size: a has 70, reference has 80; use the same 70 of each"):
        require_frechet_samples({"a": 70, "reference": 80}, 64)
    require_equal_counts({})


def test_a_reference_that_was_trained_on_is_named() -> None:
    with pytest.raises(MetricError, match=r"2 of 4 reference pictures were trained on: 3, 7; take a reference set"):
        require_disjoint([3, 5, 7, 9], {7, 3, 11})
    assert require_disjoint([3, 5, 7, 9], {7, 3, 11}, force=True) == 2
    assert require_disjoint(["a"], []) == 0


def test_rows_are_paired_by_id() -> None:
    assert paired_rows(["x", "y", "z"], ["z", "x", "y"], ("a", "b")).tolist() == [1, 2, 0]
    with pytest.raises(MetricError, match="b has 1 ids more than once: z; give each picture one"):
        paired_rows(["x", "z"], ["z", "z"], ("a", "b"))
    with pytest.raises(MetricError, match="b lacks 2 ids of a: x, y"):
        paired_rows(["x", "y", "z"], ["z"], ("a", "b"))
    with pytest.raises(MetricError, match="a lacks 1 ids of b: y"):
        paired_rows(["x"], ["y", "x"], ("a", "b"))


def test_cosine_of_pairs() -> None:
    found = paired_cosine([[1, 0], [1, 1], [2, 0]], [[0.0, 3.0], [2, 2], [-1, 0]])
    assert found.tolist() == pytest.approx([0, 1, -1])
    with pytest.raises(MetricError, match="row 1 holds zeros alone"):
        paired_cosine([[1, 0], [0, 0]], [[1, 0], [1, 1]])
    with pytest.raises(MetricError, match=r"first is \(2, 2\) and second \(1, 2\)"):
        paired_cosine([[1, 0], [0, 1]], [[1, 0]])
