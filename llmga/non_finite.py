"""A loss or gradient that is not finite ends a run before it reaches the weights, and leaves its batch to look at."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

from llmga.files import atomic_write
from llmga.runtime import Ranks, RunFailed

BAD_GRADIENT = "the gradient is not finite although the loss is"


class NonFiniteLossError(RunFailed):
    """The loss or a gradient became NaN or infinite; the batch is saved and the weights are as before the step."""


def save_and_stop(
    run_dir: Path, ranks: Ranks, step: int, what: str, batches: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> NoReturn:
    """Save this rank's batches of a step and raise; all ranks call it.

    Args:
        run_dir: they go to `non_finite/step-<n>/` in it.
        step: the optimizer step that is not made.
        what: the problem, as a sentence without a full stop.
        batches: for each forward pass its tensors (what is no tensor is left out), and facts for the report.
    Raises:
        NonFiniteLossError: always.
    """
    folder = run_dir / "non_finite" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    report = []
    for number, (tensors, facts) in enumerate(batches):
        name = f"rank{ranks.rank}-batch{number}.safetensors"
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items() if torch.is_tensor(value)},
            folder / name,
        )
        report.append({"file": name, **facts})
    content = {"step": step, "problem": what, "batches": report}
    atomic_write(folder / f"rank{ranks.rank}.json", json.dumps(content, indent=1, ensure_ascii=False))
    raise NonFiniteLossError(
        f"step {step}: {what}. The weights were not touched and the batch is in {folder}. "
        "Look at its texts, or lower optim.lr or raise optim.warmup, and run again"
    )
