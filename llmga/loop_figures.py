"""The figures of `llmga.loop`: metrics.jsonl, trackers, the progress line, and where the time goes."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmga.config import dump_config
from llmga.progress import RunProgress
from llmga.runtime import memory_gb, on_main, sum_over_ranks
from llmga.trackers import wandb_run

if TYPE_CHECKING:
    from llmga.loop import Job, Place


class LoopFigures:
    """Collects what happens in steps and writes a line every so often.

    A line's `loss` is the mean over the steps since the line before, over all processes; `loader_wait` the share of
    those steps' time that this process waited for its data. Time spent saving and measuring is not counted.

    Args:
        totals: as `state` gave them at the checkpoint that the run goes on from; empty for a new run.
    Attributes:
        totals: `samples` since the run began, over all processes and restarts.
    """

    def __init__(self, cfg: Any, place: "Place", job: "Job", totals: Mapping[str, Any]) -> None:
        self.cfg, self.place, self.job = cfg, place, job
        self.totals: dict[str, int] = {"samples": int(totals.get("samples", 0))}
        self._sums: dict[str, float] = dict(totals.get("sums", {}))
        self._count = int(totals.get("count", 0))  # steps in the sums
        self._pending: dict[str, Tensor] = {}  # on the device: adding waits for nothing
        self._norms: dict[str, Tensor] = {}
        self._steps = 0  # in the clock since the last line
        self._busy = self._all_busy = self._waited = 0.0
        self._mark = time.perf_counter()
        self._progress = RunProgress(job.total_steps, shown=place.ranks.is_main)
        if cfg.run.trackers:
            self._init_trackers()

    def _init_trackers(self) -> None:
        project, wandb = "llmga", dict[str, str]()
        if "wandb" in self.cfg.run.trackers:
            wandb = wandb_run(self.cfg.run.output_dir)
            project = wandb.pop("project")
        self.place.accelerator.init_trackers(project, _flat_settings(dump_config(self.cfg)), {"wandb": wandb})

    def __enter__(self) -> "LoopFigures":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def start(self) -> None:
        """The first step begins now."""
        self.resume_clock()

    def resume_clock(self) -> None:
        """What was done since the last step was no training."""
        self._mark = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """The loader kept the step waiting."""
        self._waited += seconds

    def add(self, losses: Sequence[Mapping[str, Tensor]], norms: Mapping[str, Tensor]) -> None:
        """The scalars of a step's passes."""
        for scalars in losses:
            for name, value in scalars.items():
                share = value.double() / len(losses)  # sums of float32 are exact in it, in whatever order
                self._pending[name] = self._pending[name] + share if name in self._pending else share
        self._norms = dict(norms)
        self._count += 1
        self.totals["samples"] += self.place.examples_per_step

    def passed(self, step: int) -> None:
        """A step is made; its time is counted up to here."""
        now = time.perf_counter()
        self._busy += now - self._mark
        self._all_busy += now - self._mark
        self._mark = now
        self._steps += 1
        self._progress.advance(step)

    def log(self, step: int) -> None:
        """Write the line of a step; all ranks call."""
        self._settle()
        busy, count = max(self._busy, 1e-9), max(self._count, 1)
        first = self.job.learners[0]
        line: dict[str, Any] = {name: value / count for name, value in self._sums.items()}
        line["lr"] = first.groups[0]["lr"]
        for number, (name, norm) in enumerate(self._norms.items()):
            line["grad_norm" if number == 0 else f"grad_norm_{name}"] = float(norm)
        line["samples_per_s"] = round(self._steps * self.place.examples_per_step / busy, 3)
        line["loader_wait"] = round(self._waited / busy, 4)
        line["samples"] = self.totals["samples"]
        if self.job.samples_per_epoch:
            line["epoch"] = round(self.totals["samples"] / self.job.samples_per_epoch, 6)
        done = step - self.place.first_step
        line["eta_s"] = round(self._all_busy / max(done, 1) * (self.job.total_steps - step), 1)
        line |= memory_gb()
        more = on_main(lambda: dict(self.job.figures(step)) if self.job.figures else {})
        self.report(step, line | more)
        self._sums, self._count, self._steps = {}, 0, 0
        self._busy = self._waited = 0.0

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures to metrics.jsonl, trackers and the terminal, on rank 0."""
        if self.place.ranks.is_main:
            self.place.run.metrics.write(step, **figures)
            self._progress.report(step, dict(figures))
        if self.cfg.run.trackers:
            self.place.accelerator.log(dict(figures), step=step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the next line after resuming reads as in an unbroken run; all ranks call."""
        self._settle()
        return {"samples": self.totals["samples"], "sums": dict(self._sums), "count": self._count}

    def _settle(self) -> None:
        """Bring the pending sums to the host, as means over the processes."""
        if not self._pending:
            return
        names = sorted(self._pending)
        mine = torch.stack([self._pending[name] for name in names]).double().tolist()
        means = [value / self.place.ranks.world_size for value in sum_over_ranks(mine)]
        for name, value in zip(names, means, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._pending = {}


def _flat_settings(value: Any, key: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with text, which every tracker takes."""
    if not isinstance(value, dict):
        return {key: str(value)}
    flat: dict[str, str] = {}
    for name, inner in value.items():
        flat |= _flat_settings(inner, f"{key}.{name}" if key else name)
    return flat
