"""Mirrored borders of any width: plain reflection where the picture is large enough, back and forth where not."""

import torch
from torch import Tensor
from torch.nn import functional as F


def reflect(images: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Add mirrored pixels around (B, C, H, W) of any type; the border itself is not repeated (reflect-101)."""
    height, width = images.shape[-2:]
    if images.is_floating_point() and max(left, right) < width and max(top, bottom) < height:
        return F.pad(images, (left, right, top, bottom), mode="reflect")
    for dim, before, after in ((-2, top, bottom), (-1, left, right)):
        if before or after:
            side = images.shape[dim]
            period = max(1, 2 * (side - 1))
            index = torch.arange(-before, side + after, device=images.device) % period
            images = images.index_select(dim, torch.where(index < side, index, period - index))
    return images
