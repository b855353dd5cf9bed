"""Distances of sets beside torch-fidelity and torchmetrics. Run: pytest tests/parity/test_set_metrics.py

Same features, same numbers; torch-fidelity takes means in the precision of the features, hence 1e-5 there.
"""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from llmga.metrics.frechet import feature_frechet_distance
from llmga.metrics.inception_score import inception_score
from llmga.metrics.kernel_distance import kernel_distance


def drawn(seed: int, count: int, dim: int, shift: float = 0.0) -> np.ndarray:
    """Features with a spectrum that falls by two orders of magnitude."""
    return np.random.default_rng(seed).normal(size=(count, dim)) * np.logspace(0, -2, dim) + shift


def test_frechet_distance() -> None:
    a, b = drawn(3, 500, 128).astype(np.float32), drawn(4, 450, 128, shift=0.02).astype(np.float32)
    found = feature_frechet_distance(a, torch.from_numpy(b))
    statistics = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-5)
    moments = [(torch.from_numpy(rows).double().mean(0), torch.from_numpy(rows).double().T.cov()) for rows in (a, b)]
    assert found == pytest.approx(float(_compute_fid(*moments[0], *moments[1])), rel=1e-9)


def test_kernel_distance() -> None:
    a, b = (torch.from_numpy(drawn(seed, 300, 16, shift)) for seed, shift in ((3, 0.0), (4, 0.1)))
    found = kernel_distance(a, b)
    settings = {"kid_subsets": 1, "kid_subset_size": 300, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    theirs = kid_features_to_metric(a, b, **settings, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=0)
    assert found == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert found == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_inception_score() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (505, 12))
    order = np.random.default_rng(7).permutation(505)
    theirs = isc_features_to_metric(torch.from_numpy(logits[order]), splits=10, shuffle=False)
    found = inception_score(torch.from_numpy(logits), splits=10, seed=7)
    assert found.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert found.sd == pytest.approx(theirs["inception_score_std"], rel=1e-9)
