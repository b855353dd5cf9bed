"""Properties, tried on whatever hypothesis comes up with: no input crashes a check, and what it calls fine, trains.

python -m pytest tests/integration/test_check_properties.py
"""

import dataclasses
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from llmga.check.kinds import KINDS
from llmga.check.lengths import LengthCounter
from llmga.check.row_check import check_rows
from llmga.check.row_file import RowFile, index_rows
from llmga.check.sets import RowSet
from llmga.images import blank_holes, fit_mask
from llmga.masks import MEDIUM, NARROW, OUTPAINTING_NARROW, STAGE1, STAGE2, WIDE, MaskMixture, random_mask
from llmga.quarantine import read_quarantine, write_quarantine
from llmga.record_check import check_record
from llmga.records import (
    TASKS,
    Record,
    RecordError,
    open_manifest,
    record_from_row,
    row_of,
    write_manifest,
)
from llmga.stage1.conversation import encode_conversation
from llmga.stage1.instructions import fill_slots, instruction_list
from llmga.stage1.tasks import TaskSettings, build_example
from llmga.tokens import IGNORE_INDEX, TAG_LITERALS, parse_reply
from tests.toy import IMAGE_TOKEN, NUM_IMAGE_TOKENS, toy_tokenizer

ANY_SPEED = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
SETTINGS = TaskSettings(picture_size=16)

# Texts that look like ours, texts that try to look like control strings, and anything else.
PIECES = st.sampled_from(
    ["a kite", " ", "\n", "<image>", *TAG_LITERALS, "<|end|>", "<|user|>", "{caption}", "\u98ce", "<s>"]
)
TEXTS = st.lists(PIECES, max_size=4).map("".join) | st.text(max_size=20)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}), max_size=5
)
OPTIONAL_TEXTS = st.none() | TEXTS
RECORDS = st.builds(
    Record,
    id=st.text(min_size=1, max_size=5),
    task=st.sampled_from(TASKS),
    image=st.none() | st.sampled_from(["a.png", "b/c.png", "../d.png", "/e.png"]),
    short_caption=OPTIONAL_TEXTS,
    caption=OPTIONAL_TEXTS,
    instruction=OPTIONAL_TEXTS,
    target_caption=OPTIONAL_TEXTS,
    messages=st.none() | MESSAGES.map(tuple),
    prompt=OPTIONAL_TEXTS,
)
NEARLY_SOUND_TEXTS = st.lists(PIECES, max_size=3).map(lambda pieces: "".join(["a kite ", *pieces]))


@st.composite
def nearly_sound_records(draw: st.DrawFn) -> Record:
    """Records that have all a task needs, with texts that may hold anything, and now and then one thing wrong."""
    turns = draw(st.integers(1, 3))
    messages = [{"role": role, "content": draw(NEARLY_SOUND_TEXTS)} for role in ("user", "assistant") * turns]
    fields: dict[str, Any] = {"image": "a.png", "messages": tuple(messages)}
    fields |= {name: draw(NEARLY_SOUND_TEXTS) for name in ("short_caption", "caption", "instruction", "target_caption")}
    task = draw(st.sampled_from(TASKS))
    if task == "qa":
        del fields["image"]
    for name in ("caption", "target_caption"):  # what is trained as a prompt may hold no control strings
        if draw(st.booleans()):
            fields[name] = draw(st.text(max_size=20))
    record = Record(id="1", task=task, **fields)
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(sorted(fields)))
        record = dataclasses.replace(record, **{name: draw(st.none() | (MESSAGES if name == "messages" else TEXTS))})
    return record


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["id", "task", "image", "caption", "short_caption", "messages", "meta", "conversations", "x"])
ROWS = st.dictionaries(NAMES, VALUES | st.sampled_from(TASKS), max_size=6) | VALUES


@cache
def tokenizer() -> Any:
    return toy_tokenizer()


def noise(name: str) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(1, 256, (12, 18, 3), dtype=np.uint8))


# ---------------------------------------------------------------- records and templates


@ANY_SPEED
@given(nearly_sound_records(), st.integers(0, 2**32 - 1))
def test_what_the_check_calls_fine_trains_and_trains_nothing_but_its_answers(record: Record, seed: int) -> None:
    problems = check_record(record)
    assert all(problem.code in KINDS for problem in problems)
    assume(not any(KINDS[problem.code].severity == "error" for problem in problems))
    example = build_example(record, np.random.default_rng(seed), SETTINGS, noise)
    encoded = encode_conversation(tokenizer(), example.messages, IMAGE_TOKEN, NUM_IMAGE_TOKENS, record.id)
    image_id = tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)
    pictures = sum(turn.has_picture for turn in example.messages)
    assert encoded.input_ids.count(image_id) == NUM_IMAGE_TOKENS * pictures
    assert (example.picture is not None) == (pictures == 1)
    trained = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORE_INDEX]
    said = tokenizer().decode(trained)
    assert said.count("<|end|>") == sum(turn.role == "assistant" for turn in example.messages) > 0
    reply = parse_reply(said.replace("<|end|>", "\n"))
    if example.kind == "generation":
        target = record.target_caption if record.task == "editing" else record.caption
        assert target is not None and reply.well_formed and reply.prompts == (target_as_trained(target),)
    else:
        assert reply.well_formed and not reply.prompts


def target_as_trained(text: str) -> str:
    """A caption with the tokenizer's special tokens broken up, as `conversation` does."""
    from llmga.stage1.conversation import control_strings
    from llmga.tokens import neutralise

    return neutralise(text.strip(), control_strings(tokenizer(), IMAGE_TOKEN)).strip()


