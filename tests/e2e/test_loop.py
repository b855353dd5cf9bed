"""The shared loop in processes of its own: killed without warning it loses nothing, and two train as one.

Run: pytest tests/e2e/test_loop.py
"""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmga.checkpoint import latest_checkpoint
from llmga.config import EXIT_INTERRUPTED, EXIT_OK, OptimConfig, RunConfig
from llmga.runtime import Interrupted, close_distributed, leave
from tests.e2e.stage1_run import PATIENCE, ROOT, free_port
from tests.forks import FORKS
from tests.toy_loop import ToyLoopConfig, losses, train


def _settings(folder: Path, run: dict[str, Any], **own: Any) -> ToyLoopConfig:
    given = {
        "output_dir": folder,
        "max_steps": 6,
        "batch_size": 4,
        "precision": "fp32",
        "num_workers": 0,
        "log_every_steps": 1,
        "save_every_steps": 2,
        "threads": 1,
    }
    return ToyLoopConfig(RunConfig(**given | run), OptimConfig(lr=0.05, warmup=2), **own)


def _in_this_process(variables: dict[str, str], folder: Path, run: dict[str, Any], own: dict[str, Any]) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(variables)
    os.dup2(os.open(folder.with_name("stderr.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    code = EXIT_OK
    try:
        train(_settings(folder, run, **own))
    except Interrupted:
        code = EXIT_INTERRUPTED
    close_distributed()
    leave(code)


def run_processes(folder: Path, run: dict[str, Any], processes: int = 1, **own: Any) -> list[int]:
    """Exit codes of the processes of one run; what they write is in `stderr.txt` beside its folder."""
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(FORKS.Process(target=_in_this_process, args=(variables, folder, run, own)))
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        assert process.exitcode is not None, f"still running after {PATIENCE} s"
    return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(_settings(tmp_path_factory.mktemp("loop") / "run", {})).parent


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and a loss whose mean over two halves is the mean over the whole."""
    return train(_settings(tmp_path_factory.mktemp("loop") / "run", {}, dropout=0.0)).parent


def assert_same_weights(folder: Path, reference: Path, tolerance: float) -> None:
    for name in ("net.safetensors", "net.ema.safetensors"):
        made, wanted = (load_file(f / "checkpoint-6" / name) for f in (folder, reference))
        for key in wanted:
            torch.testing.assert_close(made[key], wanted[key], rtol=0, atol=tolerance)


def test_killed_without_warning_it_resumes_exactly(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_processes(folder, {}, kill_at=17) == [-9]
    assert latest_checkpoint(folder) == folder / "checkpoint-4" and list(losses(folder)) == [1, 2, 3, 4]
    assert run_processes(folder, {}) == [0]
    assert losses(folder) == losses(alone)
    assert_same_weights(folder, alone, 0)


@pytest.mark.parametrize("seconds", [0.0, 0.5])  # the longer the steps, the surer one is under way
def test_a_killed_loading_worker_is_one_sentence(seconds: float, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_processes(folder, {"num_workers": 1}, kill_at=17, seconds=seconds) == [1]
    assert "RunFailed: a loading worker was killed" in folder.with_name("stderr.txt").read_text()
    assert run_processes(folder, {"num_workers": 1}) == [0]
    assert losses(folder) == losses(alone)
    assert_same_weights(folder, alone, 0)


def test_two_processes_stop_together_and_resume(alone: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "run", {"batch_size": 2}
    codes = run_processes(folder, run, 2, term_at=10)  # rank 1 alone loads example 10
    assert codes == [130, 130] and latest_checkpoint(folder) == folder / "checkpoint-3"  # rank 1 was told, both saved
    assert run_processes(folder, run, 2) == [0, 0]
    unbroken = tmp_path / "unbroken"
    assert run_processes(unbroken, run, 2) == [0, 0]
    assert losses(folder) == losses(unbroken) and list(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert_same_weights(folder, unbroken, 0)


def test_two_processes_see_what_one_sees(without_dropout: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    assert run_processes(both, {"batch_size": 2}, 2, dropout=0.0) == [0, 0]
    assert losses(both) == pytest.approx(losses(without_dropout), abs=1e-6)
    assert_same_weights(both, without_dropout, 1e-6)


def test_two_networks_learn_under_ddp(tmp_path: Path) -> None:
    run = {"batch_size": 1, "accumulation_steps": 2}
    assert run_processes(tmp_path / "run", run, 2, adversary=True) == [0, 0]
    assert set(losses(tmp_path / "run", "loss_judge")) == {1, 2, 3, 4, 5, 6}


def test_zero_2_trains_and_resumes(without_dropout: Path, tmp_path: Path) -> None:
    run = {"batch_size": 2, "deepspeed": ROOT / "configs/deepspeed/zero2.json"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_processes(whole, run, 2, dropout=0.0) == [0, 0]
    assert run_processes(broken, run, 2, term_at=10, dropout=0.0) == [130, 130]
    assert run_processes(broken, run, 2, dropout=0.0) == [0, 0]
    assert losses(broken) == pytest.approx(losses(whole), abs=1e-6)
    assert losses(whole) == pytest.approx(losses(without_dropout), abs=1e-5)
