"""The parser judges every toy picture, so it must not be wrong itself: not on soft, noisy, tinted or shifted ones.

    pytest tests/integration/test_toyworld_parse.py

Fewer scenes than benchmarks/toyworld_parse.py, which prints the whole table.
"""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from llmga.toyworld import parse
from llmga.toyworld.parse import PICTURES_PER_PASS, parse_batch
from llmga.toyworld.render import render
from llmga.toyworld.scene import ATTRIBUTES, BACKGROUNDS, COLOURS, PRESETS, SPLITS, Obj, Scene, sample_scene

NUM_SCENES = 24


def scenes_of(preset: str, split: str = "test", num_scenes: int = NUM_SCENES) -> list[Scene]:
    return [sample_scene(seed, preset) for seed in SPLITS[split][:num_scenes]]


def pictures_of(scenes: list[Scene]) -> np.ndarray:
    return np.stack([render(scene) for scene in scenes])


def noisy(pictures: np.ndarray, sd: float = 50) -> np.ndarray:
    noise = np.random.default_rng(7).normal(0, sd, pictures.shape)
    return np.clip(pictures + noise, 0, 255).round().astype(np.uint8)


def brighter(pictures: np.ndarray) -> np.ndarray:
    return np.minimum(pictures.astype(int) + 15, 255).astype(np.uint8)


def soft(pictures: np.ndarray) -> np.ndarray:
    return np.stack([Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)) for picture in pictures])


def shifted(pictures: np.ndarray) -> np.ndarray:
    return np.roll(pictures, (2, -2), axis=(1, 2))


def jpeg_50(pictures: np.ndarray) -> np.ndarray:
    files = [io.BytesIO() for _ in pictures]
    for picture, file in zip(pictures, files, strict=True):
        Image.fromarray(picture).save(file, "JPEG", quality=50)
    return np.stack([Image.open(file) for file in files])


@pytest.mark.parametrize("split", ["test", "composition"])
@pytest.mark.parametrize("preset", PRESETS)
def test_clean_renders_are_read_to_the_pixel(preset: str, split: str) -> None:
    scenes = scenes_of(preset, split)
    for scene, parsed in zip(scenes, parse_batch(pictures_of(scenes), preset), strict=True):
        assert (parsed.background, parsed.objects) == (scene.background, scene.objects)  # with their jitter
        assert parsed.facts() == scene.facts()
        assert max(parsed.residual) < 0.5 and parsed.unparseable == ()  # rounding to uint8 is all that is left


@pytest.mark.parametrize("harm", [noisy, brighter, soft, shifted])
@pytest.mark.parametrize("preset", PRESETS)
def test_facts_survive_harm(preset: str, harm: Callable[[np.ndarray], np.ndarray]) -> None:
    scenes = scenes_of(preset)
    parsed = parse_batch(harm(pictures_of(scenes)), preset)
    assert [guess.facts() for guess in parsed] == [scene.facts() for scene in scenes]


@pytest.mark.parametrize("preset", PRESETS)
def test_attributes_survive_jpeg(preset: str) -> None:
    scenes = scenes_of(preset)
    parsed = parse_batch(jpeg_50(pictures_of(scenes)), preset)
    for kind in ("background", *ATTRIBUTES):
        right = [
            guess.facts().get(key) == value
            for scene, guess in zip(scenes, parsed, strict=True)
            for key, value in scene.facts().items()
            if key[0] == kind
        ]
        assert np.mean(right) >= 0.99, kind


@pytest.mark.parametrize("preset", PRESETS)
def test_every_colour_on_every_background(preset: str) -> None:
    """Colour pairs that the themes draw rarely or never."""
    scenes = [
        Scene(preset, background, (Obj(1, "plus", "small", colour, "stripes"),))
        for background in BACKGROUNDS
        for colour in COLOURS
    ]
    for scene, parsed in zip(scenes, parse_batch(pictures_of(scenes), preset), strict=True):
        assert parsed.facts() == scene.facts()


