"""What the toy corpora are made of: one record per scene, with the truth beside it in `meta`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from llmga.records import Message, Record
from llmga.toyworld.chat import sample_chat
from llmga.toyworld.describe import BACKGROUND, describe
from llmga.toyworld.edits import Edit, feasible_kinds, sample_edit
from llmga.toyworld.questions import Question, as_sentence, name_object, sample_questions
from llmga.toyworld.scene import Scene, facts_to_list
from llmga.toyworld.wording import PLACES, pick

CORPORA: dict[str, dict[str, float]] = {
    "base": {
        "brief": 0.08,
        "medium": 0.14,
        "find": 0.2,
        "aim": 0.1,
        "imagine": 0.14,
        "questions": 0.24,
        "chat": 0.1,
    },
    "stage1": {
        "prompt_refinement": 0.13,
        "similar_image": 0.14,
        "inpainting": 0.11,  # half of the masks drawn for these are outpainting, too
        "outpainting": 0.04,
        "editing": 0.26,  # the hardest: to find what is meant, to change it, and to leave the rest alone
        "aim": 0.05,
        "questions": 0.16,
        "chat": 0.08,
        "brief": 0.01,  # short descriptions, which would be forgotten
        "medium": 0.02,
    },
}
"""Corpus -> part -> weight: what a base MLLM has seen (no long captions, nothing to draw), and what stage 1 trains."""

MAX_QUESTIONS = 8
FIND_KINDS = ("where",) * 4 + ("at", "colour", "shape")
"""Questions that lead from a description to a place or from a place to what is there."""
AIM_REQUESTS = (
    "{instruction} Which place does this change?",
    "Where would this change be seen? {instruction}",
    "{instruction} Where is the shape that is meant?",
    "Say only which place is meant. {instruction}",
    "{instruction} Which place is that?",
)
"""Which shape an edit means, answered by its place."""
HARD_EDITS = ("recolour", "add", "move", "move")
"""Kinds of edits that are learned last, the last of all twice."""
IMAGINE_REQUESTS = (
    "{instruction} What is in the {place} then?",
    "Imagine this change: {instruction} What would the {place} hold?",
    "{instruction} Tell me what the {place} holds after that.",
    "Do not draw it. {instruction} What would you see in the {place}?",
)
BACKGROUND_THEN = ("What is the background then?", "What colour would the background have?")
IMAGINE_MORE = (
    "And in the {place}?",
    "What would the {place} hold?",
    "And the {place}?",
    "What is in the {place} then?",
)
"""What an edit would lead to, asked place by place."""
BRIEF_REQUESTS = (
    "Describe the picture briefly.",
    "Give a short caption.",
    "Say in a few words what the picture shows.",
    "What is this, in one short sentence?",
    "Summarise the picture.",
    "A brief caption, please.",
    "Caption this picture in one line.",
    "Tell me shortly what you see.",
)
MEDIUM_REQUESTS = (
    "List the shapes.",
    "Name what you see and where it is.",
    "Which shapes are where?",
    "Go through the shapes one by one.",
    "List what is in the picture, in note form.",
    "What is where in this picture? Keep it short.",
    "Note down the shapes and their places.",
    "Give me a list of the things in the picture.",
)


def draw_record(part: str, id: str, split: str, image: str, scene: Scene, rng: np.random.Generator) -> Record:
    """Draw one record.

    Args:
        part: a key of `PARTS`.
        image: where the scene's picture is, or will be; records without a picture leave it out.
        scene: what the record is about; small talk is about none.
        rng: draws everything else.
    Returns:
        a record whose `meta` holds `part`, and what scores need: `scene`, `edit`, `short_facts` (facts of the short
        caption as `[kind, cell, value]`), `questions` (the kind of each; none for lists and captions).
    """
    task, draw = PARTS[part]
    fields, meta = draw(scene, rng)
    if task not in TEXT_ONLY:
        fields["image"] = image
    if task != "qa":
        meta["scene"] = scene.to_dict()
    return Record(id, task, **fields, source="toyworld", licence="Apache-2.0", split=split, meta={"part": part, **meta})


_Drawn = tuple[dict[str, Any], dict[str, Any]]


def _brief(scene: Scene, rng: np.random.Generator) -> _Drawn:
    return {"messages": _turns([(pick(rng, BRIEF_REQUESTS), describe(scene, rng, "brief").text)])}, {}


def _medium(scene: Scene, rng: np.random.Generator) -> _Drawn:
    return {"messages": _turns([(pick(rng, MEDIUM_REQUESTS), describe(scene, rng, "medium").text)])}, {}


def _questions(scene: Scene, rng: np.random.Generator) -> _Drawn:
    return _conversation(sample_questions(scene, rng, int(rng.integers(1, MAX_QUESTIONS + 1))))


def _aim(scene: Scene, rng: np.random.Generator) -> _Drawn:
    asked: dict[str, Question] = {}
    for _ in range(int(rng.integers(2, MAX_QUESTIONS + 1))):
        edit = sample_edit(scene, rng, pick(rng, ("recolour", "reshape", "retexture", "resize")))
        (cell,) = {cell for _, cell in edit.requested}
        assert cell is not None
        place = PLACES[scene.geometry.grid][cell]
        if place in edit.instruction and asked:
            continue  # too easy to be asked often
        question = pick(rng, AIM_REQUESTS).format(instruction=_closed(edit.instruction))
        asked[question] = Question(question, as_sentence(place), "aim")
    return _conversation(list(asked.values()))


def _imagine(scene: Scene, rng: np.random.Generator) -> _Drawn:
    edit = sample_edit(scene, rng)
    changed = sorted({cell for _, cell in edit.requested if cell is not None})
    others = [cell for cell in range(scene.geometry.grid**2) if cell not in changed]
    rng.shuffle(changed)
    cells = [*changed, *rng.permutation(others)[: int(rng.integers(3))]]
    if rng.random() < 0.5:
        rng.shuffle(cells)
    turns: list[tuple[str, str]] = []
    if not changed:
        turns.append((f"{_closed(edit.instruction)} {pick(rng, BACKGROUND_THEN)}", as_sentence(edit.target.background)))
    for cell in cells:
        pattern = pick(rng, IMAGINE_MORE if turns else IMAGINE_REQUESTS)
        question = pattern.format(instruction=_closed(edit.instruction), place=PLACES[scene.geometry.grid][cell])
        turns.append((question, as_sentence(name_object(edit.target.object_at(cell)))))
    return {"messages": _turns(turns)}, {"edit": edit.to_dict()}


def _closed(instruction: str) -> str:
    return f"{instruction[0].upper()}{instruction[1:].rstrip('.')}."


def _find(scene: Scene, rng: np.random.Generator) -> _Drawn:
    return _conversation(sample_questions(scene, rng, int(rng.integers(1, MAX_QUESTIONS + 1)), FIND_KINDS))


def _chat(scene: Scene, rng: np.random.Generator) -> _Drawn:
    return _conversation([sample_chat(rng) for _ in range(rng.integers(1, 3))])


def _refinement(scene: Scene, rng: np.random.Generator) -> _Drawn:
    short = describe(scene, rng, "brief")
    meta = {"short_facts": facts_to_list({(fact.kind, fact.cell): fact.value for fact in short.facts})}
    return {"short_caption": short.text, "caption": describe(scene, rng).text}, meta


def _captioned(scene: Scene, rng: np.random.Generator) -> _Drawn:
    return {"caption": describe(scene, rng).text}, {}


def _editing(scene: Scene, rng: np.random.Generator) -> _Drawn:
    return _edited(scene, rng, sample_edit(scene, rng))


def _plain_editing(scene: Scene, rng: np.random.Generator) -> _Drawn:
    kinds = feasible_kinds(scene)
    hard = [kind for kind in HARD_EDITS if kind in kinds]
    return _edited(scene, rng, sample_edit(scene, rng, pick(rng, hard if rng.random() < 0.6 else kinds)), varied=False)


def _edited(scene: Scene, rng: np.random.Generator, edit: Edit, varied: bool = True) -> _Drawn:
    target = describe(edit.target, rng, first=_changed_place(edit), varied=varied)
    fields = {"caption": describe(scene, rng).text, "target_caption": target.text, "instruction": edit.instruction}
    return fields, {"edit": edit.to_dict()}


def _changed_place(edit: Edit) -> int | Literal["background"]:
    """The cell that an edit changes, the one with the object where it moves one; or the background."""
    changed = {cell for _, cell in edit.requested if cell is not None}
    if not changed:
        return BACKGROUND
    return next((obj.cell for obj in edit.target.objects if obj.cell in changed), min(changed))


def _conversation(questions: list[Question]) -> _Drawn:
    turns = _turns([(question.question, question.answer) for question in questions])
    return {"messages": turns}, {"questions": [question.kind for question in questions]}


def _turns(pairs: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(role=role, content=text) for pair in pairs for role, text in zip(roles, pair, strict=True))


PARTS: dict[str, tuple[str, Callable[[Scene, np.random.Generator], _Drawn]]] = {
    "brief": ("vqa", _brief),
    "medium": ("vqa", _medium),
    "questions": ("vqa", _questions),
    "find": ("vqa", _find),
    "aim": ("vqa", _aim),
    "imagine": ("vqa", _imagine),
    "chat": ("qa", _chat),
    "prompt_refinement": ("prompt_refinement", _refinement),
    "similar_image": ("similar_image", _captioned),
    "inpainting": ("inpainting", _captioned),
    "outpainting": ("outpainting", _captioned),
    "editing": ("editing", _editing),
    "plain_editing": ("editing", _plain_editing),
}
"""Part of a corpus -> the task of its records, and what draws their fields and `meta`."""
TEXT_ONLY = ("qa", "prompt_refinement")
