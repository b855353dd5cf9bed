"""Scores of written prompts: a perfect prompt scores full marks, and each kind of mistake costs what it should."""

import numpy as np
import pytest

from llmga.toyworld import describe, sample_scene
from llmga.toyworld.edits import KINDS, feasible_kinds, sample_edit
from llmga.toyworld.grammar import parse_caption
from llmga.toyworld.scene import Scene
from llmga.toyworld.scores import score_description, score_edit, score_refinement, score_short_description
from llmga.toyworld.visibility import visible_share


def caption(scene: Scene, style: str = "long", seed: int = 0) -> str:
    return describe(scene, np.random.default_rng(seed), style).text


def rate(pair: tuple[int, int]) -> float:
    return pair[0] / pair[1]


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_true_caption_scores_full_marks(seed: int) -> None:
    scene = sample_scene(seed)
    pairs = score_description(caption(scene), scene).pairs
    assert all(right == total for right, total in pairs.values())
    assert pairs["attributes"] == (1 + 4 * len(scene.objects),) * 2
    assert pairs["exact"] == (1, 1)


def test_one_wrong_colour_costs_one_attribute_and_the_exact_scene() -> None:
    scene = next(s for s in map(sample_scene, range(100)) if [o.colour for o in s.objects].count("red") == 1)
    text = caption(scene).replace(" red ", " blue ")
    pairs = score_description(text, scene).pairs
    total = pairs["attributes"][1]
    assert pairs["attributes"] == (total - 1, total)
    assert rate(pairs["attribute:colour"]) == 1 - 1 / len(scene.objects)
    assert pairs["exact"] == (0, 1)
    assert pairs["valid"] == (1, 1)


def test_missing_object_is_wrong_in_all_of_its_attributes_and_extra_ones_are_seen() -> None:
    scene = next(s for s in map(sample_scene, range(100)) if len(s.objects) == 3)
    fewer = scene.with_objects(scene.objects[:2])
    missing = score_description(caption(fewer), scene).pairs
    assert missing["attributes"] == (1 + 8, 1 + 12)
    extra = score_description(caption(scene), fewer).pairs
    assert extra["attributes"] == (9, 9)
    assert extra["no_extra"] == (1, 2)
    assert extra["exact"] == (0, 1)


def test_hidden_objects_are_not_asked_for_and_imagined_ones_in_holes_are_not_extra() -> None:
    scene = next(s for s in map(sample_scene, range(100)) if s.object_at(0) and s.object_at(3))
    hole = np.zeros((64, 64), np.uint8)
    hole[:32, :32] = 1
    assert visible_share(scene, 0, hole) < 0.1
    assert visible_share(scene, 3, hole) == 1
    rest = scene.with_objects([obj for obj in scene.objects if obj.cell != 0])
    pairs = score_description(caption(rest), scene, hole).pairs
    assert pairs["attributes"] == (1 + 4 * len(rest.objects),) * 2
    assert "exact" not in pairs


@pytest.mark.parametrize("kind", KINDS)
def test_edit_scores_tell_copying_from_editing(kind: str) -> None:
    scene = next(s for s in map(sample_scene, range(100)) if kind in feasible_kinds(s) and len(s.objects) == 3)
    edit = sample_edit(scene, np.random.default_rng(1), kind)
    done = score_edit(caption(edit.target), edit).pairs
    assert done["requested"] == done["joint"] == (1, 1)
    assert rate(done["preserved"]) == 1
    copied = score_edit(caption(scene), edit).pairs
    assert copied["requested"] == copied["joint"] == (0, 1)
    assert rate(copied["preserved"]) == 1


@pytest.mark.parametrize("kind", ["remove", "move", "recolour"])
def test_silence_about_a_cell_is_no_claim_that_it_is_empty(kind: str) -> None:
    scene = next(s for s in map(sample_scene, range(100)) if kind in feasible_kinds(s) and len(s.objects) == 3)
    edit = sample_edit(scene, np.random.default_rng(1), kind)
    for text in ("", f"On {edit.target.background}."):
        pairs = score_edit(text, edit).pairs
        assert pairs["requested"] == pairs["joint"] == pairs["valid"] == (0, 1)
        assert pairs["preserved"][0] == bool(text)  # the background, and no empty cell
        assert score_description(text, scene).pairs["no_extra"] == (0, 1)


