"""Short training runs on one machine that go on where they were: what the recipes of the toy models share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from llmga.files import written_aside
from llmga.muon import Muon

SAVE_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn: linear warm-up, cosine decay to 0, gradients clipped at norm 1, EMA.

    Where there is a `matrix_lr`, Muon trains the weights inside blocks with it and AdamW all else; else AdamW does all.
    """

    steps: int
    lr: float
    matrix_lr: float | None = None
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    report_every: int = 250

    def factor(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0."""
        return min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))


def fit(
    name: str,
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    schedule: Schedule,
    state_path: Path,
    report: Callable[[nn.Module], str],
    log: Callable[[str], None],
) -> nn.Module:
    """Train a model; killed at any time, the next call loses at most a minute of work and gives the same weights.

    Args:
        name: what log lines start with.
        model: all of whose parameters that want gradients learn, in place.
        loss_of_step: step number, from 0 -> scalar loss; whatever chance decides must come from the step number.
        schedule: see there.
        state_path: where the state is kept while it trains.
        report: averaged weights -> a line about how good they are; called now and then, and at the end.
        log: takes each line.
    Returns:
        a copy of the model with the moving average of its weights, in eval mode.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(model, schedule)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    average = AveragedModel(model, multi_avg_fn=_moving_average(schedule.ema_decay), use_buffers=True)
    parts = {"model": model, "optimizer": optimizer, "rate": rate, "average": average}
    first, started, saved = _load(state_path, parts), time.monotonic(), time.monotonic()
    for step in range(first, schedule.steps):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(model)
        done, now = step + 1, time.monotonic()
        if done % schedule.report_every == 0 or done == schedule.steps:
            left = (now - started) / (done - first) * (schedule.steps - done)
            told = f"step {done}/{schedule.steps}, loss {loss.item():.4f}, {_judged(average, report)}"
            log(f"{name}: {told}, {left:.0f} s left")
        if now - saved > SAVE_EVERY_SECONDS or done == schedule.steps:
            _save(state_path, parts, done)
            saved = now
    return average.module.eval()


def quick_arithmetic() -> torch.autocast:
    """bfloat16 on processors that compute in it; others only imitate it, in up to ten times the time of float32."""
    known = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(known["avx512_bf16"] or known["amx_bf16"]))


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    settings = {"betas": schedule.betas, "weight_decay": schedule.weight_decay}
    if schedule.matrix_lr is not None:
        return Muon(model, _is_hidden, schedule.lr, schedule.matrix_lr, **settings)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(learning, lr=schedule.lr, **settings, fused=True)


def _is_hidden(name: str) -> bool:
    """Whether a parameter belongs to a block of one of diffusers' networks, or to a layer of a transformer."""
    return "_block" in name or ".layers." in name


def _moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Averages whose decay grows to its full value: at a constant 0.998 a fifth of the start is left at step 800."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor) -> None:
        if not averages[0].is_floating_point():  # positions and counts, which do not learn
            torch._foreach_copy_(averages, weights)
            return
        count = int(num_averaged)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + count) / (10 + count)))

    return update


@torch.no_grad()
def _judged(average: AveragedModel, report: Callable[[nn.Module], str]) -> str:
    average.module.eval()
    line = report(average.module)
    average.module.train()
    return line


def _save(path: Path, parts: dict, step: int) -> None:
    with written_aside(path) as aside:
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, aside)


def _load(path: Path, parts: dict) -> int:
    """Restore an interrupted run; the number of steps it has done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def batches(size: int, count: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` items."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
