"""JPEG's loss on a batch of float pictures, on any device, with a real-valued quality for each."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 8
_LUMA = (
    (16, 12, 14, 14, 18, 24, 49, 72),  # the standard table, transposed as in the published degradation
    (11, 12, 13, 17, 22, 35, 64, 92),
    (10, 14, 16, 22, 37, 55, 78, 95),
    (16, 19, 24, 29, 56, 64, 87, 98),
    (24, 26, 40, 51, 68, 81, 103, 112),
    (40, 58, 57, 87, 109, 104, 121, 100),
    (51, 60, 69, 80, 103, 113, 120, 103),
    (61, 55, 56, 62, 77, 92, 101, 99),
)
_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # the rest is 99
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def compress(images: Tensor, quality: Tensor) -> Tensor:
    """What JPEG leaves of pictures: 4:2:0, without entropy coding, which loses nothing.

    Args:
        images: (B, 3, H, W) in [0, 1], of any size.
        quality: (B,) in (0, 100].
    Returns:
        (B, 3, H, W) in [0, 1].
    Source: the degradation of Real-ESRGAN (arXiv 2107.10833); tests compare it with torchvision's codec.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % (2 * _BLOCK), 0, -height % (2 * _BLOCK)))
    ycbcr = _mix(padded * 255, _TO_YCBCR)
    luma = ycbcr[:, :1]
    chroma = F.avg_pool2d(ycbcr[:, 1:], 2)  # centred at 0: JPEG's +128 and -128 cancel
    factor = _table_factor(quality.to(images))
    luma = _quantise(luma - 128, _tables(images.device, images.dtype)[0], factor) + 128
    chroma = _quantise(chroma, _tables(images.device, images.dtype)[1], factor)
    chroma = chroma.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    rgb = _mix(torch.cat([luma, chroma], dim=1), _TO_RGB)
    return (rgb / 255).clamp(0, 1)[..., :height, :width]


def _quantise(planes: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """Round the cosine coefficients of each 8x8 block of (B, C, H, W) to steps of table * factor."""
    dct = _dct(planes.device, planes.dtype)
    blocks = planes.unflatten(-1, (-1, _BLOCK)).unflatten(-3, (-1, _BLOCK)).transpose(-3, -2)  # (B, C, h, w, 8, 8)
    step = table * factor[:, None, None, None, None, None]
    blocks = dct.T @ ((dct @ blocks @ dct.T / step).round() * step) @ dct
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def _table_factor(quality: Tensor) -> Tensor:
    """How much coarser than the tables, which are those of quality 50."""
    return torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100


def _mix(images: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Linear combinations of the three channels."""
    return torch.einsum("ij,bjhw->bihw", images.new_tensor(matrix), images)


@cache
def _dct(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal cosine transform, (8, 8); rows are frequencies."""
    n = torch.arange(_BLOCK, dtype=torch.float64)
    rows = torch.cos((2 * n + 1) * n[:, None] * math.pi / (2 * _BLOCK)) * math.sqrt(2 / _BLOCK)
    rows[0] /= math.sqrt(2)
    return rows.to(device, dtype)


@cache
def _tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Steps at quality 50 for luma and chroma, (8, 8) each."""
    chroma = F.pad(torch.tensor(_CHROMA), (0, 4, 0, 4), value=99)
    return torch.tensor(_LUMA).to(device, dtype), chroma.to(device, dtype)
