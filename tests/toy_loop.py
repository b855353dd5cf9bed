"""A job small enough for a test of `llmga.loop`: a noisy regression, and a pair of networks that play a game."""

import json
import os
import signal
import time
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from llmga.config import STRICT, OptimConfig, RunConfig
from llmga.learner import Learner, fused_adamw, lr_factor
from llmga.loop import Job, Place, run_loop

WIDTH = 4


@dataclass(config=STRICT)
class ToyLoopConfig:
    """What every trainer's settings have, and what goes wrong."""

    run: RunConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    adversary: bool = False  # a second network, which learns to tell answers from predictions
    ema: bool = True
    dropout: float = 0.25
    bad_example: int | None = None  # its answer is not a number
    kill_at: int | None = None  # example whose loading kills the process
    term_at: int | None = None  # example whose loading asks the process to stop
    memory_at: int | None = None  # example whose forward pass finds no memory
    seconds: float = 0.0  # that each forward pass takes longer


class Noisy:
    """Example i: a point and its answer, drawn from i alone."""

    def __init__(self, cfg: ToyLoopConfig) -> None:
        self.cfg = cfg

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.cfg.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.cfg.term_at:
            os.kill(os.getpid(), signal.SIGTERM)
        rng = np.random.default_rng([7, index])
        point = rng.standard_normal(WIDTH, dtype=np.float32)
        answer = float("nan") if index == self.cfg.bad_example else float(point.sum())
        return {"id": f"row{index}", "index": index, "point": point, "answer": np.float32(answer)}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "point": torch.tensor(np.stack([example["point"] for example in examples])),
        "answer": torch.tensor([example["answer"] for example in examples]),
        "index": torch.tensor([example["index"] for example in examples]),
        "sample_ids": [example["id"] for example in examples],
    }


def build(cfg: ToyLoopConfig, place: Place) -> Job:
    """A network with dropout, which draws from torch's generator; with an adversary, a second one."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(cfg.dropout), nn.Linear(8, 1))
    judge = nn.Linear(1, 1)
    total = cfg.run.max_steps or 8
    seen: dict[str, Tensor] = {}

    def predict_loss(wrapped: nn.Module, batch: dict[str, Any]) -> Any:
        if cfg.memory_at is not None and cfg.memory_at in batch["index"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        time.sleep(cfg.seconds)
        predicted = wrapped(batch["point"]).squeeze(1)
        seen["predicted"] = predicted.detach()
        error = nn.functional.mse_loss(predicted, batch["answer"])
        if not cfg.adversary:
            return error, {"half": error / 2}
        return error - 0.1 * judge(predicted[:, None]).mean()

    def judge_loss(wrapped: nn.Module, batch: dict[str, Any]) -> Tensor:
        return wrapped(seen["predicted"][:, None]).mean() - wrapped(batch["answer"][:, None]).mean()

    def learner(name: str, module: nn.Module, loss: Any) -> Learner:
        factor = lr_factor(cfg.optim, total)
        ema = 0.9 if cfg.ema else None
        return Learner(name, module, fused_adamw(module.parameters(), cfg.optim), loss, factor, 1.0, ema)

    learners = [learner("net", net, predict_loss)]
    if cfg.adversary:
        learners.append(learner("judge", judge, judge_loss))

    def validate(step: int) -> dict[str, float]:
        points = collate([Noisy(ToyLoopConfig(cfg.run))[10_000 + i] for i in range(16)])
        with learners[0].averaged() as averaged:
            return {"eval_loss": nn.functional.mse_loss(averaged(points["point"]).squeeze(1), points["answer"]).item()}

    return Job(
        total_steps=total,
        examples=Noisy(cfg),
        collate=collate,
        learners=learners,
        export=lambda folder: torch.save(learners[0].module.state_dict(), folder / "net.pt"),
        samples_per_epoch=16,
        validate=validate,
        show=lambda step: (place.run.path / f"shown-{step}").touch(),
        provenance={"stage": "toy"},
    )


def train(cfg: ToyLoopConfig) -> Path:
    return run_loop(cfg, lambda place: build(cfg, place))


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run wrote to metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, name: str = "loss") -> dict[int, float]:
    """step -> figure, where it was written."""
    return {line["step"]: line[name] for line in lines(folder) if name in line}
