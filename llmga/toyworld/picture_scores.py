"""Does a picture show what its text asks for? Facts are counted by their kind, and by how late the text says them.

CLIP reads 75 tokens at once. A system that sees the first window alone can be right early and only guesses late, so
accuracy behind token 75 shows at full size what overall accuracy dilutes. Scores are pairs (right, all) for each
picture; a pair of zeros says that the text asks for nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmga.toyworld.describe import Caption, Fact
from llmga.toyworld.grammar import match_sentence, parse_caption
from llmga.toyworld.parse import ParsedScene
from llmga.toyworld.readings import KINDS
from llmga.toyworld.scene import ATTRIBUTES, BACKGROUNDS, PRESETS, THEMES
from llmga.toyworld.wording import PLACES, value_of

WINDOW_TOKENS = 75
BIN_TOKENS = 15
NUM_BINS = 16
"""Of the curve over tokens: what is said later than 16 x 15 tokens is counted in the last one."""
NEAR_BORDER_TOKENS = 5
"""How near to the end of a window a fact counts as said at its border."""
CHANCE = {"background": 1 / len(BACKGROUNDS), **{kind: 1 / len(values) for kind, values in ATTRIBUTES.items()}}

TEXT_COUNTS = (
    "attributes",
    *(f"attribute:{kind}" for kind in KINDS),
    *("early", "late", "border"),
    *(f"tokens:{BIN_TOKENS * number}" for number in range(NUM_BINS)),
    *("exact", "no_missing", "no_extra", "parseable"),
)
TEXT_SCORES = (*TEXT_COUNTS, "above_chance")
REQUEST_SCORES = ("constraints", "kept")
THEME_SCORES = ("theme",)

Scores = dict[str, np.ndarray]
Pairs = dict[str, tuple[int, int]]


def read_text(text: str, grid: int = 2) -> Caption:
    """The facts that a text asks for, each with where it is said; the first mention of a thing counts.

    Sentences that the grammar does not know ask for nothing, nor do places that the world does not have.
    """
    facts: dict[tuple[str, int | None], Fact] = {}
    start = 0
    for sentence in text.split("."):
        end = start + len(sentence)
        match = match_sentence(text, end - len(sentence.lstrip()), end)
        said = match.groupdict() if match else {}
        place = value_of("place", said["place"]) if "place" in said else None
        cell = PLACES[grid].index(place) if place in PLACES[grid] else None
        for kind in KINDS:
            if kind in said and (kind == "background" or cell is not None):
                key = (kind, None if kind == "background" else cell)
                facts.setdefault(key, Fact(*key, value_of(kind, said[kind]), *match.span(kind)))  # type: ignore[union-attr]
        start = end + 1
    return Caption(text, tuple(sorted(facts.values(), key=lambda fact: fact.start)))


def score_texts(scenes: Sequence[ParsedScene], texts: Sequence[str]) -> Scores:
    """Compare what pictures show, as `parse_batch` reads them, with long texts.

    Returns:
        name -> (N, 2) int64, right and all: `attributes` and `attribute:<kind>`; `early` and `late`, said within the
        first `WINDOW_TOKENS` and behind; `tokens:<first>` by bins of `BIN_TOKENS`; `border`, said near the end of a
        window; `exact`, all facts and no shape more; `no_missing` and `no_extra`, cells with and without a shape;
        `parseable`, cells that look like something in this world; and `above_chance`, float64, attributes beyond what
        guessing would get right.
    """
    counts = _columns([_score_text(*pair) for pair in zip(scenes, texts, strict=True)], TEXT_COUNTS)
    return counts | {"above_chance": _above_chance(counts)}


def score_requests(scenes: Sequence[ParsedScene], briefs: Sequence[str]) -> Scores:
    """Compare what pictures show with the brief captions that somebody asked for.

    Returns:
        as `score_texts`: `constraints` (background, number of shapes, and a shape with the named attributes) and
        `kept` (all of them).
    """
    return _columns([_score_request(*pair) for pair in zip(scenes, briefs, strict=True)], REQUEST_SCORES)


def score_themes(scenes: Sequence[ParsedScene]) -> Scores:
    """How well what a picture shows goes together.

    Returns:
        `theme`, (N,) float64: the share of its details that its likeliest theme would have chosen: the background, and
        colour and texture of each shape. Scenes of the world itself score about 90 %, since 15 % of their details
        ignore the theme.
    """
    return {"theme": np.array([_share_of_theme(scene) for scene in scenes])}


def _above_chance(scores: Scores) -> np.ndarray:
    """Right and all attributes less those that guessing would get right: their ratio is 0 there, and 1 at best."""
    by_kind = {kind: scores[f"attribute:{kind}"] for kind in KINDS}
    guessed = sum(CHANCE[kind] * pairs[:, 1:] for kind, pairs in by_kind.items())
    return scores["attributes"] - guessed


def _score_text(scene: ParsedScene, text: str) -> Pairs:
    num_cells = len(scene.residual)
    asked, read, pairs = read_text(text, PRESETS[scene.preset].grid), scene.facts(), _Pairs()
    for fact, position in zip(asked.facts, asked.positions, strict=True):
        right = read.get((fact.kind, fact.cell)) == fact.value
        pairs.add("attributes", right)
        pairs.add(f"attribute:{fact.kind}", right)
        pairs.add("late" if position > WINDOW_TOKENS else "early", right)
        pairs.add(f"tokens:{BIN_TOKENS * min((position - 1) // BIN_TOKENS, NUM_BINS - 1)}", right)
        border = WINDOW_TOKENS * max(1, round(position / WINDOW_TOKENS))
        if abs(position - border) <= NEAR_BORDER_TOKENS:
            pairs.add("border", right)
    wanted = {fact.cell for fact in asked.facts if fact.cell is not None}
    drawn = {obj.cell for obj in scene.objects}
    pairs.add("no_missing", len(wanted & drawn), len(wanted))
    pairs.add("no_extra", num_cells - len(wanted | drawn), num_cells - len(wanted))
    pairs.add("parseable", num_cells - len(scene.unparseable), num_cells)
    if wanted:
        pairs.add("exact", pairs["attributes"][0] == pairs["attributes"][1] and drawn <= wanted)
    return pairs


def _score_request(scene: ParsedScene, brief: str) -> Pairs:
    asked, pairs = parse_caption(brief, PRESETS[scene.preset].grid), _Pairs()
    drawn = [obj.attributes().items() for obj in scene.objects]
    kept = [any(mention.items() <= attributes for attributes in drawn) for mention in asked.mentions]
    if asked.background is not None:
        kept.append(scene.background == asked.background)
    if asked.count is not None:
        kept.append(len(scene.objects) == asked.count)
    pairs.add("constraints", sum(kept), len(kept))
    pairs.add("kept", all(kept) and bool(kept), bool(kept))
    return pairs


def _share_of_theme(scene: ParsedScene) -> float:
    likeliest = max(
        (scene.background == theme.background)
        + sum((obj.colour in theme.palette) + (obj.texture in theme.textures) for obj in scene.objects)
        for theme in THEMES
    )
    return likeliest / (1 + 2 * len(scene.objects))


class _Pairs(dict[str, tuple[int, int]]):
    """name -> (right, all)"""

    def add(self, name: str, right: bool | int, total: bool | int = 1) -> None:
        before = self.get(name, (0, 0))
        self[name] = (before[0] + int(right), before[1] + int(total))


def _columns(rows: Sequence[Pairs], names: Sequence[str]) -> Scores:
    """(N, 2) of each name; the names do not depend on the pictures, so that parts of a run fit together."""
    return {name: np.array([row.get(name, (0, 0)) for row in rows], np.int64).reshape(-1, 2) for name in names}
