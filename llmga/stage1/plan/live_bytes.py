"""Counts the bytes of all tensors that live, by what they are for, while code runs under it."""

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ACTIVATIONS, LOSS, GRADIENTS = "activations", "logits and loss", "gradients"
Stage = tuple[Any, ...]  # of the work: who works, and what at
Live = Counter[tuple[Any, str]]  # (who made it, part) -> bytes
Peaks = dict[Stage, Live]

# Kernels that hold a copy of their first argument while they work, which no operator below them shows.
_COPYING_KERNELS = (torch.ops.aten.logsumexp.default,)


def fullest(peaks: Peaks) -> dict[str, int]:
    """Bytes by part at the stage that holds most."""
    live = max(peaks.values(), key=Counter.total)
    return {kind: sum(live[key] for key in live if key[1] == kind) for kind in (ACTIVATIONS, LOSS, GRADIENTS)}


@dataclass
class _Storage:
    size: int
    key: tuple[Any, str]
    watcher: Any = None


@dataclass
class LiveBytes(TorchDispatchMode):
    """Counts what lives, by who made it and what for.

    Args:
        known: tensors that are not to be counted.
    Attributes:
        now: what lives.
        peaks: for each stage of the work, what lived when it was most.
    """

    known: Any
    now: Live = field(default_factory=Counter)
    peaks: Peaks = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._part = ACTIVATIONS
        self._stage: Stage = ("start",)
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

    def enter(self, stage: Stage) -> None:
        """Another stage of the work begins."""
        self._stage = stage
        self._note_peak()

    def on_gradient(self, parameter: Tensor) -> None:
        """Hook: a gradient that stays."""
        assert parameter.grad is not None
        storage = self._storages.get(parameter.grad.untyped_storage()._cdata)
        if storage is not None:
            self.now[storage.key] -= storage.size
            storage.key = (storage.key[0], GRADIENTS)
            self.now[storage.key] += storage.size

    def on_logits(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Hook: from here on it is logits and loss, until the backward pass has left the head."""
        self._part = LOSS
        self.enter((LOSS,))
        if args[0].requires_grad:
            args[0].register_hook(self._after_logits)

    def _after_logits(self, gradient: Tensor) -> None:
        self._part = ACTIVATIONS

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._storages:
            return
        met = self._storages[key] = _Storage(storage.nbytes(), (self._stage[0], self._part))
        met.watcher = weakref.finalize(storage, self._leave, key)
        self.now[met.key] += met.size
        self._note_peak()

    def _note_peak(self, extra: int = 0) -> None:
        """Remember this moment if it is its stage's fullest; `extra` bytes live for it alone, in the part at hand."""
        if self.now.total() + extra > self.peaks.get(self._stage, Counter()).total():
            self.peaks[self._stage] = self.now + Counter({(self._stage[0], self._part): extra})

    def _leave(self, key: int) -> None:
        gone = self._storages.pop(key)
        self.now[gone.key] -= gone.size
