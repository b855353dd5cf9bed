"""Is one system better than another? Paired permutation tests, half-sample intervals, Holm's correction.

Everything is paired: row i of both systems has the same prompt, noise and mask. What is exchanged is the unit that was
sampled; where several rows come from one prompt or session, pass `clusters`, and they are exchanged together.

Distances between sets (Frechet, kernel) must not be bootstrapped: a set drawn with replacement repeats pictures, which
alone moves the distance. They are compared by exchanging outputs, and by halves drawn without replacement.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from llmga.metrics.features import MetricError, checked_pair, checked_set, require_samples
from llmga.metrics.intervals import Interval

_EQUAL = 1e-9  # differences that rounding alone tells apart count as equal


class Pool(Protocol):
    """Pictures of which subsets are measured."""

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """(K, M) numbers of pictures to (K,) distances."""
        ...


class SetReference(Protocol):
    """A set that others are measured against, as `FrechetReference` and `KernelReference` are."""

    def pool(self, features: Any) -> Pool:
        """Features, (N, D), ready to be measured."""
        ...


@dataclass(frozen=True, slots=True)
class PermutationTest:
    """How rarely chance alone makes a difference as large.

    Attributes:
        difference: of a less b, as measured.
        p: two-sided, never below 1 / (draws + 1).
        n: number of independent units.
        draws: exchanges that were tried.
    """

    difference: float
    p: float
    n: int
    draws: int


def permute_means(
    a: ArrayLike, b: ArrayLike, draws: int = 9_999, seed: int = 0, clusters: Sequence[Hashable] | None = None
) -> PermutationTest:
    """Test the difference of two means by exchanging the values of units.

    Args:
        a, b: one number each per measurement.
    Raises:
        MetricError: lengths that differ, values that are not finite, fewer than 2 units, or no draws.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise MetricError(f"a is {first.shape} and b {second.shape}; expected one number of each per unit")
    difference = first - second
    if not np.isfinite(difference).all():
        raise MetricError(
            f"a or b is not finite at {int(np.argmin(np.isfinite(difference)))}; leave out what was not measured"
        )
    by_unit = np.bincount(_units(len(first), clusters), difference)
    signs = 1 - 2 * _exchanges(len(by_unit), draws, seed).astype(np.float64)
    return _judge(float(by_unit.sum() / len(first)), signs @ by_unit / len(first), len(by_unit))


