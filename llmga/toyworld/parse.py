"""Pictures back to facts, by analysis by synthesis: every object that could stand in a cell is drawn and compared.

With coverage a, brightness b, colour c and background g, a cell is g * (1 - a) + c * b. The squared error of a cell y
(after g was subtracted) against a template in a colour is |y + g a - c b|^2, which the inner products <g . y, a>,
<y, b> and <a, b> give in closed form: one matrix product compares a batch of pictures with all templates.

Blurred templates are needed: without them shapes and textures are misread in soft pictures, as autoencoders make them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from llmga.toyworld.render import cell_origin, object_layers
from llmga.toyworld.scene import BACKGROUNDS, COLOURS, PRESETS, SHAPES, SIZES, TEXTURES, Facts, Obj, Scene

SIDE = 64
JITTERS = range(-3, 4)
"""Displacements in pixels that templates are drawn with: the world's own jitter, and a picture shifted by 2."""
BLURS = (0.0, 0.7, 1.1, 1.6)
"""Standard deviations in pixels of the softness that templates are drawn with."""
PRESENT_BELOW = 0.85
"""An object is present if its error is below this share of the empty cell's error, less `FLOOR` per pixel.

Both errors are taken where the object is: over the whole cell, noise around a small object would drown it.
"""
FLOOR = 9.0
TOUCHED = 0.01
"""Coverage from which a pixel counts as a part of an object."""
UNPARSEABLE_RMS = 60.0
PICTURES_PER_PASS = 8

_BACKGROUNDS = np.array(list(BACKGROUNDS.values()), np.float32)
_COLOURS = np.array(list(COLOURS.values()), np.float32)


@dataclass(frozen=True)
class ParsedScene:
    """What a picture shows.

    Attributes:
        preset: the world that it was read as.
        background: name of its background colour.
        objects: the objects found, in cell order; `dx`, `dy` are -3 to 3. An unparseable cell keeps its best guess.
        residual: per cell, the root mean square over pixels and channels (0 to 255) of what the best guess leaves
            unexplained.
    """

    preset: str
    background: str
    objects: tuple[Obj, ...]
    residual: tuple[float, ...]

    @property
    def unparseable(self) -> tuple[int, ...]:
        """Cells that look like nothing in this world: residual over `UNPARSEABLE_RMS`."""
        return tuple(cell for cell, rms in enumerate(self.residual) if rms > UNPARSEABLE_RMS)

    def facts(self) -> Facts:
        """Facts as `Scene.facts` gives them."""
        return self.scene().facts()

    def scene(self) -> Scene:
        """The scene that draws this picture best."""
        return Scene(self.preset, self.background, self.objects)

    def missing(self, scene: Scene) -> list[int]:
        """Cells where the scene has an object and the picture has none."""
        return sorted({obj.cell for obj in scene.objects} - {obj.cell for obj in self.objects})

    def extra(self, scene: Scene) -> list[int]:
        """Cells where the picture has an object and the scene has none."""
        return sorted({obj.cell for obj in self.objects} - {obj.cell for obj in scene.objects})


def parse(picture: np.ndarray, preset: str = "learnable") -> ParsedScene:
    """Read one picture, (64, 64, 3) uint8 RGB; `parse_batch` raises the same errors and reads many faster."""
    picture = np.asarray(picture)
    _check(picture, (SIDE, SIDE, 3), preset)
    return parse_batch(picture[None], preset)[0]


def parse_batch(pictures: np.ndarray, preset: str = "learnable") -> list[ParsedScene]:
    """Read many pictures.

    Args:
        pictures: (N, 64, 64, 3) uint8 RGB.
        preset: a key of `PRESETS`, the world that the pictures show.
    Raises:
        ValueError: wrong size, wrong dtype, unknown preset.
    """
    pictures = np.asarray(pictures)
    _check(pictures, (len(pictures) if pictures.ndim else 0, SIDE, SIDE, 3), preset)
    passes = range(0, len(pictures), PICTURES_PER_PASS)
    return [scene for start in passes for scene in _parse_pass(pictures[start : start + PICTURES_PER_PASS], preset)]


