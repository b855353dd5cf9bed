"""Who owns optimizer and weights: PyTorch alone or with DDP, or DeepSpeed as its file says."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin

from llmga.config import OptimConfig, RunConfig
from llmga.runtime import RuntimeSetupError
from llmga.trackers import tracker_names


def engine_name(deepspeed: Path | None) -> str:
    """Who owns optimizer and weights: "plain" (alone or DDP), or "zero0" to "zero3"."""
    if deepspeed is None:
        return "plain"
    return f"zero{deepspeed_settings(deepspeed)['zero_optimization'].get('stage', 0)}"


def deepspeed_settings(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed file and add what it must not leave to DeepSpeed's defaults.

    A file silent on clipping clips at 1.0 whatever `optim.max_grad_norm` says, and without gathering there would be no
    model to save. An optimizer in host memory would be exchanged for DeepSpeed's own, which has to be compiled, with a
    CUDA toolkit; torch's fused AdamW runs there as well. Two switches that would let a gradient that is not finite
    reach the weights are taken out.
    """
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        settings.setdefault(key, "auto")
    settings.setdefault("gradient_clipping", "auto")
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.setdefault("bf16", {}).setdefault("enabled", "auto")
    settings.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True
    settings["zero_optimization"].pop("compute_grad_norm", None)
    settings["bf16"].pop("check_grad_overflow", None)
    return settings


def build_accelerator(run: RunConfig, optim: OptimConfig, world_size: int) -> Accelerator:
    """accelerate's door to devices, precision, DDP, DeepSpeed and trackers, for `llmga.loop`.

    What an earlier run of this process chose is forgotten, as transformers' Trainer forgets it: accelerate would refuse
    another precision.

    Raises:
        RuntimeSetupError: a DeepSpeed file that spreads the weights themselves (ZeRO-3).
    """
    if run.precision == "bf16" and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="bf16" if run.precision == "bf16" else "no",
        gradient_accumulation_steps=1,  # the loop counts its own forward passes
        cpu=not torch.cuda.is_available() and run.deepspeed is None,  # accelerate would leave DeepSpeed out
        deepspeed_plugin=None if run.deepspeed is None else _deepspeed_plugin(run, optim, world_size),
        log_with=tracker_names(run.trackers) or None,
        project_dir=run.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def _deepspeed_plugin(run: RunConfig, optim: OptimConfig, world_size: int) -> DeepSpeedPlugin:
    """The file with every "auto" filled from our settings."""
    assert run.deepspeed is not None
    settings = deepspeed_settings(run.deepspeed)
    stage = settings["zero_optimization"].get("stage", 0)
    if stage == 3:
        raise RuntimeSetupError(
            f"run.deepspeed: {run.deepspeed} spreads the weights over the processes (ZeRO-3), which this trainer does "
            "not do; give a file of stage 2, such as configs/deepspeed/zero2.json"
        )
    ours = {
        "train_micro_batch_size_per_gpu": run.batch_size,
        "gradient_accumulation_steps": run.accumulation_steps,
        "train_batch_size": run.batch_size * run.accumulation_steps * world_size,
        "gradient_clipping": optim.max_grad_norm,
    }
    for key, value in ours.items():
        if settings[key] == "auto":
            settings[key] = value
    if settings["bf16"]["enabled"] == "auto":
        settings["bf16"]["enabled"] = run.precision == "bf16"
    zero = settings["zero_optimization"]
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]  # DeepSpeed's own default
    settings["zero_allow_untested_optimizer"] = True  # torch's AdamW
    return DeepSpeedPlugin(hf_ds_config=settings)
