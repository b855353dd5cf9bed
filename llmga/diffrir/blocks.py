"""The transformer block: attention between channels and a gated feed-forward network, both steered by the prior.

Exact rearrangements make it fast; every one leaves the published function as it is.
- Pixels are rows: activations lie in memory as (B, H, W, C), so that 1x1 convolutions are plain matrix products and
  depthwise ones read whole rows of channels.
- Gain of the norm and both factors of the modulation act per channel, so they are folded into the matrix behind them.
- Queries and keys are not normalised; the product of two of them is divided by both norms afterwards.
- The output projection is folded into the attention matrix: pixels are multiplied once.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["bias_free", "with_bias"]
_NORM_EPS = 1e-5
_LENGTH_EPS = 1e-12


class TransformerBlock(nn.Module):
    """Channel attention, then a gated feed-forward network, each added to its input.

    Args:
        dim: channels C, a multiple of `heads`.
        heads: groups of channels that attend among themselves.
        ffn_expansion_factor: hidden channels per channel, rounded down.
        bias: whether the convolutions have one.
        norm: see `ModulatedProjection`.
        prior_width: length of the prior vector.
    """

    def __init__(
        self, dim: int, heads: int, ffn_expansion_factor: float, bias: bool, norm: Norm, prior_width: int
    ) -> None:
        super().__init__()
        self.attention = ChannelAttention(dim, heads, bias, norm, prior_width)
        self.feed_forward = GatedFeedForward(dim, int(dim * ffn_expansion_factor), bias, norm, prior_width)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        """(B, C, H, W) and (B, prior_width) to (B, C, H, W), channels last in memory."""
        size = x.shape[-2:]
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C)
        rows = self.feed_forward(self.attention(rows, size, prior), size, prior)
        return rows.unflatten(1, size).permute(0, 3, 1, 2)


class ModulatedProjection(nn.Module):
    """Normalise every pixel over its channels, modulate by the prior, project.

    "bias_free" divides by the standard deviation of the channels (centred, biased) but does not subtract their mean;
    "with_bias" subtracts it and adds an offset. Modulation is x * k1 + k2 with (k1, k2) linear in the prior: there is
    no "1 +" before k1.
    """

    def __init__(self, dim: int, out_dim: int, bias: bool, norm: Norm, prior_width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.offset = nn.Parameter(torch.zeros(dim)) if norm == "with_bias" else None
        self.modulation = nn.Linear(prior_width, 2 * dim, bias=False)
        self.projection = nn.Linear(dim, out_dim, bias=bias)

    def forward(self, rows: Tensor, prior: Tensor) -> Tensor:
        """(B, N, C) and (B, prior_width) to (B, N, out_dim)."""
        k1, k2 = self.modulation(prior).chunk(2, dim=1)
        shift = k2 if self.offset is None else self.offset * k1 + k2
        weight = self.projection.weight * (self.gain * k1)[:, None, :]  # (B, out_dim, C)
        bias = F.linear(shift, self.projection.weight, self.projection.bias)  # (B, out_dim)
        return torch.baddbmm(bias[:, None, :], self._normalise(rows).to(weight.dtype), weight.mT)

    def _normalise(self, rows: Tensor) -> Tensor:
        """The norm without gain and offset, in float32 or better whatever autocast says."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            mean_of = rows.new_full((rows.shape[-1], 1), 1 / rows.shape[-1])  # as a product: reductions are slower
            centred = rows - rows @ mean_of
            scale = (centred.square() @ mean_of + _NORM_EPS).rsqrt()
            return (rows if self.offset is None else centred) * scale


class DepthwiseConvolution(nn.Conv2d):
    """A 3x3 convolution of each channel by itself, on rows of pixels."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, bias=bias)

    def forward(self, rows: Tensor, size: torch.Size) -> Tensor:
        """(B, H * W, C) with size (H, W) to the same shape."""
        picture = rows.unflatten(1, size).permute(0, 3, 1, 2)
        return super().forward(picture).permute(0, 2, 3, 1).flatten(1, 2)


class ChannelAttention(nn.Module):
    """Attention whose tokens are channels and whose features are all pixels; a (C/n, C/n) matrix per head."""

    def __init__(self, dim: int, heads: int, bias: bool, norm: Norm, prior_width: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.project_in = ModulatedProjection(dim, 3 * dim, bias, norm, prior_width)
        self.depthwise = DepthwiseConvolution(3 * dim, bias)
        self.project_out = nn.Linear(dim, dim, bias=bias)

    def forward(self, rows: Tensor, size: torch.Size, prior: Tensor) -> Tensor:
        """(B, N, C) to rows + attention(rows)."""
        qkv = self.depthwise(self.project_in(rows, prior), size)
        query_key, value = qkv.split([2 * rows.shape[-1], rows.shape[-1]], dim=-1)
        attention = self._attention(query_key)  # (B, heads, C/n, C/n)
        heads, width = attention.shape[1:3]
        out = self.project_out.weight.unflatten(1, (heads, width)).transpose(0, 1)  # (heads, C, C/n)
        matrix = (out @ attention.to(out.dtype)).transpose(1, 2).flatten(2)  # (B, C, C)
        rows = torch.baddbmm(rows, value, matrix.mT)
        return rows if self.project_out.bias is None else rows + self.project_out.bias

    def _attention(self, query_key: Tensor) -> Tensor:
        """Softmax of the cosines between queries and keys, in float32 or better whatever autocast says."""
        with torch.autocast(query_key.device.type, enabled=False):
            query_key = query_key.to(torch.promote_types(query_key.dtype, torch.float32))
            heads = self.temperature.shape[0]
            lengths = query_key.square().sum(dim=1).clamp_min(_LENGTH_EPS**2).rsqrt()  # (B, 2C)
            query, key = query_key.mT.unflatten(1, (2, heads, -1)).unbind(dim=1)  # (B, heads, C/n, N)
            query_scale, key_scale = lengths.unflatten(1, (2, heads, -1)).unbind(dim=1)  # (B, heads, C/n)
            scale = self.temperature * query_scale[..., :, None] * key_scale[..., None, :]
            return ((query @ key.mT) * scale).softmax(dim=-1)


class GatedFeedForward(nn.Module):
    """Expand to two halves, look at the neighbours, let the GELU of one gate the other, contract."""

    def __init__(self, dim: int, hidden: int, bias: bool, norm: Norm, prior_width: int) -> None:
        super().__init__()
        self.project_in = ModulatedProjection(dim, 2 * hidden, bias, norm, prior_width)
        self.depthwise = DepthwiseConvolution(2 * hidden, bias)
        self.project_out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, rows: Tensor, size: torch.Size, prior: Tensor) -> Tensor:
        """(B, N, C) to rows + feed_forward(rows)."""
        gate, value = self.depthwise(self.project_in(rows, prior), size).chunk(2, dim=-1)
        return rows + self.project_out(F.gelu(gate) * value)
