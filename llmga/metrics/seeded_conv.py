"""A random network with fixed weights, for tests of everything around a metric. Its numbers say nothing of pictures."""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from llmga.metrics.resizing import checked_images

_WIDTHS = (3, 16, 32, 64)
_CLASSES = 10


class SeededConv:
    """Three strided convolutions, averaged over space: 64 features of pictures of any size.

    Args:
        seed: of its weights.
        device: where it runs; pictures are moved there.
    """

    name = "seeded-conv"
    dim = _WIDTHS[-1]
    preprocessing = "none"

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight_hash = f"random, seed {seed}"
        self._device = torch.device(device)
        shapes = [(out, into, 3, 3) for into, out in pairwise(_WIDTHS)]
        self._layers = [
            (torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))).to(self._device)
            for shape in shapes
        ]
        self._classes = torch.randn(self.dim, _CLASSES, generator=generator).to(self._device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, 64) float32."""
        x = checked_images(images).to(self._device).float() / 127.5 - 1
        for weight in self._layers:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """(N, 64) features to (N, 10)."""
        return features.to(self._device) @ self._classes
