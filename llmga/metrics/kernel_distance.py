"""Kernel distance of two sets of features (KID where they are Inception's): unbiased, so it does not depend on n.

The squared maximum mean discrepancy under the polynomial kernel k(x, y) = (x . y / D + 1)^3. Sets that come from one
distribution score 0 on average, and below 0 half of the time.

Source: Binkowski et al., "Demystifying MMD GANs" (2018).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llmga.metrics.features import MetricError, checked_pair, checked_set, require_samples

_DEGREE, _OFFSET = 3, 1.0
_BLOCK_NUMBERS = 8_000_000  # of the kernel matrix at a time: 64 MB


class SubsetDistance(NamedTuple):
    """Kernel distance over subsets, as it is published.

    Attributes:
        mean: over the subsets.
        sd: between them, over their number; it shrinks with the subsets' size and is no error of the mean.
    """

    mean: float
    sd: float


def kernel_distance(features: Any, reference: Any) -> float:
    """The distance over all pictures: no subsets, no seed.

    Args:
        features, reference: (N, D) and (M, D), two rows or more of each.
    Raises:
        MetricError: as `checked_set`, or different dimensions.
    """
    a, b = checked_pair(features, reference, ("features", "reference"))
    return KernelReference(b).distance_to(a)


def subset_kernel_distance(
    features: Any, reference: Any, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> SubsetDistance:
    """Mean and spread over random subsets of both sets, drawn without replacement, as other tools publish it.

    Raises:
        MetricError: as `kernel_distance`, or a set is smaller than a subset.
    """
    a, b = checked_pair(features, reference, ("features", "reference"))
    if subsets < 1 or subset_size < 2:
        raise MetricError(f"{subsets} subsets of {subset_size}: expected 1 or more of 2 or more pictures")
    for rows, name in ((a, "features"), (b, "reference")):
        require_samples(len(rows), subset_size, name)
    rng = np.random.default_rng(seed)
    found = [
        KernelReference(b[rng.choice(len(b), subset_size, replace=False)]).distance_to(
            a[rng.choice(len(a), subset_size, replace=False)]
        )
        for _ in range(subsets)
    ]
    return SubsetDistance(float(np.mean(found)), float(np.std(found)))


class KernelReference:
    """The set that others are measured against, with its own part of the distance.

    Args:
        features: (M, D)
    Raises:
        MetricError: as `checked_set`.
    """

    def __init__(self, features: Any) -> None:
        self.rows = checked_set(features, "reference")
        everything = np.ones((len(self.rows), 1))
        self.own = float(_mean_over_pairs(self.rows, everything, len(self.rows))[0])

    def distance_to(self, features: Any) -> float:
        """Distance of a set, (N, D); errors as `kernel_distance`."""
        pool = self.pool(features)
        return float(pool.distances(np.arange(len(pool))[None])[0])

    def pool(self, features: Any) -> KernelPool:
        """Pictures of which many subsets are to be measured; errors as `kernel_distance`."""
        rows, _ = checked_pair(features, self.rows, ("features", "reference"))
        return KernelPool(self, rows)


class KernelPool:
    """Pictures with their mean kernel to a reference, taken once; all subsets share one pass over the kernel matrix."""

    def __init__(self, reference: KernelReference, rows: np.ndarray) -> None:
        self.reference = reference
        self._rows = rows
        self._across = np.concatenate(
            [_kernel(rows[block], reference.rows).mean(axis=1) for block in _blocks(len(rows), len(reference.rows))]
        )

    def __len__(self) -> int:
        return len(self._rows)

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """Distance of each subset to the reference.

        Args:
            rows: (K, M) numbers of pictures, M different ones in each of K subsets, 2 or more.
        Returns:
            (K,) float64.
        """
        subsets, count = rows.shape
        chosen = np.zeros((len(self), subsets))
        chosen[rows.T, np.arange(subsets)] = 1
        within = _mean_over_pairs(self._rows, chosen, count)
        return within + self.reference.own - 2 * self._across[rows].mean(axis=1)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + _OFFSET) ** _DEGREE


def _mean_over_pairs(rows: np.ndarray, chosen: np.ndarray, count: int) -> np.ndarray:
    """Mean kernel over ordered pairs of different rows within each subset; `chosen` is (N, K), 1 where a row is in."""
    total = np.zeros(chosen.shape[1])
    for block in _blocks(len(rows), len(rows)):
        total += ((_kernel(rows[block], rows) @ chosen) * chosen[block]).sum(axis=0)
    with_itself = (np.square(rows).sum(axis=1) / rows.shape[1] + _OFFSET) ** _DEGREE
    return (total - with_itself @ chosen) / (count * (count - 1))


def _blocks(length: int, width: int) -> list[slice]:
    """Parts of `length` rows whose products with `width` others fit the memory."""
    step = max(1, _BLOCK_NUMBERS // width)
    return [slice(start, start + step) for start in range(0, length, step)]
