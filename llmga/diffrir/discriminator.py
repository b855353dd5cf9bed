"""The discriminator of the adversarial phase: a U-Net that judges every pixel."""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

_LEAK = 0.2


class Discriminator(nn.Module):
    """Three levels down and up, with skips added; spectral norm on all convolutions but the first and the last.

    Args:
        width: channels of the first and the last level.
    Source: Real-ESRGAN (arXiv 2107.10833), as the published restoration code uses it.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.conv0 = nn.Conv2d(3, width, 3, padding=1)
        self.conv1, self.conv2, self.conv3 = (_halving(width * 2**i) for i in range(3))
        self.conv4, self.conv5, self.conv6 = (_keeping(width * 2**i, width * 2 ** (i - 1)) for i in (3, 2, 1))
        self.conv7, self.conv8 = _keeping(width, width), _keeping(width, width)
        self.conv9 = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], H and W multiples of 8, to (B, 1, H, W) logits; positive means real."""
        x0 = _leaky(self.conv0(images))
        x1 = _leaky(self.conv1(x0))
        x2 = _leaky(self.conv2(x1))
        x = _leaky(self.conv3(x2))
        for conv, skip in ((self.conv4, x2), (self.conv5, x1), (self.conv6, x0)):
            enlarged = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = _leaky(conv(enlarged)) + skip
        return self.conv9(_leaky(self.conv8(_leaky(self.conv7(x)))))


def _halving(width: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False))


def _keeping(in_width: int, out_width: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(in_width, out_width, 3, padding=1, bias=False))


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _LEAK)
