"""Small talk, and questions and answers about the toy world that need no picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmga.toyworld.questions import Question, as_sentence, name_object, sample_questions
from llmga.toyworld.scene import (
    BACKGROUNDS,
    COLOURS,
    PRESETS,
    SHAPES,
    SIZES,
    TEXTURES,
    THEMES,
    Scene,
    draw_object,
)
from llmga.toyworld.wording import COUNTS, PLACES, WORDS, fill, pick

_ABOUT_ME = "I am a small assistant for pictures of shapes."
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi!", "Hello there.", "Hey!", "Good day!"), "Hello! What shall we look at?"),
    (("Good morning.", "Good morning!"), "Good morning! What shall we look at?"),
    (("Good evening.", "Good evening!"), "Good evening! What shall we look at?"),
    (("How are you?", "How are you today?", "How is it going?"), "I am well, thank you."),
    (("Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself."), _ABOUT_ME),
    (("What is your name?", "Do you have a name?"), "I have no name yet."),
    (
        ("What can you do?", "How can you help me?", "What are you good at?", "Help!", "What can I ask you?"),
        "I can describe pictures of shapes, answer questions about them and talk a little.",
    ),
    (("Thank you!", "Thanks.", "Thanks a lot!", "Many thanks."), "You are welcome!"),
    (("Goodbye!", "Bye.", "See you later.", "Good night!"), "Goodbye!"),
    (("Are you a human?", "Are you a person?", "Are you real?"), "No, I am a small language model."),
    (("Well done!", "Great job.", "That is right.", "Very good!"), "Thank you!"),
    (("That is wrong.", "You made a mistake.", "No, look again."), "I am sorry. Please ask me once more."),
    (("Do you like shapes?", "Are shapes fun?"), "Yes, I like them all."),
    (("What is your favourite shape?", "Which shape do you like best?"), "I like the circle best."),
    (("What is your favourite colour?", "Which colour do you like best?"), "I like cyan best."),
    (("Tell me a joke.", "Do you know a joke?"), "Why did the circle feel calm? It had no corners to worry about."),
    (("What is the weather like?", "Is it raining?"), "I do not know. I only see pictures of shapes."),
    (("What is the capital of France?", "What time is it?", "Who won the game?"), "I only know about shapes."),
    (("Can you see?", "Do you see pictures?"), "Yes, I can look at a picture that you show me."),
    (("What should I do first?", "Where shall I start?"), "Show me a picture and ask what is in it."),
)
"""(ways to say it, the reply)"""

DEFINITIONS: dict[str, str] = {
    "circle": "a round shape without corners",
    "disc": "another word for a circle",
    "square": "a shape with four equal sides and four right corners",
    "triangle": "a shape with three sides and three corners",
    "diamond": "a square that stands on one corner",
    "cross": "two bars that meet in the middle",
    "background": "what lies behind all the shapes",
    "texture": "how the surface of a shape looks",
    "theme": "a set of colours and textures that go together",
    "caption": "a text that says what a picture shows",
    "striped surface": "a surface with light and dark bands",
    "checkered surface": "a surface with light and dark squares",
    "dotted surface": "a surface with dark dots",
    "plain surface": "a surface in a single colour",
}
CORNERS = {"circle": "none", "square": "four", "triangle": "three", "diamond": "four"}
_OPPOSITES = {
    "small": "large", "large": "small", "little": "big", "big": "little", "left": "right", "right": "left",
    "top": "bottom", "bottom": "top", "more": "less", "light": "dark", "dark": "light", "yes": "no",
}  # fmt: skip
_STRANGERS: dict[str, tuple[str, ...]] = {
    "shape": ("star", "heart", "hexagon", "oval", "arrow"),
    "colour": ("grey", "gold", "silver", "violet", "turquoise"),
    "texture": ("wavy", "furry", "woven", "marbled"),
    "background": ("beige", "teal", "ivory", "crimson"),
}
_CATEGORIES: dict[str, tuple[str, ...]] = {
    "shape": tuple(WORDS["shape"][value][0] for value in SHAPES),
    "colour": tuple(COLOURS),
    "texture": tuple(WORDS["texture"][value][0] for value in TEXTURES),
    "size": SIZES,
    "background": tuple(BACKGROUNDS),
}


def sample_chat(rng: np.random.Generator, kind: str | None = None) -> Question:
    """Draw a question that needs no picture, with its one right answer.

    Args:
        rng: draws everything.
        kind: one of `KINDS`; None draws one.
    Raises:
        ValueError: the kind is unknown.
    """
    if kind is not None and kind not in _DRAW:
        raise ValueError(f"chat kind {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    return _DRAW[kind or pick(rng, _OFTEN)](rng)


def listing(words: Sequence[str]) -> str:
    """ "red", "red and blue", "red, blue and pink"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _small_talk(rng: np.random.Generator) -> Question:
    ways, reply = SMALL_TALK[int(rng.integers(len(SMALL_TALK)))]
    return Question(pick(rng, ways), reply, "small_talk")


