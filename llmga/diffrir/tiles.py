"""Pictures that do not fit into memory at once: restored in overlapping tiles that are blended into each other.

Two things look at a whole picture: the prior, an average over it, and attention between channels. The prior is taken
from the whole picture here too, exactly: its encoder runs over pieces with the margin that its convolutions reach, and
the pieces' sums are averaged together. Attention sees one tile; that is why tiles are large and their joins blended.
Pictures stay in 8 bits, and only one row of tiles is held in floats.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmga.diffrir.network import GRID, MULTIPLE_PX, DiffRIR
from llmga.diffrir.reference import InputError, concat_reference


@dataclass(frozen=True)
class Tiling:
    """How a large picture is cut, in pixels of the output.

    Attributes:
        size: side of a tile; a picture no larger is not cut.
        overlap: what neighbouring tiles share at least, over which they are blended.
        batch_size: tiles that are restored at a time.
    Raises:
        InputError: numbers that are no multiples of 32, or an overlap of more than half a tile.
    """

    size: int = 768
    overlap: int = 128
    batch_size: int = 1

    def __post_init__(self) -> None:
        sound = not (self.size % MULTIPLE_PX or self.overlap % MULTIPLE_PX) and 0 < 2 * self.overlap <= self.size
        if not sound or self.batch_size < 1:
            raise InputError(
                f"tiles of {self.size} with an overlap of {self.overlap}, {self.batch_size} at a time, were asked for; "
                f"expected multiples of {MULTIPLE_PX}, an overlap of up to half a tile, and 1 or more at a time"
            )

    def starts(self, side: int) -> list[int]:
        """Where tiles begin along a side, a multiple of 32; evenly spread, the last one ends with the side."""
        if side <= self.size:
            return [0]
        count = -(-(side - self.overlap) // (self.size - self.overlap))
        free = (side - self.size) // MULTIPLE_PX
        return [index * free // (count - 1) * MULTIPLE_PX for index in range(count)]


@dataclass(frozen=True, eq=False)
class Canvas:
    """One picture's three inputs, padded to the network's grid.

    Attributes:
        generated: (h, w, 3) uint8.
        known: (H, W, 3) uint8.
        hole: (H, W) bool, True = generated.
    """

    generated: np.ndarray
    known: np.ndarray
    hole: np.ndarray

    @classmethod
    def padded(cls, generated: np.ndarray, known: np.ndarray, hole: np.ndarray, scale: int) -> "Canvas":
        """Mirror the pictures to the right and below, until their sides suit the network."""
        below, right = (-side % MULTIPLE_PX for side in hole.shape)
        small = ((0, below // scale), (0, right // scale))
        large = ((0, below), (0, right))
        return cls(
            np.pad(generated, (*small, (0, 0)), mode="reflect"),
            np.pad(known, (*large, (0, 0)), mode="reflect"),
            np.pad(hole, large, mode="reflect"),
        )

    def window(self, model: DiffRIR, top: int, left: int, height: int, width: int) -> Tensor:
        """The network's inputs of a part, (1, C, height / s, width / s) on its device; lengths in output pixels."""
        scale = model.scale
        rows, columns = slice(top, top + height), slice(left, left + width)
        low = self.generated[top // scale : (top + height) // scale, left // scale : (left + width) // scale]
        device = next(model.parameters()).device
        low_quality = _floats(low, device)
        if not model.reference:
            return low_quality
        hole = torch.from_numpy(self.hole[rows, columns])[None, None].to(device)
        return concat_reference(low_quality, _floats(self.known[rows, columns], device), hole, scale)


@torch.no_grad()
def restore_in_tiles(
    model: DiffRIR,
    generated: np.ndarray,
    known: np.ndarray,
    hole: np.ndarray,
    noise: Tensor,
    tiling: Tiling,
    composed: bool = True,
) -> np.ndarray:
    """Restore one picture of any size; tiles that hold nothing to restore are left out where known pixels are kept.

    Args:
        model: of phase "diffusion".
        generated: (h, w, 3) uint8.
        known: (H, W, 3) uint8, s times as high and wide.
        hole: (H, W) bool.
        noise: (1, prior_width) on any device.
        composed: whether known pixels come out as they went in.
    Returns:
        (H, W, 3) uint8.
    """
    canvas = Canvas.padded(generated, known, hole, model.scale)
    prior = model.predict_prior(encode_in_tiles(model, canvas, tiling.size), noise)
    output = known.copy() if composed else np.empty_like(known)
    height, width = hole.shape
    for top, row in _rows(model, canvas, prior, tiling, composed):
        bottom = min(top + len(row), height)
        if top >= bottom:
            continue
        pixels, here = row[: bottom - top, :width], output[top:bottom]
        if composed:
            np.copyto(here, pixels, where=hole[top:bottom, :, None])
        else:
            here[:] = pixels
    return output


def encode_in_tiles(model: DiffRIR, canvas: Canvas, size: int) -> Tensor:
    """The condition of the whole picture, (1, prior_width), computed in pieces of `size` pixels and their margin."""
    encoder, (height, width) = model.prior_encoder, canvas.hole.shape
    margin = encoder.reach * GRID
    total: Tensor | None = None
    for top in range(0, height, size):
        for left in range(0, width, size):
            above, before = max(0, top - margin), max(0, left - margin)
            below, behind = min(height, top + size + margin), min(width, left + size + margin)
            window = canvas.window(model, above, before, below - above, behind - before)
            features = encoder.features(model.fold(window))
            rows = slice((top - above) // GRID, (min(height, top + size) - above) // GRID)
            columns = slice((left - before) // GRID, (min(width, left + size) - before) // GRID)
            part = features[..., rows, columns].sum(dim=(2, 3), dtype=torch.float64)
            total = part if total is None else total + part
    assert total is not None
    mean = total / (height * width / GRID**2)
    return encoder.summarise(mean.to(next(encoder.parameters()).dtype))


def blending_weights(side: int, starts: Sequence[int], size: int, overlap: int) -> np.ndarray:
    """How much each tile counts at each of its pixels along one side, (tiles, size); they add up to 1 at every pixel.

    A tile fades in and out over the overlap, but not where it ends with the picture.
    """
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / overlap
    raw = np.stack(
        [
            np.minimum(1, np.minimum(ramp if start else 1, ramp[::-1] if start + size < side else 1)) * np.ones(size)
            for start in starts
        ]
    )
    total = np.zeros(side)
    for start, weights in zip(starts, raw, strict=True):
        total[start : start + size] += weights
    shares = [weights / total[start : start + size] for start, weights in zip(starts, raw, strict=True)]
    return np.stack(shares).astype(np.float32)


def _rows(
    model: DiffRIR, canvas: Canvas, prior: Tensor, tiling: Tiling, composed: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """The restored picture from top to bottom: where each band begins, and its pixels (h, padded width, 3) uint8."""
    height, width = canvas.hole.shape
    tile_height, tile_width = min(tiling.size, height), min(tiling.size, width)
    tops, lefts = tiling.starts(height), tiling.starts(width)
    down = blending_weights(height, tops, tile_height, tiling.overlap)
    across = blending_weights(width, lefts, tile_width, tiling.overlap)
    band = np.zeros((tile_height, width, 3), np.float32)  # begins at the row of tiles at hand
    for index, top in enumerate(tops):
        needed = [
            number
            for number, left in enumerate(lefts)
            if not composed or canvas.hole[top : top + tile_height, left : left + tile_width].any()
        ]
        for first in range(0, len(needed), tiling.batch_size):
            numbers = needed[first : first + tiling.batch_size]
            windows = [canvas.window(model, top, lefts[number], tile_height, tile_width) for number in numbers]
            restored = model.restore_with(torch.cat(windows), prior.expand(len(windows), -1))
            for number, tile in zip(numbers, restored.clamp(0, 1).permute(0, 2, 3, 1).float().cpu(), strict=True):
                weights = down[index][:, None, None] * across[number][None, :, None]
                band[:, lefts[number] : lefts[number] + tile_width] += tile.numpy() * weights
        after = tops[index + 1] - top if index + 1 < len(tops) else tile_height
        yield top, np.rint(band[:after] * 255).clip(0, 255).astype(np.uint8)
        band[: tile_height - after] = band[after:].copy()
        band[tile_height - after :] = 0


def _floats(pixels: np.ndarray, device: torch.device) -> Tensor:
    """(h, w, 3) uint8 to (1, 3, h, w) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(2, 0, 1)[None].float() / 255
