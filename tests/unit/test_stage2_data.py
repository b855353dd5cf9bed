"""Pictures, masks and prompts become examples: crops and their numbers, buckets, dropout, and nothing but the seed.

The published code told mirrored pictures a left that was never meant, and rounded it in bf16.
Run: pytest tests/unit/test_stage2_data.py
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llmga.config import ConfigError, load_config
from llmga.records import Record, write_manifest
from llmga.stage2.buckets import bucket_table
from llmga.stage2.config import MaskConfig, Stage2Config
from llmga.stage2.data import LatentShape, Stage2Collator, Stage2Dataset, mask_mixture, sizes_of, training_order
from llmga.stage2.pixels import Crop, bucket_sizes, crop_picture, group_by_bucket, nearest_bucket, to_unit_range
from llmga.stage2.prompt_batch import UNCONDITIONAL, PromptTokenizer
from llmga.stage2.prompt_layout import prompt_layout
from llmga.stage2.sources import Stage2DataError, open_sources
from llmga.tokens import clip_tokenizer

SHAPE = LatentShape(channels=4, factor=2, num_timesteps=1000)


def columns(width: int, height: int) -> Image.Image:
    """A picture whose red channel counts its columns and whose green counts its rows."""
    grid = np.zeros((height, width, 3), np.uint8)
    grid[..., 0], grid[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(grid)


def test_a_square_is_cut_from_the_middle_and_the_time_ids_say_where() -> None:
    cut, time_ids = crop_picture(columns(64, 32), Crop((32, 32)))
    assert cut[0, :, 0].tolist() == list(range(16, 48)) and cut[:, 0, 1].tolist() == list(range(32))
    assert time_ids.tolist() == [32, 64, 0, 16, 32, 32] and time_ids.dtype == np.float32
    cut, time_ids = crop_picture(columns(64, 32), Crop((16, 16), (0.5, 0.25)))  # scaled to 32 x 16
    assert time_ids.tolist() == [32, 64, 0, 4, 16, 16]


def test_a_mirrored_cut_is_told_its_place_in_the_mirrored_picture() -> None:
    crop = Crop((32, 32), (0.0, 0.25), flipped=True)
    cut, time_ids = crop_picture(columns(64, 32), crop)
    mirrored = columns(64, 32).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    plain, plain_ids = crop_picture(mirrored, Crop((32, 32), (0.0, 0.25)))
    assert np.array_equal(cut, plain) and time_ids.tolist() == plain_ids.tolist() == [32, 64, 0, 8, 32, 32]
    assert cut[0, :3, 0].tolist() == [55, 54, 53]


def test_a_small_picture_is_enlarged_and_values_run_from_minus_one_to_one() -> None:
    cut, time_ids = crop_picture(columns(5, 9), Crop((32, 32)))
    assert cut.shape == (32, 32, 3) and time_ids[:2].tolist() == [9, 5] and time_ids[2] == 13
    pixels = to_unit_range(np.array([[[0, 255, 51]]], np.uint8))
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6]) and pixels.dtype == np.float32


def test_buckets_have_the_area_and_aspect_that_was_asked() -> None:
    sizes = bucket_sizes(512, 64, 2.0)
    assert sizes[0] == (512, 512) and len(set(sizes)) == len(sizes)
    assert {(h, w) for h, w in sizes} == {(w, h) for h, w in sizes} and (384, 704) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and max(height, width) <= 2 * min(height, width)
        assert 0.8 < height * width / 512**2 < 1.25
    assert sizes[nearest_bucket(1000, 1000, sizes)] == (512, 512)
    assert sizes[nearest_bucket(400, 700, sizes)] == (384, 704)


def test_regrouping_keeps_steps_of_one_bucket_and_draws_nothing_twice() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.choice(3, 400, p=[0.7, 0.2, 0.1]).tolist()
    steps = list(group_by_bucket(iter(drawn), 4, 60))
    assert len(steps) == 60 and all(len({drawn[position] for position in step}) == 1 for step in steps)
    positions = [position for step in steps for position in step]
    assert len(set(positions)) == 240 and max(positions) < 240 + 4 * 2  # at most a part of the other buckets waits
    assert steps[:30] == list(group_by_bucket(iter(drawn), 4, 30))


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """Makes settings over eight rows with pictures of two shapes."""
    for i in range(8):
        columns(40, 20 if i % 2 else 40).save(tmp_path / f"{i}.png")
    texts = ["a red thing", "the thing on the left"]
    rows = [
        Record(f"r{i}", "similar_image", image=f"{i}.png", prompt=f"{texts[i % 2]} {i}", short_caption=f"short {i}")
        for i in range(8)
    ]
    write_manifest(tmp_path / "rows.jsonl", rows)

    def build(*overrides: str) -> Stage2Config:
        base = (
            f"model.path={tmp_path}", f"run.output_dir={tmp_path / 'run'}",
            f"data.sources=[{{path: {tmp_path / 'rows.jsonl'}}}]",
            "data.resolution=32", "run.max_steps=4",
        )  # fmt: skip
        return load_config(Stage2Config, None, (*base, *overrides), check_machine=False)

    return build


def dataset(cfg: Stage2Config, total_steps: int = 200, per_step: int = 4, **options: Any) -> Stage2Dataset:
    sources = open_sources(cfg.data.sources, "data.sources")
    order, positions = training_order(cfg, sources, total_steps, per_step, options.get("buckets"))
    return Stage2Dataset(cfg, sources, order, SHAPE, cfg.run.seed, positions=positions, **options)


def test_an_example_is_a_function_of_seed_and_index(settings: Any) -> None:
    one, again, other = dataset(settings())[5], dataset(settings())[5], dataset(settings("run.seed=1"))[5]
    assert one.keys() == again.keys() and all(np.array_equal(one[key], again[key]) for key in one)
    assert not np.array_equal(one["noise"], other["noise"])
    assert one["noise"].shape == (4, 16, 16) and one["pixels"].shape == (32, 32, 3)


def test_prompts_are_dropped_and_shortened_as_often_as_asked_and_sides_never_mirrored(settings: Any) -> None:
    cfg = settings("data.prompt_dropout=0.2", "data.short_caption_share=0.3", "data.flip_share=0.5")
    examples = [dataset(cfg)[i] for i in range(400)]
    kinds = Counter(
        "none" if e["prompt"] is UNCONDITIONAL else "short" if e["prompt"].startswith("short") else "long"
        for e in examples
    )
    assert kinds["none"] == pytest.approx(80, abs=25) and kinds["short"] == pytest.approx(120, abs=30)
    mirrored = [e["pixels"][0, 0, 0] > e["pixels"][0, -1, 0] for e in examples]
    sided = [int(e["sample_id"][1:]) % 2 == 1 for e in examples]
    assert not any(flip for flip, side in zip(mirrored, sided, strict=True) if side)
    assert np.mean([flip for flip, side in zip(mirrored, sided, strict=True) if not side]) == pytest.approx(
        0.5, abs=0.12
    )
    assert {e["timestep"] // 100 for e in examples} == set(range(10))


def test_buckets_keep_shapes_and_every_step_has_one(settings: Any) -> None:
    cfg = settings("data.aspect_buckets=true", "data.bucket_step=8")
    sources = open_sources(cfg.data.sources, "data.sources")
    table = bucket_table(sources[0], sizes_of(cfg))
    assert [sizes_of(cfg)[k] for k in table[:4]] == [(32, 32), (24, 48)] * 2
    examples = dataset(cfg, 20, 4, buckets=[table])
    for step in range(20):
        shapes = {examples[4 * step + place]["pixels"].shape for place in range(4)}
        assert len(shapes) == 1


def test_inpainting_masks_follow_the_settings_and_blank_ones_need_no_picture(settings: Any) -> None:
    cfg = settings("task=inpainting", "data.masks.blank_share=0.25")
    examples = [dataset(cfg)[i] for i in range(300)]
    blank = np.mean([example["mask"].all() for example in examples])
    assert blank == pytest.approx(0.25, abs=0.08)
    collate = Stage2Collator(PromptTokenizer([clip_tokenizer()], prompt_layout()))
    batch = collate(examples[:16])
    rows = batch["hidden_rows"].tolist()
    assert rows == [row for row in range(16) if not batch["mask"][row].all()] and len(rows) < 16
    for place, row in enumerate(rows):
        kept = batch["mask"][row, 0] == 0
        assert torch.equal(batch["hidden_pixels"][place][:, kept], batch["pixels"][row][:, kept])
        assert batch["hidden_pixels"][place][:, ~kept].abs().max() == 0
    assert batch["noise"].shape == (16, 4, 16, 16) and batch["time_ids"].dtype == torch.float32
    all_blank = collate([example for example in examples if example["mask"].all()][:2])
    assert all_blank["hidden_pixels"].shape == (0, 3, 32, 32)


def test_the_default_masks_are_the_published_mixture() -> None:
    from llmga.masks import STAGE2

    weights = [weight for weight, _ in mask_mixture(MaskConfig()).parts]
    assert weights == pytest.approx([weight for weight, _ in STAGE2.parts])
    assert [part for _, part in mask_mixture(MaskConfig()).parts] == [part for _, part in STAGE2.parts]


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (10, 200)])
def test_recorded_masks_of_any_size_and_mode_are_read(settings: Any, tmp_path: Path, values: tuple[int, int]) -> None:
    grey = np.full((80, 80), values[0], np.uint8)
    grey[:, :40] = values[1]
    Image.fromarray(grey).convert("RGB").save(tmp_path / "mask.png")
    write_manifest(
        tmp_path / "rows.jsonl", [Record("r", "inpainting", image="0.png", mask="mask.png", prompt="a", caption="a")]
    )
    cfg = settings("task=inpainting", "data.masks.use_recorded=true", "data.flip_share=0")
    mask = dataset(cfg)[0]["mask"]
    assert mask.shape == (32, 32) and mask[:, :16].all() and not mask[:, 16:].any()


def test_settings_that_do_not_fit_are_told_together(settings: Any) -> None:
    with pytest.raises(ConfigError) as told:
        settings("data.prompt_dropout=0.8", "data.short_caption_share=0.4", "cache.crops=3", "run.eval_every_steps=5")
    text = str(told.value)
    for part in ("expected a sum of 1 or less", "set data.crop to random", "at least one source under data.validation"):
        assert part in text


def test_rows_without_picture_or_text_say_what_to_do(settings: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path / "rows.jsonl", [Record("r", "similar_image", image="0.png", caption="a")])
    with pytest.raises(Stage2DataError, match=r"rows.jsonl:1 .*has no prompt; record prompts .*sources.0.text=cap"):
        dataset(settings())
    write_manifest(tmp_path / "rows.jsonl", [Record("r", "qa", prompt="a")])
    with pytest.raises(Stage2DataError, match=r"rows.jsonl:1 .*has no picture; stage 2 trains on pictures"):
        dataset(settings())
    write_manifest(tmp_path / "rows.jsonl", [Record("r", "similar_image", image="nowhere.png", prompt="a")])
    with pytest.raises(Stage2DataError, match=r"10 pictures in a row cannot be read.*data.sources.0.image_root right"):
        dataset(settings())[0]
