"""Where a result was made: versions, machine, command and commit, for the files that tell it."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llmga.runtime import ranks_from_environment

_LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "deepspeed", "safetensors", "numpy", "Pillow")


def environment() -> dict[str, Any]:
    """Versions, machine, command and commit of this process, as plain values for a JSON file."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.platform(),
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "world_size": ranks_from_environment().world_size,
    }


def commit() -> str | None:
    """The commit that this package runs from, with `+changes` when files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        if not (Path(git("rev-parse", "--show-toplevel")) / "llmga" / "environment.py").is_file():
            return None  # a checkout of something else that happens to hold our environment
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
