"""What a stage-2 run will do and need, without running it: steps, parameters, memory per device, arithmetic.

The UNet is built without weights and run without numbers (PyTorch's meta device); what it would keep for its backward
pass and how many operations it makes are counted as it runs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llmga.engine import engine_name
from llmga.recipe import plan_page
from llmga.records import RecordError
from llmga.stage2.config import Stage2Config
from llmga.stage2.parts import PipelineError, add_adapter, check_task, read_part_config
from llmga.stage2.sources import Stage2DataError, open_sources
from llmga.tokens import CHUNK_TOKENS

_TABLE = Path(__file__).with_name("architectures.yaml")
_BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Upsample2D", "Downsample2D")  # what checkpointing runs again
OUTSIDE_GIB = 1.5  # CUDA context and libraries, which the allocator does not see; assumed
_ENCODER_GFLOP = {512: 1117.0, 1024: 4879.0}  # of the published autoencoder, for one picture


@dataclass(frozen=True)
class Counted:
    """What one example costs in the UNet.

    Attributes:
        kept_bytes: for the backward pass, without recomputation, in the precision of the arithmetic.
        checkpointed_bytes: with gradient checkpointing: the inputs of all blocks, and the largest block run again.
        forward_flops: of the forward pass.
    """

    kept_bytes: float
    checkpointed_bytes: float
    forward_flops: float


@dataclass(frozen=True)
class Stage2Plan:
    """Everything that is told."""

    cfg: Stage2Config
    devices: int
    steps: int | None
    rows: int | None
    parameters: dict[str, int]
    trained: int
    memory: dict[str, float]
    flops_per_step: float
    missing: list[str]


def make_plan(cfg: Stage2Config, devices: int = 1) -> Stage2Plan:
    """Plan a run; what is not on this machine is named in `missing`.

    Raises:
        PipelineError: neither a pipeline folder nor a row of the table, or a UNet that does not fit the task.
    """
    missing: list[str] = []
    unet_config, parameters, text_width = _architecture(cfg, missing)
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_config(unet_config)
    check_task(cfg.task, unet.config.in_channels, unet.config.out_channels, cfg.model.path)
    parameters["unet"] = sum(parameter.numel() for parameter in unet.parameters())
    low = torch.bfloat16 if cfg.run.precision == "bf16" else torch.float32
    if cfg.model.lora is not None:
        unet.requires_grad_(False)
        with torch.device("meta"):
            add_adapter(unet, cfg.model.lora)
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    counted = count_example(unet, cfg, low, text_width)
    rows = _rows(cfg, missing)
    per_step = cfg.run.batch_size * cfg.run.accumulation_steps * devices
    steps = cfg.run.max_steps
    if steps is None and rows is not None:
        steps = math.ceil((cfg.run.epochs or 1.0) * rows / per_step)
    memory = _memory(cfg, parameters, trained, counted, devices, 2 if low is torch.bfloat16 else 4)
    flops = (4 if cfg.run.gradient_checkpointing else 3) * counted.forward_flops + _encoder_flops(cfg)
    return Stage2Plan(cfg, devices, steps, rows, parameters, trained, memory, flops * per_step, missing)


def count_example(unet: nn.Module, cfg: Stage2Config, dtype: torch.dtype, text_width: int, factor: int = 8) -> Counted:
    """Run a UNet of the meta device on one example of a config and count."""
    side = cfg.data.resolution // factor
    length = CHUNK_TOKENS * (cfg.model.max_chunks or 4) + 2
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    unet = unet.to(dtype).train()
    config: Any = unet.config
    meta = {"device": "meta", "dtype": dtype}
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(1, pooled, **meta), "time_ids": torch.zeros(1, 6, **meta)}
    sample = torch.zeros(1, config.in_channels, side, side, **meta)
    text = torch.zeros(1, length, text_width, **meta)
    kept, blocks, inputs = _Kept(unet), [0.0], [0.0]

    def enter(module: nn.Module, arguments: Any, keywords: Any) -> None:
        module._kept_before = kept.bytes
        first = arguments[0] if arguments else keywords["hidden_states"]
        inputs[0] += first.numel() * first.element_size()

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        blocks[0] = max(blocks[0], kept.bytes - module._kept_before)

    handles = []
    for module in unet.modules():
        if type(module).__name__ in _BLOCKS:
            handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)
            ]  # fmt: skip
    flops = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor)
    try:
        with _fused_attention(), hooks, flops:
            timestep = torch.zeros(1, device="meta")
            unet(sample, timestep, encoder_hidden_states=text, added_cond_kwargs=added)
    finally:
        for handle in handles:
            handle.remove()
    assert learning
    return Counted(kept.bytes, inputs[0] + blocks[0], float(flops.get_total_flops()))


class _Kept:
    """Bytes of the distinct tensors that a forward pass saves, parameters apart."""

    def __init__(self, module: nn.Module) -> None:
        self._seen = {id(parameter) for parameter in module.parameters()}
        self._alive: list[Tensor] = []  # an id is unique as long as its tensor lives
        self.bytes = 0.0

    def pack(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(tensor, nn.Parameter) and id(base) not in self._seen:
            self._seen.add(id(base))
            self._alive.append(base)
            self.bytes += base.numel() * base.element_size()
        return tensor


class _FusedAttention(torch.autograd.Function):
    """Attention as a fused kernel keeps it: queries, keys, values and the result, no matrix of weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2))  # counted, kept by nobody
        torch.bmm(key.new_empty(query.shape[0] * query.shape[1], query.shape[2], key.shape[2]), value.flatten(0, 1))
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


