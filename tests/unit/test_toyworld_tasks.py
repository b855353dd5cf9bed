"""Edits, questions and small talk are exactly true, and nothing can be guessed from how they are asked.

Run: pytest tests/unit/test_toyworld_tasks.py
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmga.tokens import TAG_LITERALS
from llmga.toyworld import chat, edits, questions
from llmga.toyworld.corpus import draw_record
from llmga.toyworld.edits import NOTHING, Edit, all_facts, describe_apart, holds, sample_edit
from llmga.toyworld.grammar import parse_caption, says
from llmga.toyworld.questions import Question, sample_questions
from llmga.toyworld.scene import ATTRIBUTES, PRESETS, SPLITS, Obj, Scene, sample_scene
from llmga.toyworld.wording import PLACES, WORDS

SEEDS = st.integers(0, SPLITS["train"].stop - 1)
PRESET = st.sampled_from(list(PRESETS))
TWO = Scene(
    "learnable",
    "navy",
    (Obj(0, "circle", "small", "red", "plain", 1, -1), Obj(3, "circle", "large", "cyan", "dots", 0, 1)),
    "harbour",
)
FOUR = replace(
    TWO, objects=(*TWO.objects, Obj(1, "square", "small", "red", "plain"), Obj(2, "plus", "large", "red", "dots"))
)


# ---------------------------------------------------------------- edits


@given(seed=SEEDS, preset=PRESET, draw=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_an_edit_asks_for_its_target_and_keeps_the_rest(seed: int, preset: str, draw: int) -> None:
    scene = sample_scene(seed, preset)
    edit = sample_edit(scene, np.random.default_rng(draw))
    target = edit.target
    assert target != scene
    assert edit.requested.keys().isdisjoint(edit.preserved)
    assert edit.requested | edit.preserved == all_facts(target)
    assert holds(target.facts(), edit.requested) and holds(target.facts(), edit.preserved)
    assert not holds(scene.facts(), edit.requested)
    assert holds(scene.facts(), edit.preserved)
    fewest, most = scene.geometry.num_objects
    assert fewest <= len(target.objects) <= most
    assert not target.has_held_out()
    assert [obj.cell for obj in target.objects] == sorted({obj.cell for obj in target.objects})
    assert Edit.from_dict(edit.to_dict()) == edit


NUM_REQUESTED = {
    "recolour": {1}, "reshape": {1}, "retexture": {1}, "resize": {1},
    "move": {5}, "add": {4}, "remove": {1}, "background": {1},
}  # fmt: skip


@pytest.mark.parametrize("kind", edits.KINDS)
def test_each_kind_changes_what_its_name_says(kind: str) -> None:
    assert len(edits.WORDINGS[kind]) >= 6
    instructions = set()
    for seed in range(60):
        scene = sample_scene(seed)
        if kind not in edits.feasible_kinds(scene):
            continue
        edit = sample_edit(scene, np.random.default_rng(seed), kind)
        assert edit.kind == kind
        assert len(edit.requested) in NUM_REQUESTED[kind]
        grown = {"add": 1, "remove": -1}.get(kind, 0)
        assert len(edit.target.objects) - len(scene.objects) == grown
        jitters = Counter((obj.dx, obj.dy) for obj in scene.objects)
        kept = Counter((obj.dx, obj.dy) for obj in edit.target.objects)
        assert sum((jitters - kept).values()) == max(-grown, 0)  # objects that stay keep their jitter
        instructions.add(edit.instruction)
    assert len(instructions) > 15


def test_edits_that_the_preset_does_not_allow_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'remove' is not feasible in this scene; expected one of recolour, reshape"):
        sample_edit(TWO, rng, "remove")
    with pytest.raises(ValueError, match="'add' is not feasible"):
        sample_edit(FOUR, rng, "add")
    with pytest.raises(ValueError, match="'move' is not feasible"):
        sample_edit(FOUR, rng, "move")
    with pytest.raises(ValueError, match="'rotate' is unknown"):
        sample_edit(TWO, rng, "rotate")


def test_a_scene_without_a_theme_can_grow() -> None:
    edit = sample_edit(replace(TWO, theme=""), np.random.default_rng(0), "add")
    assert len(edit.target.objects) == 3


def test_composition_scenes_stay_composition_scenes() -> None:
    for number in range(30):
        scene = sample_scene(SPLITS["composition"].start + number)
        assert sample_edit(scene, np.random.default_rng(number)).target.has_held_out()


def test_instructions_say_the_requested_values() -> None:
    for seed in range(150):
        scene = sample_scene(seed)
        edit = sample_edit(scene, np.random.default_rng(seed))
        said = edit.instruction.lower()
        for (kind, cell), value in edit.requested.items():
            if value == NOTHING:
                continue
            if edit.kind == "move":
                assert PLACES[2][cell or 0] in said
            else:
                assert any(word in said for word in WORDS[kind][value]), edit
        if edit.kind == "add":
            assert any(PLACES[2][obj.cell] in said for obj in edit.target.objects if obj not in scene.objects)


def test_a_description_fits_one_object_and_hides_what_it_should() -> None:
    rng = np.random.default_rng(0)
    told = {describe_apart(FOUR, FOUR.objects[0], rng) for _ in range(300)}
    assert "the red circle" in told and "the small plain circle" in told
    assert not told & {"the circle", "the red shape", "the small red shape"}  # others are red, small or circles, too
    told = {describe_apart(FOUR, FOUR.objects[1], rng, without="colour") for _ in range(300)} - {None}
    assert told and not any("cyan" in text for text in told if text)


def test_an_extra_object_breaks_what_was_to_be_kept() -> None:
    edit = sample_edit(TWO, np.random.default_rng(0), "recolour")
    crowded = edit.target.with_objects([*edit.target.objects, Obj(1, "square", "small", "red", "plain")])
    assert holds(crowded.facts(), edit.requested)
    assert not holds(crowded.facts(), edit.preserved)


# ---------------------------------------------------------------- questions


def asked_about(num_scenes: int, n: int, **options: Any) -> list[tuple[Scene, Question]]:
    drawn = [(sample_scene(seed), np.random.default_rng([1, seed])) for seed in range(num_scenes)]
    return [(scene, question) for scene, rng in drawn for question in sample_questions(scene, rng, n, **options)]


def test_every_kind_is_asked_in_several_wordings() -> None:
    found = defaultdict(set)
    for _, question in asked_about(150, 10):
        found[question.kind].add(question.question)
        assert question.answer[0].isupper() and question.answer.endswith(".") and len(question.answer) < 50
    assert set(found) == set(questions.KINDS)
    assert all(len(wordings) >= 3 for wordings in found.values())


def test_yes_and_no_are_equally_frequent_within_each_kind() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for kind in questions.YES_NO_WORDINGS:
        for seed in range(200):
            rng = np.random.default_rng([2, seed])
            try:
                asked = sample_questions(sample_scene(seed), rng, 1, kinds=(kind,))
            except ValueError:  # two shapes that differ in everything cannot be asked what is the same
                continue
            answers[kind][asked[0].answer] += 1
    for kind, counts in answers.items():
        assert set(counts) == {"Yes.", "No."}
        total = counts.total()
        assert abs(counts["Yes."] / total - 0.5) < 2.6 * 0.5 / total**0.5, (kind, counts)


def test_open_answers_are_true() -> None:
    """Worked out again from the question's text, without the code under test."""
    checked = Counter[str]()
    for scene, (text, answer, kind) in asked_about(150, 10):
        objects = {PLACES[2][obj.cell]: obj for obj in scene.objects}
        place = next((place for place in PLACES[2] if place in text), None)
        obj = objects.get(place or "")
        said = answer.rstrip(".").lower()
        if kind == "count":
            assert said == ("two", "three", "four")[len(objects) - 2]
        elif kind == "background":
            assert said == scene.background
        elif kind == "at" and obj is None:
            assert said == "nothing"
        elif kind == "at" and obj is not None:
            parsed = parse_caption(f"{answer[:-1]} in the {place}. On navy.")
            assert parsed.objects == {obj.cell: obj.attributes()}
        elif kind in ATTRIBUTES and obj is not None:
            assert WORDS[kind][getattr(obj, kind)][0] == said
        elif kind == "where":
            named = [place for place, obj in objects.items() if all(_has(obj, word) for word in _adjectives(text))]
            assert named == [said]
        else:
            continue
        checked[kind] += 1
    assert min(checked[kind] for kind in ("count", "background", "at", "where", *ATTRIBUTES)) > 20


