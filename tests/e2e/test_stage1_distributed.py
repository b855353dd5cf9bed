"""Two processes on one machine train like one: DDP, ZeRO-2 and ZeRO-3 on data where whole batches have no picture.

A rank without a picture used to hang its peers (DDP) or break them (ZeRO); a saved ZeRO model used to have names that
nothing else loads; a gathered one used to be empty.
Run: pytest tests/e2e/test_stage1_distributed.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration
from transformers.trainer_callback import CallbackHandler

from llmga.checkpoint import is_complete, latest_checkpoint, read_marker
from llmga.config import load_config
from llmga.stage1.config import Stage1Config
from llmga.stage1.train import train
from tests.e2e.stage1_run import (
    PATIENCE,
    ROOT,
    SCRIPT,
    assert_trained_alike,
    command,
    free_port,
    make_inputs,
    slow_script,
    start,
    succeed,
    wait_for,
    weights,
)
from tests.forks import warm_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ZERO2 = f"run.deepspeed={ROOT / 'configs/deepspeed/zero2.json'}"
PACKED = "data.packing=true"
ZERO3 = f"run.deepspeed={ROOT / 'configs/deepspeed/zero3.json'}"


def one_dies_after_step_5() -> None:
    """Rank 1 is killed, as by a machine that runs out of memory."""
    if os.environ["RANK"] != "1":
        return
    call_event = CallbackHandler.call_event

    def call(self: Any, event: str, args: Any, state: Any, *rest: Any, **kwargs: Any) -> Any:
        if event == "on_step_end" and state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return call_event(self, event, args, state, *rest, **kwargs)

    CallbackHandler.call_event = call


def without_a_compiler() -> None:
    """As on a machine that has a driver and Python packages, and nothing to compile with."""
    os.environ["PATH"] = ""
    os.environ.pop("CXX", None)


def bad_gradient_in_step_3() -> None:
    """The last rank's gradients are no numbers, once, after a loss that is one."""
    if int(os.environ.get("RANK", 0)) != int(os.environ.get("WORLD_SIZE", 1)) - 1:
        return
    real_backward, calls = torch.Tensor.backward, []

    def backward(self: torch.Tensor, *args: object, **kwargs: object) -> None:
        calls.append(1)
        real_backward(self * float("nan") if len(calls) == 3 else self, *args, **kwargs)

    torch.Tensor.backward = backward


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def alone(settings: Path) -> Path:
    """The run folder of one process: padded batches of 2, which are the two ranks' batches of 1, and plain logits."""
    return train(load_config(Stage1Config, settings, ("model.cross_entropy=full",))).parent


@pytest.fixture(scope="module")
def zero2(settings: Path) -> Path:
    """The run folder of two processes under ZeRO-2, packed, uninterrupted."""
    folder = settings.parent / "zero2"
    succeed(settings, ZERO2, PACKED, f"run.output_dir={folder}", "run.batch_size=1", processes=2)
    return folder


