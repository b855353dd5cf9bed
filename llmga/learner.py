"""A network that learns in `llmga.loop`: its optimizer, its schedule, its running average, its part of a checkpoint."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmga.config import OptimConfig
from llmga.run_folder import ResumeError

Figures = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Figures]]


class RunningAverage:
    """Of a network's weights, in float32; its decay rises as (1 + s) / (10 + s) to its limit, s being steps done.

    What diffusers' `EMAModel` does. That one comes with all of diffusers: seconds of import in every process of a run.

    Attributes:
        weights: what is averaged, by name.
        values: their averages.
        steps: taken in so far.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights, self.decay, self.steps = weights, decay, 0
        self.values = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Take in the weights after an optimizer step; the first ones count alone."""
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 1.0
        self.steps += 1
        values, weights = list(self.values.values()), list(self.weights.values())
        if all(weight.dtype == torch.float32 for weight in weights):
            torch._foreach_lerp_(values, weights, share)
            return
        for value, weight in zip(values, weights, strict=True):
            value.lerp_(weight.float(), share)

    def copy_to_weights(self) -> None:
        """Put the averages in the place of the weights."""
        _fill(self.weights, self.values)


@dataclass(eq=False)
class Learner:
    """One network with what makes it learn. Most runs have one; adversarial ones have two, each with its own loss.

    Attributes:
        name: in file names and, where there are several, in figures.
        module: the network itself, on the device of the run; what of it requires a gradient is trained and saved.
        optimizer: over those parameters, with its highest learning rates.
        loss: takes the network as it must be called (inside DDP or DeepSpeed) and a batch on the device, gives a
            scalar, or a scalar and other scalars to be logged. It reduces over the batch by the mean.
        factor: of the learning rate, by optimizer steps done.
        max_grad_norm: gradients are clipped to it; 0 does not clip.
        ema_decay: of the running average of the weights, or None for no average.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    factor: Callable[[int], float]
    max_grad_norm: float = 0.0
    ema_decay: float | None = None
    wrapped: Any = field(init=False, default=None)  # set by the loop

    def __post_init__(self) -> None:
        """Note what learns, and at which rates at most."""
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(f"no parameter of {self.name} requires a gradient; nothing would be learned")
        self._highest = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.ema = None if self.ema_decay is None else RunningAverage(self.trained, self.ema_decay)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whoever owns it now."""
        owner = getattr(self.wrapped, "optimizer", None) if self.wrapped is not self.module else None
        return list((self.optimizer if owner is None else owner).param_groups)

    def set_lr(self, done: int) -> None:
        """Set the learning rates for the step after `done` ones: a function of the step, nothing to save."""
        for group, highest in zip(self.groups, self._highest, strict=True):
            group["lr"] = highest * self.factor(done)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While another learns: gradients may pass through this network, none are collected in it."""
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.trained.values():
                parameter.requires_grad_(True)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network in eval mode and without gradients, its averaged weights in place where there is an average."""
        was_training = self.module.training
        self.module.eval()
        learned = None
        if self.ema is not None:
            learned = {name: weight.detach().to("cpu", copy=True) for name, weight in self.trained.items()}
            self.ema.copy_to_weights()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            if learned is not None:
                _fill(self.trained, learned)
            self.module.train(was_training)

    # ---------------------------------------------------------------- checkpoints

    def save(self, folder: Path) -> None:
        """Write weights and average, by name; optimizer states are `save_optimizer`'s, since DeepSpeed has its own."""
        save_file(_contiguous(self._learned()), folder / f"{self.name}.safetensors")
        if self.ema is not None:
            save_file(_contiguous(self.ema.values), folder / f"{self.name}.ema.safetensors")

    def save_optimizer(self, folder: Path) -> None:
        """Write the optimizer's states."""
        torch.save(self.optimizer.state_dict(), folder / f"{self.name}.optimizer.pt")

    def load(self, folder: Path, step: int, with_optimizer: bool = True) -> None:
        """Take back what `save` wrote after `step` steps.

        Raises:
            ResumeError: the checkpoint holds other weights than this network learns, or no average.
        """
        _take_back(self._learned(), load_file(folder / f"{self.name}.safetensors"), folder)
        if self.ema is not None:
            path = folder / f"{self.name}.ema.safetensors"
            if not path.is_file():
                raise ResumeError(
                    f"{folder} holds no running average of {self.name}; keep it off as it was, or start anew with "
                    "run.resume=false"
                )
            _take_back(self.ema.values, load_file(path), folder)
            self.ema.steps = step
        if with_optimizer:
            state = torch.load(folder / f"{self.name}.optimizer.pt", map_location="cpu", weights_only=True)
            settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state)
            for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(ours)  # of this run, not of the one that was stopped

    def _learned(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: trained parameters, and buffers that are saved with a network."""
        frozen = {name for name, _ in self.module.named_parameters()} - set(self.trained)
        return {name: value for name, value in self.module.state_dict().items() if name not in frozen}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _take_back(ours: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: Path) -> None:
    """Copy what a checkpoint holds into ours, all of it or none."""
    wrong = sorted(
        name
        for name in ours.keys() | saved.keys()
        if name not in ours or name not in saved or ours[name].shape != saved[name].shape
    )
    if wrong:
        raise ResumeError(
            f"{folder} holds other weights than this run trains: {len(wrong)} are missing, unknown or of another "
            f"shape, first {wrong[0]}; were settings of the model changed? Start anew with run.resume=false"
        )
    _fill(ours, saved)


@torch.no_grad()
def _fill(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])


def fused_adamw(parameters: Iterable[nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW in one kernel per group; three times as fast as PyTorch's loop on a CPU."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def lr_factor(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Warm-up and schedule as stage 1 has them: what the learning rate is multiplied by after so many steps.

    Source: transformers.optimization, whose schedules these are.
    """
    warmup = math.ceil(optim.warmup * total_steps) if optim.warmup < 1 else int(optim.warmup)

    def factor(done: int) -> float:
        if done < warmup:
            return done / max(1, warmup)
        progress = (done - warmup) / max(1, total_steps - warmup)
        if optim.schedule == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return max(0.0, 1 - progress) if optim.schedule == "linear" else 1.0

    return factor
