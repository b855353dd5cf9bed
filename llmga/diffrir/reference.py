"""The reference input: kept pixels with the hole blanked, folded to the input grid, joined to the low-quality picture.

Pictures are float RGB in [0, 1], (B, 3, H, W). `edit_mask` is (B, 1, H, W) at output resolution, 1 = generated region.
"""

from torch import Tensor, cat
from torch.nn import functional as F

SCALES = (1, 2, 4)
MASK_THRESHOLD = 0.5


class InputError(ValueError):
    """Tensors that do not belong together, or not to this network; the sentence names all of them."""


def concat_reference(low_quality: Tensor, ground_truth: Tensor, edit_mask: Tensor, scale: int | None = None) -> Tensor:
    """Build the network's input: the low-quality picture, then the kept pixels folded to its size.

    What `ground_truth` holds inside the hole has no influence.

    Args:
        low_quality: (B, 3, H/s, W/s), degraded over the whole frame.
        ground_truth: (B, 3, H, W) the picture whose pixels outside the mask are known.
        edit_mask: (B, 1, H, W), 1 (or True) where pixels were generated; grey values count from 0.5.
        scale: s, checked if given; it follows from the sizes.
    Returns:
        (B, 3 + 3 * s * s, H/s, W/s): 6, 15 or 51 channels.
    Raises:
        InputError: sizes, channels or number types that do not fit; all three inputs are named.
    Source: LLMGA (arXiv 2311.16500), reference-based restoration.
    """
    found = check_inputs(low_quality, ground_truth, edit_mask, scale)
    reference = ground_truth.masked_fill(hole_of(edit_mask), 0.0)
    return cat([low_quality, F.pixel_unshuffle(reference, found)], dim=1)


def compose(restored: Tensor, ground_truth: Tensor, edit_mask: Tensor) -> Tensor:
    """The restored picture inside the hole, and outside it the known pixels, bit for bit; all at output resolution."""
    check_inputs(restored, ground_truth, edit_mask, scale=1)
    return restored.where(hole_of(edit_mask), ground_truth)


def hole_of(edit_mask: Tensor) -> Tensor:
    """(B, 1, H, W) bool, True where pixels were generated."""
    return edit_mask >= MASK_THRESHOLD


def check_inputs(low_quality: Tensor, ground_truth: Tensor, edit_mask: Tensor, scale: int | None = None) -> int:
    """The scale at which three inputs fit together.

    Raises:
        InputError: they do not.
    """
    names = (
        f"low_quality is {_describe(low_quality)}, ground_truth {_describe(ground_truth)} "
        f"and edit_mask {_describe(edit_mask)}"
    )
    shapes = low_quality.shape, ground_truth.shape, edit_mask.shape
    if any(len(shape) != 4 for shape in shapes) or [shape[1] for shape in shapes] != [3, 3, 1]:
        raise InputError(f"{names}; expected (B, 3, H/s, W/s), (B, 3, H, W) and (B, 1, H, W)")
    if not (low_quality.is_floating_point() and ground_truth.is_floating_point()):
        raise InputError(f"{names}; expected floating-point pictures in [0, 1]: divide 8-bit ones by 255")
    if not shapes[0][0] == shapes[1][0] == shapes[2][0]:
        raise InputError(f"{names}; expected the same number of pictures")
    if shapes[1][2:] != shapes[2][2:]:
        raise InputError(f"{names}; expected ground_truth and edit_mask of the same height and width")
    fitting = [s for s in SCALES if shapes[1][2:] == (shapes[0][2] * s, shapes[0][3] * s)]
    if not fitting or 0 in shapes[0] or scale not in (None, *fitting):
        wanted = f"{scale}" if scale is not None else "1, 2 or 4"
        raise InputError(f"{names}; expected ground_truth and edit_mask {wanted} times as high and wide as low_quality")
    return fitting[0]


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
