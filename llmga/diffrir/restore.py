"""Whole pictures through the network: pad to its grid, restore, cut, paste the known pixels back."""

import torch
from torch import Tensor

from llmga.diffrir.network import MULTIPLE_PX, DiffRIR
from llmga.diffrir.padding import reflect
from llmga.diffrir.reference import check_inputs, compose, concat_reference, hole_of


@torch.no_grad()
def restore_batch(
    model: DiffRIR,
    low_quality: Tensor,
    ground_truth: Tensor,
    edit_mask: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    composed: bool = True,
) -> Tensor:
    """Restore pictures of equal but any size, whole at once.

    Args:
        model: of phase "diffusion".
        low_quality: (B, 3, H/s, W/s) float in [0, 1], the generated pictures.
        ground_truth: (B, 3, H, W) the original, known outside the mask.
        edit_mask: (B, 1, H, W), 1 = generated; grey values count from 0.5.
        noise, generator: see `DiffRIR.forward`.
        composed: whether known pixels come from `ground_truth`, bit for bit, or from the network as well.
    Returns:
        (B, 3, H, W), not clamped; `to_uint8` makes pixels of it.
    Raises:
        InputError: the three inputs do not belong together, or not to this network.
    """
    check_inputs(low_quality, ground_truth, edit_mask, model.scale)
    padded = pad_inputs(low_quality, ground_truth, edit_mask, model.scale)
    inputs = concat_reference(*padded) if model.reference else padded[0]
    image = model(inputs, noise=noise, generator=generator).image
    restored = image[..., : ground_truth.shape[-2], : ground_truth.shape[-1]]
    return compose(restored, ground_truth, edit_mask) if composed else restored


def pad_inputs(low_quality: Tensor, ground_truth: Tensor, edit_mask: Tensor, scale: int) -> tuple[Tensor, ...]:
    """Reflect the three inputs to the right and below, until the sides suit the network.

    All are padded as pictures, the larger two by `scale` times as much. (Padding the folded reference, as the published
    validation does, would not mirror the pixels inside each fold.)
    """
    height, width = (-side % MULTIPLE_PX for side in ground_truth.shape[-2:])
    return (
        reflect(low_quality, 0, width // scale, 0, height // scale),
        reflect(ground_truth, 0, width, 0, height),
        reflect(hole_of(edit_mask), 0, width, 0, height),
    )


def to_uint8(images: Tensor) -> Tensor:
    """Floats to 8-bit pixels, clamped to [0, 1] and rounded; the input stays as it is."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