def test_a_brief_caption_is_no_valid_prompt() -> None:
    brief = caption(sample_scene(3), "brief")
    assert parse_caption(brief).valid
    assert score_refinement(brief, brief, 2).pairs["valid"] == (0, 1)


@pytest.mark.parametrize("sentence", [0, 1, -1])
def test_a_loop_or_a_cut_is_not_valid(sentence: int) -> None:
    scene = sample_scene(3)
    text = caption(scene)
    again = text.removesuffix(".").split(". ")[sentence]
    assert score_description(text, scene).pairs["valid"] == (1, 1)
    assert score_description(f"{text} {again}.", scene).pairs["valid"] == (0, 1)
    assert score_description(text[:-1], scene).pairs["valid"] == (0, 1)


def test_refinement_keeps_constraints_and_may_imagine_the_rest() -> None:
    scene = sample_scene(3)
    brief = caption(scene, "brief")
    assert score_refinement(caption(scene), brief, 2).pairs["kept"] == (1, 1)
    other = next(s for s in map(sample_scene, range(4, 100)) if s.background != scene.background)
    pairs = score_refinement(caption(other), brief, 2).pairs
    assert pairs["kept"] == (0, 1)
    assert rate(pairs["constraints"]) < 1


def test_imagined_details_are_those_of_a_theme_more_often_where_they_follow_the_prior() -> None:
    scenes = [sample_scene(seed) for seed in range(300)]

    def themed(shown: list[Scene]) -> float:  # what the brief leaves open, imagined as in `shown`
        briefs = [caption(scene, "brief") for scene in scenes]
        pairs = [
            score_refinement(caption(own), brief, 2).pairs["themed"] for own, brief in zip(shown, briefs, strict=True)
        ]
        return sum(right for right, _ in pairs) / sum(total for _, total in pairs)

    assert 0.8 < themed(scenes) < 0.95
    assert themed(scenes[1:] + scenes[:1]) < themed(scenes) - 0.15


def test_what_the_brief_asks_for_is_not_imagined() -> None:
    brief = "Two shapes over navy, including a pink circle."
    prompt = "On navy. Top left small dotted pink circle. Top right large plain blue circle."
    assert score_refinement(prompt, brief, 2).pairs["themed"] == (3, 3)  # night sky; pink is asked for
    other = prompt.replace("plain blue", "checkered green")
    assert score_refinement(other, brief, 2).pairs["themed"] == (1, 3)
    assert score_refinement("", brief, 2).pairs["themed"] == (0, 0)


@pytest.mark.parametrize("style", ["brief", "medium"])
def test_short_descriptions_may_leave_out_and_say_nothing_false(style: str) -> None:
    scenes = [sample_scene(seed) for seed in range(100)]
    for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        own = score_short_description(caption(scene, style), scene).pairs
        assert own["valid"] == own["all_true"] == (1, 1) and own["true_facts"] == own["facts_said"][:1] * 2
        wrong = score_short_description(caption(other, style), scene).pairs
        assert wrong["valid"] == (1, 1) and wrong["all_true"][0] == (wrong["true_facts"][0] == wrong["true_facts"][1])


@pytest.mark.parametrize("text", ["", "Shapes.", "On navy", "On navy. On navy.", "Two shapes. Three shapes."])
def test_no_facts_or_broken_ones_are_no_description(text: str) -> None:
    scene = next(s for s in map(sample_scene, range(100)) if s.background == "navy" and len(s.objects) == 2)
    assert score_short_description(text, scene).pairs["all_true"] == (0, 1)
    assert score_short_description("Two shapes.", scene).pairs["all_true"] == (1, 1)
    assert score_short_description("Three shapes.", scene).pairs["true_facts"] == (0, 1)


@pytest.mark.parametrize("text", ["", "A nice picture.", "Large large large red. Blue", "<gen_img>"])
def test_babble_is_not_valid_and_knows_no_facts(text: str) -> None:
    pairs = score_description(text, sample_scene(5)).pairs
    assert pairs["valid"] == (0, 1)
    assert pairs["attributes"][0] == 0