def _inventory(rng: np.random.Generator) -> Question:
    category = pick(rng, tuple(_CATEGORIES))
    values = _CATEGORIES[category]
    if rng.random() < 0.5:
        plural = "background colours" if category == "background" else f"{category}s"
        ways: tuple[str, ...] = (
            "Which {} exist in this world?",
            "What {} are there?",
            "Which {} do you know?",
            "List all {}.",
        )
        return Question(pick(rng, ways).format(plural), as_sentence(listing(values)), "inventory")
    if rng.random() < 0.3:
        plural = "backgrounds" if category == "background" else f"{category}s"
        ways = ("How many different {} are there?", "How many {} do you know?")
        return Question(pick(rng, ways).format(plural), as_sentence(COUNTS[len(values)]), "inventory")
    yes = category == "size" or bool(rng.integers(2))
    word = pick(rng, values if yes else _STRANGERS[category])
    ways = ("Is {} a {} that you know?", "Does this world know the {1} {0}?", "Is there a {1} called {0} here?")
    return Question(pick(rng, ways).format(word, category), "Yes." if yes else "No.", "inventory")


def _theme(rng: np.random.Generator) -> Question:
    theme = THEMES[int(rng.integers(len(THEMES)))]
    draw = int(rng.integers(4))
    if draw == 0:
        ways: tuple[str, ...] = (
            "Which colours are usual in the {} theme?",
            "What colours belong to a {} picture?",
            "Colours of a {}?",
        )
        return Question(pick(rng, ways).format(theme.name), as_sentence(listing(theme.palette)), "theme")
    if draw == 1:
        words = [WORDS["texture"][texture][0] for texture in theme.textures]
        ways = ("Which textures are usual in the {} theme?", "What textures belong to a {} picture?")
        return Question(pick(rng, ways).format(theme.name), as_sentence(listing(words)), "theme")
    if draw == 2:
        ways = ("Which background belongs to the {} theme?", "What background does a {} picture have?")
        return Question(pick(rng, ways).format(theme.name), as_sentence(theme.background), "theme")
    yes = bool(rng.integers(2))
    colour = pick(rng, theme.palette if yes else [name for name in COLOURS if name not in theme.palette])
    ways = ("Is {} usual in the {} theme?", "Does {} belong to a {} picture?", "Would you expect {} in a {} picture?")
    return Question(pick(rng, ways).format(colour, theme.name), "Yes." if yes else "No.", "theme")


def _themes_of(rng: np.random.Generator) -> Question:
    background = pick(rng, tuple(BACKGROUNDS))
    names = [theme.name for theme in THEMES if theme.background == background]
    ways: tuple[str, ...] = (
        "Which themes have a {background} background?",
        "What could a {background} background mean?",
        "Which themes go with {background}?",
    )
    question, _ = fill(pick(rng, ways), {"background": background})
    return Question(question, as_sentence(listing(names)), "themes_of")


def _arithmetic(rng: np.random.Generator) -> Question:
    thing = pick(rng, ("shape", "circle", "square", "triangle", "diamond"))
    total = int(rng.integers(2, 9))
    part = int(rng.integers(1, total))
    if rng.random() < 0.5:
        ways: tuple[str, ...] = (
            "What is {first} plus {second}?",
            "{things} and {second} more: how many are these?",
            "I draw {things}, then {second} more. How many are there now?",
            "How many are {things} and another {second}?",
        )
        first, second, result = part, total - part, total
    else:
        ways = (
            "What is {first} minus {second}?",
            "I have {things} and erase {second}. How many are left?",
            "Of {things} I take away {second}. How many remain?",
            "There were {first}, now {second} are missing. How many are left?",
        )
        first, second, result = total, part, total - part
    things = f"{COUNTS[first]} {thing}{'s' * (first > 1)}"
    text = pick(rng, ways).format(first=COUNTS[first], second=COUNTS[second], things=things)
    return Question(text[0].upper() + text[1:], as_sentence(COUNTS[result]), "arithmetic")


