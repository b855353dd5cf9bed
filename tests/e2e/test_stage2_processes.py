"""Stage 2 in processes of its own: killed in the middle it resumes to equal losses, and two train as one, ZeRO-2 too.

Run: pytest tests/e2e/test_stage2_processes.py
"""

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llmga.config import EXIT_OK
from llmga.runtime import close_distributed, leave
from llmga.stage2.train import train
from tests.e2e.stage1_run import PATIENCE, ROOT, free_port
from tests.forks import FORKS
from tests.toy_loop import losses
from tests.toy_stage2 import load, make_inputs


def _train(settings: Path, overrides: tuple[str, ...], variables: dict[str, str], kill_at: int | None) -> None:
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)
    os.dup2(os.open(settings.with_name("stderr.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    if kill_at is not None:
        from llmga.stage2.data import Stage2Dataset

        get = Stage2Dataset.__getitem__

        def get_or_die(self: Stage2Dataset, index: int) -> object:
            if index == kill_at and not self.held_out:
                os.kill(os.getpid(), signal.SIGKILL)
            return get(self, index)

        Stage2Dataset.__getitem__ = get_or_die  # type: ignore[method-assign]
    train(load(settings, *overrides))
    close_distributed()
    leave(EXIT_OK)


def run(settings: Path, *overrides: str, processes: int = 1, kill_at: int | None = None) -> list[int | None]:
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(FORKS.Process(target=_train, args=(settings, overrides, variables, kill_at)))
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
    return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(settings: Path) -> Path:
    return train(load(settings)).parent


def test_killed_in_the_middle_it_resumes_to_the_losses_of_an_unbroken_run(settings: Path, alone: Path) -> None:
    folder = settings.parent / "killed"
    assert run(settings, f"run.output_dir={folder}", kill_at=7) == [-9]
    assert list(losses(folder)) == [1, 2, 3] and (folder / "checkpoint-2" / "complete").is_file()
    assert run(settings, f"run.output_dir={folder}") == [0]
    assert losses(folder) == losses(alone) and losses(folder, "eval_loss") == losses(alone, "eval_loss")


def test_two_processes_train_as_one(settings: Path, alone: Path) -> None:
    folder = settings.parent / "both"
    assert run(settings, f"run.output_dir={folder}", "run.batch_size=1", "run.save_every_steps=0", processes=2) == [
        0,
        0,
    ]
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(folder, "eval_loss") == pytest.approx(losses(alone, "eval_loss"), abs=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_zero_2_trains_as_one_process_does(settings: Path, alone: Path, precision: str, tolerance: float) -> None:
    folder = settings.parent / f"zero2_{precision}"
    overrides = [
        f"run.output_dir={folder}", "run.batch_size=1", f"run.precision={precision}",
        "run.sample_every_steps=4", "run.save_every_steps=4", f"run.deepspeed={ROOT / 'configs/deepspeed/zero2.json'}",
    ]  # fmt: skip
    assert run(settings, *overrides, processes=2) == [0, 0]
    assert losses(folder) == pytest.approx(losses(alone), abs=tolerance)
    assert losses(folder, "eval_loss") == pytest.approx(losses(alone, "eval_loss"), abs=tolerance)
    assert (folder / "samples" / "step-4" / "1.png").is_file()
    weights = load_file(folder / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(folder / "checkpoint-4" / "unet.ema.safetensors")
    assert all(weights[name].dtype == torch.float32 and torch.equal(weights[name], average[name]) for name in average)


@pytest.mark.parametrize("sdxl", [False, True])
def test_bf16_trains_float32_weights_and_paints(settings: Path, tmp_path: Path, sdxl: bool) -> None:
    """In processes of their own, because accelerate keeps the first precision of a process."""
    inputs = make_inputs(tmp_path, sdxl=True) if sdxl else settings
    exact, rough = (tmp_path / precision for precision in ("fp32", "bf16"))
    for folder in (exact, rough):
        overrides = (f"run.output_dir={folder}", f"run.precision={folder.name}", "run.sample_every_steps=2")
        assert run(inputs, *overrides, "run.max_steps=2", "run.save_every_steps=0") == [0]
    assert losses(rough) != losses(exact) and losses(rough) == pytest.approx(losses(exact), abs=0.02)
    assert losses(rough, "eval_loss") == pytest.approx(losses(exact, "eval_loss"), abs=0.02)
    learned, before = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (rough / "final", inputs.parent / "pipeline")
    )
    assert all(value.dtype == torch.float32 for value in learned.values())
    assert any((learned[name] - before[name]).abs().max() > 0 for name in before)
    shots = [np.asarray(Image.open(folder / "samples" / "step-2" / "1.png"), int) for folder in (exact, rough)]
    assert np.abs(shots[0] - shots[1]).mean() < 8  # grey levels: the same picture
