"""What every parameter is called in the released checkpoints: one table, read in both directions."""

import re

from llmga.diffrir.network import DiffRIR

ENCODER_OF_PHASE = {"prior": "E", "diffusion": "condition"}
ALIASES = {"diffusion.condition.": "condition.", "diffusion.model.": "denoise."}
"""What released checkpoints of the diffusion phase hold twice: prefix of the copy, prefix of the original."""

_BLOCK = {
    "attention.temperature": "attn.temperature",
    "attention.project_in.gain": "norm1.body.weight",
    "attention.project_in.offset": "norm1.body.bias",
    "attention.project_in.modulation": "attn.kernel.0",
    "attention.project_in.projection": "attn.qkv",
    "attention.depthwise": "attn.qkv_dwconv",
    "attention.project_out": "attn.project_out",
    "feed_forward.project_in.gain": "norm2.body.weight",
    "feed_forward.project_in.offset": "norm2.body.bias",
    "feed_forward.project_in.modulation": "ffn.kernel.0",
    "feed_forward.project_in.projection": "ffn.project_in",
    "feed_forward.depthwise": "ffn.dwconv",
    "feed_forward.project_out": "ffn.project_out",
}
_GENERATOR = {
    "embed": "patch_embed.proj",
    "downs.0.0": "down1_2.body.0",
    "downs.1.0": "down2_3.body.0",
    "downs.2.0": "down3_4.body.0",
    "ups.2.0": "up4_3.body.0",
    "ups.1.0": "up3_2.body.0",
    "ups.0.0": "up2_1.body.0",
    "reducers.1": "reduce_chan_level3",
    "reducers.0": "reduce_chan_level2",
    "tail.0": "tail.0.0",
    "tail.2": "tail.0.2",
    "tail.4": "tail.1",
}
_LEVELS = {"encoders": "encoder_level", "decoders": "decoder_level"}
_IN_A_LEVEL = re.compile(r"(encoders|decoders)\.(\d)\.(\d+)\.(.*)|(latent|refinement)\.(\d+)\.(.*)")
_POINTWISE = re.compile(r"G\..*\.(attn\.qkv|attn\.project_out|ffn\.project_in|ffn\.project_out)\.weight")


def released_names(model: DiffRIR) -> dict[str, str]:
    """The released name of each of a network's parameters, `{ours: released}`, without duplicates and buffers."""
    names = {}
    for own in model.state_dict():
        part, rest = own.split(".", 1)
        if part == "generator":
            names[own] = f"G.{_generator_name(rest)}"
        elif part == "prior_encoder":
            names[own] = f"{ENCODER_OF_PHASE[model.phase]}.{_encoder_name(rest, len(model.prior_encoder.blocks))}"
        else:
            names[own] = f"denoise.{_denoiser_name(rest)}"
    return names


def is_pointwise(released: str) -> bool:
    """Whether a weight is a matrix in our blocks and a 1x1 convolution, (out, in, 1, 1), in released ones."""
    return _POINTWISE.fullmatch(released) is not None


def _generator_name(own: str) -> str:
    match = _IN_A_LEVEL.fullmatch(own)
    if match is None:
        return _renamed(own, _GENERATOR)
    level, number, block, rest, single, single_block, single_rest = match.groups()
    if single:
        return f"{single}.{single_block}.{_renamed(single_rest, _BLOCK)}"
    return f"{_LEVELS[level]}{int(number) + 1}.{block}.{_renamed(rest, _BLOCK)}"


def _encoder_name(own: str, num_blocks: int) -> str:
    """Released encoders count activations as layers: beside residual blocks, every other number is a convolution."""
    part, *rest = own.split(".")
    if part == "head":
        return f"E.0.{rest[0]}"
    if part == "blocks":
        block, _, conv, kind = rest
        return f"E.{int(block) + 2}.body.{2 * int(conv)}.{kind}"
    index, kind = rest
    return f"E.{num_blocks + 2 + 2 * int(index)}.{kind}" if part == "widening" else f"mlp.{2 * int(index)}.{kind}"


def _denoiser_name(own: str) -> str:
    _, index, kind = own.split(".")
    return f"resmlp.0.{kind}" if index == "0" else f"resmlp.{int(index) + 1}.resmlp.0.{kind}"


def _renamed(own: str, table: dict[str, str]) -> str:
    """A name that a table holds, whole or without its last part."""
    if own in table:
        return table[own]
    module, kind = own.rsplit(".", 1)
    return f"{table[module]}.{kind}"
