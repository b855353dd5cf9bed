"""Every shipped recipe is planned on a machine that has neither weights nor data, and the recipe itself stops there.

Run: pytest tests/e2e/test_plan.py
"""

import subprocess
from pathlib import Path

import pytest

from llmga.stage1.plan.plan import Asked, make_plan
from llmga.stage1.plan.text import plan_text
from tests.forks import warm_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/stage1"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "shared")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_is_planned_without_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    single = "gb" in path.stem.split("_")[-1]
    card = "RTX-4090" if path.stem.endswith("24gb") else "A100-80GB"
    plan = make_plan(path, [], Asked(devices=1 if single else 8, card=card, examples=10_000))
    shown = plan_text(plan)
    assert plan.model is not None and plan.hours is not None and plan.hours > 0
    assert f"{card} has" in shown and "does NOT fit" not in shown
    trained, frozen = plan.model.trained, plan.model.frozen
    sharing = 1 if single or plan.model.engine.stage is None else 8
    held = plan.memory[-1].total + plan.memory[-1].host
    assert held > (2 * (trained + frozen) + 12 * trained) / sharing  # bf16 weights, and AdamW on float32 ones


def test_the_recipe_itself_stops_before_training(tmp_path: Path) -> None:
    command = [warm_python(), "scripts/train_stage1.py", "configs/stage1/photos.yaml", "--dry-run"]
    done = subprocess.run(
        [*command, f"run.output_dir={tmp_path}/run"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "== memory per device" in done.stdout and "[[<gen_img> " in done.stdout
    assert not (tmp_path / "run").exists()
