"""Scenes: a dark background and a few objects on a grid, drawn from a themed prior.

The prior is what makes prompt refinement learnable: a theme ties background, palette and textures together, so a
brief caption leaves details that can be imagined well or badly. Fifteen per cent of the attributes ignore the theme.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "navy": (16, 24, 66),
    "olive": (40, 52, 14),
    "maroon": (70, 12, 28),
    "charcoal": (38, 40, 44),
    "plum": (56, 18, 72),
    "brown": (66, 42, 20),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 52, 46),
    "orange": (244, 146, 30),
    "yellow": (246, 232, 60),
    "green": (62, 196, 74),
    "cyan": (60, 208, 222),
    "blue": (72, 108, 244),
    "pink": (250, 136, 196),
    "white": (242, 242, 242),
}
SHAPES = ("circle", "square", "triangle", "diamond", "plus")
SIZES = ("small", "large")
TEXTURES = ("plain", "stripes", "checks", "dots")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "size": SIZES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
}
"""The attributes of an object and their values; chance level is one over the number of values."""

Facts = dict[tuple[str, int | None], str]
"""What is true of a scene: `("background", None)` and `(attribute, cell)` -> value."""

EXCEPTION_SHARE = 0.15
WORLD_SEED = 20231128

SPLITS: dict[str, range] = {
    "train": range(0, 10_000_000),
    "validation": range(10_000_000, 11_000_000),
    "test": range(11_000_000, 12_000_000),
    "composition": range(12_000_000, 13_000_000),
}
"""Disjoint seed ranges. Scenes of `composition` hold at least one combination that no other split contains."""


@dataclass(frozen=True)
class Preset:
    """Geometry of a world, in pixels of a 64 px picture."""

    grid: int
    num_objects: tuple[int, int]
    radius: dict[str, int]
    texture_period: int
    frame: int = 2
    jitter: int = 1

    @property
    def cell(self) -> float:
        """Side of one grid cell."""
        return (64 - 2 * self.frame) / self.grid


PRESETS: dict[str, Preset] = {
    "learnable": Preset(grid=2, num_objects=(2, 4), radius={"small": 9, "large": 14}, texture_period=5),
    "dense": Preset(grid=3, num_objects=(4, 8), radius={"small": 6, "large": 9}, texture_period=3),
}


@dataclass(frozen=True)
class Theme:
    """What usually goes together."""

    name: str
    background: str
    palette: tuple[str, ...]
    textures: tuple[str, ...]


THEMES: tuple[Theme, ...] = (
    Theme("harbour", "navy", ("white", "red", "cyan"), ("stripes", "plain")),
    Theme("night sky", "navy", ("yellow", "white", "blue"), ("dots", "plain")),
    Theme("meadow", "olive", ("green", "yellow", "pink"), ("dots", "stripes")),
    Theme("orchard", "olive", ("red", "orange", "green"), ("plain", "checks")),
    Theme("theatre", "maroon", ("red", "yellow", "white"), ("stripes", "checks")),
    Theme("bakery", "maroon", ("orange", "pink", "white"), ("dots", "plain")),
    Theme("workshop", "charcoal", ("orange", "yellow", "cyan"), ("checks", "stripes")),
    Theme("laboratory", "charcoal", ("green", "cyan", "blue"), ("plain", "dots")),
    Theme("carnival", "plum", ("pink", "yellow", "cyan"), ("checks", "dots")),
    Theme("twilight", "plum", ("blue", "pink", "orange"), ("stripes", "plain")),
    Theme("desert", "brown", ("orange", "yellow", "red"), ("plain", "stripes")),
    Theme("market", "brown", ("green", "white", "red"), ("checks", "dots")),
)
THEMES_BY_NAME: dict[str, Theme] = {theme.name: theme for theme in THEMES}


@dataclass(frozen=True)
class Obj:
    """One object. `cell` counts row by row from the top left; `dx`, `dy` are its jitter in pixels of 64."""

    cell: int
    shape: str
    size: str
    colour: str
    texture: str
    dx: int = 0
    dy: int = 0

    def attributes(self) -> dict[str, str]:
        """Its four attributes by kind."""
        return {kind: getattr(self, kind) for kind in ATTRIBUTES}


@dataclass(frozen=True)
class Scene:
    """A scene: preset, background, objects in cell order, and the theme that it was drawn from."""

    preset: str
    background: str
    objects: tuple[Obj, ...]
    theme: str = ""

    @property
    def geometry(self) -> Preset:
        """The preset's geometry."""
        return PRESETS[self.preset]

    def object_at(self, cell: int) -> Obj | None:
        """The object in that cell, if there is one."""
        return next((obj for obj in self.objects if obj.cell == cell), None)

    def with_objects(self, objects: Iterator[Obj] | list[Obj] | tuple[Obj, ...]) -> Scene:
        """The same scene with other objects, kept in cell order."""
        return replace(self, objects=tuple(sorted(objects, key=lambda obj: obj.cell)))

    def empty_cells(self) -> list[int]:
        """Cells without an object."""
        taken = {obj.cell for obj in self.objects}
        return [cell for cell in range(self.geometry.grid**2) if cell not in taken]

    def has_held_out(self) -> bool:
        """True when an object has a combination that only `composition` scenes contain."""
        return any(is_held_out(obj) for obj in self.objects)

    def facts(self) -> Facts:
        """Everything that can be right or wrong."""
        facts: Facts = {("background", None): self.background}
        for obj in self.objects:
            facts.update({(kind, obj.cell): value for kind, value in obj.attributes().items()})
        return facts

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` inverts it."""
        objects = [[o.cell, o.shape, o.size, o.colour, o.texture, o.dx, o.dy] for o in self.objects]
        return {"preset": self.preset, "background": self.background, "theme": self.theme, "objects": objects}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Scene:
        """Inverse of `to_dict`."""
        objects = tuple(Obj(*values) for values in data["objects"])
        return Scene(data["preset"], data["background"], objects, data.get("theme", ""))


def facts_to_list(facts: Facts) -> list[list[Any]]:
    """JSON-ready `[kind, cell, value]` rows; `facts_from_list` inverts it."""
    return [[kind, cell, value] for (kind, cell), value in facts.items()]


def facts_from_list(rows: list[list[Any]]) -> Facts:
    """Inverse of `facts_to_list`."""
    return {(kind, cell): value for kind, cell, value in rows}


def is_held_out(obj: Obj) -> bool:
    """True for the one in eleven (colour, shape, texture) combinations that only `composition` scenes contain."""
    index = list(COLOURS).index(obj.colour) + 2 * SHAPES.index(obj.shape) + 3 * TEXTURES.index(obj.texture)
    return index % 11 == 5


def sample_scene(seed: int, preset: str = "learnable") -> Scene:
    """Draw the scene of a seed; the seed also decides its split (`SPLITS`).

    Args:
        seed: 0 to 13 million; equal seeds give equal scenes.
        preset: a key of `PRESETS`.
    Raises:
        ValueError: the seed belongs to no split, or the preset is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"toy world preset {preset!r} is unknown; expected one of {', '.join(PRESETS)}")
    composition = split_of(seed) == "composition"
    rng = np.random.default_rng([WORLD_SEED, list(PRESETS).index(preset), seed])
    while True:  # rejection keeps the prior's shape; a dense scene is accepted about every other time
        scene = _draw(rng, preset)
        if scene.has_held_out() == composition:
            return scene


def split_of(seed: int) -> str:
    """Name of the split whose seed range holds `seed`."""
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"toy world seed {seed} belongs to no split; expected 0 to {SPLITS['composition'].stop - 1}")


def _draw(rng: np.random.Generator, preset: str) -> Scene:
    geometry = PRESETS[preset]
    theme = THEMES[rng.integers(len(THEMES))]
    num_objects = int(rng.integers(geometry.num_objects[0], geometry.num_objects[1] + 1))
    cells = np.sort(rng.choice(geometry.grid**2, size=num_objects, replace=False))
    background = _themed(rng, (theme.background,), tuple(BACKGROUNDS))
    objects = tuple(draw_object(rng, int(cell), theme, geometry.jitter) for cell in cells)
    return Scene(preset, background, objects, theme.name)


def draw_object(rng: np.random.Generator, cell: int, theme: Theme, jitter: int) -> Obj:
    """Draw one object of a theme for a cell."""
    return Obj(
        cell=cell,
        shape=SHAPES[rng.integers(len(SHAPES))],
        size=SIZES[rng.integers(len(SIZES))],
        colour=_themed(rng, theme.palette, tuple(COLOURS)),
        texture=_themed(rng, theme.textures, TEXTURES),
        dx=int(rng.integers(-jitter, jitter + 1)),
        dy=int(rng.integers(-jitter, jitter + 1)),
    )


def _themed(rng: np.random.Generator, usual: tuple[str, ...], every: tuple[str, ...]) -> str:
    values = every if rng.random() < EXCEPTION_SHARE else usual
    return values[rng.integers(len(values))]
