"""Networks that turn pictures into features, behind one interface: a new one is a row of `BUILDERS` and a short file.

Metrics see arrays of features alone; what made them stands in the protocol of a result, and results of different
protocols do not compare.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from llmga.metrics.clip import load_clip
from llmga.metrics.dino import Dino
from llmga.metrics.features import MetricError
from llmga.metrics.inception import Inception
from llmga.metrics.resizing import Resize
from llmga.metrics.seeded_conv import SeededConv


class Extractor(Protocol):
    """Pictures to features.

    Attributes:
        name: a key of `BUILDERS`, or any other name.
        weight_hash: SHA-256 of its weights; for random ones, words that say so.
        dim: number of features.
        preprocessing: what is done to pictures first; part of what a number means.
    """

    name: str
    weight_hash: str
    dim: int
    preprocessing: str

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, dim) float32."""
        ...


@runtime_checkable
class Classifier(Protocol):
    """An extractor that also tells classes, as the Inception score needs it."""

    def logits(self, features: Tensor) -> Tensor:
        """(N, dim) features to (N, C) logits."""
        ...


Builder = Callable[[Path | None, Resize, torch.device | str], Extractor]

BUILDERS: dict[str, Builder] = {
    "inception-tf": lambda weights, rule, device: Inception(weights, rule, device),
    "clip-l14": lambda weights, rule, device: load_clip("clip-l14", weights, device),
    "clip-b32": lambda weights, rule, device: load_clip("clip-b32", weights, device),
    "dino-s16": lambda weights, rule, device: Dino("dino-s16", weights, device),
    "dinov2-l14": lambda weights, rule, device: Dino("dinov2-l14", weights, device),
    "seeded-conv": lambda weights, rule, device: SeededConv(device=device),
}
RANDOM = ("seeded-conv",)


def build_extractor(
    name: str,
    weights: Path | None = None,
    rule: Resize = "clean",
    device: torch.device | str = "cpu",
    allow_random: bool = False,
) -> Extractor:
    """Build an extractor by name.

    Args:
        weights: a file; None: where its library keeps it.
        rule: how pictures are resized, where the network leaves a choice (Inception).
        allow_random: take a network without training, for tests.
    Raises:
        MissingWeights: no weights on this machine.
        MetricError: unknown name, weights that do not fit, or a random network that was not asked for.
    """
    if name not in BUILDERS:
        raise MetricError(f"extractor {name!r} is unknown; expected one of {', '.join(BUILDERS)}")
    if name in RANDOM and not allow_random:
        raise MetricError(
            f"{name} is a random network: its numbers say nothing of pictures; choose another, or set allow_random in "
            "a test"
        )
    return BUILDERS[name](weights, rule, device)


def protocol_of(extractor: Extractor) -> dict[str, str | int]:
    """What a result has to say of how its features were made."""
    return {
        "extractor": extractor.name,
        "weight_hash": extractor.weight_hash,
        "dim": extractor.dim,
        "preprocessing": extractor.preprocessing,
    }


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> np.ndarray:
    """Features of many pictures, (N, dim) float32, in their order.

    Args:
        batches: (B, 3, H, W) uint8; sizes may differ from batch to batch.
    Raises:
        MetricError: no pictures, or none such.
    """
    parts = [extractor.features(images).cpu().numpy() for images in batches]
    if not parts:
        raise MetricError("there are no pictures to extract features of; expected one batch or more")
    return np.concatenate(parts)
