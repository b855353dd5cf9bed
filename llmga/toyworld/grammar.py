"""Captions back to facts: which scene does a text describe, and does it keep to the world's grammar?"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llmga.toyworld import wording
from llmga.toyworld.scene import ATTRIBUTES, Scene
from llmga.toyworld.wording import PLACES, reader, value_of


@dataclass
class ParsedCaption:
    """What a caption says.

    Attributes:
        objects: cell -> attribute -> value, for objects with a place.
        mentions: attributes of objects without a place (brief captions).
        count: the number of objects that the text states, if it does.
        problems: why the caption is not valid: unknown sentences, contradictions, missing background.
    """

    background: str | None = None
    objects: dict[int, dict[str, str]] = field(default_factory=dict)
    mentions: list[dict[str, str]] = field(default_factory=list)
    count: int | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """True when every sentence was understood and none contradicts another."""
        return not self.problems

    def facts(self) -> dict[tuple[str, int | None], str]:
        """Facts as `Scene.facts` gives them."""
        facts: dict[tuple[str, int | None], str] = {}
        if self.background is not None:
            facts["background", None] = self.background
        for cell, attributes in self.objects.items():
            facts.update({(kind, cell): value for kind, value in attributes.items()})
        return facts


_SENTENCES = (
    *wording.OPENINGS, *wording.GROUNDS, *wording.OBJECTS, *wording.CLOSINGS, *wording.BRIEFS,
    *wording.PHRASES, *wording.GROUND_PHRASES, *wording.COUNT_PHRASES,
)  # fmt: skip


def parse_caption(text: str, grid: int = 2) -> ParsedCaption:
    """Read a caption of any style.

    Args:
        text: sentences closed by full stops.
        grid: grid width of the world, which says what places exist.
    """
    parsed = ParsedCaption()
    for sentence in re.split(r"\.\s*", text.strip()):
        if sentence:
            _read_sentence(sentence.strip(), grid, parsed)
    if not text.strip():
        parsed.problems.append("the caption is empty")
    if parsed.background is None:
        parsed.problems.append("no background is named")
    if parsed.count is not None and parsed.objects and parsed.count != len(parsed.objects):
        parsed.problems.append(f"{parsed.count} shapes are announced and {len(parsed.objects)} described")
    return parsed


def says(parsed: ParsedCaption, scene: Scene) -> bool:
    """True when the caption describes exactly that scene: every fact, and nothing else."""
    return parsed.valid and parsed.facts() == scene.facts()


def match_sentence(text: str, start: int = 0, end: int | None = None) -> re.Match[str] | None:
    """Match text[start:end], a sentence without its full stop; the groups of the match are named by slot."""
    end = len(text) if end is None else end
    return next((found for pattern in _SENTENCES if (found := reader(pattern).fullmatch(text, start, end))), None)


def _read_sentence(sentence: str, grid: int, parsed: ParsedCaption) -> None:
    match = match_sentence(sentence)
    if match is None:
        parsed.problems.append(f"not a sentence of this world: {sentence!r}")
        return
    said = {slot: value_of(slot, word) for slot, word in match.groupdict().items()}
    if "count" in said:
        _state(parsed, "count", int(said["count"]))
    if "background" in said:
        _state(parsed, "background", said["background"])
    attributes = {kind: said[kind] for kind in ATTRIBUTES if kind in said}
    if "place" not in said:
        if attributes:
            parsed.mentions.append(attributes)
        return
    if said["place"] not in PLACES[grid]:
        parsed.problems.append(f"no such place here: {said['place']!r}")
        return
    cell = PLACES[grid].index(said["place"])
    if cell in parsed.objects:
        parsed.problems.append(f"two shapes in the {said['place']}")
    parsed.objects[cell] = attributes


def _state(parsed: ParsedCaption, name: str, value: int | str) -> None:
    if getattr(parsed, name) not in (None, value):
        parsed.problems.append(f"two different values for {name}: {getattr(parsed, name)} and {value}")
    setattr(parsed, name, value)
