"""From columns to metrics with intervals, and from several cells' columns to contrasts."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from llmga.evaluation.bench import Columns, Meter, Score
from llmga.evaluation.config import SetMetric, TestsConfig
from llmga.metrics.comparisons import (
    SetReference,
    half_sample_contrast,
    permute_distances,
    permute_means,
)
from llmga.metrics.extractors import Classifier, Extractor
from llmga.metrics.features import MetricError, require_equal_counts, require_frechet_samples, require_samples
from llmga.metrics.frechet import FrechetReference
from llmga.metrics.inception_score import inception_score
from llmga.metrics.intervals import bootstrap_difference, bootstrap_rate_difference, bootstrap_ratio
from llmga.metrics.kernel_distance import KernelReference
from llmga.metrics.result import Metric, with_interval
from llmga.metrics.verdicts import Contrast

Clusters = Sequence[Hashable] | None
_HALVES_NEED = 8
REFERENCES: dict[str, Callable[[Any], SetReference]] = {
    "frechet": FrechetReference.from_features,
    "kernel": KernelReference,
}


# ---------------------------------------------------------------- one cell


def score_metrics(
    meters: Sequence[Meter], columns: Columns, tests: TestsConfig, clusters: Clusters = None
) -> list[Metric]:
    """The mean of every score, with its interval; what was measured nowhere is left out."""
    found = []
    for name, score in ((name, score) for meter in meters for name, score in meter.scores.items()):
        values, known = _known(columns[name])
        if not known.any():
            continue
        units = None if clusters is None else [clusters[row] for row in np.flatnonzero(known).tolist()]
        if values.ndim == 2:
            right, total = values[known].T
            interval = bootstrap_ratio(right, total, tests.bootstrap, tests.seed, clusters=units)
        else:
            zero = np.zeros(int(known.sum()))
            interval = bootstrap_difference(values[known], zero, tests.bootstrap, tests.seed, clusters=units)
        found.append(with_interval(name, interval, score.unit, score.higher_is_better))
    return found


def require_enough(metrics: Sequence[str], counts: Mapping[str, int], extractor: Extractor, splits: int) -> list[str]:
    """Refuse sets that are too small for their metrics, or of other sizes, before anything is painted.

    Args:
        metrics: kinds, as of `Distance`.
        counts: name of a set -> its number of pictures.
    Returns:
        What to say beside the numbers.
    Raises:
        MetricError: fewer pictures than a metric needs, in which case it names the number.
    """
    said, fewest = [], min(counts.values())
    if "frechet" in metrics:
        said.append(require_frechet_samples(counts, extractor.dim))
    if "kernel" in metrics:
        require_samples(fewest, _HALVES_NEED, "each set of a kernel distance")
        require_equal_counts(counts)
    if "inception_score" in metrics:
        if not isinstance(extractor, Classifier):
            raise MetricError(f"{extractor.name} tells no classes; leave inception_score out, or take inception-tf")
        require_samples(fewest, 2 * splits, f"the set of an Inception score of {splits} splits")
    return [each for each in said if each is not None]


@dataclass(frozen=True)
class Distance:
    """How a set is compared with the reference, or looked at alone: by which columns of features.

    Attributes:
        kind: "frechet", "kernel", or "inception_score", which needs no reference.
        column: of the set's features; those of the reference are called `features`.
    """

    kind: SetMetric
    column: str = "features"

    @property
    def is_distance(self) -> bool:
        """Whether it is measured from the reference."""
        return self.kind in REFERENCES


def distances_of(metrics: Sequence[str]) -> dict[str, Distance]:
    """Those of the metrics that are about sets, each on the set's own features."""
    return {name: Distance(name) for name in get_args(SetMetric) if name in metrics}


def set_metrics(
    distances: Mapping[str, Distance], columns: Columns, reference: Columns, extractor: Extractor, splits: int
) -> list[Metric]:
    """Distances to the reference and Inception scores.

    Distances of single sets have no interval: what can be told is a difference of two.
    """
    found = []
    for name, distance in distances.items():
        features = columns[distance.column]
        count = len(features)
        if distance.is_distance:
            pool = REFERENCES[distance.kind](reference["features"]).pool(features)
            value = float(pool.distances(np.arange(count)[None])[0])
            found.append(Metric(name, value, count, "", False, ci_method="none: see comparisons"))
        elif isinstance(extractor, Classifier):
            score = inception_score(extractor.logits(torch.from_numpy(features)), splits)
            said = f"none: standard deviation over {splits} splits is {score.sd:.4g}"
            found.append(Metric(name, score.mean, count, "", True, ci_method=said))
    return found