def _adjectives(text: str) -> list[str]:
    words = text.rstrip("?.").lower().split()
    return [word for word in words if any(word in said for kind in ATTRIBUTES for said in WORDS[kind].values())]


def _has(obj: Obj, word: str) -> bool:
    return any(word in WORDS[kind][value] for kind, value in obj.attributes().items())


@pytest.mark.parametrize(
    ("kind", "truth"),
    [
        ("exists", lambda scene, text: any(all(_has(o, word) for word in _adjectives(text)) for o in scene.objects)),
        ("empty", lambda scene, text: all(PLACES[2][o.cell] not in text for o in scene.objects)),
        ("is_background", lambda scene, text: scene.background in text),
    ],
)
def test_yes_no_answers_are_true(kind: str, truth: Any) -> None:
    for seed in range(120):
        scene = sample_scene(seed)
        if kind == "empty" and len(scene.objects) == 4:
            continue
        (question,) = sample_questions(scene, np.random.default_rng(seed), 1, kinds=(kind,))
        assert question.answer == ("Yes." if truth(scene, question.question) else "No."), (scene, question)


def test_comparisons_are_true() -> None:
    rng = np.random.default_rng(0)
    for question in (sample_questions(TWO, rng, 1, kinds=("larger",))[0] for _ in range(20)):
        assert question.answer == "The bottom right one."
    for question in (sample_questions(FOUR, rng, 1, kinds=("more",))[0] for _ in range(60)):
        if "red shapes than cyan" in question.question or "red shapes outnumber the cyan" in question.question:
            assert question.answer == "Yes."
    for question in (sample_questions(FOUR, rng, 1, kinds=("count_of",))[0] for _ in range(60)):
        expected = {" red shapes": "Three.", "crosses": "One.", "circles": "Two.", "striped shapes": "None."}
        for things, answer in expected.items():
            if things in question.question:
                assert question.answer == answer


