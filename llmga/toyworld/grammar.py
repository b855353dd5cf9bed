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
        problems: why the caption is not valid, in words; see `parse_caption`.
    """

    background: str | None = None
    objects: dict[int, dict[str, str]] = field(default_factory=dict)
    mentions: list[dict[str, str]] = field(default_factory=list)
    count: int | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """True when every sentence was understood, none contradicts another, and the text is whole."""
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


def parse_caption(text: str, grid: int = 2, partial: bool = False) -> ParsedCaption:
    """Read a caption of any style.

    It is valid when all of this holds: every sentence is one of the grammar's, closed by a full stop, and said once;
    a background is named, and one only; no place holds two shapes or does not exist; a count is that of the shapes
    described (at least that of the shapes mentioned); and a shape mentioned without its place is among those described.

    Args:
        text: sentences closed by full stops.
        grid: grid width of the world, which says what places exist.
        partial: the caption may leave out the background and shapes, as one of style `medium` does.
    """
    parsed = ParsedCaption()
    *sentences, rest = re.split(r"\.\s*", text.strip())
    said: set[str] = set()
    for sentence in filter(None, (*sentences, rest)):
        _read_sentence(sentence.strip(), grid, parsed)
        if sentence.lower() in said:
            parsed.problems.append(f"said twice: {sentence!r}")
        said.add(sentence.lower())
    if not text.strip():
        parsed.problems.append("the caption is empty")
    if rest:
        parsed.problems.append(f"the last sentence is not closed: {rest!r}")
    if "" in sentences:
        parsed.problems.append("a full stop closes no sentence")
    if parsed.background is None and not partial:
        parsed.problems.append("no background is named")
    _compare_with_objects(parsed, partial)
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


def _compare_with_objects(parsed: ParsedCaption, partial: bool) -> None:
    """What the text announces must be what it describes; a partial one may describe less."""
    described = list(parsed.objects.values())
    missing = 0 if parsed.count is None or not described else parsed.count - len(described)
    if missing < 0 or (missing and not partial):
        parsed.problems.append(f"{parsed.count} shapes are announced and {len(described)} described")
    if parsed.count is not None and parsed.count < len(parsed.mentions):
        parsed.problems.append(f"{parsed.count} shapes are announced and {len(parsed.mentions)} mentioned")
    for mention in parsed.mentions:
        if described and not partial and not any(mention.items() <= attributes.items() for attributes in described):
            named = ", ".join(f"{kind} {value}" for kind, value in mention.items())
            parsed.problems.append(f"a shape is mentioned that is not described: {named}")


def _state(parsed: ParsedCaption, name: str, value: int | str) -> None:
    if getattr(parsed, name) not in (None, value):
        parsed.problems.append(f"two different values for {name}: {getattr(parsed, name)} and {value}")
    setattr(parsed, name, value)
