"""Blur: kernels of every family, filtering a batch with one kernel per picture, and sharpening."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llmga.diffrir.padding import reflect

KernelKind = Literal[
    "iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc", "identity"
]

SHARPEN_SIZE, SHARPEN_SIGMA = 51, 8.0
SHARPEN_WEIGHT, SHARPEN_THRESHOLD = 0.5, 10 / 255


def blur_kernel(
    kind: KernelKind, size: int, sigma_x: float, sigma_y: float | None = None, rotation: float = 0.0, beta: float = 1.0
) -> np.ndarray:
    """A bell-shaped kernel: Gaussian exp(-Q/2), generalised exp(-Q^beta / 2) or plateau 1 / (1 + Q^beta).

    Q is the squared Mahalanobis distance from the centre, with axes sigma_x and sigma_y turned by `rotation`.

    Args:
        kind: family, and whether both axes are `sigma_x` ("iso") or not ("aniso").
        size: odd side in pixels.
        sigma_x, sigma_y: pixels.
        rotation: radians.
        beta: shape of the generalised and plateau families.
    Returns:
        (size, size) float64 with sum 1.
    """
    family, _, symmetry = kind.rpartition("_")
    if symmetry == "iso":
        sigma_y, rotation = sigma_x, 0.0
    assert sigma_y is not None and symmetry in ("iso", "aniso"), kind
    turn = np.array([[math.cos(rotation), -math.sin(rotation)], [math.sin(rotation), math.cos(rotation)]])
    precision = turn @ np.diag([sigma_x**-2, sigma_y**-2]) @ turn.T
    y, x = _offsets(size)
    distance = precision[0, 0] * x * x + 2 * precision[0, 1] * x * y + precision[1, 1] * y * y
    kernel = 1 / (1 + distance**beta) if family == "plateau" else np.exp(-0.5 * distance ** (beta if family else 1))
    return kernel / kernel.sum()


def sinc_kernel(size: int, cutoff: float) -> np.ndarray:
    """The ideal circular low-pass, cut to a square: it rings.

    Args:
        size: odd side in pixels.
        cutoff: radians per pixel, up to pi.
    Returns:
        (size, size) float64 with sum 1.
    """
    radius = np.hypot(*_offsets(size))
    with np.errstate(divide="ignore", invalid="ignore"):
        bessel = torch.special.bessel_j1(torch.from_numpy(cutoff * radius)).numpy()
        kernel = np.where(radius == 0, cutoff**2 / (4 * math.pi), cutoff * bessel / (2 * math.pi * radius))
    return kernel / kernel.sum()


def identity_kernel(size: int) -> np.ndarray:
    """(size, size) that leaves pictures as they are."""
    return np.pad(np.ones((1, 1)), size // 2)


def pad_kernel(kernel: np.ndarray, size: int) -> np.ndarray:
    """A kernel with zeros around it, up to (size, size)."""
    return np.pad(kernel, (size - len(kernel)) // 2)


def filter_batch(images: Tensor, kernels: Tensor) -> Tensor:
    """Correlate each picture with its own kernel, the same for all channels; borders are mirrored.

    Args:
        images: (B, C, H, W).
        kernels: (B, k, k), k odd.
    """
    batch, channels, height, width = images.shape
    border = kernels.shape[-1] // 2
    padded = reflect(images, border, border, border, border)
    weight = kernels.to(images).repeat_interleave(channels, dim=0)[:, None]
    planes = padded.reshape(1, batch * channels, *padded.shape[2:])
    return F.conv2d(planes, weight, groups=batch * channels).reshape(batch, channels, height, width)


def sharpen(images: Tensor) -> Tensor:
    """Unsharp masking where the detail is strong, blended softly: the published targets of the V2 runs.

    Args:
        images: (B, 3, H, W) in [0, 1].
    """
    detail = images - _blur_widely(images)
    strong = _blur_widely((detail.abs() > SHARPEN_THRESHOLD).to(images))
    return strong * (images + SHARPEN_WEIGHT * detail).clamp(0, 1) + (1 - strong) * images


def _blur_widely(images: Tensor) -> Tensor:
    """A Gaussian of 51 x 51, as two passes of 51."""
    offsets = torch.arange(SHARPEN_SIZE, dtype=torch.float64) - SHARPEN_SIZE // 2
    line = torch.exp(-0.5 * (offsets / SHARPEN_SIGMA) ** 2)
    line = (line / line.sum()).to(images)
    channels, border = images.shape[1], SHARPEN_SIZE // 2
    padded = reflect(images, border, border, border, border)
    rows = F.conv2d(padded, line.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, line.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def _offsets(size: int) -> tuple[np.ndarray, np.ndarray]:
    """y and x of every pixel, from the centre."""
    line = np.arange(size) - size // 2
    y, x = np.meshgrid(line, line, indexing="ij")
    return y.astype(np.float64), x.astype(np.float64)
