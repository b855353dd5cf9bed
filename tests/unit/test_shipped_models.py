"""The toy models in the package: small enough for the tree, whole, and what they claim to be."""

from pathlib import Path

import pytest

from llmga.stage1.model import VISION_SHARD, load_mllm
from llmga.tokens import GEN_IMG

CHECKPOINTS = Path(__file__).parents[2] / "llmga" / "toyworld" / "checkpoints"
BASE = CHECKPOINTS / "base" / "mllm"
MODELS = sorted(CHECKPOINTS.glob("*/mllm"))
PIPELINES = sorted(CHECKPOINTS.glob("*/sd*"))
MAX_FILE_MB, MAX_TOTAL_MB = 16, 96


def test_files_are_small_and_safe() -> None:
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}
    assert max(path.stat().st_size for path in files) <= MAX_FILE_MB * 1e6
    assert sum(path.stat().st_size for path in files) <= MAX_TOTAL_MB * 1e6


def test_pipelines_share_what_is_frozen() -> None:
    assert {path.name for path in PIPELINES} == {"sd", "sd_inpainting"} and len(PIPELINES) == 4
    for path in PIPELINES:
        for part in ("vae", "text_encoder", "tokenizer"):
            assert (path / part).samefile(CHECKPOINTS / "base" / "sd" / part)


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_pipelines_are_stock_ones_and_carry_their_layout(path: Path) -> None:
    from diffusers import DiffusionPipeline

    from llmga.stage2.prompt_layout import load_layout, prompt_layout

    pipeline = DiffusionPipeline.from_pretrained(path)
    assert pipeline.unet.config.in_channels == (9 if path.name == "sd_inpainting" else 4)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert load_layout(path) == prompt_layout("masked", max_chunks=4)


def test_frozen_tower_is_stored_once() -> None:
    assert BASE in MODELS
    assert all((model / VISION_SHARD).samefile(BASE / VISION_SHARD) for model in MODELS)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.parent.name)
def test_models_load_and_only_tuned_ones_have_tags(model: Path) -> None:
    mllm = load_mllm(model)
    assert mllm.tags == GEN_IMG
    assert mllm.tags_are_tokens is (model != BASE)
    assert mllm.num_image_tokens == 16
