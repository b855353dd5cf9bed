"""Frechet distance of two sets of features, the FID where they are Inception's.

With any factor F F^T = S1, the eigenvalues of S1 S2 are those of the symmetric F^T S2 F: real, and found at a fifth of
the cost of a matrix square root. The factor belongs to the reference and is taken once. Where a set has fewer pictures
than dimensions, its centred rows are such a factor themselves, and the trace of the root is the sum of singular values
of one small product.

Source: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium" (2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmga.metrics.features import MetricError, checked_pair, checked_set
from llmga.metrics.moments import Moments

_SYMMETRIC = 1e-8  # difference of mirrored entries beside the largest one


def frechet_distance(mu1: Any, cov1: Any, mu2: Any, cov2: Any) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Args:
        mu1, mu2: (D,) means.
        cov1, cov2: (D, D) covariances; they may be singular.
    Raises:
        MetricError: shapes that do not go together, values that are not finite, or no covariance.
    """
    return FrechetReference.from_gaussian(mu1, cov1).distance(mu2, cov2)


def feature_frechet_distance(features: Any, reference: Any) -> float:
    """Frechet distance of two sets, the cheaper way for their sizes.

    Args:
        features, reference: (N, D) and (M, D), two rows or more of each.
    Raises:
        MetricError: as `checked_set`, or different dimensions.
    """
    a, b = checked_pair(features, reference, ("features", "reference"))
    return FrechetReference.from_features(b).distance_to(a)


@dataclass(frozen=True)
class FrechetReference:
    """The set that others are measured against, with a root of its covariance.

    Attributes:
        mean: (D,)
        root: (D, R) with root @ root.T = covariance; R is D, or less where the covariance is singular.
        trace: of the covariance.
    """

    mean: np.ndarray
    root: np.ndarray
    trace: float

    @classmethod
    def from_gaussian(cls, mean: Any, covariance: Any) -> FrechetReference:
        """From mean and covariance; errors as `frechet_distance`."""
        mu, cov = _checked_gaussian(mean, covariance)
        return cls(mu, covariance_root(cov), float(np.trace(cov)))

    @classmethod
    def from_moments(cls, moments: Moments) -> FrechetReference:
        """From gathered moments; errors as `Moments.covariance`."""
        return cls.from_gaussian(moments.mean, moments.covariance)

    @classmethod
    def from_features(cls, features: Any) -> FrechetReference:
        """From (N, D) features; with N up to D the rows serve as the root.

        Raises:
            MetricError: as `checked_set`.
        """
        rows = checked_set(features, "reference")
        mean = rows.mean(axis=0)
        scaled = (rows - mean) / np.sqrt(len(rows) - 1)
        root = scaled.T if len(rows) <= rows.shape[1] else covariance_root(scaled.T @ scaled)
        return cls(mean, root, float(np.square(scaled).sum()))

    def distance(self, mean: Any, covariance: Any) -> float:
        """Distance of a Gaussian; errors as `frechet_distance`."""
        mu, cov = _checked_gaussian(mean, covariance)
        self._check_dim(len(mu))
        between = _trace_of_root(self.root.T @ cov @ self.root)
        return self._join(mu - self.mean, float(np.trace(cov)), between)

    def distance_to(self, features: Any) -> float:
        """Distance of a set, (N, D); errors as `checked_set`."""
        pool = self.pool(features)
        return float(pool.distances(np.arange(len(pool))[None])[0])

    def pool(self, features: Any) -> FrechetPool:
        """Pictures of which many subsets are to be measured; errors as `checked_set`."""
        rows = checked_set(features)
        self._check_dim(rows.shape[1])
        return FrechetPool(self, rows)

    def _check_dim(self, dim: int) -> None:
        if dim != len(self.mean):
            raise MetricError(
                f"features have {dim} dimensions and the reference {len(self.mean)}; extract both with the same network"
            )

    def _join(self, mean_step: np.ndarray, trace: float, between: float) -> float:
        """The distance from its terms; what rounding leaves below 0 is 0."""
        return max(0.0, float(mean_step @ mean_step) + trace + self.trace - 2 * between)


class FrechetPool:
    """Pictures seen from a reference: projected on its root once, so that a subset costs its own covariance alone."""

    def __init__(self, reference: FrechetReference, rows: np.ndarray) -> None:
        self.reference = reference
        self._centred = rows - reference.mean
        self._squares = np.square(self._centred).sum(axis=1)
        self._projected = self._centred @ reference.root

    def __len__(self) -> int:
        return len(self._squares)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """Distance of each subset to the reference.

        Args:
            rows: (K, M) numbers of pictures, M different ones in each of K subsets, 2 or more.
        Returns:
            (K,) float64.
        """
        return np.array([self._distance(subset) for subset in rows])

    def _distance(self, subset: np.ndarray) -> float:
        count = len(subset)
        chosen = np.bincount(subset, minlength=len(self)).astype(np.float64)
        mean = chosen @ self._centred / count
        trace = (float(self._squares[subset].sum()) - count * float(mean @ mean)) / (count - 1)
        projected = self._projected[subset]
        projected -= projected.mean(axis=0)
        projected /= np.sqrt(count - 1)
        if count <= projected.shape[1]:
            between = float(np.linalg.svd(projected, compute_uv=False).sum())
        else:
            between = _trace_of_root(projected.T @ projected)
        return self.reference._join(mean, trace, between)


def covariance_root(covariance: np.ndarray) -> np.ndarray:
    """(D, R) with root @ root.T = covariance: Cholesky's where it exists, else by eigenvectors, without null space."""
    smallest = len(covariance) * np.finfo(np.float64).eps
    try:
        root = np.linalg.cholesky(covariance)
        pivots = np.square(np.diagonal(root))
        if pivots.min() > smallest * pivots.max():
            return root
    except np.linalg.LinAlgError:
        pass  # singular: fewer pictures than dimensions, or features that are always 0
    values, vectors = np.linalg.eigh(covariance)
    kept = values > smallest * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _trace_of_root(symmetric: np.ndarray) -> float:
    """Sum of the roots of the eigenvalues, of which rounding may leave some below 0."""
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(symmetric), 0, None)).sum())


def _checked_gaussian(mean: Any, covariance: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance as float64 arrays that go together."""
    mu, cov = np.atleast_1d(np.asarray(mean, np.float64)), np.atleast_2d(np.asarray(covariance, np.float64))
    if mu.ndim != 1 or cov.shape != (len(mu), len(mu)) or not mu.size:
        raise MetricError(f"mean is {mu.shape} and covariance {cov.shape}; expected (D,) and (D, D)")
    if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
        raise MetricError("mean or covariance holds values that are not finite; look for NaN among the features")
    scale = float(np.abs(cov).max())
    if np.abs(cov - cov.T).max() > _SYMMETRIC * scale or np.diagonal(cov).min() < -_SYMMETRIC * scale:
        raise MetricError("the covariance is not symmetric with variances from 0 on; expected numpy.cov of features")
    return mu, cov
