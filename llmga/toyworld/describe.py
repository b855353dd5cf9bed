"""Scenes in words: long captions past CLIP's window, brief ones, and everything between; with the truth in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from llmga.tokens import clip_positions
from llmga.toyworld import wording
from llmga.toyworld.scene import Obj, Scene
from llmga.toyworld.wording import COUNTS, PLACES, fill, pick, say

Style = Literal["long", "medium", "brief"]
BACKGROUND: Literal["background"] = "background"
"""Where a caption may begin instead of at a cell."""


@dataclass(frozen=True)
class Fact:
    """One thing that a caption says: its kind (an attribute, `background` or `count`), cell, value and characters."""

    kind: str
    cell: int | None
    value: str
    start: int
    end: int


@dataclass(frozen=True)
class Caption:
    """A caption and the facts in it, in reading order."""

    text: str
    facts: tuple[Fact, ...]

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """CLIP position of the last word piece of each fact; BOS stands at 0, so the first word piece is at 1."""
        return tuple(clip_positions(self.text, [(fact.start, fact.end) for fact in self.facts]))


def describe(
    scene: Scene,
    rng: np.random.Generator,
    style: Style = "long",
    first: int | Literal["background"] | None = None,
    varied: bool = True,
) -> Caption:
    """Say what a scene shows.

    Args:
        scene: what to describe.
        rng: draws wording and order.
        style: `long` says every fact, a sentence each object, in shuffled order, 77 to 190 CLIP tokens in the
            learnable world; `brief` says background, count and one object's colour and shape; `medium` says some or all
            facts shortly and in any order, within CLIP's window where the scene is not crowded.
        first: where a long caption begins, as one that was asked for a change begins with it: a cell, from which the
            objects follow in reading order and round, the background anywhere behind the first; or the background.
        varied: False words every long caption alike, so that all there is to learn in it is what the scene holds.
    Raises:
        ValueError: the style is unknown.
    """
    if style == "long":
        return _long(scene, rng, first, varied)
    if style == "brief":
        return _brief(scene, rng)
    if style == "medium":
        return _medium(scene, rng)
    raise ValueError(f"caption style {style!r} is unknown; expected long, medium or brief")


_Piece = tuple[str, list[Fact]]


def _long(scene: Scene, rng: np.random.Generator, first: int | str | None, varied: bool) -> Caption:
    wordings = (wording.OPENINGS, wording.OBJECTS, wording.GROUNDS, wording.CLOSINGS)
    openings, objects, grounds, closings = wordings if varied else [patterns[:1] for patterns in wordings]
    ground = _ground(rng, grounds, scene)
    num_cells = scene.geometry.grid**2
    start = first if isinstance(first, int) else int(rng.integers(num_cells))
    in_turn = sorted(scene.objects, key=lambda obj: (obj.cell - start) % num_cells)
    middle = [_object(rng, objects, scene, obj, varied) for obj in in_turn]
    middle.insert(0 if first == BACKGROUND else int(rng.integers(1, len(middle) + 1)), ground)
    if first is None:
        rng.shuffle(middle)
    return _join([_count(rng, openings, scene), *middle, (pick(rng, closings), [])])


def _brief(scene: Scene, rng: np.random.Generator) -> Caption:
    obj = scene.objects[rng.integers(len(scene.objects))]
    words = {
        "count": COUNTS[len(scene.objects)],
        "background": scene.background,
        "colour": say(rng, "colour", obj.colour),
        "shape": say(rng, "shape", obj.shape),
    }
    text, spans = fill(pick(rng, wording.BRIEFS), words)
    values = {"count": str(len(scene.objects)), "background": scene.background}
    facts = [
        Fact(slot, obj.cell if slot in ("colour", "shape") else None, values.get(slot) or getattr(obj, slot), *span)
        for slot, span in spans.items()
    ]
    return _join([(text, facts)])


def _medium(scene: Scene, rng: np.random.Generator) -> Caption:
    pieces = [_object(rng, wording.PHRASES, scene, obj) for obj in scene.objects if rng.random() < 0.9]
    if rng.random() < 0.8 or not pieces:
        pieces.append(_ground(rng, wording.GROUND_PHRASES, scene))
    if rng.random() < 0.3:
        pieces.append(_count(rng, wording.COUNT_PHRASES, scene))
    rng.shuffle(pieces)
    return _join(pieces)


def _object(rng: np.random.Generator, patterns: Sequence[str], scene: Scene, obj: Obj, varied: bool = True) -> _Piece:
    words = {kind: say(rng, kind, value, varied) for kind, value in obj.attributes().items()}
    words["place"] = PLACES[scene.geometry.grid][obj.cell]
    text, spans = fill(pick(rng, patterns), words)
    return text, [Fact(kind, obj.cell, getattr(obj, kind), *span) for kind, span in spans.items() if kind != "place"]


def _ground(rng: np.random.Generator, patterns: Sequence[str], scene: Scene) -> _Piece:
    text, spans = fill(pick(rng, patterns), {"background": scene.background})
    return text, [Fact("background", None, scene.background, *spans["background"])]


def _count(rng: np.random.Generator, patterns: Sequence[str], scene: Scene) -> _Piece:
    text, spans = fill(pick(rng, patterns), {"count": COUNTS[len(scene.objects)]})
    return text, [Fact("count", None, str(len(scene.objects)), *spans["count"])]


def _join(pieces: list[_Piece]) -> Caption:
    text, facts = "", []
    for number, (piece, piece_facts) in enumerate(pieces):
        text += ". " if number else ""
        facts += [Fact(f.kind, f.cell, f.value, f.start + len(text), f.end + len(text)) for f in piece_facts]
        text += piece[0].upper() + piece[1:]
    return Caption(text + ".", tuple(sorted(facts, key=lambda fact: fact.start)))