@contextmanager
def _fused_attention() -> Iterator[None]:
    real = nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **keywords: Any) -> Tensor:
        return _FusedAttention.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = real


def _architecture(cfg: Stage2Config, missing: list[str]) -> tuple[dict[str, Any], dict[str, int], int]:
    """The UNet's config, the parameters of the other parts, and the width of the text."""
    folder = cfg.model.path
    if (folder / "model_index.json").is_file():
        config = read_part_config(folder, "unet")
        sizes = {"vae": _weights_of(folder, "vae"), "text encoders": _weights_of(folder, "text_encoder*")}
        width = config["cross_attention_dim"]
        return config, sizes, max(width) if isinstance(width, list) else width
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    row = next((row for row in table.values() if folder.name in row["folders"]), None)
    if row is None:
        known = ", ".join(name for row in table.values() for name in row["folders"])
        raise PipelineError(f"{folder} is not on this machine, and its size is not known; known are {known}")
    missing.append(f"{folder}: sizes of {row['source']} are taken from a table")
    return dict(row["unet"]), dict(row["parameters"]), int(row["text_width"])


def _weights_of(folder: Path, pattern: str) -> int:
    """Parameters of a part, by its safetensors headers."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob(f"{pattern}/*.safetensors"):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _rows(cfg: Stage2Config, missing: list[str]) -> int | None:
    try:
        return sum(len(source) for source in open_sources(cfg.data.sources, "data.sources"))
    except (RecordError, Stage2DataError, OSError) as error:
        missing.append(str(error))
        return None


def _memory(
    cfg: Stage2Config, parameters: dict[str, int], trained: int, counted: Counted, devices: int, low: int
) -> dict[str, float]:
    """GiB per device of each kind."""
    engine = engine_name(cfg.run.deepspeed) if cfg.run.deepspeed and cfg.run.deepspeed.is_file() else "plain"
    shared = devices if engine in ("zero1", "zero2") else 1
    frozen = parameters["unet"] - trained if cfg.model.lora is not None else 0
    others = sum(count for part, count in parameters.items() if part != "unet")
    per_example = counted.checkpointed_bytes if cfg.run.gradient_checkpointing else counted.kept_bytes
    parts = {
        "weights of the UNet": 4 * trained + low * frozen,
        "frozen parts": low * others,
        "gradients": 4 * trained,
        "optimizer states": 8 * trained / shared,
        "running average": 4 * trained if cfg.objective.ema else 0,
        "weights in bf16 (autocast)": 2 * trained if low == 2 else 0,
        "activations": per_example * cfg.run.batch_size,
    }
    return {name: value / 2**30 for name, value in parts.items()} | {"outside PyTorch": OUTSIDE_GIB}


def _encoder_flops(cfg: Stage2Config) -> float:
    """Of the autoencoder for one example, by the area; the published one's."""
    pictures = (0 if cfg.cache.path else 1) + (cfg.task == "inpainting")
    nearest = min(_ENCODER_GFLOP, key=lambda side: abs(side - cfg.data.resolution))
    return pictures * _ENCODER_GFLOP[nearest] * 1e9 * (cfg.data.resolution / nearest) ** 2


def plan_text(plan: Stage2Plan) -> str:
    """A plan as text for a terminal."""
    cfg, run = plan.cfg, plan.cfg.run
    per_step = run.batch_size * run.accumulation_steps * plan.devices
    steps = "steps unknown, because rows are" if plan.steps is None else f"{plan.steps:,} steps"
    rows = "" if plan.rows is None else f" over {plan.rows:,} rows"
    time = []
    if plan.steps is not None:
        hours = plan.flops_per_step * plan.steps / plan.devices / 1e14 / 3600
        time = [f"{hours:,.1f} hours at 100 TFLOP/s on each device"]
    sections = {
        "data": [
            f"{steps}{rows}; {run.batch_size} examples x {run.accumulation_steps} forward passes x {plan.devices} "
            f"devices = {per_step:,} examples a step"
        ],
        "parameters": [
            *(f"{part:<14} {count:>15,}" for part, count in plan.parameters.items()),
            f"{'learning':<14} {plan.trained:>15,}",
        ],
        "memory per device": [
            *(f"{part:<28} {size:6.2f} GiB" for part, size in plan.memory.items()),
            f"{'together':<28} {sum(plan.memory.values()):6.2f} GiB",
        ],
        "arithmetic": [
            f"{plan.flops_per_step / 1e12:,.1f} TFLOP a step, {plan.flops_per_step / per_step / 1e12:.2f} an example",
            *time,
        ],
        "not on this machine": [f"- {note}" for note in plan.missing],
    }
    return plan_page(cfg, sections, "nothing was trained and nothing written")
