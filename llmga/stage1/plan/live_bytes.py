"""Counts the bytes of all tensors that live, by what they are for, while code runs under it."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ACTIVATIONS, LOSS, GRADIENTS = "activations", "logits and loss", "gradients"

# Kernels that hold a copy of their first argument while they work, which no operator below them shows.
_COPYING_KERNELS = (torch.ops.aten.logsumexp.default,)


@dataclass
class _Storage:
    size: int
    part: str
    watcher: Any = None


@dataclass
class LiveBytes(TorchDispatchMode):
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

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _COPYING_KERNELS:
            self._note_peak(args[0].numel() * args[0].element_size())
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
        self._note_peak()

    def _note_peak(self, extra: int = 0) -> None:
        """Remember this moment if it is the fullest; `extra` bytes live for it alone, in the part at hand."""
        if sum(self.now.values()) + extra > sum(self.peak.values()):
            self.peak = {**self.now, self._part: self.now[self._part] + extra}

    def _leave(self, key: int) -> None:
        gone = self._storages.pop(key)
        self.now[gone.part] -= gone.size
