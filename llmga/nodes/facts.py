"""What one process knows about its machine, its packages and the files of its run: plain values, to be compared."""

import dataclasses
import hashlib
import json
import os
import platform
import re
import resource
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmga.checkpoint import checkpoints, latest_checkpoint
from llmga.config import dump_config
from llmga.runtime import Ranks, device_index, environment

_HEAD_BYTES = 1 << 16  # of a file, to tell it from another one of the same size
_MOST_ENTRIES = 1000  # a larger folder holds pictures, and is not listed
_OPEN_FILES = 65_536  # the limit we ask for; what the system allows may be less
_TRAINED_BYTES = 12  # a parameter in a checkpoint: itself and Adam's two moments, fp32
_NVIDIA = Path("/proc/driver/nvidia/version")


def gather_facts(cfg: Any, ranks: Ranks) -> dict[str, Any]:
    """Everything that is compared between processes and that one of them can know alone.

    Args:
        cfg: checked settings with a `run: RunConfig`.
        ranks: this process among the others.
    Returns:
        `rank`, `host`, `versions`, `settings`, `inputs` (path: what is there), `gpus` visible, `gpu` (this process's
        own, or None), `driver`, `open_files`, `disk` (GB), as JSON knows values.
    Raises:
        RuntimeSetupError: more processes here than GPUs.
    """
    return {
        "rank": ranks.rank,
        "host": platform.node(),
        "versions": versions(),
        "settings": flat_settings(cfg),
        "inputs": {str(path): describe(path) for path in input_paths(cfg)},
        "gpus": torch.cuda.device_count(),
        "gpu": _gpu(ranks),
        "driver": _driver(),
        "open_files": raise_open_files(),
        "disk": disk(cfg),
    }


def versions() -> dict[str, str]:
    """What must be the same everywhere: Python, libraries, CUDA and NCCL as torch brings them, and our own commit."""
    here = environment()
    found = {"Python": here["python"], **here["versions"], "LLMGA": here["commit"] or "no commit"}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def flat_settings(cfg: Any) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return dict(_flat(dump_config(cfg), ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield key, value
        return
    for name, inner in pairs:
        yield from _flat(inner, f"{key}.{name}" if key else str(name))


def input_paths(cfg: Any) -> list[Path]:
    """Every path in the settings that the run reads: all but its own folder."""
    return sorted({path for path in paths_in(cfg)} - {cfg.run.output_dir})


def paths_in(value: Any) -> Iterator[Path]:
    """Every path in settings, or in a part of them."""
    if isinstance(value, Path):
        yield value
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from paths_in(getattr(value, item.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from paths_in(item)


def describe(path: Path) -> str:
    """What tells two copies apart in a moment: size and head of a file, names and sizes of a small folder."""
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                files = [(entry.name, entry) for entry, _ in zip(entries, range(_MOST_ENTRIES + 1), strict=False)]
            if len(files) > _MOST_ENTRIES:
                return f"a folder of more than {_MOST_ENTRIES} files"
            sizes = sorted((name, entry.stat().st_size if entry.is_file() else -1) for name, entry in files)
            return f"a folder of {len(files)} files ({digest(sizes)})"
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()[:8]
        return f"a file of {path.stat().st_size:,} bytes ({head})"
    except OSError as error:
        return f"missing ({error.strerror})"


def digest(value: Any) -> str:
    """Eight hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def raise_open_files() -> int:
    """Lift this process's limit of open files as far as it may, and return it; loading workers inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            return soft
        return wanted
    return _OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def disk(cfg: Any) -> dict[str, Any]:
    """GB free where checkpoints go, GB that one checkpoint takes, and how many more of them will be there at most.

    A checkpoint's size is that of the newest one, `measured`, else an estimate from the weights that the settings name:
    as if all of them learned, so it is far too high for adapters and projectors. `llmga plan` knows better.
    """
    folder = cfg.run.output_dir.absolute()
    kept = latest_checkpoint(folder) if folder.is_dir() else None
    if kept is not None:
        size = float(sum(file.stat().st_size for file in kept.rglob("*") if file.is_file()))
    else:
        size = float(sum(_TRAINED_BYTES * parameters_in(path) for path in input_paths(cfg) if path.is_dir()))
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    more = max(cfg.run.keep_last + 1 - (len(checkpoints(folder)) if kept else 0), 1)  # the next one is whole first
    free = status.f_bavail * status.f_frsize
    return {
        "folder": str(folder),
        "free": free / 1e9,
        "checkpoint": size / 1e9,
        "measured": kept is not None,
        "more": more,
    }


def parameters_in(folder: Path) -> int:
    """Number of values in a folder's safetensors files, from their headers alone; 0 for a folder without any."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for side in tensor["shape"]:
                    size *= side
                count += size
    return count


def _gpu(ranks: Ranks) -> dict[str, Any] | None:
    """Name, identity and memory of this process's GPU."""
    if not torch.cuda.is_available():
        return None
    index = device_index(ranks, torch.cuda.device_count())
    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    identity = getattr(properties, "uuid", None) or uuid.uuid5(uuid.NAMESPACE_DNS, f"{platform.node()}/{index}")
    return {"name": properties.name, "uuid": str(identity), "free_gb": free / 1e9, "total_gb": total / 1e9}


def _driver() -> str | None:
    """The NVIDIA driver's version; None without one."""
    if not _NVIDIA.is_file():
        return None
    found = re.search(r"\b(\d{3,}\.[\d.]+)", _NVIDIA.read_text(errors="replace"))
    return found[1] if found else "unknown"
