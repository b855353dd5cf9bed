"""The settings of a released checkpoint, read off its keys and shapes: it stores none."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmga.diffrir.network import GRID, RestorerError
from llmga.diffrir.reference import SCALES

LEVEL_NAMES = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
_FIRST_CONV = "G.patch_embed.proj.weight"


class CheckpointError(RestorerError):
    """A released checkpoint that cannot be converted; the sentence names the keys."""


def released_settings(weights: Mapping[str, Tensor], schedule: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `DiffRIR` for a checkpoint.

    Args:
        weights: released key to tensor, without duplicates and buffers.
        schedule: its diffusion buffers, by their full key; without them the published schedule is taken.
    Raises:
        CheckpointError: keys by which a setting is read are missing, or of no known size.
    """
    kinds = {"prior": any(key.startswith("E.") for key in weights), "diffusion": "denoise.resmlp.0.weight" in weights}
    phases = [phase for phase, found in kinds.items() if found]
    if _FIRST_CONV not in weights or len(phases) != 1:
        prefixes = sorted({key.split(".")[0] for key in weights})
        raise CheckpointError(
            f"this is no DiffRIR checkpoint: its keys begin with {', '.join(prefixes[:8]) or 'nothing'}; "
            f"expected {_FIRST_CONV} and either E.* (phase prior) or condition.* and denoise.* (phase diffusion)"
        )
    dim, in_channels = weights[_FIRST_CONV].shape[:2]
    scale, reference = _scale_of(in_channels)
    encoder = "E.E." if phases == ["prior"] else "condition.E."
    first = "G.encoder_level1.0."
    return {
        "scale": scale,
        "phase": phases[0],
        "reference": reference,
        "dim": dim,
        "num_blocks": [_count(weights, rf"G\.{name}\.(\d+)\.attn\.temperature") for name in LEVEL_NAMES],
        "num_refinement_blocks": _count(weights, r"G\.refinement\.(\d+)\.attn\.temperature"),
        "heads": [_get(weights, f"G.{name}.0.attn.temperature").shape[0] for name in LEVEL_NAMES],
        "ffn_expansion_factor": _expansion(weights),
        "bias": first + "attn.qkv.bias" in weights,
        "norm": "with_bias" if first + "norm1.body.bias" in weights else "bias_free",
        "prior_width": _get(weights, first + "attn.kernel.0.weight").shape[1],
        "num_prior_blocks": _count(weights, re.escape(encoder) + r"(\d+)\.body\.0\.weight"),
        "num_denoiser_layers": _count(weights, r"denoise\.resmlp\.(\d+)\.resmlp\.0\.weight"),
        **_betas(schedule),
    }


def _scale_of(in_channels: int) -> tuple[int, bool]:
    """Scale and whether there is a reference, from the channels of the first convolution."""
    known = {
        (3 + 3 * scale**2 * reference) * (GRID // scale) ** 2: (scale, reference)
        for scale in SCALES
        for reference in (True, False)
    }
    if in_channels not in known:
        sizes = ", ".join(map(str, sorted(known)))
        raise CheckpointError(f"{_FIRST_CONV} takes {in_channels} channels; expected one of {sizes}")
    return known[in_channels]


def _expansion(weights: Mapping[str, Tensor]) -> float:
    """The roundest factor that gives every level's hidden width, which is rounded down."""
    low, high = 0.0, math.inf
    for name in LEVEL_NAMES:
        width, hidden = _get(weights, f"G.{name}.0.ffn.project_out.weight").shape[:2]
        low, high = max(low, hidden / width), min(high, (hidden + 1) / width)
    for digits in range(12):
        factor = math.ceil(low * 10**digits) / 10**digits
        if low <= factor < high:
            return factor
    raise CheckpointError(f"the hidden widths of {', '.join(LEVEL_NAMES)} follow from no common expansion factor")


def _betas(schedule: Mapping[str, Tensor]) -> dict[str, Any]:
    betas = schedule.get("diffusion.betas")
    if betas is None:
        return {}
    start, end = (float(f"{beta:.6g}") for beta in (betas[0].item(), betas[-1].item()))
    return {"timesteps": len(betas), "linear_start": start, "linear_end": end}


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in weights if (match := re.fullmatch(pattern, key))})


def _get(weights: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in weights:
        raise CheckpointError(f"this checkpoint has no {key}; expected a whole DiffRIR checkpoint")
    return weights[key]