def test_a_question_is_not_asked_twice() -> None:
    asked = sample_questions(TWO, np.random.default_rng(0), 25)
    assert len({question.question for question in asked}) == 25
    assert sum(question.kind == "count" for question in asked) <= 1


def test_questions_that_cannot_be_asked_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="question kind 'weight' is unknown; expected colour, shape"):
        sample_questions(TWO, rng, 1, kinds=("weight",))
    with pytest.raises(ValueError, match="gave 1 different questions, expected 2; ask fewer or more kinds"):
        sample_questions(TWO, rng, 2, kinds=("count",))


# ---------------------------------------------------------------- small talk


def test_small_talk_has_hundreds_of_forms_and_one_answer_each() -> None:
    answers: dict[str, str] = {}
    for seed in range(2_500):
        question = chat.sample_chat(np.random.default_rng(seed))
        assert answers.setdefault(question.question, question.answer) == question.answer
        assert len(question.answer.split()) <= 16
        assert not any(tag in question.answer + question.question for tag in TAG_LITERALS)
    assert len(answers) > 1_000


@pytest.mark.parametrize("kind", chat.KINDS)
def test_each_kind_of_small_talk_varies(kind: str) -> None:
    drawn = {chat.sample_chat(np.random.default_rng(seed), kind) for seed in range(150)}
    assert {question.kind for question in drawn} == {kind}
    assert len(drawn) >= 15


def test_sums_are_right() -> None:
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")
    for seed in range(200):
        question = chat.sample_chat(np.random.default_rng(seed), "arithmetic")
        text = re.findall(r"\w+", question.question.lower())
        first, second = (words.index(word) for word in text if word in words)
        sign = 1 if {"plus", "more", "another"} & set(text) else -1
        assert question.answer.lower() == words[first + sign * second] + "."


def test_reading_needs_the_text() -> None:
    drawn = [chat.sample_chat(np.random.default_rng(seed), "reading") for seed in range(300)]
    colours = [question for question in drawn if question.answer.rstrip(".").lower() in WORDS["colour"]]
    assert len(colours) > 20
    assert all(question.answer.rstrip(".").lower() in question.question for question in colours)


def test_an_unknown_kind_of_small_talk_is_refused() -> None:
    with pytest.raises(ValueError, match="chat kind 'politics' is unknown; expected one of small_talk, inventory"):
        chat.sample_chat(np.random.default_rng(0), "politics")