def test_ddp_stops_on_a_signal_and_resumes_on_two_processes_or_on_one(settings: Path, alone: Path) -> None:
    folder = settings.parent / "ddp"
    overrides = (f"run.output_dir={folder}", "run.batch_size=1", "run.num_workers=1", "run.sample_every_steps=6")
    torchrun = command(settings, *overrides, processes=2, script=slow_script(settings.parent))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(torchrun, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(folder / "metrics.jsonl")
        launcher.send_signal(signal.SIGTERM)  # torchrun passes it on to its children
        said = launcher.communicate(timeout=PATIENCE)[1]
    finally:
        launcher.kill()
    saved = latest_checkpoint(folder)
    assert saved is not None, said
    assert "stopped by" in said and not (folder / "final").exists()
    on_one = shutil.copytree(folder, settings.parent / "ddp_on_one")
    assert f"going on from {saved}" in succeed(settings, *overrides, processes=2)
    assert_trained_alike(folder, alone, 5e-6)
    succeed(settings, f"run.output_dir={on_one}")
    assert_trained_alike(on_one, alone, 5e-6)
    assert read_marker(folder / "checkpoint-6")["totals"] == read_marker(alone / "checkpoint-6")["totals"]
    assert (folder / "samples" / "step-6.html").is_file()


def test_the_deepspeed_launcher_trains_and_saves(settings: Path, zero2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hosts = ("--hostfile", str(tmp_path / "none"), "--num_gpus", "2", "--master_port", str(free_port()))
    launcher = Path(sys.executable).with_name("deepspeed")
    overrides = (ZERO2, f"run.output_dir={folder}", "run.batch_size=1", "run.save_every_steps=3")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(
        [str(part) for part in (warm_python(), launcher, *hosts, SCRIPT, settings, *overrides)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert_trained_alike(folder, zero2, 5e-6)
    assert read_marker(folder / "checkpoint-6")["world_size"] == 2
    assert latest_checkpoint(folder) == folder / "checkpoint-6" and is_complete(folder / "checkpoint-3")


def test_ddp_packs_what_one_process_pads(settings: Path, alone: Path) -> None:
    folder = settings.parent / "ddp_packed"
    succeed(settings, PACKED, f"run.output_dir={folder}", "run.batch_size=1", processes=2)
    assert_trained_alike(folder, alone, 5e-6)


def test_zero2_trains_like_one_process(alone: Path, zero2: Path) -> None:
    assert_trained_alike(zero2, alone, 5e-6)


@pytest.mark.parametrize("file", ["zero2_offload", "zero3_offload"])
def test_an_optimizer_in_host_memory_trains_the_same(settings: Path, alone: Path, file: str) -> None:
    """And nothing has to be compiled for it: there is no compiler on the path."""
    folder = settings.parent / file
    deepspeed = f"run.deepspeed={ROOT / 'configs/deepspeed' / file}.json"
    succeed(settings, deepspeed, f"run.output_dir={folder}", sabotage=without_a_compiler)
    assert_trained_alike(folder, alone, 5e-6)


@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (2, 2), (3, 2)])
def test_a_gradient_that_is_not_finite_stops_all_ranks_of_deepspeed_at_once(
    settings: Path, tmp_path: Path, stage: int, processes: int
) -> None:
    deepspeed = tmp_path / "deepspeed.json"
    switches = {"compute_grad_norm": False} if stage == 2 else {}  # a user's file may say so; then nobody would look
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": stage, **switches}}))
    folder = tmp_path / "run"
    overrides = [f"run.deepspeed={deepspeed}", f"run.output_dir={folder}", "run.batch_size=1", "optim.max_grad_norm=0"]
    rarely = ("run.log_every_steps=100", "run.save_every_steps=1", "data.validation=[]")
    started = start(settings, *overrides, *rarely, processes=processes, sabotage=bad_gradient_in_step_3)
    codes = started.wait()
    assert codes == [1] * processes, started.said()[-3000:]
    assert "step 3: the gradient is not finite although the loss is. The weights were not touched" in started.said()
    saved = latest_checkpoint(folder)
    assert saved == folder / "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in weights(saved).values())
    reports = [json.loads(path.read_text()) for path in sorted((folder / "non_finite" / "step-3").glob("rank*.json"))]
    expected = [[2 * processes + rank] for rank in range(processes)]
    assert [report["batches"][0]["sample_ids"] for report in reports] == expected


def test_zero3_survives_the_death_of_a_rank_and_agrees_with_zero2(settings: Path, zero2: Path) -> None:
    folder = settings.parent / "zero3"
    overrides = (ZERO3, PACKED, f"run.output_dir={folder}", "run.batch_size=1", "run.sample_every_steps=3")
    started = start(settings, *overrides, processes=2, sabotage=one_dies_after_step_5)
    codes = started.wait()
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert read_marker(folder / "checkpoint-4")["engine"] == "zero3", started.said()[-3000:]
    said = succeed(settings, *overrides, processes=2)
    assert f"going on from {folder / 'checkpoint-4'}" in said
    assert_trained_alike(folder, zero2, 5e-6)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(info.values())
    assert all(parameter.numel() for parameter in model.parameters())
    replies = [json.loads(line) for line in (folder / "samples" / "replies.jsonl").read_text().splitlines()]
    assert [line["step"] for line in replies] == [3, 6] and all(len(line["replies"]) == 2 for line in replies)
