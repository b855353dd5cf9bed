"""Muon: momentum whose updates are made orthogonal, for weight matrices; AdamW for all else (Jordan et al., 2024).

torch's own `Muon` computes in bfloat16 alone, which a CPU does hundreds of times slower than float32, and takes one
matrix at a time; this one takes all matrices of a shape together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan's Newton-Schulz step: steep at 0, near 1 between 0.7 and 1.2
_STEPS = 5
_MOMENTUM = 0.95
_RMS = 0.2  # of an update's entries, as AdamW's are wont to have (Liu et al., 2025, section 2.2)


class Muon(torch.optim.AdamW):
    """Muon for the hidden layers' weights, AdamW for all else: embeddings, norms, biases, first and last layers.

    A convolution's weight is a matrix of as many rows as it has outputs.

    Args:
        model: gives the parameters to train.
        is_hidden: tells by its name whether a parameter belongs to a hidden layer.
        lr: AdamW's rate.
        matrix_lr: Muon's, on AdamW's scale.
        settings: AdamW's betas, eps and weight decay; the matrices have that decay too, vectors have none.
    """

    def __init__(
        self, model: nn.Module, is_hidden: Callable[[str], bool], lr: float, matrix_lr: float, **settings: Any
    ) -> None:
        matrices, others = split_parameters(model, is_hidden)
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in others if parameter.ndim > 1]},
            {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
            {"params": matrices, "lr": matrix_lr, "matrices": True},
        ]
        super().__init__([group for group in groups if group["params"]], lr=lr, **settings, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of both kinds."""
        gradients = {p: p.grad for group in self._of_matrices() for p in group["params"] if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None  # AdamW passes over it
        loss = super().step(closure)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for group in self._of_matrices():
            self._update(group)
        return loss

    def _of_matrices(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group.get("matrices")]

    def _update(self, group: dict[str, Any]) -> None:
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes[tuple(parameter.shape)].append(parameter)
        for alike in shapes.values():
            self._update_alike(alike, group["lr"], group["weight_decay"])

    def _update_alike(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """All matrices of one shape; what it takes beside the states is gone when the next shape's turn comes."""
        updates = orthogonal(torch.stack([self._momentum(parameter).flatten(1) for parameter in parameters]))
        rate = lr * _RMS * max(updates.shape[1:]) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(update.view_as(parameter), alpha=-rate)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov's look ahead along the running mean of the gradients."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # AdamW looks for it when it reads a saved state
        mean = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        return parameter.grad.lerp(mean, _MOMENTUM)


def split_parameters(
    model: nn.Module, is_hidden: Callable[[str], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained weights of hidden layers that have two or more dimensions, and all other trained parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter.ndim > 1 and is_hidden(name) else others).append(parameter)
    return matrices, others


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: all singular values are brought to between 0.7 and 1.2.

    Args:
        matrices: (N, rows, columns); on a CPU computed as they are, on a GPU in bfloat16.
    Returns:
        (N, rows, columns) in the same dtype.
    """
    flat = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = flat.to(torch.bfloat16 if flat.is_cuda else flat.dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    x = x.to(matrices.dtype)
    return x.mT if flat is not matrices else x
