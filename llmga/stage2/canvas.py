"""Pictures to complete: masks of any kind, canvases that grow on any side, and kept pixels pasted back.

Sizes are (width, height) as Pillow has them. A hole is (H, W) uint8, 1 = generate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from llmga.images import MASK_THRESHOLD, grey_mask

Paste = Literal["none", "exact", "feather"]
PASTES = ("none", "exact", "feather")
Margins = tuple[int, int, int, int]
OVERLAP_PX = 8  # of the kept picture that is painted anew along a new side, so that the seam has something to hold on
_FILL = (128, 128, 128)  # mid-grey, as hidden pixels are in training
_SHAPE_TOLERANCE = 0.02  # how much the aspect ratios of picture and mask may differ


class CanvasError(ValueError):
    """A picture, mask or margin that cannot be painted with; the message says why."""


@dataclass(frozen=True)
class Canvas:
    """What a picture is painted on.

    Attributes:
        picture: RGB; what the hole hides does not matter.
        hole: what to generate, (H, W), as large as the picture.
        kept: (H, W), 1 where pixels of the given picture are; differs from the hole's opposite where a border of kept
            pixels is painted anew.
    """

    picture: Image.Image
    hole: np.ndarray
    kept: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.picture.size


def masked_canvas(picture: Image.Image, mask: Image.Image | np.ndarray) -> Canvas:
    """A picture with a hole.

    Args:
        picture: of any mode and size.
        mask: of any mode, boolean or 0 and 1 as well; light (125 of 255 and above) means "generate". Another size is
            brought to the picture's where it has the same shape.
    Raises:
        CanvasError: the mask hides nothing, or has another shape than the picture.
    """
    if isinstance(mask, np.ndarray):
        mask = _picture_of(mask)
    (width, height), (mask_width, mask_height) = picture.size, mask.size
    if abs(mask_width / mask_height / (width / height) - 1) > _SHAPE_TOLERANCE:
        raise CanvasError(
            f"the mask is {mask_width} x {mask_height} and the picture {width} x {height}; expected the same size, "
            "or at least the same shape"
        )
    grey = grey_mask(mask)
    if grey.size != picture.size:
        grey = grey.resize(picture.size, Image.Resampling.BILINEAR)
    hole = (np.asarray(grey) >= MASK_THRESHOLD).astype(np.uint8)
    if not hole.any():
        raise CanvasError(
            "the mask hides nothing: expected white (125 and above) where to generate; if its colours are the other "
            "way round, invert it"
        )
    return Canvas(picture.convert("RGB"), hole, 1 - hole)


def _picture_of(mask: np.ndarray) -> Image.Image:
    array = np.asarray(mask)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or not array.size:
        raise CanvasError(f"the mask has shape {array.shape}, expected (height, width) or (height, width, 3)")
    if array.dtype != np.uint8:
        if array.min() < 0 or array.max() > (1 if array.dtype.kind == "f" else 255):
            raise CanvasError(f"the mask holds {array.min()} to {array.max()}, expected 0 to 1, or 0 to 255 in uint8")
        array = (array * 255).round() if array.dtype.kind == "f" else array
    return Image.fromarray(array.astype(np.uint8))


def extended_canvas(picture: Image.Image, margins: Sequence[float], overlap_px: int = OVERLAP_PX) -> Canvas:
    """A larger canvas with the picture on it.

    Args:
        margins: left, top, right, bottom; see `margins_in_pixels`.
        overlap_px: how much of the picture, along each new side, is painted anew.
    Raises:
        CanvasError: as `margins_in_pixels`, or the overlap would leave nothing of the picture.
    """
    left, top, right, bottom = margins_in_pixels(picture.size, margins)
    width, height = picture.size
    canvas = Image.new("RGB", (left + width + right, top + height + bottom), _FILL)
    canvas.paste(picture.convert("RGB"), (left, top))
    hole = np.ones((canvas.height, canvas.width), np.uint8)
    kept = np.zeros_like(hole)
    kept[top : top + height, left : left + width] = 1
    inner = [overlap_px * (margin > 0) for margin in (left, top, right, bottom)]
    if inner[0] + inner[2] >= width or inner[1] + inner[3] >= height:
        raise CanvasError(
            f"an overlap of {overlap_px} px leaves nothing of a picture of {width} x {height}; choose a smaller one"
        )
    hole[top + inner[1] : top + height - inner[3], left + inner[0] : left + width - inner[2]] = 0
    return Canvas(canvas, hole, kept)


def margins_in_pixels(size: tuple[int, int], margins: Sequence[float]) -> Margins:
    """Left, top, right and bottom in pixels: numbers below 1 are shares of the picture's side.

    Raises:
        CanvasError: not four numbers, one is negative, or all are 0.
    """
    if len(margins) != 4:
        raise CanvasError(f"found {len(margins)} margins, expected 4: left, top, right, bottom")
    if any(not margin >= 0 or margin == float("inf") for margin in margins):
        raise CanvasError(f"margins are {', '.join(f'{m:g}' for m in margins)}; expected none below 0")
    sides = (size[0], size[1], size[0], size[1])
    pixels = [
        round(margin * side) if margin < 1 else round(margin) for margin, side in zip(margins, sides, strict=True)
    ]
    if not any(pixels):
        raise CanvasError("all margins are 0, so there is nothing to paint; give one side at least a pixel")
    return (pixels[0], pixels[1], pixels[2], pixels[3])


def working_size(size: tuple[int, int], short_side: int, multiple: int) -> tuple[int, int]:
    """Width and height to paint at: the shape kept, the short side what the model knows, both whole multiples."""
    scale = short_side / min(size)
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    return width, height


def fit_canvas(canvas: Canvas, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Picture and mask (255 = generate) at the size to paint at; a picture that has it stays as it is.

    Any pixel that the hole touches is generated, so that no trace of what is hidden remains.
    """
    mask = Image.fromarray(canvas.hole * np.uint8(255))
    if canvas.size == size:
        return canvas.picture, mask
    grown = np.asarray(mask.resize(size, Image.Resampling.BILINEAR)) > 0
    return canvas.picture.resize(size, Image.Resampling.LANCZOS), Image.fromarray(
        grown.astype(np.uint8) * np.uint8(255)
    )


