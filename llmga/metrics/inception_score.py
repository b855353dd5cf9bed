"""Inception score: are pictures each of a clear kind, and the kinds many?

Source: Salimans et al., "Improved techniques for training GANs" (2016).
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from llmga.metrics.features import MetricError, checked_features, require_samples


class InceptionScore(NamedTuple):
    """Mean and standard deviation (over the number of splits) of the scores of the splits; 1 is the lowest score."""

    mean: float
    sd: float


def inception_score(logits: Any, splits: int = 10, seed: int = 0) -> InceptionScore:
    """exp of the mean divergence of a picture's classes from those of its split.

    Args:
        logits: (N, C) of a classifier; Inception's published score leaves out the bias of its last layer.
        splits: parts of nearly equal size that the pictures are dealt to.
        seed: of the order in which they are dealt, which does not depend on the order of files then.
    Raises:
        MetricError: no logits, values that are not finite, a single class, or fewer than 2 pictures a split.
    """
    rows = checked_features(logits, "logits")
    if splits < 1 or rows.shape[1] < 2:
        raise MetricError(f"{splits} splits of {rows.shape[1]} classes; expected 1 split and 2 classes or more")
    require_samples(len(rows), 2 * splits, f"an Inception score of {splits} splits")
    log_p = rows - _log_sum_exp(rows, axis=1)
    log_p = log_p[np.random.default_rng(seed).permutation(len(rows))]
    edges = [number * len(rows) // splits for number in range(splits + 1)]
    scores = [_score(log_p[start:end]) for start, end in pairwise(edges)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(log_p: np.ndarray) -> float:
    log_mean = _log_sum_exp(log_p, axis=0) - np.log(len(log_p))
    return float(np.exp((np.exp(log_p) * (log_p - log_mean)).sum(axis=1).mean()))


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    """Logarithm of the sum of exponentials, the axis kept; finite for any finite values."""
    largest = values.max(axis=axis, keepdims=True)
    return largest + np.log(np.exp(values - largest).sum(axis=axis, keepdims=True))
