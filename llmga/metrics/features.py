"""Sets of features as the metrics take them: what is refused, and which rows of two sets belong together.

A feature array has one row for each picture. Whatever network it comes from, the same things go wrong: a set is empty,
too small, of another length than its partner, holds NaN, or is the same vector again and again.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

_NAMED_IDS = 5  # in one message
_STEADY = 5  # pictures for each dimension, below which the bias of a Frechet distance outweighs most differences


class MetricError(ValueError):
    """What is to be measured cannot be; the message says why and what would do."""


def checked_features(features: Any, name: str = "features", at_least: int = 1) -> np.ndarray:
    """Features as float64 rows.

    Args:
        features: (N, D) array, tensor or nested list.
        name: how messages call the set.
        at_least: rows that are needed.
    Raises:
        MetricError: not two-dimensional, fewer rows than needed, or values that are not finite.
    """
    if hasattr(features, "detach"):  # a tensor, of whatever precision and device; numbers alone need no torch
        features = features.detach().double().cpu().numpy()
    rows = np.asarray(features, dtype=np.float64)
    if rows.size == 0:
        raise MetricError(f"{name} is empty ({rows.shape}); expected features of {max(at_least, 1)} or more pictures")
    if rows.ndim != 2:
        raise MetricError(f"{name} has shape {rows.shape}; expected (pictures, dimensions)")
    require_samples(len(rows), at_least, name)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise MetricError(
            f"{name} holds values that are not finite in {bad.sum():,} of {len(rows):,} rows, first in row "
            f"{bad.argmax()}; look at that picture and at the extractor's precision"
        )
    return rows


def checked_set(features: Any, name: str = "features", at_least: int = 2) -> np.ndarray:
    """`checked_features` of a set whose spread matters: refuses one in which all rows are the same.

    Raises:
        MetricError: as there, or no row differs from the first.
    """
    rows = checked_features(features, name, at_least)
    if (rows == rows[0]).all():
        raise MetricError(
            f"all {len(rows):,} rows of {name} are the same; either every picture is the same file, or the extractor's "
            "weights are not what they should be"
        )
    return rows


def checked_pair(first: Any, second: Any, names: tuple[str, str], at_least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """`checked_set` of two sets that come from one extractor.

    Raises:
        MetricError: as there, or of different dimensions.
    """
    a, b = checked_set(first, names[0], at_least), checked_set(second, names[1], at_least)
    if a.shape[1] != b.shape[1]:
        raise MetricError(
            f"{names[0]} has {a.shape[1]} dimensions and {names[1]} {b.shape[1]}; extract both with the same network"
        )
    return a, b


def require_samples(found: int, needed: int, name: str = "the set") -> None:
    """Refuse a set that is too small, naming the number needed.

    Raises:
        MetricError: fewer than needed.
    """
    if found < needed:
        raise MetricError(f"{name} has {found:,} pictures; at least {needed:,} are needed: add {needed - found:,} more")


def require_frechet_samples(counts: Mapping[str, int], dim: int) -> str | None:
    """Whether sets are large enough for a Frechet distance to be published, and the same in size.

    The distance is biased upwards by about 1 / n; below as many pictures as dimensions the covariance is singular.

    Args:
        counts: name of a set -> its number of pictures.
        dim: of the features.
    Returns:
        A warning to print beside the number where a set has less than five pictures for each dimension, else None.
    Raises:
        MetricError: a set has fewer pictures than dimensions, or the numbers differ.
    """
    for name, count in counts.items():
        if count < dim:
            raise MetricError(
                f"{name} has {count:,} pictures for {dim:,} dimensions; a Frechet distance needs {dim:,} at least and "
                f"{_STEADY * dim:,} to be steady: add {dim - count:,} more, or report the kernel distance, which has "
                "no such bias"
            )
    require_equal_counts(counts)
    smallest = min(counts.values())
    if smallest < _STEADY * dim:
        return (
            f"{smallest:,} pictures are less than {_STEADY} for each of {dim:,} dimensions ({_STEADY * dim:,}): "
            "compare with distances of the same number of pictures only"
        )
    return None


def require_equal_counts(counts: Mapping[str, int]) -> None:
    """Refuse sets of different sizes: distances depend on the number of pictures.

    Args:
        counts: name of a set -> its number of pictures.
    Raises:
        MetricError: the numbers differ.
    """
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} has {count:,}" for name, count in counts.items())
        raise MetricError(f"sets differ in size: {shown}; use the same {min(counts.values()):,} of each")


def require_disjoint(reference: Collection[Hashable], trained_on: Collection[Hashable], force: bool = False) -> int:
    """Refuse a reference set that shares pictures with what a system was trained on.

    Args:
        reference, trained_on: ids.
        force: count what is shared and go on.
    Returns:
        Number of shared ids, for the result's protocol.
    Raises:
        MetricError: some are shared; it names the first.
    """
    known = set(trained_on)
    shared = [name for name in dict.fromkeys(reference) if name in known]
    if shared and not force:
        raise MetricError(
            f"{len(shared):,} of {len(set(reference)):,} reference pictures were trained on: {name_some(shared)}; take "
            "a reference set that training has not seen"
        )
    return len(shared)


def paired_rows(first: Sequence[Hashable], second: Sequence[Hashable], names: tuple[str, str]) -> np.ndarray:
    """Which row of `second` belongs to each row of `first`.

    Args:
        first, second: the ids of the rows.
    Returns:
        (N,) int64, so that `second_values[rows]` stand in the order of `first`.
    Raises:
        MetricError: an id comes twice, or on one side alone.
    """
    for ids, name in zip((first, second), names, strict=True):
        twice = [key for key, count in Counter(ids).items() if count > 1]
        if twice:
            raise MetricError(
                f"{name} has {len(twice):,} ids more than once: {name_some(twice)}; give each picture one"
            )
    places = {key: row for row, key in enumerate(second)}
    lacking = [key for key in first if key not in places]
    if lacking:
        raise MetricError(f"{names[1]} lacks {len(lacking):,} ids of {names[0]}: {name_some(lacking)}")
    if len(first) < len(second):
        known = set(first)
        lacking = [key for key in second if key not in known]
        raise MetricError(f"{names[0]} lacks {len(lacking):,} ids of {names[1]}: {name_some(lacking)}")
    return np.array([places[key] for key in first], dtype=np.int64)


def paired_cosine(first: Any, second: Any) -> np.ndarray:
    """Cosine of the features of each picture with those of its partner: CLIP-I with CLIP's, DINO with DINO's.

    Args:
        first, second: (N, D), row by row one pair.
    Returns:
        (N,) float64 in [-1, 1].
    Raises:
        MetricError: shapes that differ, values that are not finite, or a row of zeros, which has no direction.
    """
    a, b = checked_features(first, "first"), checked_features(second, "second")
    if a.shape != b.shape:
        raise MetricError(f"first is {a.shape} and second {b.shape}; expected one row of each for every pair")
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if (lengths == 0).any():
        raise MetricError(f"row {int((lengths == 0).argmax())} holds zeros alone, which have no direction")
    return np.clip((a * b).sum(axis=1) / lengths, -1, 1)


def name_some(ids: Sequence[Hashable]) -> str:
    """The first few ids, for a message."""
    return ", ".join(map(str, ids[:_NAMED_IDS])) + (", ..." if len(ids) > _NAMED_IDS else "")