def _order(rng: np.random.Generator) -> Question:
    number = int(rng.integers(2, 8))
    draw = int(rng.integers(4))
    if draw == 0:
        return Question(f"Which number comes after {COUNTS[number]}?", as_sentence(COUNTS[number + 1]), "order")
    if draw == 1:
        return Question(f"Which number comes before {COUNTS[number]}?", as_sentence(COUNTS[number - 1]), "order")
    if draw == 2:
        return Question(f"Count to {COUNTS[number]}.", as_sentence(", ".join(list(COUNTS.values())[:number])), "order")
    less, more = sorted(int(n) for n in rng.choice(np.arange(1, 9), size=2, replace=False))
    yes = bool(rng.integers(2))
    first, second = (more, less) if yes else (less, more)
    ways: tuple[str, ...] = ("Is {} more than {}?", "Are {} shapes more than {} shapes?", "Is {} larger than {}?")
    return Question(pick(rng, ways).format(COUNTS[first], COUNTS[second]), "Yes." if yes else "No.", "order")


def _definition(rng: np.random.Generator) -> Question:
    term = pick(rng, tuple(DEFINITIONS))
    ways: tuple[str, ...] = ("What is a {}?", "Explain what a {} is.", "What does {} mean?", "Define {}.")
    return Question(pick(rng, ways).format(term), as_sentence(DEFINITIONS[term]), "definition")


def _word(rng: np.random.Generator) -> Question:
    draw = int(rng.integers(4))
    if draw == 0:
        word = pick(rng, tuple(_OPPOSITES))
        ways: tuple[str, ...] = (
            "What is the opposite of {}?",
            "Say the opposite of {}.",
            "Which word is the opposite of {}?",
        )
        return Question(pick(rng, ways).format(word), as_sentence(_OPPOSITES[word]), "word")
    if draw == 1:
        shape = pick(rng, tuple(CORNERS))
        ways = ("How many corners does a {} have?", "Count the corners of a {}.", "How many corners has a {}?")
        return Question(pick(rng, ways).format(shape), as_sentence(CORNERS[shape]), "word")
    if draw == 2:
        synonyms = [words for values in WORDS.values() for words in values.values() if len(words) > 1]
        first, second = rng.permutation(synonyms[int(rng.integers(len(synonyms)))])
        ways = ("Another word for {}?", "Say {} in another way.")
        return Question(pick(rng, ways).format(first), as_sentence(second), "word")
    category = pick(rng, ("shape", "colour", "texture", "size"))
    word = pick(rng, _CATEGORIES[category])
    ways = ("What kind of word is {}?", "Is {} a shape, a colour, a texture or a size?")
    return Question(pick(rng, ways).format(word), as_sentence(f"a {category}"), "word")


def _place(rng: np.random.Generator) -> Question:
    cell = int(rng.integers(4))
    place = PLACES[2][cell]
    kinds = {"opposite": 3, "beside": 1, "above or below": 2}
    relation = pick(rng, tuple(kinds))
    ways: tuple[str, ...] = ("Which place is {} the {}?", "Name the place {} the {}.")
    question = pick(rng, ways).format("diagonally across from" if relation == "opposite" else relation, place)
    return Question(question, as_sentence(PLACES[2][cell ^ kinds[relation]]), "place")


def _reading(rng: np.random.Generator) -> Question:
    """A question about a scene that is told rather than shown: the skill of keeping to what a text says."""
    scene = _told_scene(rng)
    kinds = ("colour", "shape", "size", "texture", "at", "where", "is", "exists", "same")
    question = sample_questions(scene, rng, 1, kinds)[0]
    told = [f"{name_object(obj)} in the {PLACES[2][obj.cell]}" for obj in scene.objects]
    rng.shuffle(told)
    ways: tuple[str, ...] = (
        "A picture shows {}. {}",
        "Think of {}. {}",
        "I see {}. {}",
        "Imagine {}. {}",
        "There is {}. {}",
    )
    text = pick(rng, ways).format(listing(told), question.question)
    return Question(text, question.answer, "reading")


def _told_scene(rng: np.random.Generator) -> Scene:
    theme = THEMES[int(rng.integers(len(THEMES)))]
    cells = sorted(int(cell) for cell in rng.choice(4, size=int(rng.integers(1, 4)), replace=False))
    while True:
        objects = tuple(draw_object(rng, cell, theme, PRESETS["learnable"].jitter) for cell in cells)
        scene = Scene("learnable", theme.background, objects, theme.name)
        if not scene.has_held_out():
            return scene


_DRAW: dict[str, Callable[[np.random.Generator], Question]] = {
    "small_talk": _small_talk,
    "inventory": _inventory,
    "theme": _theme,
    "themes_of": _themes_of,
    "arithmetic": _arithmetic,
    "order": _order,
    "definition": _definition,
    "word": _word,
    "place": _place,
    "reading": _reading,
}
KINDS = tuple(_DRAW)
"""All kinds of questions that need no picture."""
_OFTEN = (*KINDS, "small_talk", "theme", "arithmetic", "reading", "reading", "reading")