def _check(pictures: np.ndarray, expected: tuple[int, ...], preset: str) -> None:
    if preset not in PRESETS:
        raise ValueError(f"toy world preset {preset!r} is unknown; expected one of {', '.join(PRESETS)}")
    if pictures.shape != expected:
        raise ValueError(
            f"pictures of shape {pictures.shape} cannot be parsed; expected {expected}: resize them to {SIDE} px, "
            "and give one picture to `parse`, several to `parse_batch`"
        )
    if pictures.dtype != np.uint8:
        raise ValueError(f"pictures of dtype {pictures.dtype} cannot be parsed; expected uint8 with values 0 to 255")


@dataclass(frozen=True)
class _Templates:
    """What can stand in a cell of P pixels: T textures times S soft masks (shape, size, blur, jitter)."""

    masks: list[tuple[str, str, int, int]]  # shape, size, dx, dy of each of the S masks
    coverage: np.ndarray  # (S, P)
    brightness: np.ndarray  # (T * S, P)
    constant: np.ndarray  # (backgrounds, colours, T, S): the part of the error that no picture changes


@lru_cache(maxsize=len(PRESETS))
def _templates(preset: str) -> _Templates:
    """Draw and blur every object once, then move it: jitters are whole pixels."""
    side, margin = round(PRESETS[preset].cell), JITTERS[-1]
    num_masks = len(SHAPES) * len(SIZES) * len(BLURS) * len(JITTERS) ** 2
    masks: list[tuple[str, str, int, int]] = []
    coverage = np.empty((num_masks, side * side), np.float32)
    brightness = np.empty((len(TEXTURES), num_masks, side * side), np.float32)
    for shape, size, blur in product(SHAPES, SIZES, BLURS):
        layers = np.stack([_soft_layers(preset, Obj(0, shape, size, "", t), blur, margin) for t in TEXTURES])
        for dx, dy in product(JITTERS, JITTERS):
            window = layers[..., margin - dy : margin - dy + side, margin - dx : margin - dx + side]
            coverage[len(masks)] = window[0, 0].reshape(-1)
            brightness[:, len(masks)] = window[:, 1].reshape(len(TEXTURES), -1)
            masks.append((shape, size, dx, dy))
    constant = _constant(coverage, brightness)
    return _Templates(masks, coverage, brightness.reshape(-1, side * side), constant)


def _soft_layers(preset: str, obj: Obj, blur: float, margin: int) -> np.ndarray:
    """(2, side, side) coverage and brightness of an object, blurred, on its cell and a margin around it."""
    top, left, *layers = object_layers(preset, obj, SIDE)
    canvas = np.zeros((2, SIDE + 2 * margin, SIDE + 2 * margin))
    height, width = layers[0].shape
    canvas[:, top + margin : top + margin + height, left + margin : left + margin + width] = layers
    if blur:
        offsets = np.arange(canvas.shape[1])
        distance = abs(offsets[:, None] - offsets)
        # Cut off at 3 sigma: the far tail would be denormal numbers, which make the matrix products three times slower.
        kernel = np.exp(-0.5 * (distance / blur) ** 2) * (distance <= 3 * blur)
        kernel /= kernel.sum(axis=1).max()
        canvas = kernel @ canvas @ kernel.T
    top, left = (round(origin) for origin in cell_origin(preset, obj.cell))
    side = round(PRESETS[preset].cell) + 2 * margin
    return canvas[:, top : top + side, left : left + side]


def _cell_pixels(pictures: np.ndarray, preset: str) -> np.ndarray:
    """(N, cells, P, 3) pixels of every cell."""
    side = round(PRESETS[preset].cell)
    origins = [cell_origin(preset, cell) for cell in range(PRESETS[preset].grid ** 2)]
    cells = [pictures[:, round(y) : round(y) + side, round(x) : round(x) + side] for y, x in origins]
    return np.stack(cells, axis=1).reshape(len(pictures), len(origins), side * side, 3)


