"""The scripts that make the toy MLLMs of the package, from start to shipped folder, with little to draw and learn."""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llmga.config import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK
from llmga.toyworld import tower
from llmga.toyworld.build import Report, build_world
from llmga.toyworld.tower import TowerRecipe

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
QUICK = [
    *("run.max_steps=2", "run.batch_size=2", "run.num_workers=0", "run.eval_every_steps=0"),
    *("run.sample_every_steps=0", "run.threads=1", "optim.warmup=0"),
]


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Both scripts, at work in a folder of the test's own."""
    (tmp_path / "llmga/stage1").mkdir(parents=True)
    for name in ("configs", "llmga/stage1/instructions.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    base, tuned = (importlib.import_module(f"make_toy_{name}") for name in ("base", "tuned"))

    def build_small(out: Path, *, splits: dict[str, int], **how: Any) -> Report:
        small = {"train": 64, "validation": 8, "test": 1}
        return build_world(out, splits={name: small[name] for name in splits}, sheet=False, **how)

    monkeypatch.setattr("llmga.toyworld.build.build_world", build_small)
    monkeypatch.setattr(base, "SCENES_TO_SPELL", 40)
    monkeypatch.setattr(tower, "TowerRecipe", lambda: TowerRecipe(num_scenes=64, batch_size=16, steps=2))
    return {"base": base, "tuned": tuned}


def steps(run: str) -> int:
    return json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1])["step"]


@pytest.mark.timeout(600)
def test_they_run_from_start_to_shipped_folder(scripts: dict[str, ModuleType]) -> None:
    assert [script.main(QUICK) for script in scripts.values()] == [EXIT_OK, EXIT_OK]
    runs = ("base/looking", "base/finding", "base", "tuned/editing", "tuned", "tuned/refining")
    assert {steps(f"runs/toy_{run}/run") for run in runs} == {2}  # also where a lesson has steps of its own
    shipped = Path("llmga/toyworld/checkpoints")
    for name, knows_tags in (("base", False), ("tuned", True)):
        _, info = LlavaForConditionalGeneration.from_pretrained(shipped / name / "mllm", output_loading_info=True)
        assert not any(info.values())
        vocabulary = AutoProcessor.from_pretrained(shipped / name / "mllm").tokenizer.get_vocab()
        assert ("<gen_img>" in vocabulary) == knows_tags
    assert any(os.path.islink(file) for file in (shipped / "tuned/mllm").iterdir())  # one vision tower for both


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_a_misspelt_key_ends_them_at_once(
    scripts: dict[str, ModuleType], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        scripts[name].main(["run.max_stps=3"])
    assert end.value.code == EXIT_BAD_INPUT and "did you mean run.max_steps?" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_interrupted_they_say_so_in_one_sentence(
    scripts: dict[str, ModuleType], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmga.toyworld.build.build_world", interrupt)
    assert scripts[name].main(QUICK) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted; the same command goes on with what is done\n"
