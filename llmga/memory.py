"""Too little memory, in one sentence that names the setting which would fit."""

import contextlib
from collections.abc import Iterator

import torch

from llmga.config import RunConfig
from llmga.run_folder import RunFolder, way_on
from llmga.runtime import RunFailed

_CPU_TEXT = "DefaultCPUAllocator"


@contextlib.contextmanager
def explaining_memory(run: RunConfig) -> Iterator[None]:
    """Turn a device's or machine's refusal to give more memory into advice.

    The machine refuses by killing a loading worker; PyTorch tells of it from a signal handler, so anywhere in a step.

    Raises:
        RunFailed: instead of PyTorch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # a worker's own errors keep their type
            raise lost_worker(run) from error
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_TEXT not in str(error):
            raise
        reason = next(iter(str(error).splitlines()), "out of memory")
        raise RunFailed(f"out of memory ({reason:.160}); try {memory_advice(run)}") from error


def lost_worker(run: RunConfig) -> RunFailed:
    """The error of a run whose loading worker is gone."""
    return RunFailed(
        "a loading worker was killed, most often for lack of memory; lower run.num_workers, or give the machine more; "
        f"{way_on(RunFolder(run.output_dir))}"
    )


def memory_advice(run: RunConfig) -> str:
    """The next setting to change, the cheapest first: same result, then less speed, then sharing over devices."""
    steps = []
    if run.precision == "fp32":
        steps.append("run.precision=bf16")
    if not run.gradient_checkpointing:
        steps.append("run.gradient_checkpointing=true (a third more time, same result)")
    if run.batch_size > 1:
        half = (run.batch_size + 1) // 2
        more = run.accumulation_steps * 2 if run.batch_size % 2 == 0 else run.accumulation_steps * run.batch_size
        half = half if run.batch_size % 2 == 0 else 1
        steps.append(f"run.batch_size={half} run.accumulation_steps={more} (same batch per step)")
    if run.deepspeed is None:
        steps.append("on several devices run.deepspeed=configs/deepspeed/zero2.json")
    return ", then ".join(steps) if steps else "a smaller resolution, or a device with more memory"