def _constant(coverage: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    """g.g <a, a> + c.c <b, b> - 2 g.c <a, b> for every background g and colour c."""
    aa, bb = (coverage**2).sum(-1), (brightness**2).sum(-1)
    ab = (coverage * brightness).sum(-1)
    gg, cc = (_BACKGROUNDS**2).sum(-1), (_COLOURS**2).sum(-1)
    gc = _BACKGROUNDS @ _COLOURS.T
    return gg[:, None, None, None] * aa + cc[:, None, None] * bb - 2 * gc[..., None, None] * ab


def _parse_pass(pictures: np.ndarray, preset: str) -> list[ParsedScene]:
    """Read a few pictures at once: background from the frame, objects, then a second look at the background."""
    frame = PRESETS[preset].frame
    border = np.ones((SIDE, SIDE), bool)
    border[frame:-frame, frame:-frame] = False
    edges = pictures[:, border]
    cells = _cell_pixels(pictures, preset)
    first = _nearest_background(np.median(edges, axis=1))
    scenes, covered = _fit(cells, first, preset)
    bare = [np.concatenate([edges[i], cells[i][~covered[i]]]) for i in range(len(pictures))]
    second = _nearest_background(np.stack([np.median(pixels, axis=0) for pixels in bare]))
    for i in np.flatnonzero(first != second):  # a damaged frame: believe whichever explains the cells better
        rivals, _ = _fit(cells[i : i + 1], second[i : i + 1], preset)
        scenes[i] = min(scenes[i], rivals[0], key=lambda scene: sum(rms**2 for rms in scene.residual))
    return scenes


def _nearest_background(colours: np.ndarray) -> np.ndarray:
    """(N,) index of the palette colour nearest to each of (N, 3) colours."""
    return ((colours[:, None] - _BACKGROUNDS) ** 2).sum(-1).argmin(-1)


def _fit(cells: np.ndarray, background: np.ndarray, preset: str) -> tuple[list[ParsedScene], np.ndarray]:
    """Best scene on given backgrounds, (N,), for (N, cells, P, 3) pixels; and the pixels that its objects touch."""
    known = _templates(preset)
    ground = _BACKGROUNDS[background][:, None, None]  # (N, 1, 1, 3)
    pixels = cells - ground
    choice = _best_choice(pixels, background, known)  # (N, cells) index into colours * T * S
    colour, template = np.divmod(choice, len(known.brightness))
    texture, mask = np.divmod(template, len(known.masks))
    coverage = known.coverage[mask]
    drawn = known.brightness[template][..., None] * _COLOURS[colour][:, :, None] - coverage[..., None] * ground
    touched = coverage > TOUCHED
    empty_error, error = (pixels**2).sum(-1), ((pixels - drawn) ** 2).sum(-1)
    present = ((error - PRESENT_BELOW * empty_error + FLOOR) * touched).sum(-1) < 0
    residual = np.sqrt(np.where(present, error.mean(-1), empty_error.mean(-1)) / 3)
    scenes = []
    for i in range(len(cells)):
        objects = []
        for cell in np.flatnonzero(present[i]):
            shape, size, dx, dy = known.masks[mask[i, cell]]
            names = list(COLOURS)[colour[i, cell]], TEXTURES[texture[i, cell]]
            objects.append(Obj(int(cell), shape, size, *names, dx, dy))
        name = list(BACKGROUNDS)[background[i]]
        scenes.append(ParsedScene(preset, name, tuple(objects), tuple(residual[i].tolist())))
    return scenes, present[..., None] & touched


def _best_choice(pixels: np.ndarray, background: np.ndarray, known: _Templates) -> np.ndarray:
    """Index of the least error over colours * T * S, for (N, cells, P, 3) pixels without their background."""
    num_pictures, num_cells, num_pixels, _ = pixels.shape
    on_ground = np.einsum("nmpc,nc->nmp", pixels, _BACKGROUNDS[background]).reshape(-1, num_pixels)
    with_coverage = (on_ground @ known.coverage.T).reshape(num_pictures, num_cells, 1, 1, -1)
    channels = np.ascontiguousarray(pixels.swapaxes(2, 3)).reshape(-1, num_pixels)
    with_brightness = (channels @ known.brightness.T).reshape(num_pictures, num_cells, 3, -1)
    error = (-2 * _COLOURS) @ with_brightness
    error = error.reshape(num_pictures, num_cells, *known.constant.shape[1:])
    error += known.constant[background][:, None]
    error += 2 * with_coverage
    return error.reshape(num_pictures, num_cells, -1).argmin(-1)
