"""Sensor noise on a batch: Gaussian and Poisson, in colour or grey, strength and randomness of each picture its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)


def add_gaussian_noise(images: Tensor, sigma: Tensor, field: Tensor) -> Tensor:
    """clamp(images + field * sigma / 255).

    Args:
        images: (B, 3, H, W) in [0, 1].
        sigma: (B,) in grey levels of 255.
        field: (B, 3, H, W) standard normal, equal in all channels for grey noise.
    """
    return (images + field * (sigma.to(images) / 255)[:, None, None, None]).clamp(0, 1)


def gaussian_field(images: Tensor, gray: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal numbers for `add_gaussian_noise`, each picture's from its own generator.

    Args:
        images: (B, 3, H, W), for size and device.
        gray: (B,) bool, whether a picture's channels share their noise.
        generators: B of them, on the device of the images.
    """
    _, channels, height, width = images.shape
    fields = [
        torch.randn(1 if flag else channels, height, width, generator=generator, device=images.device)
        for flag, generator in zip(gray.tolist(), generators, strict=True)
    ]
    return torch.stack([field.expand(channels, height, width) for field in fields]).to(images.dtype)


def add_poisson_noise(images: Tensor, scale: Tensor, gray: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """clamp(images + scale * (Poisson(V x) / V - x)), with x the picture in 8 bits, or its luma for grey noise.

    V is the number of grey levels that occur in x, rounded up to a power of two: noise is stronger where few do.

    Args:
        images: (B, 3, H, W) in [0, 1].
        scale: (B,) factor on the noise.
        gray, generators: see `gaussian_field`.
    """
    luma = (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    base = torch.where(gray.to(images.device)[:, None, None, None], luma, images)
    levels = (base * 255).round().clamp(0, 255)
    values = 2 ** _count_levels(levels).log2().ceil()[:, None, None, None]
    clean = levels / 255
    drawn = [
        torch.poisson(rate[:1] if flag else rate, generator=generator).expand_as(rate)
        for rate, flag, generator in zip(clean * values, gray.tolist(), generators, strict=True)
    ]
    noise = torch.stack(drawn) / values - clean
    return (images + noise * scale.to(images)[:, None, None, None]).clamp(0, 1)


def _count_levels(levels: Tensor) -> Tensor:
    """How many of the 256 levels occur in each picture: (B, C, H, W) in 0..255 to (B,)."""
    seen = levels.new_zeros(len(levels), 256)
    return seen.scatter_(1, levels.flatten(1).long(), 1.0).sum(dim=1)