def paste_back(painted: Image.Image, canvas: Canvas, paste: Paste, feather_px: int = OVERLAP_PX) -> Image.Image:
    """Kept pixels over what was painted, at the size of the canvas.

    Args:
        painted: of any size; with "none" it is returned as it is.
        paste: "exact" puts every kept pixel back bit for bit; "feather" lets the painted picture fade out over
            `feather_px` beside the hole and keeps the rest bit for bit.
        feather_px: 0 is "exact" around the hole.
    """
    if paste == "none":
        return painted
    if painted.size != canvas.size:
        painted = painted.resize(canvas.size, Image.Resampling.LANCZOS)
    new, old = np.asarray(painted.convert("RGB")), np.asarray(canvas.picture)
    if paste == "exact" or feather_px == 0:
        return Image.fromarray(np.where(canvas.kept[..., None] > 0, old, new))
    share = _faded(canvas.hole, feather_px) * canvas.kept + (1.0 - canvas.kept)
    mixed = new * share[..., None] + old * (1 - share[..., None])
    return Image.fromarray(np.where(share[..., None] == 0, old, (mixed + 0.5).astype(np.uint8)))


def _faded(hole: np.ndarray, feather_px: int) -> np.ndarray:
    """1 in the hole, falling to 0 over `feather_px` beside it."""
    radius = max(1, feather_px // 2)
    mask = Image.fromarray(hole * np.uint8(255))
    padded = Image.new("L", (mask.width + 4 * radius, mask.height + 4 * radius))
    padded.paste(mask, (2 * radius, 2 * radius))
    soft = padded.filter(ImageFilter.MaxFilter(2 * radius + 1)).filter(ImageFilter.BoxBlur(radius))
    inner = soft.crop((2 * radius, 2 * radius, 2 * radius + mask.width, 2 * radius + mask.height))
    return np.maximum(np.asarray(inner, np.float32) / 255, hole)
