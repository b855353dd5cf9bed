"""The toy models in the package: small enough for the tree, whole, and what they claim to be."""

from pathlib import Path

import pytest

from llmga.stage1.model import VISION_SHARD, load_mllm
from llmga.tokens import GEN_IMG

CHECKPOINTS = Path(__file__).parents[2] / "llmga" / "toyworld" / "checkpoints"
MAX_FILE_MB, MAX_TOTAL_MB = 16, 96


def test_files_are_small_and_safe() -> None:
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}
    assert max(path.stat().st_size for path in files) <= MAX_FILE_MB * 1e6
    assert sum(path.stat().st_size for path in files) <= MAX_TOTAL_MB * 1e6


def test_frozen_tower_is_stored_once() -> None:
    assert (CHECKPOINTS / "tuned/mllm" / VISION_SHARD).samefile(CHECKPOINTS / "base/mllm" / VISION_SHARD)


@pytest.mark.parametrize(("name", "tags_are_tokens"), [("base", False), ("tuned", True)])
def test_models_load_and_only_the_tuned_one_has_tags(name: str, tags_are_tokens: bool) -> None:
    mllm = load_mllm(CHECKPOINTS / name / "mllm")
    assert mllm.tags == GEN_IMG
    assert mllm.tags_are_tokens is tags_are_tokens
    assert mllm.num_image_tokens == 16
