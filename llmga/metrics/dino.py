"""DINO, as timm has it: the class token of a vision transformer that learnt without labels."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmga.metrics.features import MetricError
from llmga.metrics.resizing import resize_and_crop
from llmga.metrics.weights import find_weights, hub_file, weight_hash

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_CROP_PX = 224


@dataclass(frozen=True, slots=True)
class _Published:
    """Weights and the size of the short side before the centre is cut out."""

    architecture: str
    resize_px: int


MODELS = {
    "dino-s16": _Published("vit_small_patch16_224.dino", 256),  # as editing is published with
    "dinov2-l14": _Published("vit_large_patch14_dinov2.lvd142m", 224),  # as FD-DINOv2 is
}


class Dino:
    """A published DINO as an extractor.

    Args:
        name: a key of `MODELS`.
        weights: a file as timm has it; None: the one in the Hugging Face cache.
        device: where it runs; pictures are moved there.
    Raises:
        MissingWeights: no such file.
        MetricError: unknown name, or weights that do not fit.
    """

    def __init__(self, name: str, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        import timm

        if name not in MODELS:
            raise MetricError(f"DINO {name!r} is unknown; expected one of {', '.join(MODELS)}")
        published = MODELS[name]
        place = hub_file(f"timm/{published.architecture}", ("model.safetensors", "pytorch_model.bin"))
        fetch = f"python -c \"import timm; timm.create_model('{published.architecture}', pretrained=True)\""
        path = find_weights(name, weights, [place], fetch)
        self.name, self.weight_hash = name, weight_hash(path)
        self.preprocessing = f"bicubic-{published.resize_px}-crop-{_CROP_PX}"
        self._resize_px, self._device = published.resize_px, torch.device(device)
        try:
            network = timm.create_model(
                published.architecture,
                pretrained=True,
                pretrained_cfg_overlay={"file": str(path)},
                img_size=_CROP_PX,
                num_classes=0,
            )
        except (RuntimeError, KeyError, ValueError) as error:
            raise MetricError(f"{path} does not hold the weights of {name} ({error}); fetch: {fetch}") from error
        self._network = network.to(self._device).eval().requires_grad_(False)
        self.dim: int = network.num_features
        self._mean, self._std = (torch.tensor(values, device=self._device)[:, None, None] for values in (_MEAN, _STD))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, D) float32."""
        pixels = resize_and_crop(images, self._resize_px, _CROP_PX).to(self._device).float() / 255
        return self._network((pixels - self._mean) / self._std).float()
