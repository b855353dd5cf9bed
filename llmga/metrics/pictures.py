"""How near a picture is to the true one."""

import torch
from torch import Tensor

_LUMA = (65.481, 128.553, 24.966)  # BT.601, studio range


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
