"""How well what was put into a hole matches what is around it and what was there: seam, contrast, brightness, PSNR;
and whether what should have stayed did.

Pictures are (B, 3, H, W) floats in [0, 1]; holes are (B, 1, H, W), True or 1 where pixels were put in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MIN_DEVIATION = 0.02  # of the truth inside a hole; gain and bias cannot be told apart in flatter ones


class ColourFit(NamedTuple):
    """How the colours of a hole differ from the truth, by least squares of `images = gain * targets + bias`.

    Attributes:
        gain: (B,) float64, 1 where contrast is right; not a number in holes without contrast, or without pixels.
        bias: (B,) float64, 0 where brightness is right; of the same pictures.
    """

    gain: Tensor
    bias: Tensor


def seam_excess(images: Tensor, targets: Tensor, holes: Tensor) -> Tensor:
    """Mean absolute step between neighbours on both sides of the hole's border, less the same of the truth.

    Returns:
        (B,) float64, in units of [0, 1]; 0 is as in the truth; not a number where there is no border.
    Raises:
        ValueError: shapes that do not go together.
    """
    inside = _checked(images, targets, holes)
    return _border_step(images, inside) - _border_step(targets, inside)


def colour_fit(images: Tensor, targets: Tensor, holes: Tensor) -> ColourFit:
    """Contrast and brightness of the hole against the truth, all channels together.

    Args:
        holes: which pixels count; leave out those whose content is wrong, not their colour.
    Raises:
        ValueError: shapes that do not go together.
    """
    weights = _checked(images, targets, holes).double().expand_as(images).flatten(1)
    y, x = images.double().flatten(1), targets.double().flatten(1)
    count = weights.sum(dim=1)

    def mean(values: Tensor) -> Tensor:
        return (values * weights).sum(dim=1) / count  # 0 / 0 where there is no hole: not a number, as promised

    mean_x, mean_y = mean(x), mean(y)
    variance = mean(x * x) - mean_x**2
    gain = (mean(x * y) - mean_x * mean_y) / variance
    gain = gain.where(variance > _MIN_DEVIATION**2, torch.nan)
    return ColourFit(gain, mean_y - gain * mean_x)


def hole_psnr(images: Tensor, targets: Tensor, holes: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of RGB inside the hole alone, in dB; (B,) float64, not a number without a hole."""
    inside = _checked(images, targets, holes)
    return -10 * torch.log10(_mean_inside((images.double() - targets.double()).square(), inside))


def hole_l1(images: Tensor, targets: Tensor, holes: Tensor) -> Tensor:
    """Mean absolute difference of RGB inside the hole alone; (B,) float64, not a number without a hole."""
    return _mean_inside((images.double() - targets.double()).abs(), _checked(images, targets, holes))


def preserved_l1(images: Tensor, targets: Tensor, holes: Tensor) -> Tensor:
    """Mean absolute difference of RGB outside the hole: what a system does to pixels that it should keep.

    Measure its raw output: in one with the kept pixels pasted back this is 0 by construction.

    Returns:
        (B,) float64, not a number where nothing is kept.
    Raises:
        ValueError: shapes that do not go together.
    """
    return _mean_inside((images.double() - targets.double()).abs(), ~_checked(images, targets, holes))


def preserved_psnr(images: Tensor, targets: Tensor, holes: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of RGB outside the hole, in dB; as `preserved_l1`."""
    kept = ~_checked(images, targets, holes)
    return -10 * torch.log10(_mean_inside((images.double() - targets.double()).square(), kept))


def _mean_inside(values: Tensor, inside: Tensor) -> Tensor:
    """(B,) mean over the channels of chosen pixels; 0 / 0 where there are none."""
    weights = inside.double().expand_as(values)
    return (values * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))


def _border_step(images: Tensor, inside: Tensor) -> Tensor:
    """(B,) mean absolute difference of RGB over all pairs of neighbours of which one lies inside."""
    total, pairs = torch.zeros(len(images), dtype=torch.float64), torch.zeros(len(images), dtype=torch.float64)
    for dim in (2, 3):
        length = images.shape[dim] - 1
        first, second = (images.double().narrow(dim, start, length) for start in (0, 1))
        crosses = (inside.narrow(dim, 0, length) != inside.narrow(dim, 1, length)).double()
        total += ((first - second).abs().mean(dim=1, keepdim=True) * crosses).sum(dim=(1, 2, 3)).cpu()
        pairs += crosses.sum(dim=(1, 2, 3)).cpu()
    return total / pairs


def _checked(images: Tensor, targets: Tensor, holes: Tensor) -> Tensor:
    """The holes as (B, 1, H, W) bool."""
    batch, _, height, width = images.shape if images.ndim == 4 else (0, 0, 0, 0)
    if images.shape != targets.shape or holes.shape != (batch, 1, height, width):
        raise ValueError(
            f"images are {tuple(images.shape)}, targets {tuple(targets.shape)} and holes {tuple(holes.shape)}; "
            "expected (B, 3, H, W) twice and (B, 1, H, W)"
        )
    return holes >= 0.5 if holes.is_floating_point() else holes.bool()
