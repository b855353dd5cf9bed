"""Random inpainting and outpainting masks, 1 = generate; lengths hold for 512 px and scale with the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

MaskKind = Literal["irregular", "box", "outpainting", "full"]

REFERENCE_PX = 512  # the short side for which lengths below are given
_MAX_DRAWS = 20  # wide masks, rejected most often, would use all of them once in 20 million


@dataclass(frozen=True, eq=False)
class Mask:
    """What to generate.

    Attributes:
        hole: (H, W) uint8 in {0, 1}, 1 = generate.
        kind: how it was made; "full" hides everything.
    """

    hole: np.ndarray
    kind: MaskKind

    @property
    def is_outpaint(self) -> bool:
        """Whether the picture is to be continued past its borders, rather than repaired inside."""
        return self.kind == "outpainting"

    @property
    def coverage(self) -> float:
        """Share of the pixels to generate, 0 to 1."""
        return float(self.hole.mean())


# ---------------------------------------------------------------- parameters; every range includes both ends


@dataclass(frozen=True)
class Strokes:
    """Broken thick lines with round ends; lengths and widths in pixels at 512."""

    count: tuple[int, int] = (1, 5)
    segments: tuple[int, int] = (1, 5)
    length: tuple[int, int] = (10, 249)
    width: tuple[int, int] = (5, 104)


@dataclass(frozen=True)
class Boxes:
    """Union of rectangles, `margin` away from the border; sides in pixels at 512."""

    count: tuple[int, int] = (1, 4)
    side: tuple[int, int] = (35, 160)
    margin: int = 10


@dataclass(frozen=True)
class Strips:
    """Strips along the border, each side with probability one half and at least one; depth as a share of the side.

    The depth is drawn in 512ths, from the lower bound up to but not including the upper one.
    """

    depth: tuple[float, float] = (0.35, 0.40)


@dataclass(frozen=True)
class Full:
    """Everything is to be generated."""


@dataclass(frozen=True)
class MaskMixture:
    """Kinds of masks with their weights; masks that cover more than `max_coverage` are drawn again."""

    parts: tuple[tuple[float, Strokes | Boxes | Strips | Full], ...]
    max_coverage: float = 1.0


STROKES, BOXES, STRIPS = Strokes(), Boxes(), Strips()  # what both training stages draw
STAGE1 = MaskMixture(((0.25, STROKES), (0.25, BOXES), (0.5, STRIPS)))
# Stage 2 hides a quarter of the pictures entirely, and its strips may be thinner.
STAGE2 = MaskMixture(((0.25, Full()), (0.1875, STROKES), (0.1875, BOXES), (0.375, Strips(depth=(0.25, 0.40)))))
# Restoration (DiffRIR) publishes its lengths for 400 px: strokes of 10 to 249, boxes of 35 to 160.
RESTORATION = MaskMixture(
    (
        (0.35, Strokes(length=(13, 319), width=(6, 133))),
        (0.30, Boxes(side=(45, 205), margin=13)),
        (0.35, Strips(depth=(0.15, 0.40))),
    )
)

# Evaluation: LaMa's three sizes of inpainting masks (its code draws one stroke more than its settings say), and two of
# outpainting, which are ours.
NARROW = MaskMixture(((1.0, Strokes(count=(4, 71), length=(10, 109), width=(5, 24))),), max_coverage=0.5)
MEDIUM = MaskMixture(
    (
        (0.77, Strokes(count=(4, 11), length=(10, 209), width=(5, 104))),
        (0.23, Boxes(count=(1, 5), side=(30, 150), margin=0)),
    ),
    max_coverage=0.5,
)
WIDE = MaskMixture(
    ((0.77, Strokes(count=(1, 6), length=(10, 459), width=(5, 254))), (0.23, Boxes(side=(30, 300)))),
    max_coverage=0.5,
)
OUTPAINTING_NARROW = MaskMixture(((1.0, Strips(depth=(0.15, 0.25))),))
OUTPAINTING_WIDE = MaskMixture(((1.0, STRIPS),))


# ---------------------------------------------------------------- drawing


def random_mask(rng: np.random.Generator, height: int, width: int, mixture: MaskMixture = STAGE1) -> Mask:
    """Draw one mask of a mixture; equal generators give equal masks.

    Args:
        height, width: pixels of the mask, 1 or more; lengths scale with the short side.
    Returns:
        a mask with at least one pixel to generate.
    Raises:
        ValueError: a side is below 1 pixel.
    Source: the mixtures of the published training code (arXiv 2311.16500); LaMa's protocol for narrow to wide.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a mask of {height} x {width} pixels was asked for; expected 1 or more per side")
    weights = np.array([weight for weight, _ in mixture.parts])
    smallest: Mask | None = None
    for _ in range(_MAX_DRAWS):
        part = mixture.parts[rng.choice(len(weights), p=weights / weights.sum())][1]
        mask = _draw_part(rng, height, width, part)
        if mask.coverage <= mixture.max_coverage:
            return mask
        if smallest is None or mask.coverage < smallest.coverage:
            smallest = mask
    assert smallest is not None
    return smallest  # pictures of a few pixels cannot always stay below the limit


def _draw_part(rng: np.random.Generator, height: int, width: int, part: Strokes | Boxes | Strips | Full) -> Mask:
    """One mask of the kind that the parameters describe."""
    match part:
        case Strokes():
            return irregular_mask(rng, height, width, part)
        case Boxes():
            return box_mask(rng, height, width, part)
        case Strips():
            return outpainting_mask(rng, height, width, part)
        case Full():
            return Mask(np.ones((height, width), np.uint8), "full")


