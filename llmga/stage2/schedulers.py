"""Samplers by the names that people use."""

from difflib import get_close_matches
from typing import Any

# name -> class in diffusers, and what differs from the pipeline's own settings
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


class SchedulerError(ValueError):
    """A sampler that does not exist."""


def scheduler_by_name(name: str, present: Any) -> Any:
    """A scheduler with the noise schedule and prediction type of the one at hand.

    Args:
        name: a key of `SCHEDULERS`.
        present: the pipeline's own scheduler.
    Raises:
        SchedulerError: the name is unknown.
    """
    if name not in SCHEDULERS:
        close = get_close_matches(name, SCHEDULERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SchedulerError(f"scheduler {name!r} is unknown, expected one of {', '.join(SCHEDULERS)}{hint}")
    import diffusers

    kind, changes = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(present.config, **changes)