@ANY_SPEED
@given(RECORDS)
def test_a_record_is_what_its_row_says(record: Record) -> None:
    assert record_from_row(json.loads(json.dumps(row_of(record)))) == record


@ANY_SPEED
@given(TEXTS, TEXTS)
def test_braces_in_what_people_write_are_never_slots(caption: str, instruction: str) -> None:
    for template in instruction_list("edit_caption"):
        between = template.replace("{caption}", "\0C\0").replace("{instruction}", "\0I\0")
        parts = between.split("\0")
        expected = "".join({"C": caption, "I": instruction}.get(part, part) for part in parts)
        assert fill_slots(template, caption, instruction) == expected


# ---------------------------------------------------------------- rows of any kind


@ANY_SPEED
@given(
    st.lists(ROWS, max_size=8),
    st.sampled_from(["manifest", "llmga_t2i", "llmga_sg", "llmga_edit", "llava", "sharegpt"]),
)
def test_no_row_crashes_a_check_and_each_is_judged_as_the_loader_would(rows: list[Any], format: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        lines = [json.dumps(row) for row in rows]
        path.write_text("[" + ",\n".join(lines) + "]" if format != "manifest" else "\n".join(lines))
        source = RowSet(path, format, Path(folder), "rows")
        index = index_rows(source, Path(folder), 0)
        if index.fault is not None:  # NaN ends a published file for its reader as well
            assert "NaN" in str(index.fault) or "Infinity" in str(index.fault) or path.read_text()[:1] == "["
            return
        assert index.rows == len(rows)
        file = RowFile(source, index)
        found = check_rows(file, 0, index.rows, LengthCounter())
        file.close()
        assert all(finding.code in KINDS for finding in found.findings)
        unread = {finding.row for finding in found.findings if KINDS[finding.code].severity == "error"}
        if format == "manifest" and rows:
            try:
                manifest = open_manifest(path)
            except RecordError:  # the loader takes a file whose first line is no object for something else
                assert 0 in unread
                return
            for number in range(len(manifest)):
                try:
                    fine = not any(KINDS[p.code].severity == "error" for p in check_record(manifest[number]))
                except RecordError:
                    fine = False
                assert fine == (number not in unread)


@ANY_SPEED
@given(st.binary(max_size=200))
def test_no_bytes_crash_a_check(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for format in ("manifest", "llmga_sg"):
            path = Path(folder) / "rows.jsonl"
            path.write_bytes(content)
            index = index_rows(RowSet(path, format, Path(folder), "rows"), Path(folder), 0)
            if index.fault is None and index.rows:
                file = RowFile(RowSet(path, format, Path(folder), "rows"), index)
                check_rows(file, 0, index.rows, LengthCounter())
                assert len(list(file.places(range(index.rows)))) == index.rows
                file.close()


@settings(ANY_SPEED, max_examples=30)
@given(st.integers(1, 40), st.sets(st.integers(0, 39)))
def test_a_quarantine_leaves_out_exactly_its_rows(count: int, bad: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, listed = Path(folder) / "rows.jsonl", Path(folder) / "quarantine.jsonl"
        write_manifest(
            path, (Record(str(n), "prompt_refinement", short_caption="a", caption="b") for n in range(count))
        )
        rows = sorted(row for row in bad if row < count)
        write_quarantine(listed, path, [(row, ["orphan"]) for row in rows])
        assert read_quarantine(listed, path) == rows
        assert sorted(os.listdir(folder)) == ["quarantine.jsonl", "rows.jsonl"]


# ---------------------------------------------------------------- masks


@ANY_SPEED
@given(
    st.sampled_from([STAGE1, STAGE2, NARROW, MEDIUM, WIDE, OUTPAINTING_NARROW]),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(0, 2**32 - 1),
)
def test_a_drawn_mask_is_a_mask(mixture: MaskMixture, height: int, width: int, seed: int) -> None:
    mask = random_mask(np.random.default_rng(seed), height, width, mixture)
    assert mask.hole.shape == (height, width) and mask.hole.dtype == np.uint8
    assert set(np.unique(mask.hole)) <= {0, 1} and mask.hole.any()
    assert 0 < mask.coverage <= 1 and (mask.kind != "full" or mask.coverage == 1)
    again = random_mask(np.random.default_rng(seed), height, width, mixture)
    assert (mask.hole == again.hole).all() and mask.kind == again.kind


@ANY_SPEED
@given(st.integers(1, 48), st.integers(0, 2**32 - 1), st.sampled_from([1, 255]), st.sampled_from(["L", "RGB", "P"]))
def test_a_mask_file_gives_back_the_mask(size: int, seed: int, white: int, mode: str) -> None:
    mask = random_mask(np.random.default_rng(seed), size, size, STAGE2)
    fitted = fit_mask(Image.fromarray(mask.hole * np.uint8(white)).convert(mode), size)
    assert (fitted.hole == mask.hole).all()
    if mask.kind == "outpainting" and not mask.hole.all():
        assert fitted.kind == "outpainting"
    picture = Image.fromarray(np.random.default_rng(seed).integers(1, 256, (size, size, 3), dtype=np.uint8))
    blanked = np.asarray(blank_holes(picture, fitted))
    assert (blanked[mask.hole == 1] == 0).all()
    assert (blanked[mask.hole == 0] == np.asarray(picture)[mask.hole == 0]).all()


def test_masks_and_pictures_must_agree_in_size() -> None:
    mask = random_mask(np.random.default_rng(0), 8, 8)
    with pytest.raises(ValueError, match="the picture is 18 x 12, its mask 8 x 8"):
        blank_holes(noise("a"), mask)
