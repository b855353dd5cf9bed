"""Pictures against texts in the toy world: what is right early and wrong late shows where it is.

Run: pytest tests/unit/test_picture_scores.py
"""

from dataclasses import replace

import numpy as np
import pytest

from llmga.toyworld.describe import Caption, describe
from llmga.toyworld.parse import parse_batch
from llmga.toyworld.picture_scores import (
    read_text,
    score_requests,
    score_texts,
    score_themes,
)
from llmga.toyworld.render import render
from llmga.toyworld.scene import ATTRIBUTES, BACKGROUNDS, SPLITS, Scene, sample_scene
from tests.toy_evaluation import guessed_past

COUNT = 60


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed) for seed in SPLITS["test"][:COUNT]]


@pytest.fixture(scope="module")
def captions(scenes: list[Scene]) -> list[Caption]:
    return [describe(scene, np.random.default_rng(number)) for number, scene in enumerate(scenes)]


def drawn(scenes: list[Scene]) -> list:
    return parse_batch(np.stack([render(scene) for scene in scenes]))


def rate(pairs: np.ndarray) -> float:
    right, total = pairs.sum(axis=0)
    return right / total


@pytest.mark.parametrize("preset", ["learnable", "dense"])
def test_a_text_is_read_back_with_its_positions(preset: str) -> None:
    for number in range(20):
        scene = sample_scene(number, preset)
        caption = describe(scene, np.random.default_rng(number))
        read = read_text(caption.text, scene.geometry.grid)
        told = {(f.kind, f.cell, f.value): p for f, p in zip(caption.facts, caption.positions, strict=True)}
        found = {(f.kind, f.cell, f.value): p for f, p in zip(read.facts, read.positions, strict=True)}
        assert found == {key: place for key, place in told.items() if key[0] != "count"}


def test_what_nobody_asked_for_in_words_of_the_world_is_passed_over() -> None:
    text = "A small dog. Top middle small plain red circle. Top left small plain red circle. Top left large"
    assert {(f.kind, f.cell) for f in read_text(text).facts} == {(kind, 0) for kind in ATTRIBUTES}
    assert read_text("").facts == ()


def test_perfect_pictures_score_full_marks(scenes: list[Scene], captions: list[Caption]) -> None:
    found = score_texts(drawn(scenes), [caption.text for caption in captions])
    full = {name: rate(pairs) for name, pairs in found.items() if pairs[:, 1].sum()}
    assert set(full.values()) == {1.0} and "above_chance" in full
    assert found["attributes"].sum(0)[1] == sum(1 + 4 * len(scene.objects) for scene in scenes)
    assert (found["early"] + found["late"] == found["attributes"]).all()
    by_token = sum(pairs for name, pairs in found.items() if name.startswith("tokens:"))
    assert (by_token == found["attributes"]).all()
    assert found["late"][:, 1].mean() > 4  # past the first window, in every picture nearly


def test_one_who_sees_the_first_window_alone_is_right_early_and_guesses_late(
    scenes: list[Scene], captions: list[Caption]
) -> None:
    rng = np.random.default_rng(0)
    cut = [guessed_past(scene, caption, rng) for scene, caption in zip(scenes, captions, strict=True)]
    found = score_texts(drawn(cut), [caption.text for caption in captions])
    assert rate(found["early"]) == 1 and rate(found["late"]) < 0.4
    assert rate(found["tokens:15"]) == 1 and rate(found["tokens:105"]) < 0.5
    assert 0.4 < rate(found["above_chance"]) < rate(found["attributes"])


def test_guessing_is_not_above_chance(scenes: list[Scene], captions: list[Caption]) -> None:
    rng = np.random.default_rng(2)
    guessed = [guessed_past(scene, Caption("", ()), rng) for scene in scenes]
    found = score_texts(drawn(guessed), [caption.text for caption in captions])
    assert 0.15 < rate(found["attributes"]) < 0.4 and abs(rate(found["above_chance"])) < 0.08


def test_missing_and_extra_shapes_are_told_apart(scenes: list[Scene], captions: list[Caption]) -> None:
    texts = [caption.text for caption in captions]
    fewer = score_texts(drawn([scene.with_objects(scene.objects[1:]) for scene in scenes]), texts)
    assert rate(fewer["no_missing"]) == 1 - COUNT / sum(len(scene.objects) for scene in scenes)
    assert rate(fewer["no_extra"]) == 1 and rate(fewer["exact"]) == 0 and rate(fewer["attribute:background"]) == 1
    free = [scene for scene in scenes if scene.empty_cells()]
    shown = [s.with_objects([*s.objects, replace(s.objects[0], cell=s.empty_cells()[0])]) for s in free]
    told = [text for scene, text in zip(scenes, texts, strict=True) if scene.empty_cells()]
    more = score_texts(drawn(shown), told)
    assert rate(more["no_missing"]) == 1 and rate(more["attributes"]) == 1
    assert rate(more["no_extra"]) < 1 and rate(more["exact"]) == 0


def test_noise_is_not_parseable(captions: list[Caption]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 64, 64, 3), np.uint8)
    found = score_texts(parse_batch(noise), [caption.text for caption in captions])
    assert rate(found["parseable"]) < 0.05


def test_a_brief_request_is_kept_by_its_scene_and_rarely_by_another(scenes: list[Scene]) -> None:
    briefs = [describe(scene, np.random.default_rng(number), "brief").text for number, scene in enumerate(scenes)]
    assert rate(score_requests(drawn(scenes), briefs)["kept"]) == 1
    other = score_requests(drawn(scenes[1:] + scenes[:1]), briefs)
    assert rate(other["kept"]) < 0.1 < rate(other["constraints"]) < 0.5
    assert score_requests(drawn(scenes[:1]), ["Something nice."])["kept"].tolist() == [[0, 0]]


def test_scenes_of_the_prior_agree_with_a_theme_and_random_ones_less(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(1)
    random = [
        replace(
            scene.with_objects(
                [
                    replace(o, **{k: str(rng.choice(ATTRIBUTES[k])) for k in ("colour", "texture")})
                    for o in scene.objects
                ]
            ),
            background=str(rng.choice(list(BACKGROUNDS))),
        )
        for scene in scenes
    ]
    themed, free = (score_themes(drawn(each))["theme"].mean() for each in (scenes, random))
    assert 0.85 < themed < 0.99 and free < themed - 0.15
