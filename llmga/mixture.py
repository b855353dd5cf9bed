"""Which row of which source is the i-th example of a run.

The answer is a pure function of (sources, weights, seed, i). Nothing else has a say: not the number of ranks, not the
workers, not where a run was stopped. Resuming is therefore nothing but starting at another index.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PLACES, _ROWS = 0, 1  # the two random streams of a source: where its draws stand, and in which order its rows come
_JITTER_LEVELS = 1 << 16


class MixtureError(ValueError):
    """A set of sources and weights that nothing can be drawn from; the message names the source."""


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What one source gives to a run: its rows, its share of the weights, its draws, and how often each row comes."""

    name: str
    rows: int
    weight: float
    draws: int
    epochs: float


class Mixture:
    """A seeded order over several sources in which every stretch follows the weights.

    The j-th draw of a source with share p is due at the time (j + u) / p, with u random in (0, 1); sorting all draws
    by their due times gives the order. At any time a source is less than one draw away from its due, so that after
    any n examples, of K sources, `abs(draws - p * n) < 1 + p * K`: the bound does not grow with n. The random u keeps
    the pattern from locking onto a batch size or a number of ranks (equal weights alternate, but not A B A B).
    A source is walked in seeded permutations: all its rows once, then all its rows once again in another order.

    The order does not depend on `total`: a longer run begins with the shorter one. When the weights are the numbers of
    rows and `total` is their sum, every row of every source comes exactly once.

    Args:
        lengths: rows of each source.
        weights: relative weight of each source, 0 to leave it out, None for its number of rows.
        total: examples in the run.
        seed: of the order; the same seed gives the same order on every machine.
        names: of the sources, for messages and `summary`.

    Attributes:
        source: (total,) int16, index of the source of each example.
        row: (total,) int32, or int64 past 2**31 rows, row inside that source.
        epoch: (total,) int32, how many times the source had been walked through before.

    Raises:
        MixtureError: a weight that is negative or not finite, a weighted source without rows, nothing to draw from.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float | None] | None,
        total: int,
        seed: int,
        names: Sequence[str] | None = None,
    ) -> None:
        self.names = tuple(names) if names is not None else tuple(f"source {k}" for k in range(len(lengths)))
        self.lengths = tuple(int(length) for length in lengths)
        self.shares = _shares(self.names, self.lengths, weights)
        self.seed = seed
        if total < 1:
            raise MixtureError(f"a mixture of {total} examples was asked for, expected at least 1; check run.max_steps")

        drawn = [k for k, share in enumerate(self.shares) if share > 0]
        places = [_places(self.shares[k], total, len(drawn), np.random.default_rng([seed, k, _PLACES])) for k in drawn]
        merged = np.argsort(np.concatenate(places), kind="stable")[:total]  # stable: joins runs that are sorted already
        owner = np.repeat(np.arange(len(drawn)), [len(p) for p in places])[merged]

        widest = max(self.lengths)
        self.source = np.asarray(drawn, np.int16)[owner]
        self.row = np.empty(total, np.int32 if widest < 2**31 else np.int64)
        self.epoch = np.empty(total, np.int32)
        for k in drawn:
            at = np.flatnonzero(self.source == k)
            self.row[at] = _rows(self.lengths[k], len(at), np.random.default_rng([seed, k, _ROWS]))
            self.epoch[at] = np.arange(len(at)) // self.lengths[k]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        """(source, row, epoch) of the example at `index`."""
        return int(self.source[index]), int(self.row[index]), int(self.epoch[index])

    def summary(self, until: int | None = None) -> list[SourceShare]:
        """What each source gives to the first `until` examples (to the whole run by default)."""
        draws = np.bincount(self.source[:until], minlength=len(self.lengths))
        return [
            SourceShare(name, rows, share, int(drawn), int(drawn) / rows if rows else 0.0)
            for name, rows, share, drawn in zip(self.names, self.lengths, self.shares, draws, strict=True)
        ]


def rows_per_epoch(lengths: Sequence[int], weights: Sequence[float | None] | None) -> int:
    """Examples in one epoch of a mixture: the rows of the sources that are drawn from, whatever their weights."""
    given = weights if weights is not None else [None] * len(lengths)
    return sum(length for length, weight in zip(lengths, given, strict=True) if weight is None or weight > 0)


def _shares(names: Sequence[str], lengths: Sequence[int], weights: Sequence[float | None] | None) -> tuple[float, ...]:
    """Weights as shares that sum to 1."""
    given = weights if weights is not None else [None] * len(lengths)
    if not len(names) == len(lengths) == len(given):
        raise MixtureError(f"{len(lengths)} sources, {len(given)} weights and {len(names)} names do not match")
    resolved = [float(length if weight is None else weight) for length, weight in zip(lengths, given, strict=True)]
    for name, length, weight in zip(names, lengths, resolved, strict=True):
        if not math.isfinite(weight) or weight < 0:
            raise MixtureError(f"{name} has the weight {weight}, expected a number that is 0 or more")
        if weight > 0 and length < 1:
            raise MixtureError(
                f"{name} has no rows but the weight {weight}; give it weight 0, or check its path and tasks"
            )
    if not sum(resolved) > 0:
        raise MixtureError(
            f"no source can be drawn from: {', '.join(names) or 'none was given'}; give one a weight above 0"
        )
    return tuple(weight / sum(resolved) for weight in resolved)


def _places(share: float, total: int, num_sources: int, rng: np.random.Generator) -> np.ndarray:
    """Due times, ascending, of every draw of one source that can fall among the first `total` examples."""
    # After n examples the time lies within K of n, so no draw due later than total + K is among the first `total`.
    count = math.ceil(share * (total + num_sources)) + 1
    # Rounded to levels well above float error: draw j is due before draw j + 1, exactly, up to 1e10 draws.
    jitter = (np.floor(rng.random(count) * _JITTER_LEVELS) + 0.5) / _JITTER_LEVELS
    return (np.arange(count) + jitter) / share


def _rows(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """The first `count` rows of one permutation of the source after the other."""
    epochs = math.ceil(count / length)
    # Sorting random numbers row by row shuffles all epochs in one call, also those of a source of three rows.
    return np.argsort(rng.random((epochs, length)), axis=1, kind="stable").reshape(-1)[:count]
