"""The training loop of everything that transformers' Trainer does not train: Stable Diffusion and DiffRIR.

A trainer says what differs, in a `Job`: data, networks with their losses, what is measured and how the result is saved.
All else is here, once: processes, precision, accumulation, checkpoints, signals, figures, and errors in one sentence.

Example i of the data is a pure function of i, and step s takes the examples from (s - 1) x `examples_per_step` on,
whatever the number of processes. Before each forward pass torch's generator is set from (seed, step, pass, rank). So
there is no state of samplers or generators to save: resuming is nothing but starting at a later example, and is exact.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from llmga.checkpoint import checkpoint_path, checkpoint_step, keep_last, mark_complete, read_marker
from llmga.checkpoint import write_folder_atomically as written_whole
from llmga.config import dump_config
from llmga.engine import build_accelerator, engine_name
from llmga.learner import Learner
from llmga.loop_data import batches_of
from llmga.loop_figures import LoopFigures
from llmga.memory import explaining_memory, lost_worker
from llmga.nodes.preflight import start_together
from llmga.non_finite import BAD_GRADIENT, save_and_stop
from llmga.provenance import made_with, write_provenance
from llmga.run_folder import RunFolder, check_fits, explaining_full_disk, way_on
from llmga.runtime import (
    Interrupted,
    Ranks,
    StopSignal,
    any_rank,
    barrier,
    from_main,
    on_main,
    seed_everything,
    sum_over_ranks,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a job runs; given to the trainer before it builds anything.

    Attributes:
        run: the run folder.
        accelerator: devices and precision; `accelerator.device` is where networks go.
        ranks: this process among the others.
        examples_per_step: over all processes and forward passes.
        checkpoint: what the run goes on from, or None.
    """

    run: RunFolder
    accelerator: Accelerator
    ranks: Ranks
    examples_per_step: int
    checkpoint: Path | None

    @property
    def first_step(self) -> int:
        """Steps that are done already."""
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


@dataclass
class Job:
    """What a trainer brings.

    Attributes:
        total_steps: where the run ends.
        examples: `examples[i]` is example i of the run, for i below total_steps x examples_per_step; loaded by
            `run.num_workers` processes.
        collate: list of examples to a batch: a dict of tensors (moved to the device), and anything else (left alone).
            `sample_ids` and `texts` in it are written down when the batch turns out bad.
        learners: in the order in which their losses are taken; all step together.
        export: writes the result into an empty folder, on rank 0.
        samples_per_epoch: rows of the data, for the figure `epoch`.
        validate: held-out figures after a step, every `run.eval_every_steps` and at the end; all ranks call it and
            get the same. Names begin with `eval_`.
        show: sample pictures after a step, every `run.sample_every_steps` and at the end; all ranks call it.
        figures: more figures for a log line after a step, on rank 0; may raise RunFailed to end the run.
        provenance: what the result was made from, for `provenance.json`.
    """

    total_steps: int
    examples: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    learners: Sequence[Learner]
    export: Callable[[Path], None]
    samples_per_epoch: int = 0
    validate: Callable[[int], Mapping[str, float]] | None = None
    show: Callable[[int], None] | None = None
    figures: Callable[[int], Mapping[str, float]] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def run_loop(cfg: Any, build: Callable[[Place], Job]) -> Path:
    """Run a job, or go on with it, to its end.

    Args:
        cfg: checked settings with `run: RunConfig` and `optim: OptimConfig`.
        build: makes networks and data ready; every process calls it.
    Returns:
        The result's folder, `final/` in the run folder. A run that is finished already returns at once.
    Raises:
        Interrupted: stopped by a signal, with the state saved.
        RunFailed: a loss that is not finite, a full disk, too little memory.
        ValueError: settings, data, networks or checkpoint do not fit each other; the message says what to change.
    """
    engine = engine_name(cfg.run.deepspeed)
    ranks = start_together(cfg, with_deepspeed=engine != "plain")
    run = RunFolder(cfg.run.output_dir)
    if from_main(run.is_finished and cfg.run.resume):
        run.say_finished(cfg)
        return run.final
    signals = StopSignal()
    try:
        with explaining_memory(cfg.run):
            place, fit = _start(cfg, run, ranks, engine)
            return _Loop(cfg, place, build(place), signals, fit).run()
    except KeyboardInterrupt:
        raise Interrupted(f"aborted at once; {way_on(run)}") from None
    finally:
        signals.close()


