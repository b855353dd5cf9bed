"""What happens beside the training loop: figures, checkpoints, stopping, sample replies.

Order matters: the Trainer calls callbacks as `train` lists them, `Figures` first, because the others read its clock.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmga.bad_samples import KINDS, NO_ROOM, BadSampleBudget
from llmga.checkpoint import checkpoint_path, keep_last, mark_complete
from llmga.progress import RunProgress
from llmga.runtime import MetricsLog, Ranks, StopSignal, barrier, memory_gb, on_main
from llmga.stage1.held_out import TOKEN_LOSS
from llmga.stage1.watch import BatchWatch


class Figures(TrainerCallback):
    """Writes metrics.jsonl and shows the progress; adds its figures to what wandb and TensorBoard receive.

    Args:
        log: metrics.jsonl.
        watch: counts what went through the model.
        progress: the bar or the lines.
        ranks: rank 0 writes.
        samples_per_epoch: rows of all sources together.
        replaced: how many examples were replaced or left out up to a step, by kind.
    Attributes:
        totals: samples, tokens and trained tokens since the run began, over all ranks and restarts.
    """

    def __init__(
        self,
        log: MetricsLog,
        watch: BatchWatch,
        progress: RunProgress,
        ranks: Ranks,
        samples_per_epoch: int,
        replaced: Callable[[int], Mapping[str, int]],
    ) -> None:
        self.log, self.watch, self.progress, self.ranks = log, watch, progress, ranks
        self.samples_per_epoch, self.replaced = samples_per_epoch, replaced
        self.totals = {"samples": 0, "tokens": 0, "trained_tokens": 0}
        self._new = dict.fromkeys(self.totals, 0)
        self._mark = self._busy = self._all_busy = 0.0  # seconds; busy: training, without saving and evaluating
        self._first_step = 0

    def take_counts(self) -> dict[str, int]:
        """Bring `totals` up to date and return a copy; every rank must call at the same point."""
        for name, count in zip(self.totals, self.watch.take_counts(), strict=True):
            self.totals[name] += count
            self._new[name] += count
        return dict(self.totals)

    def skip_time(self) -> None:
        """What was done since the last step was no training."""
        self._mark = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step = state.global_step
        self.skip_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._busy += now - self._mark
        self._all_busy += now - self._mark
        self._mark = now
        self.progress.advance(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = {} if logs is None else logs
        if "loss" in logs:
            self._complete(logs, state)
        elif not keep_token_loss(logs):
            return  # the Trainer's own summary at the end, which counts from the last restart
        if self.ranks.is_main:
            figures = {key: value for key, value in logs.items() if key != "step"}
            self.log.write(state.global_step, **figures)
            self.progress.report(state.global_step, figures)
        self.skip_time()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.skip_time()

    def _complete(self, logs: dict[str, float], state: TrainerState) -> None:
        """Turn the Trainer's log of a few steps into ours, in place."""
        self.take_counts()
        busy = max(self._busy, 1e-9)
        per_step = self._all_busy / max(state.global_step - self._first_step, 1)
        logs["lr"] = logs.pop("learning_rate", 0.0)
        logs["tokens_per_s"] = round(self._new["tokens"] / busy, 1)
        logs["samples_per_s"] = round(self._new["samples"] / busy, 3)
        logs["trained_tokens"] = self.totals["trained_tokens"]
        logs["epoch"] = round(self.totals["samples"] / max(self.samples_per_epoch, 1), 6)
        logs["eta_s"] = round(per_step * (state.max_steps - state.global_step), 1)
        logs.update(memory_gb())
        if self.ranks.is_main:
            replaced = self.replaced(state.global_step)
            logs.update({f"replaced_{kind}": replaced[kind] for kind in KINDS})
            if replaced[NO_ROOM]:
                logs["left_out"] = replaced[NO_ROOM]
        self._new = dict.fromkeys(self.totals, 0)
        self._busy = 0.0


def keep_token_loss(logs: dict[str, float]) -> bool:
    """Reduce a log of held-out data to its loss per trained token, in place; False when it is another log.

    The Trainer's own held-out loss is a mean over batches, which depends on their size and on the number of ranks.
    """
    name = next((key for key in logs if key.endswith(f"_{TOKEN_LOSS}")), None)
    if name is None:
        return False
    value = logs[name]
    logs.clear()
    logs[name.replace(TOKEN_LOSS, "loss")] = value
    return True


class StopWhenAsked(TrainerCallback):
    """After a signal to any rank: finish the step, save, stop."""

    def __init__(self, signals: StopSignal) -> None:
        self.signals = signals

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.signals.agreed():
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint when all ranks have written it, and only then deletes older ones.

    Args:
        run_dir: where the checkpoints are.
        count: how many to keep.
        processor: saved beside the weights, so that a checkpoint can be tried out like a finished model.
        facts: what the marker says beside the files, for the run that resumes.
        prove: raises where what was saved is not what is in memory; all ranks call it together.
    """

    def __init__(
        self,
        run_dir: Path,
        count: int,
        processor: Any,
        facts: Callable[[], dict[str, Any]],
        prove: Callable[[Path], None],
    ) -> None:
        self.run_dir, self.count, self.processor, self.facts, self.prove = run_dir, count, processor, facts, prove

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        facts = self.facts()
        barrier()
        folder = checkpoint_path(self.run_dir, state.global_step)
        self.prove(folder)
        on_main(lambda: self._mark(folder, facts))

    def _mark(self, folder: Path, facts: dict[str, Any]) -> None:
        self.processor.save_pretrained(folder)
        mark_complete(folder, **facts)
        keep_last(self.run_dir, self.count)


class BadSamples(TrainerCallback):
    """Counts the examples that were replaced, and ends the run when too many of its pictures could not be read.

    Args:
        budget: what is too many.
        examples_per_step: over all ranks.
    """

    def __init__(self, budget: BadSampleBudget, examples_per_step: int) -> None:
        self.budget, self.examples_per_step = budget, examples_per_step

    def counts(self, step: int) -> Mapping[str, int]:
        """Replaced and left out examples up to a step, by kind."""
        return self.budget.counts(step * self.examples_per_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log or control.should_save:
            on_main(lambda: self.budget.check(state.global_step * self.examples_per_step))


class SampleReplies(TrainerCallback):
    """Lets the model answer a few held-out conversations every so many steps.

    Args:
        every_steps: how often; the last step is always one of them.
        answer: writes the page for a step. All ranks call it: under ZeRO-3 each holds a part of the model.
        figures: its clock does not count the time.
    """

    def __init__(self, every_steps: int, answer: Callable[[int], None], figures: Figures) -> None:
        self.every_steps, self.answer, self.figures = every_steps, answer, figures

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every_steps == 0 or state.global_step == state.max_steps:
            self.answer(state.global_step)
            self.figures.skip_time()
