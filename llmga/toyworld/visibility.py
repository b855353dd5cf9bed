"""What can still be seen of a scene through a mask."""

from __future__ import annotations

import numpy as np

from llmga.toyworld.render import cell_origin, object_layers
from llmga.toyworld.scene import Scene

MIN_VISIBLE = 0.5
"""Share of an object that must be outside of the hole for its attributes to be asked for."""


def is_visible(scene: Scene, cell: int, hole: np.ndarray | None) -> bool:
    """Whether the cell's object, or the empty cell, can be told through a hole; without one everything can."""
    return hole is None or visible_share(scene, cell, hole) >= MIN_VISIBLE


def hidden_cells(scene: Scene, hole: np.ndarray | None) -> list[int]:
    """The cells of which too little can be seen."""
    return [cell for cell in range(scene.geometry.grid**2) if not is_visible(scene, cell, hole)]


def visible_share(scene: Scene, cell: int, hole: np.ndarray) -> float:
    """Share of the cell's object, or of the empty cell, that lies outside of the hole.

    Args:
        scene: the scene.
        cell: cell number, row by row.
        hole: (S, S) array, 1 = hidden.
    Returns:
        0 (hidden) to 1 (fully visible); for an object its coverage is the weight, for an empty cell every pixel counts.
    """
    size = hole.shape[0]
    obj = scene.object_at(cell)
    if obj is not None:
        top, left, coverage, _ = object_layers(scene.preset, obj, size)
        window = hole[top : top + coverage.shape[0], left : left + coverage.shape[1]]
        return float(1 - (window * coverage).sum() / coverage.sum())
    top_64, left_64 = cell_origin(scene.preset, cell)
    scale, side = size / 64, scene.geometry.cell
    window = hole[
        round(top_64 * scale) : round((top_64 + side) * scale), round(left_64 * scale) : round((left_64 + side) * scale)
    ]
    return float(1 - window.mean())
