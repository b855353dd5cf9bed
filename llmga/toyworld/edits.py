"""Edits of a scene: an instruction in words, the scene it should lead to, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmga.toyworld.scene import (
    ATTRIBUTES,
    BACKGROUNDS,
    THEMES,
    THEMES_BY_NAME,
    Facts,
    Obj,
    Scene,
    draw_object,
    facts_from_list,
    facts_to_list,
)
from llmga.toyworld.wording import PLACES, fill, pick, say

NOTHING = "nothing"
"""Value of the fact `("shape", cell)` where a cell must be empty."""

_OF_OBJECT: dict[str, str] = {"recolour": "colour", "reshape": "shape", "retexture": "texture", "resize": "size"}

WORDINGS: dict[str, tuple[str, ...]] = {
    "recolour": (
        "make {object} {colour}",
        "paint {object} {colour}",
        "change the colour of {object} to {colour}",
        "turn {object} {colour}",
        "recolour {object} in {colour}",
        "I would like {object} to be {colour}",
        "{object} should be {colour}",
        "give {object} a {colour} colour",
    ),
    "reshape": (
        "turn {object} into a {shape}",
        "replace {object} by a {shape} of the same size, colour and texture",
        "make {object} a {shape}",
        "change the shape of {object} to a {shape}",
        "{object} should become a {shape}",
        "I want a {shape} instead of {object}, everything else about it unchanged",
        "reshape {object} to a {shape}",
    ),
    "retexture": (
        "make {object} {texture}",
        "give {object} a {texture} surface",
        "change the texture of {object} to {texture}",
        "{object} should be {texture}",
        "I would like {object} to have a {texture} surface",
        "turn {object} into a {texture} one",
        "let the surface of {object} be {texture}",
    ),
    "resize": (
        "make {object} {size}",
        "change the size of {object} to {size}",
        "{object} should be {size}",
        "let {object} become {size}",
        "I would like {object} to be {size}",
        "redraw {object} in a {size} size",
        "turn {object} into a {size} one",
    ),
    "move": (
        "move {object} to the {place}",
        "put {object} into the {place}",
        "shift {object} to the {place}",
        "take {object} and bring it to the {place}",
        "{object} belongs in the {place}",
        "I want {object} moved to the {place}",
        "drag {object} over to the {place}",
    ),
    "add": (
        "add a {size} {texture} {colour} {shape} in the {place}",
        "put a {size} {colour} {shape} with a {texture} surface in the {place}",
        "draw a {texture} {colour} {shape} in the {place}, {size}",
        "place a {size} {texture} {shape} in {colour} in the {place}",
        "in the {place} I would like a {size} {texture} {colour} {shape}",
        "the {place} should hold a {size} {texture} {colour} {shape}",
        "insert a new shape in the {place}: a {size} {texture} {colour} {shape}",
    ),
    "remove": (
        "remove {object}",
        "delete {object}",
        "take {object} away",
        "erase {object}",
        "get rid of {object}",
        "{object} should disappear",
        "I do not want {object} any more",
    ),
    "background": (
        "make the background {background}",
        "change the background to {background}",
        "paint the background {background}",
        "put everything on a {background} background",
        "the background should be {background}",
        "replace the background by {background}",
        "I would like a {background} background",
    ),
}
KINDS = tuple(WORDINGS)
"""The eight kinds of edits."""


@dataclass(frozen=True)
class Edit:
    """An edit.

    Attributes:
        kind: one of `KINDS`.
        instruction: what to change, in one sentence.
        target: the scene that fulfils it; objects that stay keep their jitter.
        requested: the facts that the instruction asks for; together with `preserved` all facts of the target.
        preserved: all others. In both, `("shape", cell): NOTHING` says that a cell must be empty.
    """

    kind: str
    instruction: str
    target: Scene
    requested: Facts
    preserved: Facts

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` inverts it."""
        facts = {name: facts_to_list(getattr(self, name)) for name in ("requested", "preserved")}
        return {"kind": self.kind, "instruction": self.instruction, "target": self.target.to_dict(), **facts}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Edit:
        """Inverse of `to_dict`."""
        facts = [facts_from_list(data[name]) for name in ("requested", "preserved")]
        return Edit(data["kind"], data["instruction"], Scene.from_dict(data["target"]), *facts)


def holds(facts: Facts, wanted: Facts) -> bool:
    """True when every wanted fact is among `facts`, which come from a scene, a parsed caption or a parsed picture."""
    return all(facts.get(key, NOTHING) == value for key, value in wanted.items())


def feasible_kinds(scene: Scene) -> tuple[str, ...]:
    """Kinds of edits that keep the number of objects within the preset's range."""
    fewest, most = scene.geometry.num_objects
    num_objects = len(scene.objects)
    barred = set()
    if num_objects <= fewest:
        barred.add("remove")
    if num_objects >= most:
        barred.add("add")
    if num_objects == scene.geometry.grid**2:
        barred.add("move")
    return tuple(kind for kind in KINDS if kind not in barred)


