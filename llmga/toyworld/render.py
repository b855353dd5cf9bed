"""Draw scenes: antialiased, at any size, pure NumPy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from llmga.toyworld.scene import BACKGROUNDS, COLOURS, PRESETS, Obj, Scene

DARK_PART = 0.4
"""Brightness of a texture's dark parts relative to the object's colour."""
SUPERSAMPLING = 4


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: side of the square picture in pixels, at least 8.
    Returns:
        (size, size, 3) uint8 RGB.
    Raises:
        ValueError: the size is below 8.
    """
    if size < 8:
        raise ValueError(f"a toy scene cannot be drawn at {size} px; expected at least 8")
    picture = np.empty((size, size, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        top, left, coverage, brightness = object_layers(scene.preset, obj, size)
        window = picture[top : top + coverage.shape[0], left : left + coverage.shape[1]]
        window *= 1 - coverage[..., None]
        window += brightness[..., None] * np.asarray(COLOURS[obj.colour])
    return (picture + 0.5).astype(np.uint8)


def cell_origin(preset: str, cell: int) -> tuple[float, float]:
    """(top, left) of a cell in pixels of a 64 px picture."""
    geometry = PRESETS[preset]
    row, column = divmod(cell, geometry.grid)
    return geometry.frame + row * geometry.cell, geometry.frame + column * geometry.cell


def object_layers(preset: str, obj: Obj, size: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Where an object lies and how it covers its window.

    Returns:
        top, left of the window in pixels, its coverage (h, w) in [0, 1], and its brightness (h, w) in [0, 1]: coverage
        with dark texture parts scaled by `DARK_PART`. A pixel is background * (1 - coverage) + colour * brightness.
    """
    geometry = PRESETS[preset]
    top, left = cell_origin(preset, obj.cell)
    centre_y, centre_x = top + geometry.cell / 2 + obj.dy, left + geometry.cell / 2 + obj.dx
    return _layers(obj.shape, obj.texture, geometry.radius[obj.size], geometry.texture_period, centre_y, centre_x, size)


@lru_cache(maxsize=8192)
def _layers(
    shape: str, texture: str, radius: int, period: int, centre_y: float, centre_x: float, size: int
) -> tuple[int, int, np.ndarray, np.ndarray]:
    scale = size / 64
    top, bottom = (int(np.floor((centre_y - radius) * scale)), int(np.ceil((centre_y + radius) * scale)))
    left, right = (int(np.floor((centre_x - radius) * scale)), int(np.ceil((centre_x + radius) * scale)))
    top, left, bottom, right = max(top, 0), max(left, 0), min(bottom, size), min(right, size)
    fine = (np.arange(SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    v = ((np.arange(top, bottom)[:, None] + fine).reshape(-1) / scale - centre_y)[:, None]
    u = ((np.arange(left, right)[:, None] + fine).reshape(-1) / scale - centre_x)[None, :]
    inside = _inside(shape, u, v, radius)
    brightness = np.where(_dark(texture, u, v, period), DARK_PART, 1.0) * inside
    coverage, brightness = _pool(inside.astype(float)), _pool(brightness)
    coverage.flags.writeable = brightness.flags.writeable = False
    return top, left, coverage, brightness


def _inside(shape: str, u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    if shape == "circle":
        return u**2 + v**2 <= (0.96 * r) ** 2
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.84 * r
    if shape == "triangle":
        return (v <= 0.8 * r) & (abs(u) <= (v + r) * 0.54)
    if shape == "diamond":
        return abs(u) + abs(v) <= r
    return ((abs(u) <= 0.34 * r) & (abs(v) <= r)) | ((abs(v) <= 0.34 * r) & (abs(u) <= r))


def _dark(texture: str, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    if texture == "plain":
        return np.zeros(np.broadcast_shapes(u.shape, v.shape), bool)
    if texture == "stripes":
        return np.broadcast_to(np.floor(v / period + 0.5) % 2 == 1, np.broadcast_shapes(u.shape, v.shape))
    if texture == "checks":
        return (np.floor(u / period) + np.floor(v / period)) % 2 == 1
    spacing = 1.4 * period
    nearest_u, nearest_v = u - spacing * np.round(u / spacing), v - spacing * np.round(v / spacing)
    return nearest_u**2 + nearest_v**2 <= (0.5 * period) ** 2


def _pool(fine: np.ndarray) -> np.ndarray:
    height, width = fine.shape[0] // SUPERSAMPLING, fine.shape[1] // SUPERSAMPLING
    return fine.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean(axis=(1, 3))
