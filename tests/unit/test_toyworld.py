"""Scenes, pictures and captions agree: splits never leak, shapes are smooth at any size, every word can be read back.

Run: pytest tests/unit/test_toyworld.py
"""

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmga.tokens import CLIP_WINDOW, clip_length, clip_positions
from llmga.toyworld import describe, render, sample_scene
from llmga.toyworld.describe import Caption
from llmga.toyworld.grammar import parse_caption, says
from llmga.toyworld.scene import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    PRESETS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    THEMES_BY_NAME,
    Obj,
    Scene,
    facts_from_list,
    facts_to_list,
    is_held_out,
    split_of,
)
from llmga.toyworld.wording import PLACES, WORDS, fill, value_of

PRESET = st.sampled_from(list(PRESETS))
STYLES = ("long", "medium", "brief")


def every_object() -> list[Obj]:
    """One object of each kind that can be drawn."""
    return [Obj(0, *values) for values in product(SHAPES, SIZES, COLOURS, TEXTURES)]


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Any scene at all, probable or not, held out or not."""
    preset = draw(PRESET)
    geometry = PRESETS[preset]
    cells = draw(st.sets(st.integers(0, geometry.grid**2 - 1), min_size=1, max_size=geometry.num_objects[1]))
    jitter = st.integers(-geometry.jitter, geometry.jitter)
    objects = tuple(
        Obj(cell, **{kind: draw(st.sampled_from(values)) for kind, values in ATTRIBUTES.items()}, dx=draw(jitter))
        for cell in sorted(cells)
    )
    return Scene(preset, draw(st.sampled_from(list(BACKGROUNDS))), objects, "harbour")


# ---------------------------------------------------------------- scenes


def test_splits_cover_their_seeds_without_overlap() -> None:
    seeds = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert all(before.stop <= after.start for before, after in pairwise(seeds))
    for name, seeds_of_split in SPLITS.items():
        assert split_of(seeds_of_split.start) == split_of(seeds_of_split.stop - 1) == name


@pytest.mark.parametrize("seed", [-1, 13_000_000])
def test_a_seed_outside_of_all_splits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed {seed} belongs to no split; expected 0 to 12999999"):
        sample_scene(seed)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="preset 'sparse' is unknown; expected one of learnable, dense"):
        sample_scene(0, "sparse")


@pytest.mark.parametrize("preset", PRESETS)
def test_only_composition_scenes_hold_the_held_out_combinations(preset: str) -> None:
    for name, seeds in SPLITS.items():
        drawn = [sample_scene(seeds.start + number, preset) for number in range(40)]
        assert [scene.has_held_out() for scene in drawn] == [name == "composition"] * 40


def test_every_value_is_met_outside_of_held_out_combinations() -> None:
    share = np.mean([is_held_out(obj) for obj in every_object()])
    assert 0.06 < share < 0.12
    seen = [obj for obj in every_object() if not is_held_out(obj)]
    pairs = {(obj.colour, obj.shape) for obj in seen}, {(obj.colour, obj.texture) for obj in seen}
    assert len(pairs[0]) == len(COLOURS) * len(SHAPES)
    assert len(pairs[1]) == len(COLOURS) * len(TEXTURES)


@pytest.mark.parametrize(("preset", "fewest", "most"), [("learnable", 2, 4), ("dense", 4, 8)])
def test_scenes_follow_their_theme(preset: str, fewest: int, most: int) -> None:
    drawn = [sample_scene(seed, preset) for seed in range(400)]
    assert {len(scene.objects) for scene in drawn} == set(range(fewest, most + 1))
    assert set(Counter(scene.theme for scene in drawn)) == set(THEMES_BY_NAME)
    themes = [THEMES_BY_NAME[scene.theme] for scene in drawn]
    usual = np.mean([scene.background == theme.background for scene, theme in zip(drawn, themes, strict=True)])
    assert 0.83 < usual < 0.93  # 85 % and one exception in six
    in_palette = [o.colour in theme.palette for scene, theme in zip(drawn, themes, strict=True) for o in scene.objects]
    assert 0.87 < np.mean(in_palette) < 0.95  # 85 % and three exceptions in eight, less what is held out


@given(scenes())
@settings(max_examples=30, deadline=None)
def test_scenes_survive_json(scene: Scene) -> None:
    assert Scene.from_dict(scene.to_dict()) == scene
    assert facts_from_list(facts_to_list(scene.facts())) == scene.facts()
    assert len(scene.facts()) == 1 + 4 * len(scene.objects)
    assert {obj.cell for obj in scene.objects}.isdisjoint(scene.empty_cells())


def test_scenes_of_a_seed_never_change() -> None:
    """Shipped models were trained on these; other scenes need another WORLD_SEED."""
    assert sample_scene(3).to_dict() == {
        "preset": "learnable",
        "background": "charcoal",
        "theme": "laboratory",
        "objects": [[0, "diamond", "small", "green", "dots", -1, 0], [2, "diamond", "small", "cyan", "plain", 0, 1]],
    }
    assert sample_scene(11_000_000, "dense").to_dict()["objects"][0] == [
        1,
        "diamond",
        "small",
        "green",
        "stripes",
        0,
        -1,
    ]


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [8, 33, 64, 100])
@pytest.mark.parametrize("preset", PRESETS)
def test_pictures_of_any_size_show_the_same_scene(preset: str, size: int) -> None:
    scene = sample_scene(11, preset)
    picture = render(scene, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    if size > 32:  # the frame is 2 px wide at 64
        assert tuple(picture[0, 0].tolist()) == BACKGROUNDS[scene.background]
    shrunk = render(scene, 4 * size).reshape(size, 4, size, 4, 3).mean(axis=(1, 3))
    assert abs(picture - shrunk).mean() < 4  # supersampled: close to the exact area


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be drawn at 7 px; expected at least 8"):
        render(sample_scene(0), 7)


@pytest.mark.parametrize("size", [48, 64, 150])
def test_slanted_and_round_edges_are_antialiased(size: int) -> None:
    scene = Scene(
        "learnable", "navy", (Obj(0, "circle", "large", "white", "plain"), Obj(3, "diamond", "large", "white", "plain"))
    )
    red = render(scene, size)[..., 0].astype(int)
    between = (red > BACKGROUNDS["navy"][0] + 20) & (red < COLOURS["white"][0] - 20)
    assert between.sum() > size  # a hard edge has none
    assert between.mean() < 0.1


def test_every_attribute_changes_the_picture() -> None:
    pictures = {render(Scene("learnable", "navy", (obj,))).tobytes() for obj in every_object()}
    assert len(pictures) == len(SHAPES) * len(SIZES) * len(COLOURS) * len(TEXTURES)


@pytest.mark.parametrize("preset", PRESETS)
def test_objects_stay_in_their_cells(preset: str) -> None:
    geometry = PRESETS[preset]
    for cell, dx, dy in product(range(geometry.grid**2), (-1, 1), (-1, 1)):
        largest = [Obj(cell, shape, "large", "white", "plain", dx, dy) for shape in SHAPES]
        for obj in largest:
            rows, columns = np.nonzero((render(Scene(preset, "navy", (obj,))) != BACKGROUNDS["navy"]).any(axis=2))
            row, column = divmod(cell, geometry.grid)
            top, left = geometry.frame + row * geometry.cell, geometry.frame + column * geometry.cell
            assert top - 1 <= rows.min() and rows.max() <= top + geometry.cell
            assert left - 1 <= columns.min() and columns.max() <= left + geometry.cell


# ---------------------------------------------------------------- captions


@given(scene=scenes(), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_long_captions_read_back_as_their_scene(scene: Scene, seed: int) -> None:
    caption = describe(scene, np.random.default_rng(seed))
    parsed = parse_caption(caption.text, scene.geometry.grid)
    assert parsed.problems == []
    assert says(parsed, scene)
    assert parsed.count == len(scene.objects)


@given(scene=scenes(), seed=st.integers(0, 2**32), style=st.sampled_from(STYLES))
@settings(max_examples=60, deadline=None)
def test_facts_are_where_the_caption_says_them(scene: Scene, seed: int, style: str) -> None:
    caption = describe(scene, np.random.default_rng(seed), style)  # type: ignore[arg-type]
    truth = scene.facts() | {("count", None): str(len(scene.objects))}
    assert caption.facts
    for fact in caption.facts:
        assert value_of(fact.kind, caption.text[fact.start : fact.end].lower()) == fact.value
        assert truth[fact.kind, fact.cell] == fact.value
    parsed = parse_caption(caption.text, scene.geometry.grid)
    assert parsed.facts().items() <= scene.facts().items()
    assert not [problem for problem in parsed.problems if "sentence" in problem]
    assert list(caption.positions) == sorted(caption.positions)


@pytest.mark.parametrize(("preset", "shortest", "longest"), [("learnable", 76, 200), ("dense", 130, 300)])
def test_long_captions_pass_the_clip_window(preset: str, shortest: int, longest: int) -> None:
    drawn = [sample_scene(seed, preset) for seed in range(150)]
    captions = [describe(scene, np.random.default_rng(seed)) for seed, scene in enumerate(drawn)]
    lengths = [clip_length(caption.text) for caption in captions]
    assert min(lengths) + 2 > CLIP_WINDOW
    assert shortest <= min(lengths) and max(lengths) <= longest
    late = [position > 75 for caption in captions for position in caption.positions]
    assert np.mean(late) > 0.2


def test_every_kind_of_fact_stands_early_and_late() -> None:
    positions: dict[str, list[int]] = {}
    for seed in range(300):
        caption = describe(sample_scene(seed), np.random.default_rng(seed))
        for fact, position in zip(caption.facts, caption.positions, strict=True):
            positions.setdefault(fact.kind, []).append(position)
    for kind in (*ATTRIBUTES, "background"):
        assert 0.15 < np.mean([position > 75 for position in positions[kind]]) < 0.85, kind
    assert max(positions["count"]) < 15


def test_brief_captions_hold_ten_tokens_and_four_facts() -> None:
    captions = [describe(sample_scene(seed), np.random.default_rng(seed), "brief") for seed in range(200)]
    lengths = [clip_length(caption.text) for caption in captions]
    assert 10 <= np.mean(lengths) <= 15 and max(lengths) <= 18
    assert {tuple(sorted(fact.kind for fact in caption.facts)) for caption in captions} == {
        ("background", "colour", "count", "shape")
    }


def test_medium_captions_of_the_learnable_world_fit_the_clip_window() -> None:
    captions = [describe(sample_scene(seed), np.random.default_rng(seed), "medium").text for seed in range(300)]
    assert max(map(clip_length, captions)) + 2 <= CLIP_WINDOW


def test_the_position_of_a_fact_is_that_of_its_last_word_piece() -> None:
    scene = Scene("learnable", "charcoal", (Obj(1, "plus", "small", "cyan", "checks"),))
    text = "A small checkered cyan cross in the top right. On charcoal."
    parsed = parse_caption(text)
    assert parsed.valid and says(parsed, scene)
    spans = [(text.index(word), text.index(word) + len(word)) for word in ("small", "checkered", "cyan", "charcoal")]
    # a 1, small 2, checkered 3 and 4, cyan 5 and 6, cross 7, in the top right 8 to 11, full stop 12, on 13, charcoal 14
    assert clip_positions(text, spans) == [2, 4, 6, 14]
    assert Caption(text, ()).positions == ()


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="style 'verbose' is unknown; expected long, medium or brief"):
        describe(sample_scene(0), np.random.default_rng(0), "verbose")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the caption is empty"),
        ("A small plain red square in the top left.", "no background is named"),
        ("On navy. A small plain red hexagon in the top left.", "not a sentence of this world: 'A small plain red hex"),
        ("On navy. A small plain red square in the centre.", "no such place here: 'centre'"),
        ("On navy. On olive.", "two different values for background: navy and olive"),
        ("On navy. Two shapes. A small plain red square in the top left.", "2 shapes are announced and 1 described"),
        (
            "On navy. A small plain red square in the top left. A small plain red circle in the top left.",
            "two shapes in the top left",
        ),
        ("On navy. A small plain red square in the top left", "the last sentence is not closed: 'A small plain red"),
        ("On navy.. A small plain red square in the top left.", "a full stop closes no sentence"),
        ("On navy. On navy. A small plain red square in the top left.", "said twice: 'On navy'"),
        (
            "One shapes on a navy background, one of them a red disc. A small plain red square in the top left.",
            "a shape is mentioned that is not described: shape circle, colour red",
        ),
        (
            "One shapes over navy, including a red disc. A navy background with one shapes, among them a red cross.",
            "1 shapes are announced and 2 mentioned",
        ),
    ],
)
def test_the_grammar_names_what_is_wrong(text: str, problem: str) -> None:
    parsed = parse_caption(text)
    assert not parsed.valid
    assert any(problem in found for found in parsed.problems), parsed.problems


def test_one_wrong_word_is_a_wrong_scene() -> None:
    scene = sample_scene(5)
    caption = describe(scene, np.random.default_rng(5))
    for fact in caption.facts:
        if fact.kind in ATTRIBUTES:
            other = next(words[0] for value, words in WORDS[fact.kind].items() if value != fact.value)
            parsed = parse_caption(caption.text[: fact.start] + other + caption.text[fact.end :])
            assert parsed.facts() != scene.facts()
            assert len(parsed.facts().items() - scene.facts().items()) == 1


def test_articles_follow_their_word() -> None:
    assert fill("A {colour} {shape}", {"colour": "orange", "shape": "disc"})[0] == "An orange disc"
    text, spans = fill("{Count} of a {colour} {shape}", {"count": "two", "colour": "red", "shape": "disc"})
    assert text == "Two of a red disc"
    assert [text[slice(*spans[slot])] for slot in ("count", "colour", "shape")] == ["Two", "red", "disc"]


def test_words_are_told_apart_and_places_named() -> None:
    for slot, values in WORDS.items():
        words = [word for said in values.values() for word in said]
        assert len(words) == len(set(words)), slot
    assert [len(PLACES[grid]) for grid in (2, 3)] == [4, 9]
