"""The generator: a four-level U-Net of transformer blocks on a grid of a quarter of the output's size."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmga.diffrir.blocks import Norm, TransformerBlock

LEVELS = 4


class Level(nn.ModuleList):
    """Transformer blocks of equal width, one after the other.

    Attributes:
        checkpointed: whether training computes activations again in the backward pass instead of keeping them.
    """

    checkpointed = False

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        """(B, C, H, W) and (B, prior_width) to (B, C, H, W)."""
        for block in self:
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, prior, use_reentrant=False)
            else:
                x = block(x, prior)
        return x


class Generator(nn.Module):
    """What the restored picture differs from the (enlarged) low-quality one by.

    Args:
        in_channels: of the folded input.
        dim: channels d of the first level; deeper ones have 2d, 4d, 8d, decoder 1 and the refinement 2d.
        num_blocks: blocks of levels 1 to 4; encoder and decoder share the first three numbers.
        num_refinement_blocks: blocks between decoder 1 and the upsampling.
        heads: attention heads of levels 1 to 4.
        ffn_expansion_factor, bias, norm, prior_width: see `TransformerBlock`; the tail always has biases.
    Source: Restormer (arXiv 2111.09881) steered as in DiffIR (arXiv 2303.09472).
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        num_blocks: Sequence[int],
        num_refinement_blocks: int,
        heads: Sequence[int],
        ffn_expansion_factor: float,
        bias: bool,
        norm: Norm,
        prior_width: int,
    ) -> None:
        super().__init__()

        def level(width: int, count: int, num_heads: int) -> Level:
            return Level(
                TransformerBlock(width, num_heads, ffn_expansion_factor, bias, norm, prior_width) for _ in range(count)
            )

        widths = [dim * 2**index for index in range(LEVELS)]
        inner = range(LEVELS - 1)
        self.embed = conv3x3(in_channels, dim)
        self.encoders = nn.ModuleList(level(widths[i], num_blocks[i], heads[i]) for i in inner)
        self.downs = nn.ModuleList(
            nn.Sequential(conv3x3(widths[i], widths[i] // 2), nn.PixelUnshuffle(2)) for i in inner
        )
        self.latent = level(widths[3], num_blocks[3], heads[3])
        self.ups = nn.ModuleList(
            nn.Sequential(conv3x3(widths[i + 1], widths[i + 1] * 2), nn.PixelShuffle(2)) for i in inner
        )
        # The first level joins without reducing, so its decoder is twice as wide as its encoder.
        self.reducers = nn.ModuleList(nn.Conv2d(widths[i + 1], widths[i], 1, bias=bias) for i in inner[1:])
        self.decoders = nn.ModuleList(
            level(width, num_blocks[i], heads[i]) for i, width in enumerate([2 * dim, *widths[1:3]])
        )
        self.refinement = level(2 * dim, num_refinement_blocks, heads[0])
        self.tail = nn.Sequential(
            conv3x3(2 * dim, 8 * dim, bias=True),
            nn.PixelShuffle(2),
            conv3x3(2 * dim, 8 * dim, bias=True),
            nn.PixelShuffle(2),
            conv3x3(2 * dim, 3, bias=True),
        )

    def forward(self, folded: Tensor, prior: Tensor) -> Tensor:
        """(B, in_channels, h, w) with h and w multiples of 8, and (B, prior_width), to (B, 3, 4h, 4w)."""
        x = self.embed(folded.contiguous(memory_format=torch.channels_last))
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x, prior)
            skips.append(x)
            x = down(x)
        x = self.latent(x, prior)
        for index in reversed(range(LEVELS - 1)):
            x = torch.cat([self.ups[index](x), skips[index]], dim=1)
            if index:
                x = self.reducers[index - 1](x)
            x = self.decoders[index](x, prior)
        return self.tail(self.refinement(x, prior))


def conv3x3(in_channels: int, out_channels: int, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
