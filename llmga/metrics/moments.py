"""Mean and covariance of features, gathered batch by batch and merged across ranks and shards."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llmga.metrics.features import MetricError, checked_features, require_samples


class Moments:
    """How many rows there were, their mean, and the products of their deviations from it; all float64.

    Parts are merged by the pairwise update, which loses nothing where values are large beside their spread. How the
    rows were divided changes the result by rounding alone.

    Attributes:
        n: rows so far.
        mean: (D,)
        scatter: (D, D), the sum of outer products of deviations from the mean.
    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    @property
    def dim(self) -> int:
        """Number of features."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), over n - 1.

        Raises:
            MetricError: fewer than 2 rows.
        """
        require_samples(self.n, 2, "the set")
        return self.scatter / (self.n - 1)

    def update(self, features: Any) -> None:
        """Add rows, (N, D).

        Raises:
            MetricError: no rows, another D, or values that are not finite.
        """
        rows = checked_features(features)
        part = Moments(rows.shape[1])
        part.n, part.mean = len(rows), rows.mean(axis=0)
        deviations = rows - part.mean
        part.scatter = deviations.T @ deviations
        self.merge(part)

    def merge(self, other: "Moments") -> None:
        """Add what another one has gathered.

        Raises:
            MetricError: of another dimension.
        """
        if other.dim != self.dim:
            raise MetricError(f"features of {other.dim} dimensions cannot be added to those of {self.dim}")
        if other.n == 0:
            return
        n = self.n + other.n
        step = other.mean - self.mean
        self.scatter += other.scatter + np.outer(step, step) * (self.n * other.n / n)
        self.mean = self.mean + step * (other.n / n)
        self.n = n

    def state(self) -> dict[str, np.ndarray]:
        """Arrays to gather or to keep in a file (`numpy.savez`)."""
        return {"n": np.array(self.n), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "Moments":
        """What `state` gave.

        Raises:
            MetricError: arrays that do not go together.
        """
        if not {"n", "mean", "scatter"} <= state.keys():
            raise MetricError(f"moments have {', '.join(sorted(state)) or 'nothing'}; expected n, mean and scatter")
        moments = cls(len(state["mean"]))
        if state["scatter"].shape != moments.scatter.shape:
            raise MetricError(f"scatter is {state['scatter'].shape}; expected {moments.scatter.shape}, as mean has it")
        moments.n = int(state["n"])
        moments.mean, moments.scatter = np.array(state["mean"], np.float64), np.array(state["scatter"], np.float64)
        return moments


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """What ranks or shards have gathered, as one; the parts stay as they are.

    Raises:
        MetricError: no parts, or of different dimensions.
    """
    merged: Moments | None = None
    for part in parts:
        merged = merged or Moments(part.dim)
        merged.merge(part)
    if merged is None:
        raise MetricError("there are no moments to merge; expected those of one shard or more")
    return merged
