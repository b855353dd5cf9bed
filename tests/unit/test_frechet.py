"""Frechet distances against closed forms and scipy's square root. Run: pytest tests/unit/test_frechet.py"""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import sqrtm

from llmga.metrics.features import MetricError
from llmga.metrics.frechet import FrechetReference, covariance_root, feature_frechet_distance, frechet_distance
from llmga.metrics.moments import Moments, merge_moments


def drawn(seed: int, count: int, dim: int, shift: float = 0.0) -> np.ndarray:
    """Features with a spectrum that falls by four orders of magnitude, as trained networks have it."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) * np.logspace(0, -2, dim)
    return rng.normal(size=(count, dim)) @ mixing.T + shift


def by_scipy(features: np.ndarray, reference: np.ndarray) -> float:
    """The definition, with scipy's root of the product."""
    cov1, cov2 = np.cov(features, rowvar=False), np.cov(reference, rowvar=False)
    step = features.mean(axis=0) - reference.mean(axis=0)
    return float(step @ step + np.trace(cov1 + cov2 - 2 * np.real(sqrtm(cov1 @ cov2))))


def test_gaussians_with_a_closed_form() -> None:
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(2**2 + (3 - 2) ** 2)
    variances1, variances2 = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.0])  # one direction is missing
    expected = 3 * 0.5**2 + np.square(np.sqrt(variances1) - np.sqrt(variances2)).sum()
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    for turn in (np.eye(3), rotation):
        cov1, cov2 = (turn @ np.diag(variances) @ turn.T for variances in (variances1, variances2))
        found = frechet_distance(turn @ np.full(3, 0.5), cov1, np.zeros(3), cov2)
        assert found == pytest.approx(expected, rel=1e-7)
        assert frechet_distance(np.zeros(3), cov2, turn @ np.full(3, 0.5), cov1) == pytest.approx(found, rel=1e-7)


def test_covariances_that_do_not_commute() -> None:
    """Of 2 x 2 matrices the root of the product has trace sqrt(tr + 2 sqrt(det))."""
    cov1, cov2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    product = cov1 @ cov2
    trace = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = 1 + np.trace(cov1 + cov2) - 2 * trace
    assert frechet_distance([0, 1], cov1, [0, 0], cov2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "dim"), [(600, 48), (40, 64), (64, 64), (65, 64)])
def test_a_set_is_at_no_distance_from_itself_and_the_distance_is_symmetric(count: int, dim: int) -> None:
    a, b = drawn(1, count, dim), drawn(2, count, dim, shift=0.1)
    assert feature_frechet_distance(a, a) <= 1e-9 * np.trace(np.cov(a, rowvar=False))
    assert feature_frechet_distance(a, a[::-1]) <= 1e-9 * np.trace(np.cov(a, rowvar=False))
    assert feature_frechet_distance(a, b) == pytest.approx(feature_frechet_distance(b, a), rel=1e-9)


@pytest.mark.parametrize(("count1", "count2", "dim"), [(700, 600, 64), (50, 45, 64), (400, 40, 64), (40, 400, 64)])
def test_scipy_agrees_on_many_and_on_few_pictures(count1: int, count2: int, dim: int) -> None:
    a, b = drawn(1, count1, dim), drawn(2, count2, dim, shift=0.1)
    expected = by_scipy(a, b)
    gaussians = [(rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (a, b)]
    tolerance = 1e-9 if min(count1, count2) > dim else 1e-6  # scipy's root of a singular matrix has noise of its own
    assert feature_frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(*gaussians[0], *gaussians[1]) == pytest.approx(expected, rel=tolerance)


def test_moments_do_not_depend_on_order_and_division() -> None:
    rows = drawn(5, 500, 24, shift=1e4)  # far from 0, where sums of squares would lose the spread
    whole = Moments(24)
    whole.update(rows)
    np.testing.assert_allclose(whole.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)
    shuffled = np.random.default_rng(0).permutation(rows)
    for edges in ([0, 500], [0, 1, 2, 130, 500], list(range(0, 501, 50))):
        shards = []
        for start, end in pairwise(edges):
            shards.append(Moments(24))
            for batch in np.array_split(shuffled[start:end], min(3, end - start)):
                shards[-1].update(batch)
        merged = merge_moments([Moments(24), *(Moments.from_state(shard.state()) for shard in shards)])
        assert merged.n == 500
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-7)
    reference = FrechetReference.from_moments(merged)
    assert reference.distance(whole.mean, whole.covariance) <= 1e-9 * reference.trace


def test_subsets_of_a_pool_are_measured_as_if_alone() -> None:
    a, b = drawn(6, 90, 20), drawn(7, 120, 20, shift=0.2)
    for reference in (FrechetReference.from_features(b), FrechetReference.from_features(b[:15])):
        rows = np.stack([np.random.default_rng(seed).permutation(90)[:40] for seed in range(3)])
        found = reference.pool(a).distances(rows)
        np.testing.assert_allclose(found, [reference.distance_to(a[subset]) for subset in rows], rtol=1e-10)
        one_by_one = frechet_distance(
            a[rows[0]].mean(axis=0), np.cov(a[rows[0]], rowvar=False), reference.mean, reference.root @ reference.root.T
        )
        assert found[0] == pytest.approx(one_by_one, rel=1e-8)


def test_the_root_of_a_singular_covariance_is_narrow() -> None:
    covariance = np.cov(drawn(8, 12, 30), rowvar=False)
    root = covariance_root(covariance)
    assert root.shape == (30, 11)
    np.testing.assert_allclose(root @ root.T, covariance, atol=1e-12 * np.trace(covariance))


def test_what_is_no_gaussian_is_refused() -> None:
    fine = np.eye(2)
    with pytest.raises(MetricError, match=r"mean is \(3,\) and covariance \(2, 2\); expected \(D,\) and \(D, D\)"):
        frechet_distance(np.zeros(3), fine, np.zeros(2), fine)
    with pytest.raises(MetricError, match="features have 3 dimensions and the reference 2"):
        frechet_distance(np.zeros(2), fine, np.zeros(3), np.eye(3))
    with pytest.raises(MetricError, match="not finite; look for NaN among the features"):
        frechet_distance(np.zeros(2), fine * np.nan, np.zeros(2), fine)
    with pytest.raises(MetricError, match="not symmetric with variances from 0 on"):
        frechet_distance(np.zeros(2), [[1, 2], [0, 1]], np.zeros(2), fine)
    with pytest.raises(MetricError, match=r"moments have mean; expected n, mean and scatter"):
        Moments.from_state({"mean": np.zeros(2)})
    with pytest.raises(MetricError, match="no moments to merge"):
        merge_moments([])
    with pytest.raises(MetricError, match="features of 3 dimensions cannot be added to those of 2"):
        Moments(2).update(np.ones((4, 3)))
    with pytest.raises(MetricError, match="the set has 0 pictures; at least 2 are needed: add 2 more"):
        _ = Moments(2).covariance