def sample_edit(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Edit:
    """Draw an edit.

    The target stays on the source's side of the split: it has a held-out combination exactly when the source has one.

    Args:
        scene: the scene to edit.
        rng: draws everything.
        kind: one of `KINDS`; None draws one that is feasible.
    Raises:
        ValueError: the kind is unknown, or not feasible in this scene.
    """
    feasible = feasible_kinds(scene)
    if kind is not None and kind not in feasible:
        known = "not feasible in this scene" if kind in KINDS else "unknown"
        raise ValueError(f"edit kind {kind!r} is {known}; expected one of {', '.join(feasible)}")
    while True:
        drawn = kind or feasible[rng.integers(len(feasible))]
        target, words = _DRAW[drawn](scene, rng, drawn)
        if target.has_held_out() == scene.has_held_out():
            break
    instruction, _ = fill(pick(rng, WORDINGS[drawn]), words)
    if rng.random() < 0.7:
        instruction = instruction[0].upper() + instruction[1:]
    if rng.random() < 0.5:
        instruction += "."
    before, after = all_facts(scene), all_facts(target)
    requested = {key: value for key, value in after.items() if value != before.get(key)}
    preserved = {key: value for key, value in after.items() if key not in requested}
    return Edit(drawn, instruction, target, requested, preserved)


def all_facts(scene: Scene) -> Facts:
    """`scene.facts()` and `("shape", cell): NOTHING` for each empty cell."""
    empty: Facts = {("shape", cell): NOTHING for cell in scene.empty_cells()}
    return scene.facts() | empty


def refer(scene: Scene, obj: Obj, rng: np.random.Generator) -> str:
    """Name an object so that it cannot be mistaken: by its place, or by a description that fits no other."""
    apart = describe_apart(scene, obj, rng) if rng.random() < 0.5 else None
    if apart is not None:
        return apart
    place = PLACES[scene.geometry.grid][obj.cell]
    shape, colour = say(rng, "shape", obj.shape), say(rng, "colour", obj.colour)
    return pick(rng, (f"the {place} shape", f"the {shape} in the {place}", f"the {colour} {shape} in the {place}"))


def describe_apart(scene: Scene, obj: Obj, rng: np.random.Generator, without: str | None = None) -> str | None:
    """Some attributes of an object that fit no other one, such as "the small cross"; None where the draw was unlucky.

    Args:
        without: an attribute to keep silent about.
    """
    kinds = [kind for kind in ("size", "texture", "colour", "shape") if kind != without and rng.random() < 0.5]
    alike = [other for other in scene.objects if all(getattr(other, kind) == getattr(obj, kind) for kind in kinds)]
    if not kinds or len(alike) > 1:
        return None
    said = {kind: say(rng, kind, getattr(obj, kind)) for kind in kinds}
    return " ".join(["the", *(said[kind] for kind in kinds if kind != "shape"), said.get("shape", "shape")])


_Drawn = tuple[Scene, dict[str, str]]


def _attribute(scene: Scene, rng: np.random.Generator, kind: str) -> _Drawn:
    attribute = _OF_OBJECT[kind]
    obj = scene.objects[rng.integers(len(scene.objects))]
    others = [value for value in ATTRIBUTES[attribute] if value != getattr(obj, attribute)]
    value = others[rng.integers(len(others))]
    change: dict[str, Any] = {attribute: value}
    target = scene.with_objects([o if o is not obj else replace(o, **change) for o in scene.objects])
    return target, {"object": refer(scene, obj, rng), attribute: say(rng, attribute, value)}


def _move(scene: Scene, rng: np.random.Generator, kind: str) -> _Drawn:
    obj = scene.objects[rng.integers(len(scene.objects))]
    cell = int(rng.choice(scene.empty_cells()))
    target = scene.with_objects([o if o is not obj else replace(o, cell=cell) for o in scene.objects])
    return target, {"object": refer(scene, obj, rng), "place": PLACES[scene.geometry.grid][cell]}


def _add(scene: Scene, rng: np.random.Generator, kind: str) -> _Drawn:
    geometry = scene.geometry
    # A scene that was read from a picture has no theme.
    theme = THEMES_BY_NAME.get(scene.theme) or THEMES[int(rng.integers(len(THEMES)))]
    obj = draw_object(rng, int(rng.choice(scene.empty_cells())), theme, geometry.jitter)
    words = {attribute: say(rng, attribute, value) for attribute, value in obj.attributes().items()}
    return scene.with_objects([*scene.objects, obj]), {**words, "place": PLACES[geometry.grid][obj.cell]}


def _remove(scene: Scene, rng: np.random.Generator, kind: str) -> _Drawn:
    obj = scene.objects[rng.integers(len(scene.objects))]
    return scene.with_objects([o for o in scene.objects if o is not obj]), {"object": refer(scene, obj, rng)}


def _background(scene: Scene, rng: np.random.Generator, kind: str) -> _Drawn:
    others = [name for name in BACKGROUNDS if name != scene.background]
    background = others[rng.integers(len(others))]
    return replace(scene, background=background), {"background": background}


_DRAW: dict[str, Callable[[Scene, np.random.Generator, str], _Drawn]] = {
    **dict.fromkeys(_OF_OBJECT, _attribute),
    "move": _move,
    "add": _add,
    "remove": _remove,
    "background": _background,
}