def test_missing_and_extra_objects() -> None:
    asked = Scene(
        "learnable", "navy", (Obj(0, "circle", "large", "red", "plain"), Obj(3, "plus", "small", "cyan", "dots"))
    )
    shown = Scene(
        "learnable", "navy", (Obj(0, "circle", "large", "red", "plain"), Obj(2, "square", "small", "blue", "checks"))
    )
    parsed = parse(render(shown))
    assert (parsed.missing(asked), parsed.extra(asked)) == ([3], [2])
    assert (parsed.missing(shown), parsed.extra(shown)) == ([], [])


def test_small_faint_objects_are_found_in_noise() -> None:
    """Few bright pixels in a noisy cell: judged over the whole cell, some of these would be taken for empty."""
    objects = [Obj(4, "triangle", "small", colour, "stripes") for colour in ("green", "red")]
    scenes = [Scene("dense", background, (obj,)) for background in BACKGROUNDS for obj in objects]
    for scene, parsed in zip(scenes, parse_batch(noisy(pictures_of(scenes), sd=60), "dense"), strict=True):
        assert (parsed.missing(scene), parsed.extra(scene)) == ([], [])


@pytest.mark.parametrize(("strength", "present"), [(0.2, False), (0.7, True)])
def test_a_ghost_of_an_object_is_none(strength: float, present: bool) -> None:
    scene = Scene("learnable", "olive", (Obj(2, "diamond", "large", "pink", "plain"),))
    empty = render(scene.with_objects([])).astype(float)
    ghost = empty + strength * (render(scene) - empty)
    parsed = parse(ghost.astype(np.uint8))
    assert [obj.cell for obj in parsed.objects] == ([2] if present else [])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_picture_of_noise_is_unparseable(preset: str) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert parse(noise, preset).unparseable == tuple(range(PRESETS[preset].grid ** 2))


def test_one_ruined_cell_leaves_the_others_readable() -> None:
    scene = sample_scene(SPLITS["test"][0])
    picture = render(scene).copy()
    picture[2:32, 32:62] = np.random.default_rng(3).integers(0, 256, (30, 30, 3))
    parsed = parse(picture)
    assert parsed.unparseable == (1,)
    assert parsed.background == scene.background
    assert [obj for obj in parsed.objects if obj.cell != 1] == [obj for obj in scene.objects if obj.cell != 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_background_is_read_despite_a_damaged_frame(preset: str) -> None:
    scenes = scenes_of(preset, num_scenes=12)
    pictures = pictures_of(scenes)
    for number, scene in enumerate(scenes):
        others = [colour for name, colour in BACKGROUNDS.items() if name != scene.background]
        frame = np.ones((64, 64), bool)
        frame[2:-2, 2:-2] = False
        pictures[number][frame] = others[number % len(others)]
    parsed = parse_batch(pictures, preset)
    assert [guess.facts() for guess in parsed] == [scene.facts() for scene in scenes]


def test_a_batch_is_read_as_its_pictures_are() -> None:
    pictures = pictures_of(scenes_of("dense", num_scenes=PICTURES_PER_PASS + 3))  # a whole pass and a part of one
    parsed = parse_batch(pictures, "dense")
    assert [guess.objects for guess in parsed] == [parse(picture, "dense").objects for picture in pictures]
    assert parse_batch(pictures[:0], "dense") == []


def test_bad_pictures_are_named() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"shape \(32, 32, 3\) cannot be parsed; expected \(64, 64, 3\)"):
        parse(picture[:32, :32])
    with pytest.raises(ValueError, match=r"shape \(1, 64, 64, 3\) .* expected \(64, 64, 3\).*`parse_batch`"):
        parse(picture[None])
    with pytest.raises(ValueError, match=r"shape \(2, 48, 64, 3\) cannot be parsed; expected \(2, 64, 64, 3\)"):
        parse_batch(np.zeros((2, 48, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"dtype float64 cannot be parsed; expected uint8"):
        parse(picture / 255)
    with pytest.raises(ValueError, match=r"preset 'sparse' is unknown; expected one of learnable, dense"):
        parse(picture, "sparse")