# ---------------------------------------------------------------- several cells


@dataclass(frozen=True)
class Sides:
    """What a contrast is between: the sum of some cells' values, each with its weight.

    Attributes:
        a, b: what messages and documents call the sides.
        weights: cell -> weight; 1 and -1 for a difference, four of them for an interaction.
    """

    a: str
    b: str
    weights: Mapping[str, float]
    claim: str = ""

    @classmethod
    def of(cls, a: str, b: str, claim: str = "") -> "Sides":
        """The difference of two cells."""
        return cls(a, b, {a: 1.0, b: -1.0}, claim)


def score_contrast(
    name: str,
    score: Score,
    values: Mapping[str, np.ndarray],
    sides: Sides,
    tests: TestsConfig,
    clusters: Clusters = None,
) -> Contrast | None:
    """The contrast of a score, paired by picture; None where neither direction is better, or too little was measured.

    Args:
        values: cell -> its column, in the same order of ids.
    """
    if score.higher_is_better is None:
        return None
    parts = [_known(values[cell]) for cell in sides.weights]
    known = np.logical_and.reduce([known for _, known in parts])
    weights = list(sides.weights.values())
    units = None if clusters is None else [clusters[row] for row in np.flatnonzero(known).tolist()]
    if (known.sum() if units is None else len(set(units))) < 2:
        return None
    columns = [column[known] for column, _ in parts]
    total = columns[0][:, 1] if columns[0].ndim == 2 else np.ones(int(known.sum()))
    if any(column.ndim == 2 and (column[:, 1] != total).any() for column in columns):
        raise MetricError(f"{sides.a} and {sides.b} were asked for different facts ({name}); measure the same texts")
    right = np.stack([column[:, 0] if column.ndim == 2 else column for column in columns])
    plus, minus = (sum(abs(w) * r for w, r in zip(weights, right, strict=True) if w * sign > 0) for sign in (1, -1))
    zero = np.zeros_like(total, dtype=np.float64)
    first, second = zero + plus, zero + minus

    def interval(level: float) -> Any:
        if columns[0].ndim == 2:
            return bootstrap_rate_difference(first, second, total, tests.bootstrap, tests.seed, level, units)
        return bootstrap_difference(first, second, tests.bootstrap, tests.seed, level, units)

    scale = total.mean()
    tested = permute_means(first / scale, second / scale, 10 * tests.permutations, tests.seed, units)
    return Contrast(
        a=sides.a,
        b=sides.b,
        metric=name,
        higher_is_better=score.higher_is_better,
        interval=interval,
        p=tested.p,
        test=f"paired permutation, {tested.draws} draws",
        claim=sides.claim,
        smallest_effect=tests.smallest_effects.get(name, 0.0),
    )


def distance_contrast(
    name: str,
    distance: Distance,
    columns: Mapping[str, Columns],
    reference: Columns,
    sides: Sides,
    tests: TestsConfig,
) -> Contrast:
    """The contrast of a distance to the reference: an interval always, a p-value where two cells are compared."""
    features = {cell: columns[cell][distance.column] for cell in sides.weights}
    weights = list(sides.weights.values())
    base = REFERENCES[distance.kind](reference["features"])
    p = None
    if weights == [1.0, -1.0]:
        a, b = features.values()
        p = permute_distances(a, b, base, tests.permutations, tests.seed).p
    return Contrast(
        a=sides.a,
        b=sides.b,
        metric=name,
        higher_is_better=False,
        interval=lambda level: half_sample_contrast(features, weights, base, tests.halves, tests.seed, level),
        p=p,
        test="none" if p is None else f"paired permutation, {tests.permutations} draws",
        claim=sides.claim,
        smallest_effect=tests.smallest_effects.get(name, 0.0),
    )


def _known(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A column as float64, and the rows in which something was measured."""
    values = column.astype(np.float64)
    return values, (values[:, 1] > 0 if values.ndim == 2 else np.isfinite(values))
