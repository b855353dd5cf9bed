"""Guards sampling: pictures that depend on nothing but their recipe, canvases that keep what they should.

Run: pytest tests/integration/test_stage2_sample.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler
from PIL import Image, PngImagePlugin

from llmga.prompt_chunks import PromptError
from llmga.stage2.canvas import (
    CanvasError,
    extended_canvas,
    fit_canvas,
    margins_in_pixels,
    masked_canvas,
    paste_back,
    working_size,
)
from llmga.stage2.pipelines import PipelineError
from llmga.stage2.prompt_layout import prompt_layout, save_layout, stamp_layout
from llmga.stage2.recipe import RecipeError, read_recipe
from llmga.stage2.sample import SampleError, Sampler, Settings
from llmga.stage2.schedulers import SCHEDULERS, SchedulerError, scheduler_by_name
from tests.toy_diffusion import toy_sd_pipeline, toy_sdxl_pipeline

LONG = " ".join(["cat", "dog", "sun", "red", "sea", "tree", "lamp"][number % 7] for number in range(110))
MAKERS = {"sd": toy_sd_pipeline, "sdxl": toy_sdxl_pipeline}
INPAINT = {"sd": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"}
QUICK = Settings(steps=2)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def left_half(width: int, height: int) -> Image.Image:
    """A mask whose left half is white."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference between two pictures, in grey levels."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("layout", ["masked", "published"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(kind: str, layout: str) -> None:
    pipeline = MAKERS[kind]()
    stamp_layout(pipeline.unet, prompt_layout(layout))
    sampler = Sampler(pipeline)
    prompts, seeds = ["a red boat", LONG, "two cats", ""], [5, 6, 7, 8]
    together = sampler.text_to_image(prompts, "fog", seeds, Settings(steps=2, batch_size=4))
    for number, prompt in enumerate(prompts):
        [alone] = sampler.text_to_image(prompt, "fog", seeds[number], Settings(steps=2, batch_size=1))
        assert apart(alone.picture, together[number].picture) <= 1
    [other] = sampler.text_to_image(prompts[0], "fog", 9, QUICK)
    assert apart(other.picture, together[0].picture) > 20
    assert together[1].recipe.layout == layout and together[0].picture.size == (16, 16)


def test_one_seed_counts_on() -> None:
    sampler = Sampler(toy_sd_pipeline())
    painted = sampler.text_to_image(["a", "a", "a"], seed=3, settings=QUICK)
    assert [one.recipe.seed for one in painted] == [3, 4, 5]
    assert apart(painted[0].picture, painted[1].picture) > 20


def test_a_negative_and_late_words_change_the_picture_and_guidance_1_needs_no_negative() -> None:
    sampler = Sampler(toy_sd_pipeline())
    pictures = [
        sampler.text_to_image(prompt, negative, 1, Settings(steps=2, guidance_scale=scale))[0].picture
        for prompt, negative, scale in [
            (LONG, None, 7.5), (LONG, "fog " * 90, 7.5), (LONG + " moon", None, 7.5),
            (LONG, None, 1.0), (LONG, "x", 1.0),
        ]
    ]  # fmt: skip
    assert apart(pictures[0], pictures[1]) > 0 and apart(pictures[0], pictures[2]) > 0
    assert apart(pictures[3], pictures[4]) == 0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_keeps_what_the_model_predicts(name: str) -> None:
    own = DDIMScheduler(prediction_type="v_prediction", beta_start=0.0007)
    scheduler = scheduler_by_name(name, own)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.beta_start == own.config.beta_start


def test_a_picture_is_painted_by_the_scheduler_that_is_named_and_the_pipelines_own_is_back_afterwards() -> None:
    sampler = Sampler(toy_sd_pipeline())
    [first] = sampler.text_to_image("a boat", settings=QUICK)
    [euler] = sampler.text_to_image("a boat", settings=Settings(steps=2, scheduler="euler"))
    [again] = sampler.text_to_image("a boat", settings=QUICK)
    assert apart(first.picture, euler.picture) > 0 and apart(first.picture, again.picture) == 0
    assert (euler.recipe.scheduler, again.recipe.scheduler) == ("euler", "DDIMScheduler")


# ---------------------------------------------------------------- completing pictures


@pytest.mark.parametrize("channels", [9, 4])
@pytest.mark.parametrize("kind", MAKERS)
def test_inpainting_pastes_kept_pixels_back_bit_for_bit(kind: str, channels: int) -> None:
    sampler = Sampler(MAKERS[kind](INPAINT[kind], in_channels=channels))
    picture, mask = noise(40, 24), left_half(40, 24)
    [painted] = sampler.inpaint(LONG, picture, mask, settings=Settings(steps=2, paste="exact"))
    new, old = np.asarray(painted.picture), np.asarray(picture)
    assert np.array_equal(new[:, 20:], old[:, 20:]) and not np.array_equal(new[:, :20], old[:, :20])
    assert painted.canvas is not None and painted.canvas.hole.sum() == 20 * 24
    [raw] = sampler.inpaint(LONG, picture, mask, settings=QUICK)
    assert raw.picture.size == (32, 16) if kind == "sdxl" else raw.picture.size == (26, 16)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_text_to_image_pipeline_completes_pictures_too_and_stays_what_it_is(kind: str) -> None:
    pipeline = MAKERS[kind]()
    sampler = Sampler(pipeline)
    [before] = sampler.text_to_image("a boat", settings=QUICK)
    [painted] = sampler.inpaint("a boat", noise(16, 16), left_half(16, 16), settings=Settings(steps=2, paste="exact"))
    assert np.array_equal(np.asarray(painted.picture)[:, 8:], np.asarray(noise(16, 16))[:, 8:])
    [after] = sampler.text_to_image("a boat", settings=QUICK)
    assert apart(before.picture, after.picture) == 0 and sampler.pipeline is pipeline


def test_what_the_mask_hides_does_not_leak() -> None:
    sampler = Sampler(toy_sd_pipeline(INPAINT["sd"], in_channels=9))
    picture, mask = noise(16, 16), left_half(16, 16)
    other = picture.copy()
    other.paste((255, 0, 0), (0, 0, 8, 16))
    painted = [sampler.inpaint("a boat", one, mask, seed=4, settings=QUICK)[0].picture for one in (picture, other)]
    assert apart(*painted) == 0


def test_outpainting_grows_the_canvas_on_every_side_and_keeps_the_picture() -> None:
    sampler = Sampler(toy_sd_pipeline(INPAINT["sd"], in_channels=9))
    picture = noise(24, 20)
    [painted] = sampler.outpaint(
        "a sea", picture, (0.5, 3, 0, 8), settings=Settings(steps=2, paste="exact", overlap_px=2)
    )
    assert painted.picture.size == (24 + 12, 20 + 3 + 8)
    assert np.array_equal(np.asarray(painted.picture)[3:23, 12:36], np.asarray(picture))
    assert painted.recipe.margins == [12, 3, 0, 8] and painted.recipe.task == "outpainting"


def test_several_pictures_of_several_sizes_in_one_call() -> None:
    sampler = Sampler(toy_sd_pipeline(INPAINT["sd"], in_channels=9))
    pictures, masks = (
        [noise(16, 16), noise(48, 16), noise(9, 7)],
        [left_half(16, 16), left_half(48, 16), left_half(9, 7)],
    )
    painted = sampler.inpaint(["a", LONG, "c"], pictures, masks, seed=1, settings=QUICK)
    assert [one.picture.size for one in painted] == [(16, 16), (48, 16), (20, 16)]
    [alone] = sampler.inpaint(LONG, pictures[1], masks[1], seed=2, settings=QUICK)
    assert apart(alone.picture, painted[1].picture) <= 1


def test_a_full_mask_paints_everything() -> None:
    sampler = Sampler(toy_sd_pipeline(INPAINT["sd"], in_channels=9))
    [painted] = sampler.inpaint("a", noise(16, 16), np.ones((16, 16), bool), settings=Settings(steps=2, paste="exact"))
    assert not painted.canvas.kept.any() and apart(painted.picture, noise(16, 16)) > 0


# ---------------------------------------------------------------- canvases


@pytest.mark.parametrize(
    "mask",
    [
        left_half(8, 6), left_half(8, 6).convert("RGB"), left_half(8, 6).convert("1"), left_half(16, 12),
        np.asarray(left_half(8, 6)) > 0, (np.asarray(left_half(8, 6)) > 0).astype(np.uint8),
        (np.asarray(left_half(8, 6)) / 255)[..., None],
    ],
    ids=["L", "RGB", "1", "larger", "bool", "0 and 1", "float"],
)  # fmt: skip
def test_masks_of_every_kind_mean_the_same(mask: Any) -> None:
    hole = masked_canvas(noise(8, 6), mask).hole
    assert hole.dtype == np.uint8 and np.array_equal(hole, np.tile([1, 1, 1, 1, 0, 0, 0, 0], (6, 1)))


def test_grey_means_generate_from_125_on() -> None:
    mask = np.array([[0, 124, 125, 255]], np.uint8).repeat(2, axis=0)
    assert masked_canvas(noise(4, 2), mask).hole[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((6, 8), np.uint8), "the mask hides nothing: expected white"),
        (left_half(6, 6), "the mask is 6 x 6 and the picture 8 x 6; expected the same size"),
        (np.full((6, 8), 2.0), "the mask holds 2.0 to 2.0, expected 0 to 1"),
        (np.zeros((6, 8, 3, 1), np.uint8), r"the mask has shape \(6, 8, 3, 1\)"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(mask: Any, message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        masked_canvas(noise(8, 6), mask)


@pytest.mark.parametrize(
    ("margins", "message"),
    [
        ((1, 2, 3), "found 3 margins, expected 4: left, top, right, bottom"),
        ((0, 0, 0, 0), "all margins are 0"),
        ((-1, 0, 0, 0), "margins are -1, 0, 0, 0; expected none below 0"),
        ((float("nan"), 0, 0, 1), "expected none below 0"),
    ],
)
def test_margins_that_cannot_be_meant_are_refused(margins: Any, message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        margins_in_pixels((10, 10), margins)


def test_an_overlap_paints_a_border_of_the_picture_anew_on_growing_sides_only() -> None:
    canvas = extended_canvas(noise(10, 8), (4, 0, 0, 2), overlap_px=3)
    assert canvas.size == (14, 10)
    assert canvas.hole[0].tolist() == [1] * 7 + [0] * 7 and canvas.hole[:, 13].tolist() == [0] * 5 + [1] * 5
    assert canvas.kept.sum() == 80
    with pytest.raises(CanvasError, match="an overlap of 9 px leaves nothing of a picture of 10 x 8"):
        extended_canvas(noise(10, 8), (4, 0, 0, 2), overlap_px=9)


def test_feathering_fades_beside_the_hole_and_keeps_the_rest_bit_for_bit() -> None:
    picture = Image.new("RGB", (40, 4), (10, 20, 30))
    canvas = masked_canvas(picture, left_half(40, 4))
    row = np.asarray(paste_back(Image.new("RGB", (40, 4), (210, 220, 230)), canvas, "feather", 8))[2, :, 0]
    assert (row[:20] == 210).all() and (row[28:] == 10).all()
    assert (np.diff(row[19:29].astype(int)) <= 0).all() and 10 < row[22] < 210
    hard = np.asarray(paste_back(Image.new("RGB", (40, 4), (210, 220, 230)), canvas, "exact"))[2, :, 0]
    assert hard.tolist() == [210] * 20 + [10] * 20


def test_sizes_keep_the_shape_and_round_to_whole_multiples() -> None:
    assert working_size((1000, 500), 512, 8) == (1024, 512)
    assert working_size((30, 40), 512, 64) == (512, 704)
    picture, mask = fit_canvas(masked_canvas(noise(10, 10), np.eye(10, dtype=bool)), (40, 20))
    assert picture.size == mask.size == (40, 20) and set(np.unique(mask)) == {0, 255}


# ---------------------------------------------------------------- recipes


def saved(folder: Path) -> Path:
    """The folder of a saved pipeline in the published layout."""
    toy_sd_pipeline().save_pretrained(folder)
    save_layout(folder, prompt_layout("published", 3))
    return folder


def test_a_picture_can_be_painted_again_from_its_own_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    sampler = Sampler.load(folder, device="cpu")
    assert sampler.encoder.layout == prompt_layout("published", 3)
    settings = Settings(steps=3, guidance_scale=4.0, scheduler="dpm++", width=24, height=16)
    [painted] = sampler.text_to_image(f'{LONG} \N{SNOWMAN} "quoted"', "fog", 11, settings)
    painted.save(tmp_path / "a.png")
    recipe = read_recipe(tmp_path / "a.png")
    assert recipe == painted.recipe and recipe.model == str(folder) and len(recipe.model_hash) == 16
    again = Sampler.load(folder, device="cpu").repeat(recipe)
    assert apart(again.picture, Image.open(tmp_path / "a.png")) == 0 and again.recipe == recipe


def test_a_completed_picture_can_be_painted_again_unless_its_picture_changed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    toy_sd_pipeline(INPAINT["sd"], in_channels=9).save_pretrained(folder)
    noise(20, 20).save(tmp_path / "in.png")
    left_half(20, 20).save(tmp_path / "mask.png")
    sampler = Sampler.load(folder, device="cpu")
    settings = Settings(steps=2, paste="feather", feather_px=4, overlap_px=2)
    for number, painted in enumerate(
        sampler.inpaint("a", tmp_path / "in.png", tmp_path / "mask.png", settings=settings)
        + sampler.outpaint("a", tmp_path / "in.png", (0, 0, 6, 0), settings=settings)
    ):
        painted.save(tmp_path / f"{number}.png")
        again = sampler.repeat(read_recipe(tmp_path / f"{number}.png"))
        assert apart(again.picture, painted.picture) == 0 and again.recipe == painted.recipe
    noise(20, 20, seed=1).save(tmp_path / "in.png")
    with pytest.raises(RecipeError, match=r"the recipe's picture .*in\.png has changed since"):
        sampler.repeat(read_recipe(tmp_path / "0.png"))
    [unnamed] = sampler.inpaint("a", noise(20, 20), tmp_path / "mask.png", settings=settings)
    with pytest.raises(RecipeError, match="the recipe's picture was no file"):
        sampler.repeat(unnamed.recipe)


def test_recipes_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    sampler = Sampler(toy_sd_pipeline(), "here", "0" * 16)
    [painted] = sampler.text_to_image("a", settings=QUICK)
    with pytest.raises(RecipeError, match="would be no PNG"):
        painted.save(tmp_path / "a.jpg")
    with pytest.raises(RecipeError, match="made with weights 0000000000000000 of here, found 1111"):
        Sampler(toy_sd_pipeline(), "there", "1" * 16).repeat(painted.recipe)
    noise(4, 4).save(tmp_path / "plain.png")
    with pytest.raises(RecipeError, match="carries no recipe"):
        read_recipe(tmp_path / "plain.png")
    with pytest.raises(RecipeError, match="does not exist"):
        read_recipe(tmp_path / "absent.png")
    for text, message in (("{", "is damaged"), (json.dumps({"recipe": 9}), "has version 9, this code reads version 1"),
                          (json.dumps({"recipe": 1, "task": "x"}), "is incomplete"),
                          (json.dumps({"recipe": 1, "colour": "x"}), "has the unknown keys colour")):  # fmt: skip
        info = PngImagePlugin.PngInfo()
        info.add_text("llmga", text)
        noise(4, 4).save(tmp_path / "odd.png", pnginfo=info)
        with pytest.raises(RecipeError, match=message):
            read_recipe(tmp_path / "odd.png")


# ---------------------------------------------------------------- the command


def run_sample(*arguments: str) -> Any:
    """`llmga sample` in this process."""
    from typer.testing import CliRunner

    from llmga.cli import app

    return CliRunner().invoke(app, ["sample", *arguments])


def test_the_command_paints_files_of_its_own_and_one_of_them_again(tmp_path: Path) -> None:
    folder, out = saved(tmp_path / "model"), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a boat\n\ntwo cats\n")
    arguments = [
        "--model",
        str(folder),
        "--out",
        str(out),
        "--steps",
        "2",
        "--prompts-file",
        str(tmp_path / "prompts.txt"),
    ]
    told = run_sample("a sun", *arguments, "--seed", "3")
    assert told.exit_code == 0, told.output
    names = ["00000-seed3.png", "00001-seed4.png", "00002-seed5.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert read_recipe(out / names[2]).prompt == "two cats"
    told = run_sample("--recipe", str(out / names[1]), "--out", str(out))
    assert told.exit_code == 0 and told.stdout.strip() == str(out / "00003-seed4.png")
    assert apart(Image.open(out / names[1]), Image.open(out / "00003-seed4.png")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to paint"),
        (["a"], "no model is named"),
        (["a", "--model", "x", "--mask", "m", "--extend", "1,1,1,1"], "found --mask and --extend, expected one"),
        (["a", "--model", "x", "--picture", "p"], "found --picture alone"),
        (["a", "--model", "x", "--mask", "m"], "found --mask or --extend alone"),
        (
            ["a", "--model", "x", "--picture", "p", "--extend", "a,b"],
            "--extend is 'a,b', expected left,top,right,bottom",
        ),
        (["--prompts-file", "absent.txt"], "--prompts-file: absent.txt does not exist"),
        (["a", "--model", "absent"], "absent does not exist; expected the folder of a diffusers pipeline"),
    ],
)
def test_what_is_typed_wrong_is_told_in_one_sentence(arguments: list[str], message: str) -> None:
    told = run_sample(*arguments)
    assert told.exit_code == 2 and message in " ".join(told.output.split())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.text_to_image([]), PromptError, "there is no prompt"),
        (lambda s: s.text_to_image([3], settings=QUICK), PromptError, "prompt 0"),
        (lambda s: s.text_to_image(["a", "b"], ["c"]), SampleError, "there are 1 negative prompts for 2 prompts"),
        (lambda s: s.text_to_image(["a", "b"], seed=[1]), SampleError, "there are 1 seeds for 2 prompts"),
        (lambda s: s.text_to_image("a", seed=-1), SampleError, "seed -1 is out of range"),
        (lambda s: s.text_to_image("a", settings=Settings(width=15)), SampleError, "width is 15, expected a multiple"),
        (lambda s: s.text_to_image("a", settings=Settings(scheduler="eulr")), SchedulerError, "did you mean 'euler'"),
        (lambda s: s.inpaint(["a", "b"], [noise(4, 4)], left_half(4, 4)), SampleError, "1 pictures for 2 prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_painted_is_refused_in_one_sentence(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(Sampler(toy_sd_pipeline()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"strength": 1.5}, "strength is 1.5"),
        ({"paste": "soft"}, "paste is 'soft', expected one of none, exact, feather"),
        ({"feather_px": -1}, "feather_px is -1"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        Settings(**changes)


def test_models_that_cannot_paint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="does not exist; expected the folder of a diffusers pipeline"):
        Sampler.load(tmp_path / "absent")
    with pytest.raises(PipelineError, match=r"has no model_index\.json"):
        Sampler.load(tmp_path)
    with pytest.raises(PipelineError, match="9 input channels, so it was trained for inpainting"):
        Sampler(toy_sd_pipeline(INPAINT["sd"], in_channels=9)).text_to_image("a", settings=QUICK)
    folder = saved(tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "moved")
    with pytest.raises(PipelineError, match="cannot be loaded"):
        Sampler.load(folder)
