"""Whole pictures through the network: pad to its grid, restore, cut, paste the known pixels back."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmga.diffrir.inputs import RestorationInputs, check_arrays
from llmga.diffrir.network import MULTIPLE_PX, DiffRIR, RestorerError
from llmga.diffrir.padding import reflect
from llmga.diffrir.reference import check_inputs, compose, concat_reference, hole_of
from llmga.diffrir.tiles import Tiling, restore_in_tiles


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


def restore_arrays(
    model: DiffRIR,
    pictures: Sequence[RestorationInputs],
    noise: Tensor,
    tiling: Tiling | None = None,
    composed: bool = True,
) -> list[np.ndarray]:
    """Restore 8-bit pictures: those of equal size and no larger than a tile together, others in tiles.

    Args:
        model: of phase "diffusion".
        noise: (pictures, prior_width), one row for each; it decides the result together with the picture.
        tiling: how large pictures are cut; None is the default.
        composed: whether known pixels come out as they went in, bit for bit.
    Returns:
        (H, W, 3) uint8 for each.
    Raises:
        InputError: arrays that do not fit each other or the scale.
        RestorerError: a network of another phase, which cannot restore without the truth.
    """
    tiling = tiling or Tiling()
    if model.phase != "diffusion":
        raise RestorerError(f"this is a restorer of {model.describe()}; only phase diffusion works without the truth")
    for picture in pictures:
        check_arrays(picture.generated, picture.known, picture.hole, model.scale)
    alike = len({picture.hole.shape for picture in pictures}) == 1
    if not alike or max(pictures[0].hole.shape) > tiling.size:
        return [
            restore_in_tiles(model, each.generated, each.known, each.hole, noise[index : index + 1], tiling, composed)
            for index, each in enumerate(pictures)
        ]
    device = next(model.parameters()).device
    low_quality, known = (
        torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2).float() / 255
        for arrays in ([each.generated for each in pictures], [each.known for each in pictures])
    )
    hole = torch.from_numpy(np.stack([each.hole for each in pictures]))[:, None].to(device)
    restored = restore_batch(model, low_quality, known, hole, noise=noise, composed=False)
    pixels = to_uint8(restored).permute(0, 2, 3, 1).cpu().numpy()
    if composed:  # as 8-bit pixels, so that no rounding comes between
        pixels = np.where(np.stack([each.hole for each in pictures])[..., None], pixels, [p.known for p in pictures])
    return list(pixels)


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