def irregular_mask(rng: np.random.Generator, height: int, width: int, strokes: Strokes = STROKES) -> Mask:
    """Thick strokes that wander over the picture.

    Each stroke starts at a uniform pixel; each of its segments turns to 0.01 + {0, 1, 2, 3} radians, mirrored for
    every other stroke, and is clipped at the border, where the next one starts.
    """
    scale = min(height, width) / REFERENCE_PX
    count = int(_draw(rng, strokes.count))
    starts = np.stack([rng.integers(0, width, count), rng.integers(0, height, count)], axis=1)
    segments = _draw(rng, strokes.segments, count)
    total = int(segments.sum())
    mirror = np.where(np.repeat(np.arange(count) % 2 == 0, segments), -1.0, 1.0)
    angles = mirror * (0.01 + rng.integers(0, 4, total))
    steps = scale * _draw(rng, strokes.length, total)[:, None] * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    radii = np.maximum(0.5, scale * np.ceil(_draw(rng, strokes.width, total) / 2))  # OpenCV rounds odd widths up

    lines, remaining = [], iter(steps.tolist())
    for (x, y), parts in zip(starts.tolist(), segments.tolist(), strict=True):
        for _ in range(parts):
            dx, dy = next(remaining)
            end_x, end_y = min(max(int(x + dx), 0), width), min(max(int(y + dy), 0), height)
            lines.append((x, y, end_x, end_y))
            x, y = end_x, end_y
    return Mask(_fill_capsules(np.array(lines, float), radii, height, width), "irregular")


def box_mask(rng: np.random.Generator, height: int, width: int, boxes: Boxes = BOXES) -> Mask:
    """Union of rectangles with independent sides."""
    short = min(height, width)
    scale = short / REFERENCE_PX
    margin = min(round(boxes.margin * scale), (short - 1) // 2)
    longest = max(1, min(round(boxes.side[1] * scale), short - 2 * margin))
    shortest = min(max(1, round(boxes.side[0] * scale)), longest)
    hole = np.zeros((height, width), np.uint8)
    for _ in range(int(_draw(rng, boxes.count))):
        box_width, box_height = _draw(rng, (shortest, longest), 2).tolist()
        x = int(_draw(rng, (margin, width - margin - box_width)))
        y = int(_draw(rng, (margin, height - margin - box_height)))
        hole[y : y + box_height, x : x + box_width] = 1
    return Mask(hole, "box")


def outpainting_mask(rng: np.random.Generator, height: int, width: int, strips: Strips = STRIPS) -> Mask:
    """Strips along the border: left and right measured by the width, top and bottom by the height.

    The published code swaps width and height here, which shows on pictures that are not square.
    """
    low, high = (int(share * REFERENCE_PX) for share in strips.depth)
    left, top, right, bottom = rng.integers(low, max(low + 1, high), 4) / REFERENCE_PX
    sides = rng.random(4) < 0.5
    if not sides.any():
        sides[rng.integers(0, 4)] = True
    hole = np.zeros((height, width), np.uint8)
    if sides[0]:
        hole[:, : max(1, int(left * width))] = 1
    if sides[1]:
        hole[: max(1, int(top * height))] = 1
    if sides[2]:
        hole[:, int((1 - right) * width) :] = 1
    if sides[3]:
        hole[int((1 - bottom) * height) :] = 1
    return Mask(hole, "outpainting")


def _draw(rng: np.random.Generator, bounds: tuple[int, int], count: int | None = None) -> np.ndarray:
    """Uniform integers, both bounds included."""
    return np.asarray(rng.integers(bounds[0], bounds[1], count, endpoint=True))


def _fill_capsules(lines: np.ndarray, radii: np.ndarray, height: int, width: int) -> np.ndarray:
    """All pixels whose centre lies within its radius of one of the lines.

    A capsule is convex, so each row crosses it in one interval, and the interval's ends are closed formulas: walking
    along the line, the circle that reaches furthest touches where the normal points sideways. Intervals of all lines
    are counted in at their start, out behind their end, and summed along the row.

    Args:
        lines: (S, 4) x, y of start and end in pixels.
        radii: (S,) pixels.
    Returns:
        (height, width) uint8 in {0, 1}.
    """
    x, y, end_x, end_y = (column[:, None] for column in lines.T)
    dx, dy = end_x - x, end_y - y
    level = dy == 0
    dy = np.where(level, 1.0, dy)
    radius = radii[:, None]
    normal_y = -np.sign(dy) * dx / np.hypot(dx, dy) * radius
    below_start = np.arange(height) - y  # (S, height)

    edges = []
    for side in (-1, 1):
        along = np.where(level, side * dx > 0, np.clip((below_start - side * normal_y) / dy, 0, 1))
        squared = radius**2 - (below_start - np.where(level, 0, along * dy)) ** 2
        edges.append(x + along * dx + side * np.sqrt(np.maximum(squared, 0)))
    first = np.clip(np.ceil(edges[0] - 1e-6), 0, width).astype(np.intp)
    behind = np.clip(np.floor(edges[1] + 1e-6) + 1, 0, width).astype(np.intp)
    hit = (squared >= -1e-6) & (first < behind)

    rows = np.broadcast_to(np.arange(height), hit.shape)[hit]
    change = np.zeros((height, width + 1), np.int16)
    np.add.at(change, (rows, first[hit]), 1)
    np.add.at(change, (rows, behind[hit]), -1)
    return (np.cumsum(change[:, :width], axis=1, dtype=np.int16) > 0).view(np.uint8)
