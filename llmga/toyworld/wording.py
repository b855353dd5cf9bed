"""The words of the toy world: one table of sentence patterns, used both to write captions and to read them back.

A pattern is text with slots in braces. A slot's words are in `WORDS`; "a" before a slot becomes "an" where the word
wants it. Sentences hold no inner full stop, so a caption splits at full stops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from llmga.toyworld.scene import BACKGROUNDS, COLOURS

PLACES: dict[int, tuple[str, ...]] = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: (
        *("top left", "top middle", "top right"),
        *("middle left", "centre", "middle right"),
        *("bottom left", "bottom middle", "bottom right"),
    ),
}
"""Name of each cell by grid width, row by row."""

COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "background": {name: (name,) for name in BACKGROUNDS},
    "colour": {name: (name,) for name in COLOURS},
    "size": {"small": ("small", "little"), "large": ("large", "big")},
    "texture": {"plain": ("plain",), "stripes": ("striped",), "checks": ("checkered",), "dots": ("dotted",)},
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square",),
        "triangle": ("triangle",),
        "diamond": ("diamond",),
        "plus": ("cross",),
    },
    "count": {str(number): (word,) for number, word in COUNTS.items()},
    "place": {place: (place,) for place in dict.fromkeys([*PLACES[2], *PLACES[3]])},
}
"""slot -> value -> words that say it; the first word is the usual one."""

OPENINGS = (
    "A clean digital illustration shows {count} simple shapes on a quiet grid",
    "This is a flat graphic picture made of {count} separate shapes with crisp edges",
    "The picture presents {count} neat shapes in a calm and ordered layout",
    "An abstract poster in a modern style brings {count} shapes together",
    "Here is a tidy vector drawing with {count} shapes that never overlap",
)
GROUNDS = (
    "The whole background is filled with a deep {background} tone that stays even from edge to edge",
    "Behind everything lies a dark {background} ground without any gradient or noise",
    "A smooth {background} backdrop covers the rest of the picture and keeps it quiet",
    "All of the free space around the shapes is painted in a dark {background} colour",
    "The backdrop is a single flat {background} surface that lets the shapes stand out",
)
OBJECTS = (
    "In the {place} part of the picture there is a {size} {colour} {shape}, and its surface is {texture} all the way "
    "to the outline",
    "Look to the {place} area, where a {colour} {shape} with a {texture} surface sits calmly, and its size is clearly "
    "{size} for the space around it",
    "The {place} region belongs to a {size} {colour} {shape}, its outline crisp and its inside {texture}, drawn with "
    "great care",
    "The {place} part holds a {shape} that is {size}, its colour is {colour}, and its surface has been kept {texture} "
    "by the artist",
    "At rest in the {place} area is a {texture} {shape}, shown in a clean {colour} tone and kept {size} so that the "
    "layout stays balanced",
    "Placed in the {place} region we find a {size} {texture} {shape} whose {colour} paint stands out against the "
    "ground",
    "Towards the {place} area there is a {colour} shape, namely a {size} {shape}, and the inside of it looks {texture} "
    "from edge to edge",
    "Into the {place} part someone has set a {texture} {colour} {shape}, and it appears {size} next to the empty space "
    "around it",
)
CLOSINGS = (
    "Soft even light and sharp edges complete the composition",
    "There is no text, no shadow and no texture outside of the shapes",
    "The overall mood is calm, balanced and a little playful",
    "Everything is drawn in high contrast with clean antialiased borders",
    "The style is minimal, with plenty of room between the shapes",
)
BRIEFS = (
    "{Count} shapes on a {background} background, one of them a {colour} {shape}",
    "A {colour} {shape} and more, {count} shapes in all, on {background}",
    "A {background} background with {count} shapes, among them a {colour} {shape}",
    "{Count} shapes over {background}, including a {colour} {shape}",
)
"""Brief captions: background, count and one object, about ten CLIP tokens."""
PHRASES = (
    "{place} {size} {texture} {colour} {shape}",
    "{place} {texture} {shape}, {size} {colour}",
    "{place} {colour} {texture} {shape}, {size}",
    "{place} {shape}, {texture} {colour}, {size}",
    "{place}: a {size} {texture} {colour} {shape}",
    "{place}: a {texture} {colour} {shape}, {size}",
    "in the {place} a {texture} {shape} in {colour}, {size}",
    "in the {place} a {size} {colour} {shape} with a {texture} surface",
    "a {size} {texture} {colour} {shape} in the {place}",
)
"""Objects of medium captions, said shortly. In those in note form a fact follows the place at once: from place to
picture is one step of attention, which a small model finds by itself; through other words it takes two."""
GROUND_PHRASES = ("a {background} background", "on {background}", "the background is {background}")
COUNT_PHRASES = ("{count} shapes", "a picture of {count} shapes")

_SLOT = re.compile(r"\{(\w+)\}")


def fill(pattern: str, words: dict[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """Fill a pattern's slots.

    Args:
        pattern: text with slots; `{Count}` is `{count}` with a capital.
        words: slot -> the word to put there.
    Returns:
        the text, its first letter as in the pattern, and slot -> (start, end) character span.
    """
    text, spans = "", {}
    slots, tail = _pieces(pattern)
    for literal, slot, is_capital, has_article in slots:
        word = words[slot]
        if is_capital:
            word = word.capitalize()
        if has_article and word[0] in "aeiou":
            literal = f"{literal[:-1]}n "
        text += literal
        spans[slot] = (len(text), len(text) + len(word))
        text += word
    return text + tail, spans


@cache
def _pieces(pattern: str) -> tuple[list[tuple[str, str, bool, bool]], str]:
    """(text before, slot, written with a capital, behind an article) of each slot, and the text after the last."""
    slots, last = [], 0
    for match in _SLOT.finditer(pattern):
        literal, slot = pattern[last : match.start()], match[1]
        slots.append((literal, slot.lower(), slot[0].isupper(), re.search(r"(^|\s)[Aa] $", literal) is not None))
        last = match.end()
    return slots, pattern[last:]


def pick(rng: np.random.Generator, patterns: Sequence[str]) -> str:
    """One of the patterns."""
    return patterns[int(rng.integers(len(patterns)))]


def say(rng: np.random.Generator, slot: str, value: str, varied: bool = True) -> str:
    """A word for a value: the usual one three times out of four, or always."""
    words = WORDS[slot][value]
    if len(words) == 1 or not varied or rng.random() < 0.75:
        return words[0]
    return words[int(rng.integers(1, len(words)))]


@cache
def reader(pattern: str) -> re.Pattern[str]:
    """A regular expression that matches what `fill` writes for the pattern, with one named group per slot."""
    parts, last = [], 0
    for match in _SLOT.finditer(pattern):
        slot = match[1].lower()
        literal = re.escape(pattern[last : match.start()])
        parts.append(re.sub(r"(^|\\ )([Aa])\\ $", r"\1\2n?\\ ", literal))
        words = sorted((word for values in WORDS[slot].values() for word in values), key=len, reverse=True)
        parts.append(f"(?P<{slot}>{'|'.join(words)})")
        last = match.end()
    return re.compile("".join(parts) + re.escape(pattern[last:]), re.IGNORECASE)


@cache
def value_of(slot: str, word: str) -> str:
    """The value that a word says: `value_of("shape", "disc") == "circle"`."""
    return next(value for value, words in WORDS[slot].items() if word.lower() in words)
