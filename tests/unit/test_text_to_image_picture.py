"""The README's picture of stage 2: every column painted, what is read coloured by what was asked."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmga.records import Record, write_manifest
from llmga.tokens import clip_tokenizer
from llmga.toyworld.describe import describe
from llmga.toyworld.parse import parse
from llmga.toyworld.picture_scores import WINDOW_TOKENS, read_text
from llmga.toyworld.render import render
from llmga.toyworld.scene import SPLITS, sample_scene
from text_to_image_picture import COLUMNS, NUM_ROWS, facts_of, main, prompt_words, reading, requested_by_brief

SEEDS = SPLITS["test"][:NUM_ROWS]


def long_prompt(seed: int) -> str:
    return describe(sample_scene(seed), np.random.default_rng(seed), "long").text


def colours(seed_painted: int, seed_asked: int) -> list[str]:
    read = parse(render(sample_scene(seed_painted)))
    lines = reading(read, facts_of(read_text(long_prompt(seed_asked))))
    return [colour for line in lines for _, colour, _ in line if colour != "soft"]


def test_what_is_as_the_prompt_wants_it_is_green_and_what_is_not_is_red() -> None:
    scene = sample_scene(SEEDS[0])
    assert colours(SEEDS[0], SEEDS[0]) == ["right"] * len(scene.facts())
    assert {"right", "wrong"} >= set(colours(SEEDS[1], SEEDS[0])) and "wrong" in colours(SEEDS[1], SEEDS[0])


def test_a_shape_that_is_asked_for_and_not_there_is_named() -> None:
    scene = sample_scene(SEEDS[0])
    fewer = scene.with_objects(list(scene.objects)[1:])
    lines = reading(parse(render(fewer)), facts_of(read_text(long_prompt(SEEDS[0]))))
    assert [line[-1][:2] for line in lines].count(("nothing", "wrong")) == 1


def test_a_brief_caption_asks_for_its_background_alone() -> None:
    scene = sample_scene(SEEDS[0])
    brief = describe(scene, np.random.default_rng(0), "brief").text
    assert requested_by_brief(brief) == {("background", None): scene.background}


def test_words_behind_the_window_stand_out() -> None:
    prompt = long_prompt(SEEDS[0])
    words = prompt_words(prompt)
    assert " ".join(word for word, _, _ in words) == prompt
    within = " ".join(word for word, colour, _ in words if colour == "text")
    tokens = len(clip_tokenizer()(within, add_special_tokens=False).input_ids)
    assert WINDOW_TOKENS - 8 <= tokens <= WINDOW_TOKENS and words[-1][1] == "tag"
    assert {colour for _, colour, _ in prompt_words("A red circle.")} == {"text"}


def test_the_picture_shows_every_row_and_says_when_words_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for seed in SEEDS:
        brief = describe(sample_scene(seed), np.random.default_rng(seed), "brief").text
        rows.append(Record(id=f"scene/{seed}", task="prompt_refinement", short_caption=brief, prompt=long_prompt(seed)))
        for column in COLUMNS:
            folder = tmp_path / "pictures" / column
            folder.mkdir(parents=True, exist_ok=True)
            from llmga.metrics.picture_files import file_name

            Image.fromarray(render(sample_scene(seed))).save(folder / file_name(f"scene/{seed}"))
    write_manifest(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out" / "grid.png"
    assert main([str(tmp_path), str(tmp_path / "rows.jsonl"), str(out)]) == 0
    width, height = Image.open(out).size
    assert width == 2360 and height > NUM_ROWS * 2 * 150
    assert main([str(tmp_path)]) == 2
    assert "text_to_image_picture.py" in capsys.readouterr().err
