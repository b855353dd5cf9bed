"""wandb and TensorBoard: which are there, which wandb run goes on, and sample pictures for both."""

import importlib.util
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmga.checkpoint import atomic_write
from llmga.runtime import RuntimeSetupError

_WANDB_VARIABLES = {"project": "WANDB_PROJECT", "dir": "WANDB_DIR", "id": "WANDB_RUN_ID", "resume": "WANDB_RESUME"}


def tracker_names(trackers: Sequence[str]) -> list[str]:
    """The trackers as transformers and accelerate name them.

    Raises:
        RuntimeSetupError: the package of a tracker is not installed.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise RuntimeSetupError(
                f"run.trackers: {name!r} needs the package {name!r}, which is not installed; "
                f"run `pip install {name}` or take it off the list (metrics.jsonl is written in any case)"
            )
    return list(trackers)


def wandb_run(run_dir: Path) -> dict[str, str]:
    """`project`, `dir`, `id` and `resume` for `wandb.init`: a folder is one run, which goes on when training resumes.

    What the environment says (WANDB_PROJECT, ...) goes first.
    """
    path = run_dir / "wandb" / "run_id"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and os.environ.get("RANK", "0") == "0":
        atomic_write(path, secrets.token_hex(4))
    ours = {
        "project": "llmga",
        "dir": str(run_dir),
        "id": path.read_text() if path.exists() else "",
        "resume": "allow",
    }
    return {key: os.environ.get(_WANDB_VARIABLES[key]) or value for key, value in ours.items()}


def export_wandb_run(run_dir: Path) -> None:
    """`wandb_run` by way of the environment, for transformers' Trainer, which asks nothing else."""
    for key, value in wandb_run(run_dir).items():
        os.environ[_WANDB_VARIABLES[key]] = value


def log_pictures(trackers: Sequence[Any], step: int, pictures: Sequence[np.ndarray]) -> None:
    """Hand sample pictures to the trackers that take some.

    Args:
        trackers: of accelerate.
        pictures: (H, W, 3) uint8 each, all of one size.
    """
    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}  # it expects channels first
            tracker.log_images({"samples": np.stack(pictures)}, step=step, **layout)
