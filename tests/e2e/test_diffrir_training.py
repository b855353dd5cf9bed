"""Restoration training as launchers start it: two processes stay one, and a killed run goes on to the same weights.

The published encoder phase calls the network past its data-parallel wrapper: the ranks drift apart for good.
Run: pytest tests/e2e/test_diffrir_training.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmga.config import EXIT_BAD_INPUT, EXIT_OK, dump_config
from llmga.diffrir.train import train
from tests.forks import warm_python
from tests.toy_restoration import settings

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_diffrir.py"
ABLATION = ROOT / "eval" / "restoration.py"
PATIENCE = 280  # seconds; a run takes ten, but not on a machine that is busy with other things

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# Each rank writes the weights that it holds when a phase ends.
WRITING_SCRIPT = f"""\
import os, runpy
from safetensors.torch import save_file
from llmga.diffrir import train
from llmga.loop import _Loop
run = _Loop.run
def run_and_write(self):
    made = run(self)
    state = {{name: value.detach().clone() for name, value in self.job.learners[0].trained.items()}}
    save_file(state, str(self.place.run.path / f"rank{{self.place.ranks.rank}}.safetensors"))
    return made
_Loop.run = run_and_write
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
# Every step takes a while, so that a signal comes in the middle.
SLOW_SCRIPT = f"""\
import runpy, time
from llmga.loop import _Loop
step = _Loop._step
_Loop._step = lambda self, *args: (time.sleep(0.4), step(self, *args))[1]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def write_settings(folder: Path, *phases: str, **run: Any) -> Path:
    """The settings as a file."""
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(dump_config(settings(folder, *phases, **run)) | {}))
    text = yaml.safe_load(path.read_text())
    text["run"].pop("epochs")
    path.write_text(yaml.safe_dump(text))
    return path


def command(script: Path, path: Path, *overrides: str, python: str | None = None, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [python or warm_python(), *(launcher if processes > 1 else []), str(script), str(path), *overrides]


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)


def finish(words: list[str], folder: Path) -> str:
    process = start(words, folder)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == EXIT_OK, said[-3000:]
    return said


def losses(folder: Path) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


def test_two_processes_hold_the_same_weights_and_train_like_one(tmp_path: Path) -> None:
    script = tmp_path / "writing.py"
    script.write_text(WRITING_SCRIPT)
    path = write_settings(tmp_path, "prior", "encoder", "joint", "gan", batch_size=1)
    finish(command(script, path, processes=2), tmp_path)
    for phase in ("prior", "encoder", "joint", "gan"):
        ours, theirs = (load_file(tmp_path / "run" / phase / f"rank{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), phase
    trained = set(load_file(tmp_path / "run/encoder/rank0.safetensors"))
    assert not any(name.startswith("generator.") for name in trained)
    alone = train(settings(tmp_path, "prior", output_dir="alone", batch_size=2)).parent
    # No noise is drawn in phase prior: two batches of one are a batch of two.
    assert losses(tmp_path / "run/prior") == pytest.approx(losses(alone / "prior"), abs=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a training that nothing stops."""
    return train(settings(tmp_path_factory.mktemp("whole"), "prior", "encoder", "joint"))


@pytest.mark.parametrize(("number", "where"), [(signal.SIGKILL, "prior"), (signal.SIGTERM, "joint")])
def test_a_stopped_training_goes_on_to_the_same_weights(whole: Path, tmp_path: Path, number: int, where: str) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_SCRIPT)
    path = write_settings(tmp_path, "prior", "encoder", "joint")
    killed = number == signal.SIGKILL
    process = start(command(script, path, python=sys.executable if killed else None), tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / f"run/{where}/checkpoint-2/complete").is_file():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (-signal.SIGKILL if killed else 130)
    said = finish(command(SCRIPT, path), tmp_path)
    assert f"going on from {tmp_path}/run/{where}/checkpoint-" in said
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run/final", whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for phase in ("prior", "encoder", "joint"):
        assert losses(tmp_path / "run" / phase) == losses(whole.parent / phase)


def test_a_mistake_in_the_settings_is_one_message(tmp_path: Path) -> None:
    path = write_settings(tmp_path, "prior")
    process = start(command(SCRIPT, path, "phases.0.stepz=3"), tmp_path)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == EXIT_BAD_INPUT and "phases.0.stepz" in said and "did you mean" in said
    assert "Traceback" not in said


def test_the_ablation_trains_every_arm_once_and_judges_every_step(tmp_path: Path) -> None:
    short = ("phases.0.steps=1", "phases.1.steps=1")
    path = write_settings(tmp_path, "prior", "joint", overrides=short, eval_every_steps=0, sample_every_steps=0)
    words = [str(ABLATION), "--config", str(path), "--seeds=2", "--pictures=6"]
    words += ["--data", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    finish([sys.executable, *words], tmp_path)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert {metric["arm"] for metric in result["metrics"]} == {
        "none",
        "plain",
        "reference",
        "colour",
        "reference+colour",
    }
    assert {each["verdict"] for each in result["comparisons"]} <= {"supported", "contradicted", "inconclusive"}
    assert len(result["comparisons"]) == 16 and all(len(each["per_seed"]) == 2 for each in result["comparisons"])
    items = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    biases = [line["bias_error"] for line in items if line["arm"] == "none" and line["seed"] == 0]
    [none] = [m for m in result["metrics"] if m["arm"] == "none" and m["name"] == "bias_error"]
    assert none["value"] == pytest.approx(np.nanmean(biases), rel=0.2) and none["value"] > 0.01
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/joint/final/model.safetensors")}
    assert len(made) == 8
    finish([warm_python(), *words], tmp_path)
    assert {path: path.stat().st_mtime_ns for path in made} == made