def permute_distances(
    a: Any,
    b: Any,
    reference: SetReference,
    draws: int = 999,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> PermutationTest:
    """Test the difference of two sets' distances to a reference by exchanging their pictures prompt by prompt.

    Args:
        a, b: (N, D) features, row by row of the same prompt.
        reference: a `FrechetReference` or `KernelReference`.
    Raises:
        MetricError: counts or dimensions that differ, values that are not finite, fewer than 2 units, or no draws.
    """
    count, pool = _common_pool({"a": a, "b": b}, reference)
    units = _units(count, clusters)
    num_units = int(units.max()) + 1
    as_measured = np.zeros((1, count), bool)
    exchanged = np.concatenate([as_measured, _exchanges(num_units, draws, seed)[:, units]])
    numbers = np.arange(count)
    both_sides = np.concatenate([numbers + count * exchanged, numbers + count * ~exchanged])
    of_a, of_b = np.split(pool.distances(both_sides), 2)
    differences = of_a - of_b
    return _judge(float(differences[0]), differences[1:], num_units)


def half_sample_difference(
    a: Any, b: Any, reference: SetReference, draws: int = 100, seed: int = 0, level: float = 0.95
) -> Interval:
    """The difference of two sets' distances to a reference; see `half_sample_contrast`."""
    return half_sample_contrast({"a": a, "b": b}, (1, -1), reference, draws, seed, level)


def half_sample_contrast(
    sets: Mapping[str, Any],
    weights: Sequence[float],
    reference: SetReference,
    draws: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A weighted sum of several sets' distances to a reference, with an interval from halves of the prompts.

    Weights of 1 and -1 make a difference, of 1, -1, -1 and 1 an interaction. Halves are drawn without replacement, the
    same for all sets; their spread is taken as it is, not scaled down to the whole set. Measured, the interval is as
    wide as it should be in 4 dimensions, and 1.3 to 1.8 times too wide in 64. The reference stays as it is: the
    interval is about the prompts, not about another draw of the reference.

    Args:
        sets: name -> (N, D) features, row by row of the same prompt.
        weights: one for each set.
    Raises:
        MetricError: as `permute_distances`, or fewer than 8 pictures.
    """
    if not 0 < level < 1 or draws < 2:
        raise MetricError(
            f"level {level} and {draws} draws; expected a confidence between 0 and 1, and 2 or more draws"
        )
    if not sets or len(sets) != len(weights):
        raise MetricError(f"there are {len(sets)} sets and {len(weights)} weights; expected one weight for each")
    count, pool = _common_pool(sets, reference, at_least=8)
    rng = np.random.default_rng(seed)
    halves = np.stack([rng.choice(count, count // 2, replace=False) for _ in range(draws)])

    def contrast(rows: np.ndarray) -> np.ndarray:
        parts = [weight * pool.distances(rows + count * place) for place, weight in enumerate(weights)]
        return np.sum(parts, axis=0)

    spread = float(np.std(contrast(halves), ddof=1))
    value = float(contrast(np.arange(count)[None])[0])
    reach = NormalDist().inv_cdf((1 + level) / 2) * spread
    return Interval(value, value - reach, value + reach, count, f"{draws} paired half-samples, undivided")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given: below 0.05 where Holm's procedure rejects at 5 %.

    Raises:
        MetricError: a value is not in [0, 1].
    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise MetricError(f"{p} is no p-value; expected 0 to 1")
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected


def holm_levels(p_values: Sequence[float], level: float = 0.95) -> list[float]:
    """Confidence that each comparison's interval must have for Holm's correction: the smallest p has the strictest.

    Args:
        level: of all intervals together.
    Raises:
        MetricError: as `holm`.
    """
    holm(p_values)
    levels = [level] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        levels[place] = 1 - (1 - level) / (len(p_values) - rank)
    return levels


def _judge(difference: float, exchanged: np.ndarray, n: int) -> PermutationTest:
    """The share of exchanges that do as much as was seen; what was seen is one of them."""
    as_large = np.abs(exchanged) >= abs(difference) * (1 - _EQUAL)
    return PermutationTest(difference, float((1 + as_large.sum()) / (1 + len(exchanged))), n, len(exchanged))


def _common_pool(sets: Mapping[str, Any], reference: SetReference, at_least: int = 2) -> tuple[int, Pool]:
    """Number of rows of each set, and all as one pool, one set's behind another's."""
    first, *others = sets
    rows = [checked_set(sets[first], first, at_least)]
    for name in others:
        rows.append(checked_pair(sets[first], sets[name], (first, name), at_least)[1])
        if len(rows[-1]) != len(rows[0]):
            raise MetricError(
                f"{first} has {len(rows[0]):,} pictures and {name} {len(rows[-1]):,}; pair them: one of each per prompt"
            )
    return len(rows[0]), reference.pool(np.concatenate(rows))


def _units(count: int, clusters: Sequence[Hashable] | None) -> np.ndarray:
    """The number of the unit that each row belongs to."""
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise MetricError(f"there are {len(clusters)} clusters for {count} rows; expected one for each")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)


def _exchanges(units: int, draws: int, seed: int) -> np.ndarray:
    """(draws, units), True where a unit's outputs change sides."""
    require_samples(units, 2, "a paired test")
    if draws < 1:
        raise MetricError(f"{draws} draws; expected 1 or more")
    return np.random.default_rng(seed).integers(0, 2, (draws, units)).astype(bool)
