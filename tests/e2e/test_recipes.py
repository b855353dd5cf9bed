"""The shipped recipes on the shipped models: what a newcomer runs must run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from llmga.toyworld.build import build_world
from tests.forks import warm_python

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


def train(python: str, config: str, run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Start a recipe as its launch line does."""
    command = [python, "scripts/train_stage1.py", config, f"run.output_dir={run}", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.timeout(300)
def test_photos_recipe_trains_on_every_published_format_packed(tmp_path: Path) -> None:
    run = tmp_path / "photos"
    short = ("run.max_steps=4", "run.sample_every_steps=4", "run.num_workers=0", "samples.max_new_tokens=32")
    short += ("data.packing=true",)
    done = train(warm_python(), "configs/stage1/photos.yaml", run, *short)
    assert done.returncode == 0, done.stderr[-2000:]
    drawn = re.findall(r"source (.+): (\d+) of the 16 examples", done.stderr)
    assert len(drawn) == 8 and drawn[-1] == ("alpaca", "0")
    assert sum(int(count) for _, count in drawn) == 16
    _, info = LlavaForConditionalGeneration.from_pretrained(run / "final", output_loading_info=True)
    assert not any(info.values())
    page = (run / "samples" / "step-4.html").read_text(encoding="utf-8")
    assert page.count("data:image/") == 3  # the photographs stand beside the replies
    sources = json.loads((run / "final" / "provenance.json").read_text(encoding="utf-8"))["inputs"]
    assert any(source["path"].endswith("Edit/train.json") for source in sources)


@pytest.mark.timeout(300)
def test_toy_recipe_learns_from_the_first_steps(tmp_path: Path) -> None:
    build_world(tmp_path / "world", rows=320, sheet=False)
    run = tmp_path / "toy"
    done = train(
        sys.executable,
        "configs/stage1/toy.yaml",
        run,
        f"data.sources.0.path={tmp_path}/world/train.jsonl",
        f"data.validation.0.path={tmp_path}/world/validation.jsonl",
        "data.validation.0.max_rows=8",
        *("run.max_steps=16", "run.batch_size=4", "run.log_every_steps=1", "run.num_workers=0"),
        *("run.eval_every_steps=0", "run.sample_every_steps=0"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
