"""How right is a written prompt? Every score is a (right, total) pair, so that sums over scenes are exact.

A prompt is *valid* when the grammar reads all of it without a contradiction (`grammar.parse_caption` says what that
takes) and it describes at least one shape with its place. A cell of which a prompt says nothing counts as empty, but
only in a prompt that describes a shape: silence earns nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llmga.toyworld.edits import NOTHING, Edit, all_facts
from llmga.toyworld.grammar import ParsedCaption, parse_caption, says
from llmga.toyworld.scene import THEMES, Facts, Scene
from llmga.toyworld.visibility import is_visible


@dataclass
class PromptScore:
    """Scores of one prompt: name -> (right, total); a total of 0 says that the score does not apply."""

    pairs: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, name: str, right: bool | int, total: int = 1) -> None:
        """Add to a score."""
        before = self.pairs.get(name, (0, 0))
        self.pairs[name] = (before[0] + int(right), before[1] + total)


def score_description(prompt: str, scene: Scene, hole: np.ndarray | None = None) -> PromptScore:
    """Score a prompt that should describe a scene, or what a mask leaves to see of it.

    Scores: `valid`, `attributes` and `attribute:<kind>` (a missing object is wrong in all of its attributes),
    `exact` (every fact and no other; only without a hole), `no_extra` (no object where a visible cell is empty).

    Args:
        hole: (S, S), 1 = hidden; the facts of objects that are mostly hidden are not counted.
    """
    grid = scene.geometry.grid
    parsed, score = parse_caption(prompt, grid), PromptScore()
    score.add("valid", _is_valid(parsed))
    _score_facts(score, parsed, _visible_facts(scene, hole))
    empty = [cell for cell in scene.empty_cells() if is_visible(scene, cell, hole)]
    said = _said(parsed, grid)
    score.add("no_extra", sum(said.get(("shape", cell)) == NOTHING for cell in empty), len(empty))
    if hole is None:
        score.add("exact", says(parsed, scene))
    return score


def score_refinement(prompt: str, brief: str, grid: int) -> PromptScore:
    """Score a prompt that should keep what a brief caption asks for and add the rest.

    Scores: `valid`, `constraints` (background, count, and an object with the named colour and shape), `kept` (all of
    them), `themed` (of the colours and textures that the brief leaves open, those usual in one theme of its background,
    the one that fits best).
    """
    parsed, asked, score = parse_caption(prompt, grid), parse_caption(brief, grid), PromptScore()
    score.add("valid", _is_valid(parsed))
    kept = [parsed.background == asked.background]
    if asked.count is not None:
        kept.append(len(parsed.objects) == asked.count)
    for mention in asked.mentions:
        kept.append(any(mention.items() <= said.items() for said in parsed.objects.values()))
    score.add("constraints", sum(kept), len(kept))
    score.add("kept", all(kept))
    imagined = _imagined(parsed, asked)
    themes = [theme for theme in THEMES if theme.background == asked.background]
    usual = [sum(value in (*theme.palette, *theme.textures) for value in imagined) for theme in themes]
    score.add("themed", max(usual, default=0), len(imagined))
    return score


def score_short_description(text: str, scene: Scene) -> PromptScore:
    """Score a brief caption or one in note form, which leaves facts out; the more it says, the more can be false.

    Scores: `valid`, `facts_said` (their number), `true_facts` (of those said), `all_true` (valid, and every fact is
    true, of one at least).
    """
    parsed, score, facts = parse_caption(text, scene.geometry.grid, partial=True), PromptScore(), scene.facts()
    true = [facts.get(place) == value for place, value in parsed.facts().items()]
    if parsed.count is not None:
        true.append(parsed.count == len(scene.objects))
    for mention in parsed.mentions:
        true.append(any(mention.items() <= obj.attributes().items() for obj in scene.objects))
    score.add("valid", parsed.valid)
    score.add("facts_said", len(true))
    score.add("true_facts", sum(true), len(true))
    score.add("all_true", parsed.valid and bool(true) and all(true))
    return score


def score_edit(prompt: str, edit: Edit) -> PromptScore:
    """Score a prompt that should describe the target scene of an edit.

    Scores: `valid`, `requested` (all facts that the instruction asks for), `preserved` (share of all other facts),
    `joint` (all requested and all preserved facts), and the attributes as for a description.
    """
    grid = edit.target.geometry.grid
    parsed, score = parse_caption(prompt, grid), PromptScore()
    score.add("valid", _is_valid(parsed))
    said = _said(parsed, grid).items()
    score.add("requested", edit.requested.items() <= said)
    score.add("preserved", len(edit.preserved.items() & said), len(edit.preserved))
    score.add("joint", all_facts(edit.target).items() <= said and _is_valid(parsed))
    _score_facts(score, parsed, edit.target.facts())
    return score


def _is_valid(parsed: ParsedCaption) -> bool:
    return parsed.valid and bool(parsed.objects)


def _said(parsed: ParsedCaption, grid: int) -> Facts:
    """The facts of a prompt, the emptiness of the other cells among them if it describes any shape."""
    empty: Facts = {("shape", cell): NOTHING for cell in range(grid**2) if cell not in parsed.objects}
    return parsed.facts() | empty if parsed.objects else parsed.facts()


def _imagined(parsed: ParsedCaption, asked: ParsedCaption) -> list[str]:
    """The colours and textures of a prompt that its brief caption did not ask for."""
    objects = [dict(attributes) for attributes in parsed.objects.values()]
    for mention in asked.mentions:
        meant = [attributes for attributes in objects if mention.items() <= attributes.items()]
        for attributes in meant[:1]:
            attributes.pop("colour", None)
    return [attributes[kind] for attributes in objects for kind in ("colour", "texture") if kind in attributes]


def _score_facts(score: PromptScore, parsed: ParsedCaption, facts: Facts) -> None:
    said = parsed.facts()
    for (kind, cell), value in facts.items():
        right = said.get((kind, cell)) == value
        score.add("attributes", right)
        score.add(f"attribute:{kind}", right)


def _visible_facts(scene: Scene, hole: np.ndarray | None) -> Facts:
    return {
        (kind, cell): value
        for (kind, cell), value in scene.facts().items()
        if cell is None or is_visible(scene, cell, hole)
    }
