"""LPIPS, the distance of pictures in a trained network's eyes; the package `lpips` enters the house here."""

import importlib.util

import torch
from torch import Tensor

from llmga.metrics.weights import torch_cache

TRUNK_FILE = "vgg16-397923af.pth"  # torchvision's, which `lpips` puts its own small heads on


def missing_for_lpips() -> str | None:
    """What LPIPS lacks on this machine, as one sentence that says what to do; None when it can be measured."""
    if importlib.util.find_spec("lpips") is None:
        return "LPIPS needs the package lpips, which is not installed; pip install lpips"
    trunk = torch_cache() / TRUNK_FILE
    if not trunk.is_file():
        return (
            f"LPIPS needs the weights of torchvision's VGG16 at {trunk}; where there is a network, "
            "python -c \"import torchvision; torchvision.models.vgg16(weights='IMAGENET1K_V1')\" puts them there"
        )
    return None


class Lpips:
    """The VGG variant, built once.

    Args:
        device: where pictures are.
    Raises:
        ValueError: package or weights are missing; see `missing_for_lpips`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        if problem := missing_for_lpips():
            raise ValueError(problem)
        import lpips

        self.network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] to (B,); 0 for equal pictures."""
        return self.network(images * 2 - 1, targets * 2 - 1).flatten()
