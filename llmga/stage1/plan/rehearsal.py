"""One training step rehearsed on tensors that have shapes and no storage: what it would hold in memory, counted.

The model's own code runs, forward and backward, at full depth and at the real batch size; every tensor that would be
allocated is counted while it lives. So activations need no formula per architecture, and a GPU and a CPU are asked the
same question. What stays the same from step to step (weights, optimizer states) is counted in `states`.
"""

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ACTIVATIONS, LOSS, GRADIENTS = "activations", "logits and loss", "gradients"


@dataclass(frozen=True)
class BatchShape:
    """One micro-batch on one device.

    Attributes:
        rows: of the batch; 1 when conversations are packed.
        tokens: per row, padding and picture placeholders included.
        pictures: in all rows together.
    """

    rows: int
    tokens: int
    pictures: int


@dataclass(frozen=True)
class HowToStep:
    """What of the settings changes the memory of a step.

    Attributes:
        autocast: fp32 weights computing in bf16, as plain and DDP runs with `precision: bf16` do.
        checkpointing: activations of a layer are computed again in the backward pass.
        packed: rows hold several conversations told apart by their positions, without a mask.
        gradients: "stay" (as from the second micro-batch of a step on), "arrive" (the only micro-batch: they come while
            activations go), "leave" (DeepSpeed takes each one away as it comes).
    """

    autocast: bool = False
    checkpointing: bool = False
    packed: bool = False
    gradients: str = "arrive"


def rehearse_step(model: nn.Module, batch: BatchShape, how: HowToStep) -> dict[str, int]:
    """Bytes that live at the fullest moment of forward and backward pass, without weights and optimizer states.

    Args:
        model: a `LlavaForConditionalGeneration` built inside `without_storage`, with `requires_grad` set.
        batch: on one device.
        how: see there.
    Returns:
        Bytes by part: activations, logits and loss, gradients.
    """
    model.train()
    if how.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with without_storage():
        inputs = _inputs(model.config, batch, how)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if how.gradients == "stay" else None
        staying = [parameter.grad for parameter in parameters if parameter.grad is not None]
        live = _LiveBytes([*model.parameters(), *model.buffers(), *inputs.values(), *staying])
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(live.on_gradient if how.gradients != "leave" else _drop)
        model.lm_head.register_forward_pre_hook(live.on_logits)
        forward = _computing_in_bf16(model) if how.autocast else model
        with live:
            output = forward(**inputs, use_cache=False)
            loss = output["loss"]
            del output
            loss.backward()
    peak = dict(live.peak)
    if how.gradients == "stay":
        peak[GRADIENTS] = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return peak


@contextmanager
def without_storage() -> Iterator[None]:
    """Tensors made here take no memory."""
    global _MODE
    if _MODE is None:
        _MODE = FakeTensorMode(allow_non_fake_inputs=True)
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # its checks look at values, and there are none
    former = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with _MODE:
            yield
    finally:
        os.environ.pop(name) if former is None else os.environ.update({name: former})


_MODE: FakeTensorMode | None = None  # one for all: tensors of two do not mix


def _inputs(config: Any, batch: BatchShape, how: HowToStep) -> dict[str, Tensor]:
    """A batch as the collator makes it."""
    shape, side = (batch.rows, batch.tokens), config.vision_config.image_size
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.zeros(shape, dtype=torch.long),
        "pixel_values": torch.zeros(max(batch.pictures, 1), 3, side, side),
    }
    inputs["position_ids" if how.packed else "attention_mask"] = torch.zeros(shape, dtype=torch.long)
    return inputs


def _computing_in_bf16(model: nn.Module) -> Any:
    """As accelerate wraps a model for mixed precision."""

    def forward(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    return convert_outputs_to_fp32(forward)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@dataclass
class _Storage:
    size: int
    part: str
    watcher: Any = None


@dataclass
class _LiveBytes(TorchDispatchMode):
    """Counts what lives, by part.

    Args:
        known: tensors that are not to be counted.
    Attributes:
        now, peak: bytes by part; `peak` is of the moment when their sum was highest.
    """

    known: Any
    now: dict[str, int] = field(default_factory=lambda: {ACTIVATIONS: 0, LOSS: 0, GRADIENTS: 0})
    peak: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._part = ACTIVATIONS
        self._storages: dict[int, _Storage] = {}
        self._kept = [tensor.untyped_storage() for tensor in self.known]  # so that their addresses are not used again
        self._known = {storage._cdata for storage in self._kept}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._meet(value)
        return result

    def on_gradient(self, parameter: Tensor) -> None:
        """Hook: a gradient that stays."""
        assert parameter.grad is not None
        storage = self._storages.get(parameter.grad.untyped_storage()._cdata)
        if storage is not None and storage.part != GRADIENTS:
            self.now[storage.part] -= storage.size
            self.now[GRADIENTS] += storage.size
            storage.part = GRADIENTS

    def on_logits(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Hook: from here on it is logits and loss, until the backward pass has left the head."""
        self._part = LOSS
        if args[0].requires_grad:
            args[0].register_hook(self._after_logits)

    def _after_logits(self, gradient: Tensor) -> None:
        self._part = ACTIVATIONS

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._storages:
            return
        size = storage.nbytes()
        met = self._storages[key] = _Storage(size, self._part)
        met.watcher = weakref.finalize(storage, self._leave, key)
        self.now[self._part] += size
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)

    def _leave(self, key: int) -> None:
        gone = self._storages.pop(key)
        self.now[gone.part] -= gone.size
