"""Signals become flags, logs survive crashes and resumes, and a run can say where it ran."""

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llmga import runtime
from llmga.environment import environment
from llmga.runtime import (
    MetricsLog,
    Ranks,
    StopSignal,
    any_rank,
    from_main,
    init_distributed,
    memory_gb,
    outlive_terminate,
    seed_everything,
    sum_over_ranks,
    without_zero3,
    zero3_is_on,
)


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    signals = StopSignal()
    yield signals
    signals.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_flag_and_nothing_is_raised(
    stop: StopSignal, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not stop.agreed()
    os.kill(os.getpid(), number)
    assert stop.agreed()
    assert stop.received == number.name
    assert "saving after this step" in capfd.readouterr().err


def test_only_a_later_second_ctrl_c_aborts(stop: StopSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the launcher's echo of the first
    now = time.monotonic()
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now + 4)
    os.kill(os.getpid(), signal.SIGTERM)  # however late, a second SIGTERM does not throw the save away
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_former_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    StopSignal().close()
    assert signal.getsignal(signal.SIGTERM) is before


def collate_and_outlive(samples: list[int]) -> tuple[int, list[int]]:
    outlive_terminate()
    return os.getpid(), samples


def test_a_loading_worker_outlives_a_terminate_to_the_group_but_not_its_parents() -> None:
    loaded: list[int] = []
    batches = iter(DataLoader(range(12), batch_size=2, num_workers=1, collate_fn=collate_and_outlive))
    for worker, samples in batches:
        if not loaded:
            subprocess.run(["kill", "-TERM", str(worker)], check=True)
            time.sleep(0.2)
        loaded += samples
    assert loaded == list(range(12))

    batches = iter(DataLoader(range(12), batch_size=2, num_workers=1, collate_fn=collate_and_outlive))
    worker, _ = next(batches)
    os.kill(worker, signal.SIGTERM)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(batches)
        time.sleep(2)


def test_metrics_lines_past_the_resumed_step_are_cut(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.cut_after(3)  # nothing there yet
    for step in range(1, 6):
        log.write(step, loss=1 / step, note="naïve")
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4, 5]
    log.cut_after(3)
    log.write(4, loss=0.5)
    assert [(line["step"], round(line["loss"], 3)) for line in log.read()] == [(1, 1), (2, 0.5), (3, 0.333), (4, 0.5)]
    assert json.loads(log.path.read_text().splitlines()[0]) == {"step": 1, "loss": 1.0, "note": "naïve"}


def test_a_line_holds_whatever_a_model_wrote(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "replies.jsonl")
    replies = ["two\nlines", "a\u2028b", "\x85\x1c\v", ""]
    log.write(1, replies=replies)
    log.cut_after(1)
    assert log.read() == [{"step": 1, "replies": replies}]


def test_seeds_reach_all_three_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_ranks_are_read_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert init_distributed() == Ranks(0, 0, 1)
    assert Ranks(3, 1, 4).is_main is False
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that monkeypatch restores them
        monkeypatch.delenv(name)
    assert runtime.ranks_from_environment() == Ranks(5, 1, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node1", "29500")


@pytest.mark.parametrize("launched", [True, False], ids=["launched", "alone"])
def test_leaving_runs_what_waits_for_the_end_and_tears_the_interpreter_down_only_alone(launched: bool) -> None:
    script = """
import atexit, sys, threading, time
from llmga.runtime import leave

class TornDown:
    def __del__(self): print("torn down")

sys.modules["kept"] = TornDown()  # goes when the interpreter clears its modules
atexit.register(print, "tracker finished")
threading.Thread(target=lambda: (time.sleep(0.2), print("page written"))).start()
leave(130)
"""
    variables = {name: value for name, value in os.environ.items() if name != "RANK"} | (
        {"RANK": "0"} if launched else {}
    )
    done = subprocess.run([sys.executable, "-c", script], env=variables, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout.split("\n")[:-1] == ["page written", "tracker finished", *([] if launched else ["torn down"])]


def test_tasks_of_srun_need_no_meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores them
        monkeypatch.delenv(name)
    step = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
    for name, value in {**step, "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "17"}.items():
        monkeypatch.setenv(name, value)
    assert runtime.ranks_from_environment() == Ranks(5, 1, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03", "20017")


def test_one_process_agrees_with_itself() -> None:
    assert (any_rank(True), any_rank(False)) == (True, False)
    assert sum_over_ranks([1.5, 2]) == [1.5, 2.0]
    assert from_main({"step": 3}) == {"step": 3}


def test_zero3_is_out_of_the_way_for_one_rank_and_back_again() -> None:
    from transformers.integrations import HfDeepSpeedConfig

    assert not zero3_is_on()
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # as the Trainer's arguments hold one
    assert zero3_is_on()
    with pytest.raises(OSError, match="full"), without_zero3():
        assert not zero3_is_on()
        raise OSError("the disk is full")
    assert zero3_is_on()
    del alive
    with without_zero3():
        assert not zero3_is_on()


def test_deepspeed_enters_at_one_door() -> None:
    package = Path(runtime.__file__).parent
    importers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if not module.startswith("llmga") and "deepspeed" in " ".join([module, *names]):  # transformers' part, too
                importers.add(path.relative_to(package).as_posix())
    assert importers == {"runtime.py"}


def test_environment_says_what_ran_where() -> None:
    facts = json.loads(json.dumps(environment()))
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["world_size"] == 1
    assert facts["commit"] is None or len(facts["commit"].split("+")[0]) == 40
    assert 0.05 < memory_gb()["memory_gb"] < 64