def _start(cfg: Any, run: RunFolder, ranks: Ranks, engine: str) -> tuple[Place, dict[str, Any]]:
    """Make folder and process ready; also the facts that a checkpoint must agree with."""
    examples_per_step = cfg.run.batch_size * cfg.run.accumulation_steps * ranks.world_size
    fit = {"examples_per_step": examples_per_step, "engine": engine, "world_size": ranks.world_size}
    checkpoint = on_main(lambda: run.start(cfg, cfg.run.resume))
    if checkpoint:
        check_fits(checkpoint, **fit)
        logger.info("going on from %s", checkpoint)
    seed_everything(cfg.run.seed)
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    accelerator = build_accelerator(cfg.run, cfg.optim, ranks.world_size)
    return Place(run, accelerator, ranks, examples_per_step, checkpoint), fit


class _Loop:
    """`run_loop`, once everything is built."""

    def __init__(self, cfg: Any, place: Place, job: Job, signals: StopSignal, fit: dict[str, Any]) -> None:
        self.cfg, self.place, self.job, self.signals, self.fit = cfg, place, job, signals, fit
        self.accelerator = place.accelerator
        self.with_deepspeed = fit["engine"] != "plain"
        for learner in job.learners:
            self._prepare(learner)
        totals = read_marker(place.checkpoint)["totals"] if place.checkpoint else {}
        self.figures = LoopFigures(cfg, place, job, totals)
        if place.checkpoint:
            self._load(place.checkpoint)

    def run(self) -> Path:
        """Train to the end, save, and say so."""
        run, total = self.place.run, self.job.total_steps
        if self.signals.agreed():
            raise Interrupted(f"stopped by {self.signals.received} before the first step; {way_on(run)}")
        with self.figures, explaining_full_disk(run):
            batches = self._batches()
            self.figures.start()
            for step in range(self.place.first_step + 1, total + 1):
                stopping = self._step(step, batches)
                self._after(step, stopping)
                if stopping and step < total:
                    raise Interrupted(f"stopped by {self.signals.received} after step {step} of {total}; {way_on(run)}")
            on_main(self._export)
        for tracker in self.accelerator.trackers:  # `end_training` would part the processes, which another run may need
            tracker.finish()
        logger.info("finished after %d steps and %d samples: %s", total, self.figures.totals["samples"], run.final)
        return run.final

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> bool:
        """One optimizer step of every learner; whether any process was asked to stop."""
        held: list[dict[str, Any]] = []
        passes = self.cfg.run.accumulation_steps
        losses: list[dict[str, Tensor]] = []
        for learner in self.job.learners:
            learner.set_lr(step - 1)
        for number in range(passes):
            waiting = time.perf_counter()
            batch = self._next(batches)
            self.figures.waited(time.perf_counter() - waiting)
            held.append(batch)
            batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
            torch.manual_seed(_pass_seed(self.cfg.run.seed, step, number, self.place.ranks.rank))
            losses.append(self._forward_and_backward(batch, number == passes - 1, step, held))
        norms = {learner.name: self._clip(learner) for learner in self.job.learners}
        total = torch.stack([loss.float() for pass_losses in losses for loss in pass_losses.values()])
        fine = total.isfinite().all() & torch.stack(list(norms.values())).isfinite().all()
        stop, bad = sum_over_ranks([float(self.signals.received is not None), float(not fine)])
        if bad:
            finite = bool(total.isfinite().all())
            self._stop_at(step, BAD_GRADIENT if finite else f"the loss is {float(total[~total.isfinite()][0])}", held)
        for learner in self.job.learners:
            if not self.with_deepspeed:
                learner.optimizer.step()
                learner.optimizer.zero_grad(set_to_none=True)
            if learner.ema is not None:
                learner.ema.step()
        self.figures.add(losses, norms)
        if stop and self.signals.received is None:
            self.signals.received = "a signal to another rank"
        return bool(stop)

    def _forward_and_backward(
        self, batch: dict[str, Any], last: bool, step: int, held: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """One pass of every learner; its losses and other scalars, by the name they are logged under."""
        scalars: dict[str, Tensor] = {}
        for learner in self.job.learners:
            with contextlib.ExitStack() as while_this_learns:
                for other in self.job.learners:
                    if other is not learner:
                        while_this_learns.enter_context(other.frozen())
                if not last:
                    while_this_learns.enter_context(self.accelerator.no_sync(learner.wrapped))
                result = learner.loss(learner.wrapped, batch)
                loss, more = result if isinstance(result, tuple) else (result, {})
                scalars[_loss_name(learner, self.job)] = loss.detach()
                scalars |= {name: value.detach() for name, value in more.items()}
                if self.with_deepspeed:  # makes its step inside; what is not finite must not get so far
                    if any_rank(not bool(loss.detach().isfinite())):
                        self._stop_at(step, f"the loss is {float(loss.detach())}", held)
                    self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)
                else:
                    self.accelerator.backward(loss / self.cfg.run.accumulation_steps)
        return scalars

    def _clip(self, learner: Learner) -> Tensor:
        """Clip a learner's gradient; its norm before."""
        if self.with_deepspeed:
            return torch.as_tensor(learner.wrapped.get_global_grad_norm() or 0.0).float().cpu()
        limit = learner.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(learner.trained.values(), limit)

    def _after(self, step: int, stopping: bool) -> None:
        """What is due after a step: figures, held-out loss, pictures, a checkpoint."""
        run, last = self.cfg.run, step == self.job.total_steps
        self.figures.passed(step)
        if step == 1 or step % run.log_every_steps == 0 or last:
            self.figures.log(step)
        if self.job.validate and not stopping and (last or _due(step, run.eval_every_steps)):
            self.figures.report(step, self.job.validate(step))
        if self.job.show and not stopping and run.sample_every_steps and (last or _due(step, run.sample_every_steps)):
            self.job.show(step)
        if stopping or last or _due(step, run.save_every_steps):
            self._save(step)
        self.figures.resume_clock()

    # ---------------------------------------------------------------- data

    def _batches(self) -> Iterator[dict[str, Any]]:
        """This process's batches, from the first step that is not done."""
        passes = self.cfg.run.accumulation_steps
        return batches_of(
            self.job.examples,
            self.job.collate,
            self.cfg.run,
            self.place.ranks,
            range(self.place.first_step * passes, self.job.total_steps * passes),
            pinned=self.accelerator.device.type == "cuda",
        )

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        try:
            return next(batches)
        except (ConnectionError, EOFError) as error:  # its end of the pipe is closed
            raise lost_worker(self.cfg.run) from error

    # ---------------------------------------------------------------- state

    def _prepare(self, learner: Learner) -> None:
        """Hand a learner to DDP or DeepSpeed, where there is one."""
        learner.module.train()
        if self.cfg.run.compile:
            learner.module.compile(dynamic=False)  # with dynamic shapes, a second change of length breaks
        if self.with_deepspeed:
            assert len(self.job.learners) == 1, "DeepSpeed takes one network"
            learner.wrapped, _ = self.accelerator.prepare(learner.module, learner.optimizer)
            if self.cfg.run.precision == "bf16":  # DeepSpeed casts the weights and, without autocast, nothing else
                learner.module.register_forward_pre_hook(_inputs_in_bf16, with_kwargs=True)
        else:
            learner.wrapped = self.accelerator.prepare(learner.module)

    def _save(self, step: int) -> None:
        folder = checkpoint_path(self.place.run.path, step)
        facts = {**self.fit, "totals": self.figures.state()}
        on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        if self.with_deepspeed:
            self.job.learners[0].wrapped.save_checkpoint(str(folder), tag="deepspeed")
        barrier()
        on_main(lambda: self._write_checkpoint(folder, facts))

    def _write_checkpoint(self, folder: Path, facts: dict[str, Any]) -> None:
        for learner in self.job.learners:
            learner.save(folder)
            if not self.with_deepspeed:
                learner.save_optimizer(folder)
        mark_complete(folder, **facts)
        keep_last(self.place.run.path, self.cfg.run.keep_last)

    def _load(self, checkpoint: Path) -> None:
        for learner in self.job.learners:
            learner.load(checkpoint, checkpoint_step(checkpoint), with_optimizer=not self.with_deepspeed)
        if self.with_deepspeed:
            self.job.learners[0].wrapped.load_checkpoint(str(checkpoint), tag="deepspeed")

    def _export(self) -> None:
        for learner in self.job.learners:
            learner.module = self.accelerator.unwrap_model(learner.wrapped, keep_fp32_wrapper=False)
        facts = {
            **self.job.provenance,
            "steps": self.job.total_steps,
            **{key: value for key, value in self.figures.totals.items() if key == "samples"},
            "config": dump_config(self.cfg),
            **made_with(),
        }
        with written_whole(self.place.run.final) as folder:
            self.job.export(folder)
            write_provenance(folder, facts)

    def _stop_at(self, step: int, what: str, held: list[dict[str, Any]]) -> None:
        """Save the step's batches and end the run on every rank."""
        told = ("sample_ids", "texts")
        named: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (_flat(batch), {key: list(batch[key]) for key in told if key in batch}) for batch in held
        ]
        save_and_stop(self.place.run.path, self.place.ranks, step, what, named)


def _pass_seed(seed: int, step: int, number: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, number, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _loss_name(learner: Learner, job: Job) -> str:
    return "loss" if learner is job.learners[0] else f"loss_{learner.name}"


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _inputs_in_bf16(module: torch.nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    """What a network is called with, in bf16; not numbers such as timesteps, which it embeds in float32 first."""
    return tuple(map(_in_bf16, arguments)), {name: _in_bf16(value) for name, value in keywords.items()}


def _in_bf16(value: Any) -> Any:
    is_features = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    return value.to(torch.bfloat16) if is_features else value


def _flat(batch: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tensors of a batch under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in batch.items():
        if torch.is_tensor(value):
            flat[prefix + key] = value
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
    return flat
