"""The published figures of the shipped models: they are of these very weights, and reach what was promised."""

import json
from pathlib import Path

import pytest

from llmga.checkpoint import sha256
from llmga.cli import SHIPPED_MODELS

RESULT = json.loads((Path(__file__).parents[2] / "docs/results/stage1_language.json").read_text(encoding="utf-8"))
TUNED = {(m["task"], m["kind"], m["name"]): m["value"] for m in RESULT["metrics"] if m["system"] == "tuned"}


@pytest.mark.parametrize("system", ["base", "tuned"])
def test_the_published_figures_are_of_the_shipped_weights(system: str) -> None:
    files = (SHIPPED_MODELS / system / "mllm").glob("*.safetensors")
    assert RESULT["weights"][system] == {file.name: sha256(file) for file in files}


def test_the_shipped_model_reaches_what_was_promised() -> None:
    assert TUNED["all", "generation", "tags_well_formed"] >= 0.99
    assert TUNED["all", "other", "tags_where_none_belong"] <= 0.01
    assert TUNED["short_description", "chat", "tags_where_none_belong"] <= 0.01
    assert TUNED["similar_image", "generation", "attributes"] >= 0.95
    assert TUNED["editing", "generation", "joint"] >= 0.9
    assert TUNED["prompt_refinement", "generation", "past_clip_window"] == 1
    [difference] = [c["difference"] for c in RESULT["comparisons"] if (c["task"], c["name"]) == ("vqa", "exact_match")]
    assert difference >= -0.01


def test_every_interval_says_how_it_was_found() -> None:
    for metric in RESULT["metrics"]:
        certain = metric["value"] in (0, 1) and metric["name"].partition(":")[0] not in ("clip_tokens", "facts_said")
        assert metric["ci_low"] <= metric["value"] <= metric["ci_high"]
        assert ("Wilson" in metric["ci_method"]) == certain, metric
