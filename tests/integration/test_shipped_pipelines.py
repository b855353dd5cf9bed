"""The shipped toy pipelines paint what they claim: words of any window count for the tuned one, and for it alone.

Run: pytest tests/integration/test_shipped_pipelines.py
"""

from pathlib import Path

import numpy as np
import pytest

from llmga.stage2.sample import Sampler
from llmga.stage2.sample_inputs import Settings
from llmga.toyworld.describe import describe
from llmga.toyworld.parse import parse_batch
from llmga.toyworld.picture_scores import score_texts
from llmga.toyworld.scene import SPLITS, sample_scene

CHECKPOINTS = Path(__file__).parents[2] / "llmga" / "toyworld" / "checkpoints"
PROMPTS = [describe(sample_scene(seed), np.random.default_rng(seed), "long").text for seed in SPLITS["test"][:24]]


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, float]]:
    """Share of attributes right that a prompt names within its first window, and behind."""
    found = {}
    for name in ("base", "tuned"):
        sampler = Sampler.load(CHECKPOINTS / name / "sd")
        settings = Settings(steps=12, guidance_scale=3, batch_size=len(PROMPTS))
        painted = sampler.text_to_image(PROMPTS, None, list(range(len(PROMPTS))), settings)
        pairs = score_texts(parse_batch(np.stack([np.asarray(each.picture) for each in painted])), PROMPTS)
        found[name] = {part: pairs[part][:, 0].sum() / pairs[part][:, 1].sum() for part in ("early", "late")}
    return found


def test_the_tuned_pipeline_follows_long_prompts_to_their_end(scores: dict[str, dict[str, float]]) -> None:
    assert scores["tuned"]["early"] > 0.7 and scores["tuned"]["late"] > 0.64  # in wordings, too, that no MLLM gave it


def test_tuning_is_what_made_it_follow_them(scores: dict[str, dict[str, float]]) -> None:
    assert scores["tuned"]["early"] - scores["base"]["early"] > 0.1
    assert scores["tuned"]["late"] - scores["base"]["late"] > 0.05
