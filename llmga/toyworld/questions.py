"""Questions about a scene whose short answers are exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import NamedTuple, TypeVar

import numpy as np

from llmga.toyworld.edits import NOTHING, describe_apart
from llmga.toyworld.scene import ATTRIBUTES, BACKGROUNDS, Obj, Scene
from llmga.toyworld.wording import COUNTS, PLACES, WORDS, fill, pick


class Question(NamedTuple):
    """A question about a scene; an exact-match score compares the answer, and is reported by kind."""

    question: str
    answer: str
    kind: str


OPEN_WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is {object}?",
        "Which colour does {object} have?",
        "What is the colour of {object}?",
        "Tell me the colour of {object}.",
    ),
    "shape": (
        "What shape is {object}?",
        "What kind of shape is {object}?",
        "Which shape does {object} have?",
        "Tell me the shape of {object}.",
    ),
    "size": (
        "What size is {object}?",
        "Is {object} small or large?",
        "Which size does {object} have?",
        "Tell me the size of {object}.",
    ),
    "texture": (
        "What texture does {object} have?",
        "How is the surface of {object}?",
        "Which texture does {object} have?",
        "Tell me the texture of {object}.",
    ),
    "at": (
        "What is in the {place}?",
        "What do you see in the {place}?",
        "Describe the {place} of the picture.",
        "What does the {place} show?",
        "Tell me what the {place} holds.",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes does the picture show?",
        "Count the shapes.",
        "What is the number of shapes in the picture?",
    ),
    "count_of": (
        "How many {things} are there?",
        "How many {things} does the picture show?",
        "Count the {things}.",
        "What is the number of {things}?",
    ),
    "background": (
        "What colour is the background?",
        "Which colour does the background have?",
        "What is the background like?",
        "Name the background.",
    ),
    "where": (
        "Where is {object}?",
        "In which place is {object}?",
        "Which place holds {object}?",
        "Find {object}.",
    ),
    "larger": (
        "Which shape is larger, the {place} one or the {other} one?",
        "Is the {place} shape or the {other} shape larger?",
        "Compare the sizes of the {place} and {other} shapes.",
    ),
}
YES_NO_WORDINGS: dict[str, tuple[str, ...]] = {
    "is": (
        "Is {object} {value}?",
        "Would you say that {object} is {value}?",
        "Is it true that {object} is {value}?",
    ),
    "exists": (
        "Is there a {thing}?",
        "Can you see a {thing}?",
        "Does the picture show a {thing}?",
    ),
    "empty": (
        "Is the {place} empty?",
        "Is there nothing in the {place}?",
        "Is the {place} free?",
    ),
    "is_background": (
        "Is the background {background}?",
        "Do the shapes lie on a {background} background?",
        "Is it true that the background is {background}?",
    ),
    "same": (
        "Do the {place} shape and the {other} shape have the same {attribute}?",
        "Is the {attribute} of the {place} shape the same as that of the {other} shape?",
        "Are the {place} and {other} shapes alike in {attribute}?",
    ),
    "more": (
        "Are there more {things} than {others}?",
        "Do the {things} outnumber the {others}?",
        "Does the picture show more {things} than {others}?",
    ),
}
KINDS = (*OPEN_WORDINGS, *YES_NO_WORDINGS)
"""All kinds of questions, as scores report them."""

YES_NO_SHARE = 0.3
_OFTEN = {"colour": 2, "shape": 2, "texture": 2, "at": 3}


def sample_questions(scene: Scene, rng: np.random.Generator, n: int, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Draw questions, no two of which differ in wording alone.

    A yes/no question is written for a drawn answer, and a kind is asked only of scenes that allow both: within each
    kind either answer is equally frequent, so nothing can be guessed from the wording.

    Args:
        scene: what is asked about.
        rng: draws everything.
        n: number of questions; a dozen is safe in any scene.
        kinds: keep to these of `KINDS`.
    Raises:
        ValueError: a kind is unknown, or the scene does not give that many questions.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"question kind {unknown[0] if unknown else kinds!r} is unknown; expected {', '.join(KINDS)}")
    open_kinds = [kind for kind in kinds if kind in OPEN_WORDINGS for _ in range(_OFTEN.get(kind, 1))]
    yes_no_kinds = [kind for kind in kinds if kind in YES_NO_WORDINGS]
    asked: dict[_Key, Question] = {}
    for _ in range(100 + 50 * n):
        if len(asked) == n:
            return list(asked.values())
        if not open_kinds or (yes_no_kinds and rng.random() < YES_NO_SHARE):
            question = _yes_no_question(scene, rng, pick(rng, yes_no_kinds))
        else:
            question = _open_question(scene, rng, pick(rng, open_kinds))
        if question is not None:
            asked.setdefault(question[0], question[1])
    raise ValueError(f"this scene gave {len(asked)} different questions, expected {n}; ask fewer or more kinds")


def as_sentence(text: str) -> str:
    """First letter large, a full stop behind."""
    return f"{text[0].upper()}{text[1:]}."


def name_object(obj: Obj | None) -> str:
    """What is at a place: "a small striped cyan circle" or "nothing"."""
    if obj is None:
        return NOTHING
    return "a " + " ".join(_word(kind, getattr(obj, kind)) for kind in ("size", "texture", "colour", "shape"))


_T = TypeVar("_T")
_Words = dict[str, str]


_Key = tuple[str, ...]  # equal for questions that differ in their wording alone


def _open_question(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Key, Question] | None:
    drawn = _OPEN.get(kind, _attribute)(scene, rng, kind)
    if drawn is None:
        return None
    words, said = drawn
    text, _ = fill(pick(rng, OPEN_WORDINGS[kind]), words)
    return (kind, *words.values()), Question(text, as_sentence(said), kind)


def _yes_no_question(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Key, Question] | None:
    yes = bool(rng.integers(2))
    words = _YES_NO[kind](scene, rng)[yes]
    if words is None:
        return None
    text, _ = fill(pick(rng, YES_NO_WORDINGS[kind]), words)
    return (kind, *words.values()), Question(text, "Yes." if yes else "No.", kind)


# ---------------------------------------------------------------- questions with many answers: slots and the answer


def _attribute(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Words, str]:
    obj = _one(rng, scene.objects)
    return {"object": _name(scene, obj, rng, kind)}, _word(kind, getattr(obj, kind))


def _at(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Words, str]:
    cell = int(rng.integers(scene.geometry.grid**2))
    return {"place": _place(scene, cell)}, name_object(scene.object_at(cell))


def _count(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Words, str]:
    return {}, COUNTS[len(scene.objects)]


def _count_of(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Words, str]:
    attribute = _one(rng, tuple(ATTRIBUTES))
    value = getattr(_one(rng, scene.objects), attribute) if rng.random() < 0.8 else _one(rng, ATTRIBUTES[attribute])
    return {"things": _plural(attribute, value)}, COUNTS.get(_number(scene, attribute, value), "none")


def _background(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Words, str]:
    return {}, scene.background


def _where(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Words, str] | None:
    obj = _one(rng, scene.objects)
    described = describe_apart(scene, obj, rng)
    return ({"object": described}, _place(scene, obj.cell)) if described else None


def _larger(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[_Words, str]:
    one, other = _one(rng, tuple(permutations(scene.objects, 2)))
    words = {"place": _place(scene, one.cell), "other": _place(scene, other.cell)}
    if one.size == other.size:
        return words, "they have the same size"
    return words, f"the {_place(scene, (one if one.size == 'large' else other).cell)} one"


_OPEN: dict[str, Callable[[Scene, np.random.Generator, str], tuple[_Words, str] | None]] = {
    "at": _at,
    "count": _count,
    "count_of": _count_of,
    "background": _background,
    "where": _where,
    "larger": _larger,
}

# ---------------------------------------------------------------- yes/no questions: slots for the answers (no, yes)

_NoYes = tuple[_Words, _Words] | tuple[None, None]


def _is(scene: Scene, rng: np.random.Generator) -> _NoYes:
    obj, attribute = _one(rng, scene.objects), _one(rng, tuple(ATTRIBUTES))
    true = getattr(obj, attribute)
    false = _one(rng, [value for value in ATTRIBUTES[attribute] if value != true])
    name, article = _name(scene, obj, rng, attribute), "a " if attribute == "shape" else ""
    no, yes = ({"object": name, "value": article + _word(attribute, value)} for value in (false, true))
    return no, yes


def _exists(scene: Scene, rng: np.random.Generator) -> _NoYes:
    obj = _one(rng, scene.objects)
    said = {kind: getattr(obj, kind) for kind in ("size", "texture", "colour", "shape") if rng.random() < 0.5}
    if not said:
        return None, None
    changed = _one(rng, tuple(said))
    false = said | {changed: _one(rng, ATTRIBUTES[changed])}
    if any(false.items() <= other.attributes().items() for other in scene.objects):
        return None, None
    no, yes = (
        {"thing": " ".join([_word(k, v) for k, v in thing.items()] + ["shape"] * ("shape" not in thing))}
        for thing in (false, said)
    )
    return no, yes


def _empty(scene: Scene, rng: np.random.Generator) -> _NoYes:
    if not scene.empty_cells():
        return None, None
    taken, empty = _one(rng, scene.objects).cell, _one(rng, scene.empty_cells())
    return {"place": _place(scene, taken)}, {"place": _place(scene, empty)}


def _is_background(scene: Scene, rng: np.random.Generator) -> _NoYes:
    other = _one(rng, [background for background in BACKGROUNDS if background != scene.background])
    return {"background": other}, {"background": scene.background}


def _same(scene: Scene, rng: np.random.Generator) -> _NoYes:
    attribute = _one(rng, tuple(ATTRIBUTES))
    pairs: tuple[list[_Words], list[_Words]] = ([], [])
    for one, other in permutations(scene.objects, 2):
        words = {"place": _place(scene, one.cell), "other": _place(scene, other.cell), "attribute": attribute}
        pairs[getattr(one, attribute) == getattr(other, attribute)].append(words)
    return (_one(rng, pairs[0]), _one(rng, pairs[1])) if all(pairs) else (None, None)


def _more(scene: Scene, rng: np.random.Generator) -> _NoYes:
    attribute = _one(rng, tuple(ATTRIBUTES))
    fewer, more = _one(rng, tuple(permutations(ATTRIBUTES[attribute], 2)))
    if _number(scene, attribute, fewer) >= _number(scene, attribute, more):
        return None, None
    fewer, more = _plural(attribute, fewer), _plural(attribute, more)
    return {"things": fewer, "others": more}, {"things": more, "others": fewer}


_YES_NO: dict[str, Callable[[Scene, np.random.Generator], _NoYes]] = {
    "is": _is,
    "exists": _exists,
    "empty": _empty,
    "is_background": _is_background,
    "same": _same,
    "more": _more,
}

# ---------------------------------------------------------------- words


def _one(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def _word(kind: str, value: str) -> str:
    return WORDS[kind][value][0]


def _plural(attribute: str, value: str) -> str:
    word = _word(attribute, value)
    if attribute != "shape":
        return f"{word} shapes"
    return f"{word}es" if word.endswith("s") else f"{word}s"


def _place(scene: Scene, cell: int) -> str:
    return PLACES[scene.geometry.grid][cell]


def _name(scene: Scene, obj: Obj, rng: np.random.Generator, asked: str) -> str:
    """By its place, or by a description that does not give away what is asked."""
    apart = describe_apart(scene, obj, rng, without=asked) if rng.random() < 0.4 else None
    name = apart or f"the {_place(scene, obj.cell)} shape"
    return name.removesuffix("shape") + "object" if asked == "shape" else name


def _number(scene: Scene, attribute: str, value: str) -> int:
    return sum(getattr(obj, attribute) == value for obj in scene.objects)
