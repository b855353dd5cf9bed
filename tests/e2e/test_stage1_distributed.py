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
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration
from transformers.trainer_callback import CallbackHandler

from llmga.checkpoint import latest_checkpoint, read_marker
from llmga.config import load_config
from llmga.stage1.config import Stage1Config
from llmga.stage1.train import train
from tests.e2e.stage1_run import (
    PATIENCE,
    ROOT,
    SCRIPT,
    command,
    lines,
    losses,
    make_inputs,
    sample_ids,
    start,
    succeed,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ZERO2 = f"run.deepspeed={ROOT / 'configs/deepspeed/zero2.json'}"
PACKED = "data.packing=true"
ZERO3 = f"run.deepspeed={ROOT / 'configs/deepspeed/zero3.json'}"
SLOW_SCRIPT = f"""
import runpy, time
from transformers.trainer_callback import CallbackHandler

begin = CallbackHandler.on_step_begin
CallbackHandler.on_step_begin = lambda *args: (time.sleep(0.3), begin(*args))[1]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


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


def assert_trained_alike(folder: Path, reference: Path, tolerance: float) -> None:
    """Same examples in every step, same losses, same held-out losses, same weights."""
    assert sample_ids(folder) == sample_ids(reference)
    assert list(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert list(losses(folder).values()) == pytest.approx(list(losses(reference).values()), abs=tolerance)
    held_out, expected = (
        {key: value for line in lines(f / "metrics.jsonl") for key, value in line.items() if key.startswith("eval_")}
        for f in (folder, reference)
    )
    assert held_out.keys() == expected.keys() == {"eval_pictures_loss", "eval_texts_loss"}
    assert held_out == pytest.approx(expected, abs=tolerance)
    made, wanted = weights(folder / "final"), weights(reference / "final")
    assert made.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(made[name], wanted[name], rtol=0, atol=50 * tolerance, msg=name)


def test_ddp_stops_on_a_signal_and_resumes_on_two_processes_or_on_one(settings: Path, alone: Path) -> None:
    folder = settings.parent / "ddp"
    overrides = (f"run.output_dir={folder}", "run.batch_size=1", "run.num_workers=1", "run.sample_every_steps=6")
    slow_script = settings.parent / "slow_train_stage1.py"
    slow_script.write_text(SLOW_SCRIPT)
    torchrun = command(settings, *overrides, processes=2, script=slow_script)
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


def test_ddp_packs_what_one_process_pads(settings: Path, alone: Path) -> None:
    folder = settings.parent / "ddp_packed"
    succeed(settings, PACKED, f"run.output_dir={folder}", "run.batch_size=1", processes=2)
    assert_trained_alike(folder, alone, 5e-6)


def test_zero2_trains_like_one_process(alone: Path, zero2: Path) -> None:
    assert_trained_alike(zero2, alone, 5e-6)


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
