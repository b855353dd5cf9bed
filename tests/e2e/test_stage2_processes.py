"""Stage 2 in processes of its own: killed in the middle it resumes to equal losses, and two processes train as one.

Run: pytest tests/e2e/test_stage2_processes.py
"""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from llmga.config import EXIT_OK
from llmga.runtime import close_distributed, leave
from llmga.stage2.train import train
from tests.e2e.stage1_run import PATIENCE, free_port
from tests.toy_stage2 import load, make_inputs
from tests.unit.test_loop import losses

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["llmga.stage2.train", "tests.toy_stage2"])


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
        started.append(_FORKS.Process(target=_train, args=(settings, overrides, variables, kill_at)))
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
    assert run(settings, f"run.output_dir={folder}", "run.batch_size=1", processes=2) == [0, 0]
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(folder, "eval_loss") == pytest.approx(losses(alone, "eval_loss"), abs=1e-5)
