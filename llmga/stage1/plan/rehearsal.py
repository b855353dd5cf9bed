"""One training step rehearsed on tensors that have shapes and no storage: what it would hold in memory, counted.

The model's own code runs, forward and backward, at the real batch size; every tensor that would be allocated is counted
while it lives. So activations need no formula per architecture, and a GPU and a CPU are asked the same question. Layers
that are alike run a few times only (`depth`). What stays the same from step to step (weights, optimizer states) is
counted in `states`.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._mode_utils import no_dispatch

from llmga.muon import orthogonal, split_parameters
from llmga.stage1.cross_entropy import LossHead, summed_cross_entropy, use_chunked_cross_entropy
from llmga.stage1.model import is_in_llm_block
from llmga.stage1.packed_attention import use_packed_sdpa
from llmga.stage1.plan.depth import mark_stages, peaks_at_full_depth
from llmga.stage1.plan.live_bytes import GRADIENTS, LiveBytes, Peaks, fullest


@dataclass(frozen=True)
class BatchShape:
    """One micro-batch on one device.

    Attributes:
        rows: of the batch; 1 when conversations are packed.
        tokens: per row, padding and picture placeholders included.
        pictures: in all rows together.
        trained: tokens with a label, in all rows together.
        packed: conversations in the one row, told apart without a mask; 0 for padded rows.
    """

    rows: int
    tokens: int
    pictures: int
    trained: int
    packed: int = 0


@dataclass(frozen=True)
class HowToStep:
    """What of the settings changes the memory of a step.

    Attributes:
        autocast: fp32 weights computing in bf16, as plain and DDP runs with `precision: bf16` do.
        checkpointing: activations of a layer are computed again in the backward pass.
        chunked: the loss is made of the trained tokens alone, a chunk of logits at a time.
        gradients: "stay" (as from the second micro-batch of a step on), "arrive" (the only micro-batch: they come while
            activations go), "leave" (DeepSpeed takes each one away as it comes).
    """

    autocast: bool = False
    checkpointing: bool = False
    chunked: bool = False
    gradients: str = "arrive"


def rehearse_step(model: nn.Module, batch: BatchShape, how: HowToStep) -> dict[str, int]:
    """Bytes that live at the fullest moment of forward and backward pass, without weights and optimizer states.

    Args:
        model: a `LlavaForConditionalGeneration` on the meta device, with `requires_grad` set.
        batch: on one device.
        how: see there.
    Returns:
        Bytes by part: activations, logits and loss, gradients.
    """
    peak = fullest(peaks_at_full_depth(model, lambda copy: rehearse_stages(copy, batch, how)))
    if how.gradients == "stay":
        peak[GRADIENTS] = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return peak


def rehearse_stages(model: nn.Module, batch: BatchShape, how: HowToStep) -> Peaks:
    """The fullest moment of each stage of a step, all of the model's layers taken; it is used up."""
    model.train()
    if how.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    _off_the_meta_device(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _without_storage():
        inputs = _inputs(model.config, batch)
        if batch.packed:
            use_packed_sdpa(model.model.language_model)
        if how.chunked:
            use_chunked_cross_entropy(model)
            model.lm_head = _RehearsedHead(model.lm_head, batch.trained)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if how.gradients == "stay" else None
        staying = [parameter.grad for parameter in parameters if parameter.grad is not None]
        given = [value for value in inputs.values() if isinstance(value, Tensor)]
        live = LiveBytes([*model.parameters(), *model.buffers(), *given, *staying])
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(live.on_gradient if how.gradients != "leave" else _drop)
        mark_stages(model, live)
        model.lm_head.register_forward_pre_hook(live.on_logits)
        forward = _computing_in_bf16(model) if how.autocast else model
        with live:
            output = forward(**inputs, use_cache=False)
            loss = output["loss"]
            del output
            loss.backward()
    return live.peaks


def rehearse_muon(model: nn.Module) -> int:
    """The most bytes that Muon's step takes beside its states, while it makes all matrices of one shape orthogonal.

    Counted in the matrices' own dtype, as on a CPU; a GPU computes in bfloat16 and takes less.
    """
    shapes = Counter(tuple(matrix.shape) for matrix in split_parameters(model, is_in_llm_block)[0])
    peaks = [0]
    for shape, count in shapes.items():
        with _without_storage():
            gradients = [torch.empty(shape) for _ in range(count)]
            live = LiveBytes(gradients)
            with live:
                orthogonal(torch.stack([gradient.lerp(gradient, 0.95) for gradient in gradients]))
        peaks.append(sum(fullest(live.peaks).values()))
    return max(peaks)


@contextmanager
def _without_storage() -> Iterator[None]:
    """Tensors made here have a device, which decides about autocast and kernels, but take no memory."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # its checks look at values, and there are none
    former = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with _MODE:
            yield
    finally:
        os.environ.pop(name) if former is None else os.environ.update({name: former})


_MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all: tensors of two do not mix


def _off_the_meta_device(model: nn.Module) -> None:
    """Give every parameter and buffer a device; tied ones stay one."""
    made: dict[int, Tensor] = {}
    with _without_storage():
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    own[name] = made[id(tensor)]


def _inputs(config: Any, batch: BatchShape) -> dict[str, Any]:
    """A batch as the collators make it."""
    shape, side = (batch.rows, batch.tokens), config.vision_config.image_size
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.zeros(shape, dtype=torch.long),
        "pixel_values": torch.zeros(max(batch.pictures, 1), 3, side, side),
    }
    if not batch.packed:
        return {**inputs, "attention_mask": torch.zeros(shape, dtype=torch.long)}
    bounds = np.linspace(0, batch.tokens, batch.packed + 1).astype(np.int32)
    with no_dispatch():  # its values are looked at
        segments = torch.from_numpy(bounds)
    return {
        **inputs,
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "cu_seq_lens_q": segments,
        "cu_seq_lens_k": segments,
        "max_length_q": int(np.diff(bounds).max()),
        "max_length_k": int(np.diff(bounds).max()),
    }


class _RehearsedHead(LossHead):
    """`LossHead` that is told how many tokens are trained, where it would look at labels that have no values."""

    def __init__(self, head: LossHead, trained: int) -> None:
        nn.Module.__init__(self)
        self.weight: nn.Parameter = head.weight
        self.num_trained = trained

    def forward(self, hidden: Tensor) -> Tensor:
        trained = hidden[:, :-1].flatten(0, 1)[: self.num_trained].clone()
        return summed_cross_entropy(trained, self.weight, torch.zeros(len(trained), dtype=torch.long))


def _computing_in_bf16(model: nn.Module) -> Any:
    """As accelerate wraps a model for mixed precision."""

    def forward(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    return convert_outputs_to_fp32(forward)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