def test_the_caption_of_an_edited_scene_tells_the_change_first() -> None:
    """Right behind the opening; what a removal leaves has nothing to tell."""
    told: Counter[str] = Counter()
    for seed in range(200):
        scene = sample_scene(seed)
        record = draw_record("editing", "x", "train", "x.png", scene, np.random.default_rng(seed))
        edit = Edit.from_dict(record.meta["edit"])
        second = parse_caption(record.target_caption.split(". ")[1] + ".")
        said = {("shape", cell) for cell in second.objects} or {("background", None)}
        wanted = {("shape", cell) if cell is not None else (kind, None) for kind, cell in edit.requested}
        wanted -= {key for key, value in edit.requested.items() if value == NOTHING}
        told[edit.kind] += 1
        assert said <= wanted or edit.kind == "remove", (edit.instruction, record.target_caption)
    assert set(told) == set(edits.KINDS)


def test_finding_leads_from_descriptions_to_places_and_back() -> None:
    asked: Counter[str] = Counter()
    for seed in range(300):
        record = draw_record("find", "x", "train", "x.png", sample_scene(seed), np.random.default_rng(seed))
        asked.update(record.meta["questions"])
    assert set(asked) == {"where", "at", "colour", "shape"}
    assert asked["where"] > 0.25 * asked.total()


def test_aiming_asks_which_shape_an_edit_means_mostly_without_naming_its_place() -> None:
    named, answers = [], Counter()
    for seed in range(300):
        scene = sample_scene(seed)
        record = draw_record("aim", "x", "train", "x.png", scene, np.random.default_rng(seed))
        occupied = {PLACES[scene.geometry.grid][obj.cell] for obj in scene.objects}
        for question, answer in zip(record.messages[::2], record.messages[1::2], strict=True):
            place = answer["content"].rstrip(".").lower()
            assert place in occupied
            answers[place] += 1
            named.append(place in question["content"].lower())
    assert 0.02 < np.mean(named) < 0.4
    assert set(answers) == set(PLACES[2]) and min(answers.values()) > 0.18 * answers.total()


def test_an_edited_caption_begins_with_the_change_and_goes_round() -> None:
    for seed in range(200):
        scene = sample_scene(seed)
        record = draw_record("editing", "x", "train", "x.png", scene, np.random.default_rng(seed))
        edit = Edit.from_dict(record.meta["edit"])
        first = record.target_caption.split(". ")[1]
        places = PLACES[scene.geometry.grid]
        told = [places.index(found) for found in re.findall("|".join(places), record.target_caption)]
        assert sorted(told) == sorted(obj.cell for obj in edit.target.objects)
        if edit.kind == "background":
            assert edit.target.background in first
            continue
        steps = [(cell - told[0]) % 4 for cell in told]
        assert steps == sorted(steps)
        if edit.kind == "remove":
            (gone,) = {cell for _, cell in edit.requested}
            assert all((cell - gone) % 4 >= (told[0] - gone) % 4 for cell in told)
        else:
            changed = {cell for _, cell in edit.requested}
            assert told[0] in changed


def test_plain_edits_are_worded_alike_and_say_the_same_facts() -> None:
    openings = set()
    for seed in range(60):
        scene = sample_scene(seed)
        record = draw_record("plain_editing", "x", "train", "x.png", scene, np.random.default_rng(seed))
        edit = Edit.from_dict(record.meta["edit"])
        assert record.task == "editing"
        assert says(parse_caption(record.target_caption), edit.target)
        openings.add(re.sub("two|three|four", "N", record.target_caption.split(". ")[0]))
        assert not re.search("little|big|disc", record.target_caption)
    assert len(openings) == 1


def test_imagining_asks_for_every_changed_place_and_answers_from_the_edited_scene() -> None:
    asked: Counter[str] = Counter()
    for seed in range(300):
        scene = sample_scene(seed)
        record = draw_record("imagine", "x", "train", "x.png", scene, np.random.default_rng(seed))
        edit, turns = Edit.from_dict(record.meta["edit"]), record.messages
        assert edit.instruction.rstrip(".").lower() in turns[0]["content"].lower()
        places, told = PLACES[scene.geometry.grid], {}
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            behind = question["content"][-40:]
            cells = [cell for cell, place in enumerate(places) if place in behind]
            if cells and "background" not in behind:
                told[max(cells, key=lambda cell: behind.rindex(places[cell]))] = answer["content"]
            else:
                assert answer["content"] == f"{edit.target.background.capitalize()}."
        assert {cell for _, cell in edit.requested} - {None} <= set(told)
        for cell, answer in told.items():
            assert answer == questions.as_sentence(questions.name_object(edit.target.object_at(cell)))
        asked[edit.kind] += 1
    assert set(asked) == set(edits.KINDS)
