"""Guards what stage 1 teaches: who gets tags, which words ask for what, and that chance comes from one generator."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from llmga.record_check import NEEDS
from llmga.records import TASKS, Record, RecordError
from llmga.stage1.config import DataConfig, SourceConfig
from llmga.stage1.instructions import INSTRUCTIONS_PATH, fill_slots, instruction_list
from llmga.stage1.tasks import Example, TaskSettings, Turn, build_example
from llmga.tokens import GEN_IMAGE, GEN_IMG, parse_reply

SIZE = 32
SETTINGS = TaskSettings(picture_size=SIZE)
CAPTION = "A large red circle lies on a grey ground, and a small blue square stands beside it."
MESSAGES = (
    {"role": "user", "content": "What is <image> here?"},
    {"role": "assistant", "content": "A circle."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, <gen_img> is a tag."},
)


def picture_named(name: str) -> Image.Image:
    """Noise without black pixels, 40 x 30; `mask.png` is white in its left half."""
    if name == "mask.png":
        return Image.fromarray(np.repeat(np.uint8([[255, 255, 0, 0]]), 4, axis=0)).convert("RGB")
    if name == "empty.png":
        return Image.new("RGB", (4, 4))
    return Image.fromarray(np.random.default_rng(1).integers(1, 256, (30, 40, 3), dtype=np.uint8))


def record_of(task: str, **fields: Any) -> Record:
    complete: dict[str, Any] = {
        "image": "a.png",
        "caption": CAPTION,
        "short_caption": "a circle and a square",
        "instruction": "Paint the circle green.",
        "target_caption": CAPTION.replace("red", "green"),
        "messages": MESSAGES,
    }
    needed = (*NEEDS[task], "image") if task == "editing" else NEEDS[task]
    return Record(id="row-7", task=task, **{name: complete[name] for name in needed} | fields)


def build(record: Record, seed: int = 0, settings: TaskSettings = SETTINGS) -> Example:
    return build_example(record, np.random.default_rng([7, seed]), settings, picture_named)


def build_many(record: Record, count: int, settings: TaskSettings = SETTINGS) -> list[Example]:
    return [build(record, seed, settings) for seed in range(count)]


def pixels(example: Example) -> np.ndarray:
    assert example.picture is not None
    return np.asarray(example.picture)


# ---------------------------------------------------------------- every task


@pytest.mark.parametrize("task", TASKS)
def test_equal_generators_give_equal_examples(task: str) -> None:
    np.random.seed(0)  # the global generator must not matter
    first = build(record_of(task))
    np.random.seed(1)
    second = build(record_of(task))
    assert first.messages == second.messages
    assert first.kind == second.kind
    if first.picture is not None:
        assert np.array_equal(pixels(first), pixels(second))
        assert first.picture.size == (SIZE, SIZE)
    if task not in ("vqa", "qa", "editing"):
        assert len({repr(example.messages) for example in build_many(record_of(task), 10)}) > 4


@pytest.mark.parametrize("task", TASKS)
def test_tags_mark_generation_requests_and_nothing_else(task: str) -> None:
    for example in build_many(record_of(task), 40):
        replies = [parse_reply(turn.content) for turn in example.messages if turn.role == "assistant"]
        assert all(reply.well_formed for reply in replies)
        assert [len(reply.prompts) for reply in replies] == [int(example.kind == "generation")] * len(replies)
        assert [turn.has_picture for turn in example.messages] == [
            example.picture is not None,
            *[False] * (len(example.messages) - 1),
        ]


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in TASKS for name in NEEDS[task]])
@pytest.mark.parametrize("empty", [None, " "])
def test_missing_field_is_named(task: str, name: str, empty: Any) -> None:
    record = record_of(task, **{name: () if empty and name == "messages" else empty})
    settings = replace(SETTINGS, similar_generate_share=1.0)
    with pytest.raises(RecordError, match=f"'row-7': task '{task}' needs '{name}', found none; fill it in"):
        build(record, settings=settings)


def test_unknown_task_is_named() -> None:
    with pytest.raises(RecordError, match="'row-7' has the task 'painting'; expected one of prompt_refinement, "):
        build(Record(id="row-7", task="painting"))


@pytest.mark.parametrize("tags", [GEN_IMG, GEN_IMAGE])
def test_literal_tags_in_a_caption_do_not_break_the_pair(tags: Any) -> None:
    record = record_of("similar_image", caption="A sign that reads </gen_img> and <gen_image> <image>.")
    generated = build(record, settings=replace(SETTINGS, similar_generate_share=1.0, tags=tags)).messages[1].content
    described = build(record, settings=replace(SETTINGS, similar_generate_share=0.0, tags=tags)).messages[1].content
    text = "A sign that reads < /gen_img> and < gen_image> <image>."  # the placeholder is broken up by conversation.py
    assert generated == f"{tags.open} {text} {tags.close}"
    assert described == text


# ---------------------------------------------------------------- prompt refinement, similar image


def test_refinement_draws_task_and_position_independently() -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for example in build_many(record_of("prompt_refinement"), 2000):
        question, answer = (turn.content for turn in example.messages)
        name = "generate" if example.kind == "generation" else "expand"
        before = question.endswith(" a circle and a square")
        place = "before" if before else "behind"
        instruction = question.removesuffix(" a circle and a square").removeprefix("a circle and a square ")
        assert instruction in instruction_list(f"{name}_{place}")
        assert answer == (f"<gen_img> {CAPTION} </gen_img>" if name == "generate" else CAPTION)
        assert example.picture is None
        counts[name, place] += 1
    assert len(counts) == 4
    assert all(abs(count - 500) < 80 for count in counts.values())  # 4 standard deviations of 19


def test_shares_steer_what_is_asked() -> None:
    settings = replace(SETTINGS, refine_generate_share=0.2, instruction_behind_share=0.9)
    examples = build_many(record_of("prompt_refinement"), 1000, settings)
    behind = sum(example.messages[0].content.startswith("a circle and a square") for example in examples)
    assert abs(sum(example.kind == "generation" for example in examples) - 200) < 51
    assert abs(behind - 900) < 38


def test_similar_image_is_asked_for_in_seven_of_ten() -> None:
    examples = build_many(record_of("similar_image"), 1000)
    generated = [example for example in examples if example.kind == "generation"]
    assert abs(len(generated) - 700) < 58
    drawn = {example.messages[0].content for example in generated}
    described = {example.messages[0].content for example in examples if example.kind == "description"}
    assert drawn == set(instruction_list("similar_picture"))
    assert described == set(instruction_list("describe_picture"))
    assert examples[0].mask is None


def test_settings_follow_the_config() -> None:
    data = DataConfig(sources=[SourceConfig(path=__file__)], picture_size=48, language="xx", similar_generate_share=0.1)
    settings = TaskSettings.from_config(data, GEN_IMAGE, "held_out")
    assert settings == TaskSettings(0.1, 0.5, 0.5, 48, "squash", "xx", GEN_IMAGE, phrasing="held_out")


# ---------------------------------------------------------------- inpainting, outpainting


def test_drawn_mask_decides_what_is_asked() -> None:
    examples = build_many(record_of("inpainting"), 400)
    outpaint = 0
    for example in examples:
        assert example.mask is not None
        outpaint += example.mask.is_outpaint
        instruction = example.messages[0].content
        assert instruction in instruction_list("outpaint" if example.mask.is_outpaint else "inpaint")
    assert abs(outpaint - 200) < 41


def test_holes_are_black_and_the_rest_is_untouched() -> None:
    whole = np.asarray(picture_named("a.png").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    for example in build_many(record_of("inpainting"), 10):
        assert example.mask is not None
        hole = example.mask.hole.astype(bool)
        assert hole.any()
        assert not pixels(example)[hole].any()
        assert np.array_equal(pixels(example)[~hole], whole[~hole])


def test_outpainting_record_is_always_outpainted() -> None:
    for example in build_many(record_of("outpainting"), 40):
        assert example.mask is not None
        assert example.mask.is_outpaint
        assert example.messages[0].content in instruction_list("outpaint")


@pytest.mark.parametrize(("task", "name"), [("inpainting", "inpaint"), ("outpainting", "outpaint")])
def test_own_mask_is_used_and_the_task_says_what_is_asked(task: str, name: str) -> None:
    for example in build_many(record_of(task, mask="mask.png"), 5):
        assert example.mask is not None
        assert example.mask.hole[:, : SIZE // 2 - 4].all()
        assert not example.mask.hole[:, SIZE // 2 + 4 :].any()
        assert example.messages[0].content in instruction_list(name)


def test_mask_without_a_hole_is_an_error() -> None:
    with pytest.raises(RecordError, match=r"'row-7': 'mask' 'empty.png' hides nothing; expected white"):
        build(record_of("inpainting", mask="empty.png"))


# ---------------------------------------------------------------- editing


def test_edit_of_a_picture_is_picture_and_instruction() -> None:
    example = build(record_of("editing", caption=CAPTION))
    assert example.messages[0] == Turn("user", "Paint the circle green.", has_picture=True)
    assert example.messages[1].content == f"<gen_img> {CAPTION.replace('red', 'green')} </gen_img>"


def test_edit_without_a_picture_starts_from_its_caption() -> None:
    caption = "A {instruction} in {braces}."
    questions = {
        example.messages[0].content for example in build_many(record_of("editing", image=None, caption=caption), 200)
    }
    templates = instruction_list("edit_caption")
    assert questions == {fill_slots(template, caption, "Paint the circle green.") for template in templates}
    assert all(caption in question and "Paint the circle green." in question for question in questions)
    short = build(record_of("editing", image=None, short_caption="a circle"))
    assert "a circle" in short.messages[0].content
    assert short.picture is None


def test_edit_of_nothing_is_an_error() -> None:
    with pytest.raises(
        RecordError, match="'row-7': task 'editing' needs 'image', or 'caption' in its place, found none"
    ):
        build(record_of("editing", image=None))


# ---------------------------------------------------------------- chat


def test_recorded_turns_stand_as_they_are() -> None:
    expected = [Turn(m["role"], m["content"]) for m in MESSAGES]
    expected[3] = Turn("assistant", "Yes, < gen_img> is a tag.")
    assert build(record_of("qa")).messages == expected
    expected[0] = replace(expected[0], has_picture=True)
    assert build(record_of("vqa")).messages == expected


def test_picture_belongs_to_the_first_question() -> None:
    messages = ({"role": "assistant", "content": "Hello."}, *MESSAGES)
    example = build(record_of("vqa", messages=messages))
    assert [turn.has_picture for turn in example.messages] == [False, True, False, False, False]
    with pytest.raises(RecordError, match="'row-7': task 'vqa' needs a question in 'messages'"):
        build(record_of("vqa", messages=messages[:1]))


# ---------------------------------------------------------------- instructions


def test_lists_are_long_and_share_nothing() -> None:
    seen: Counter[str] = Counter()
    for name in yaml.safe_load(INSTRUCTIONS_PATH.read_text())["en"]:
        trained, held_out = instruction_list(name), instruction_list(name, phrasing="held_out")
        assert len(trained) >= 12, name
        assert len(held_out) >= 2, name
        assert all(isinstance(line, str) and line == line.strip() and line for line in (*trained, *held_out))
        assert any(line[0].islower() for line in trained)  # sloppy requests are trained
        assert any(line[0].islower() for line in held_out)  # and unseen phrasing is not only unseen polish
        seen.update(line.lower().strip(" .:?!,") for line in {*trained, *held_out})
    # "Before" and "behind" lists may share words; what looks alike to the model asks for the same.
    shared = {line for line, count in seen.items() if count > 1}
    expand = {line.lower().strip(" .:?!,") for p in ("before", "behind") for line in all_lines(f"expand_{p}")}
    assert shared <= expand


def all_lines(name: str) -> tuple[str, ...]:
    return instruction_list(name) + instruction_list(name, phrasing="held_out")


def test_edit_templates_have_both_slots_once() -> None:
    for template in all_lines("edit_caption"):
        assert template.count("{caption}") == template.count("{instruction}") == 1


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("vqa", "qa")])
def test_held_out_phrasing_is_drawn_only_when_asked_for(task: str) -> None:
    record = record_of(task, image=None if task == "editing" else "a.png", caption=CAPTION)
    held_out = {e.messages[0].content for e in build_many(record, 100, replace(SETTINGS, phrasing="held_out"))}
    trained = {e.messages[0].content for e in build_many(record, 100)}
    assert held_out.isdisjoint(trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inpaint", "xx"), r"no instructions for 'xx' in .*instructions.yaml; it has en"),
        (("paint", "en"), r"no instructions for 'paint' in .*; it has describe_picture, "),
        (("inpaint", "en", "all"), "come in the phrasings train, held_out; found 'all'"),
    ],
)
def test_unknown_list_language_or_phrasing_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instruction_list(*arguments)
