"""A stage-1 run small enough for a test: tiny model, mixed data, the real script in processes of its own."""

import json
import multiprocessing
import os
import runpy
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from llmga.records import Record, write_manifest
from tests.forks import FORKS, warm_python
from tests.toy import IMAGE_SIZE_PX, toy_mllm_folder

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_stage1.py"
PATIENCE = 240  # seconds; a run takes two, but not on a machine that is busy with other things


def make_inputs(folder: Path) -> Path:
    """Write a tiny model, pictures and manifests below `folder`, and the settings that use them; return the latter.

    Half of the training rows are text only, and they come in runs: whole batches without a picture are common.
    """
    toy_mllm_folder(folder / "model")
    rng = np.random.default_rng(0)
    for name, rows in (("train", 24), ("pictures", 4), ("texts", 4)):
        records = []
        for i in range(rows):
            text_only = {"train": i % 4 < 2, "pictures": False, "texts": True}[name]
            if text_only:
                short, long = f"object {i}", f"a long text about object {i} " * (1 + i % 3)
                records.append(Record(f"{name}{i}", "prompt_refinement", short_caption=short, caption=long))
            else:
                picture = rng.integers(0, 256, (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / f"{name}{i}.png")
                task = "similar_image" if i % 2 else "inpainting"
                records.append(Record(f"{name}{i}", task, image=f"{name}{i}.png", caption=f"a scene, number {i}"))
        write_manifest(folder / f"{name}.jsonl", records)
    settings = {
        "model": {"path": str(folder / "model")},
        "data": {
            "sources": [{"path": str(folder / "train.jsonl")}],
            "validation": [{"path": str(folder / "pictures.jsonl")}, {"path": str(folder / "texts.jsonl")}],
            "picture_size": IMAGE_SIZE_PX,
        },
        "samples": {"rows": 2, "max_new_tokens": 4},
        "optim": {"lr": 1e-2, "warmup": 2},
        "run": {
            "output_dir": str(folder / "run"),
            "max_steps": 6,
            "batch_size": 2,
            "precision": "fp32",
            "num_workers": 0,
            "log_every_steps": 1,
            "save_every_steps": 2,
            "record_sample_ids": True,
            "threads": 1,
        },
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@dataclass
class Started:
    """A run in processes of its own."""

    processes: list[Any]
    log: Path

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Exit codes by rank, negative for a signal; a process that is late is killed and its output shown."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, f"still running after {timeout} s:\n{self.said()[-4000:]}"
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """What all processes wrote to the error stream."""
        return self.log.read_text(errors="replace")


def start(
    settings: Path,
    *overrides: str,
    processes: int = 1,
    sabotage: Callable[[], None] | None = None,
    of_rank: dict[int, str] | None = None,
) -> Started:
    """Start the script in processes forked from one that has imported everything, as a launcher would.

    Args:
        sabotage: called in each process before the script starts, to make something go wrong at the right moment.
        of_rank: one more override, for a rank alone.
    """
    log = settings.parent / f"stderr-{secrets.token_hex(4)}.txt"
    variables: list[dict[str, str]] = [{}]
    if processes > 1:
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        variables = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    arguments = [[str(settings), *overrides, *filter(None, [(of_rank or {}).get(r)])] for r in range(processes)]
    ranks = [
        FORKS.Process(target=_run_script, args=(line, env, log, sabotage))
        for line, env in zip(arguments, variables, strict=True)
    ]
    for rank in ranks:
        rank.start()
    return Started(ranks, log)


def succeed(settings: Path, *overrides: str, **how: Any) -> str:
    """Start, wait, expect exit code 0 everywhere, and return what was written to the error stream."""
    run = start(settings, *overrides, **how)
    codes = run.wait()
    assert set(codes) == {0}, f"exit codes {codes}:\n{run.said()[-4000:]}"
    return run.said()


def _run_script(
    arguments: list[str], variables: dict[str, str], log: Path, sabotage: Callable[[], None] | None
) -> None:
    """In the new process: its own session, variables and error stream, then the script as python would run it."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # ours would be handed down to the loading workers
    os.environ.update(variables)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    if sabotage:
        sabotage()
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def command(settings: Path, *overrides: str, processes: int = 1, script: Path = SCRIPT) -> list[str]:
    """The command line of a run, with torchrun for more than one process."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return [warm_python(), *(launcher if processes > 1 else []), str(script), str(settings), *overrides]


def slow_script(folder: Path) -> Path:
    """The recipe with steps that last long enough for a signal to arrive in the middle of the run."""
    path = folder / "slow_train_stage1.py"
    path.write_text(
        "import runpy, time\n"
        "from transformers.trainer_callback import CallbackHandler\n"
        "begin = CallbackHandler.on_step_begin\n"
        "CallbackHandler.on_step_begin = lambda *args: (time.sleep(0.3), begin(*args))[1]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    return path


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


def wait_for(path: Path) -> None:
    """Return when the file is there."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} has not appeared"
        time.sleep(0.02)


def lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample_ids(run_dir: Path) -> dict[int, list[int]]:
    """The ids of each step, over all ranks and micro-batches, as recorded by the last process that made the step."""
    steps: dict[int, list[int]] = {}
    for path in sorted(run_dir.glob("samples-rank*.jsonl")):
        for line in lines(path):
            steps.setdefault(line["step"], []).extend(index for batch in line["ids"] for index in batch)
    return {step: sorted(ids) for step, ids in steps.items()}


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in lines(run_dir / "metrics.jsonl") if "loss" in line}


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a saved model."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
