"""The perceptual loss of the adversarial phase: distances between features of VGG19."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from llmga.files import no_such_file

# Index in torchvision's `features`, before the ReLU: conv1_2, conv2_2, conv3_4, conv4_4, conv5_4.
LAYER_WEIGHTS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class PerceptualError(ValueError):
    """VGG19's weights cannot be used; the message names the file."""


class PerceptualLoss(nn.Module):
    """Weighted sum over five layers of the mean absolute difference of features; nothing of it learns.

    Args:
        features: torchvision's VGG19 `features`, up to layer 34 at least.
    Source: Real-ESRGAN (arXiv 2107.10833), as the published restoration code uses it.
    """

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features[: max(LAYER_WEIGHTS) + 1].eval().requires_grad_(False)
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = False  # what comes before it is compared
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION)[:, None, None], persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] to a scalar; gradients reach the images alone."""
        with torch.no_grad():
            wanted = self._seen(targets)
        terms = [
            weight * F.l1_loss(found, expected)
            for found, expected, weight in zip(self._seen(images), wanted, LAYER_WEIGHTS.values(), strict=True)
        ]
        return torch.stack(terms).sum()

    def _seen(self, images: Tensor) -> list[Tensor]:
        x, seen = (images - self.mean) / self.deviation, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in LAYER_WEIGHTS:
                seen.append(x)
        return seen


def load_perceptual(path: Path) -> PerceptualLoss:
    """Build the loss with weights from a file of torchvision's VGG19, whole or `features.*` alone.

    Raises:
        PerceptualError: no such file, or not VGG19's.
    """
    from torchvision.models import vgg19  # takes seconds, and only one phase needs it

    if not path.is_file():
        raise PerceptualError(f"VGG19's weights: {no_such_file(path)}")
    try:
        weights = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
        with torch.device("meta"):
            network = vgg19().features
        prefix = "features."
        network.load_state_dict(
            {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}, assign=True
        )
    except Exception as error:  # torch and safetensors have no common error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PerceptualError(f"{path} does not hold VGG19's weights as torchvision saves them ({reason})") from error
    return PerceptualLoss(network)
