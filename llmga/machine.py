"""The machine that a figure was measured on, in plain words."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine_in_words(*libraries: str, threads: int | None = None, note: str = "") -> str:
    """Say what a figure was measured on, for a result file.

    Args:
        libraries: packages whose versions matter to the figure.
        threads: how many were used; None for all cores.
        note: what else a reader should know, such as other work on the machine.
    Returns:
        One line, such as "1 thread of 2 cores (AMD EPYC), 24 GB memory, Linux, Python 3.11.7, torch 2.12.1; quiet".
    """
    cores = f"{os.cpu_count()} cores ({_processor()})"
    where = cores if threads is None else f"{threads} thread{'s' * (threads > 1)} of {cores}"
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"{name} {version(name).split('+')[0]}" for name in libraries]
    parts = [where, f"{memory_gb:.0f} GB memory", platform.system(), f"Python {platform.python_version()}", *versions]
    return ", ".join(parts) + (f"; {note}" if note else "")


def matrix_peak_tflops(device: Any, side: int = 8192, repeats: int = 20) -> float:
    """The fastest of several bf16 products of two square matrices, in TFLOP/s: what the device does at best.

    Args:
        device: a `torch.device`.
        side: of the matrices.
        repeats: products, after one to warm up.
    """
    import torch  # the rest of this module is for machines without it as well

    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    fastest = float("inf")
    for repeat in range(1 + repeats):
        start = time.perf_counter()
        matrix @ matrix
        if matrix.is_cuda:
            torch.cuda.synchronize(device)
        if repeat:
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest / 1e12


def _processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())
