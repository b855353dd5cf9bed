"""How near a picture is to the true one."""

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = (65.481, 128.553, 24.966)  # BT.601, studio range
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5


def l1(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference over pixels and channels.

    Args:
        images, targets: (B, 3, H, W) in [0, 1]. Editing is published with pictures brought to the target's size first.
    Returns:
        (B,) float64.
    Raises:
        ValueError: shapes that differ.
    """
    return _difference(images, targets).abs().mean(dim=(1, 2, 3))


def l2(images: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference over pixels and channels; see `l1`."""
    return _difference(images, targets).square().mean(dim=(1, 2, 3))


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of RGB, in dB, infinite for equal pictures; see `l1`."""
    return -10 * torch.log10(l2(images, targets))


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], rounded to 8 bits first, to (B, H, W) float64 in 16 to 235."""
    levels = (images.double().clamp(0, 1) * 255).round() / 255
    return 16 + (levels * levels.new_tensor(_LUMA)[:, None, None]).sum(dim=1)


def psnr_luma(images: Tensor, targets: Tensor, border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio of the luma, in dB; infinite for equal pictures.

    Args:
        images, targets: (B, 3, H, W) in [0, 1].
        border: pixels left out at every side; restoration is published with 0 and, in adversarial phases, 4.
    Returns:
        (B,) float64.
    Raises:
        ValueError: shapes that differ, or nothing left inside the border.
    """
    inside = min(images.shape[-2:]) - 2 * border
    if images.shape != targets.shape or inside < 1:
        raise ValueError(
            f"images are {tuple(images.shape)}, targets {tuple(targets.shape)} and border {border}; "
            "expected equal shapes, larger than twice the border"
        )
    error = luma(images) - luma(targets)
    error = error[:, border : error.shape[1] - border, border : error.shape[2] - border]
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2)))


def ssim_luma(images: Tensor, targets: Tensor, border: int = 0) -> Tensor:
    """Structural similarity of the luma: 1 for equal pictures.

    Means, variances and covariance under a Gaussian window of 11 x 11 with sigma 1.5, averaged where it fits whole.

    Args:
        images, targets: (B, 3, H, W) in [0, 1], at least 11 pixels a side inside the border.
        border: pixels left out at every side.
    Returns:
        (B,) float64.
    Raises:
        ValueError: shapes that differ, or less than the window left inside the border.
    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004).
    """
    inside = min(images.shape[-2:]) - 2 * border
    if images.shape != targets.shape or inside < _SSIM_WINDOW:
        raise ValueError(
            f"images are {tuple(images.shape)}, targets {tuple(targets.shape)} and border {border}; "
            f"expected equal shapes, with {_SSIM_WINDOW} pixels or more a side inside the border"
        )
    x, y = (
        values[:, None, border : values.shape[1] - border, border : values.shape[2] - border]
        for values in (luma(images), luma(targets))
    )
    offsets = torch.arange(_SSIM_WINDOW, dtype=x.dtype, device=x.device) - _SSIM_WINDOW // 2
    line = torch.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    line = line / line.sum()

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (light * structure).mean(dim=(1, 2, 3))


def _difference(images: Tensor, targets: Tensor) -> Tensor:
    """(B, 3, H, W) float64."""
    if images.shape != targets.shape or images.ndim != 4:
        raise ValueError(
            f"images are {tuple(images.shape)} and targets {tuple(targets.shape)}; expected (B, 3, H, W) twice"
        )
    return images.double() - targets.double()
