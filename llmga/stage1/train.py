"""Stage 1: the MLLM learns to write generation prompts. This file reads in the order things happen.

transformers' Trainer runs the loop, as it is: no subclass, no override. Example i of the data is a pure function of
(seed, i) and the Trainer takes the examples in order, in one epoch as long as the run. So the order does not depend
on the number of ranks, and resuming is nothing but starting at a later example.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.utils.logging import disable_progress_bar

from llmga.bad_samples import BAD_SAMPLES_FILE, BadSampleBudget
from llmga.checkpoint import checkpoint_step, read_marker
from llmga.config import dump_config, paths_in
from llmga.engine import engine_name
from llmga.memory import explaining_memory
from llmga.mixture import Mixture, rows_per_epoch
from llmga.muon import Muon
from llmga.nodes.preflight import start_together
from llmga.progress import RunProgress
from llmga.provenance import made_with
from llmga.run_folder import RunFolder, check_fits, explaining_full_disk, hashes, way_on
from llmga.runtime import (
    Interrupted,
    Ranks,
    StopSignal,
    from_main,
    on_main,
    seed_everything,
)
from llmga.stage1.arguments import training_arguments
from llmga.stage1.arithmetic import set_arithmetic
from llmga.stage1.callbacks import BadSamples, CompleteCheckpoints, Figures, SampleReplies, StopWhenAsked
from llmga.stage1.chat_rows import row_of
from llmga.stage1.config import MllmOptimConfig, Stage1Config
from llmga.stage1.data import Stage1Dataset, build_datasets
from llmga.stage1.feed import Feed, make_feed
from llmga.stage1.held_out import mean_token_loss, token_losses
from llmga.stage1.model import Mllm, is_in_llm_block
from llmga.stage1.resume import accept_saved_names, check_same_adapter, complete_checkpoint
from llmga.stage1.sample_page import SamplePages
from llmga.stage1.samples import answer_questions, draw_questions
from llmga.stage1.start import Start, save_result, start_model
from llmga.stage1.watch import BatchWatch, NamedBatches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """What a run is from before its model is loaded.

    Attributes:
        fit: facts that a checkpoint must share with the run that goes on from it.
        checkpoint: that this run goes on from.
    """

    cfg: Stage1Config
    run: RunFolder
    ranks: Ranks
    signals: StopSignal
    fit: dict[str, Any]
    checkpoint: Path | None

    @property
    def examples_per_step(self) -> int:
        """Over all forward passes and ranks."""
        return int(self.fit["examples_per_step"])

    @property
    def first_step(self) -> int:
        """Steps that are behind the run."""
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


def train(cfg: Stage1Config) -> Path:
    """Run stage 1, or go on with it, to its end.

    Args:
        cfg: checked settings; `cfg.run.output_dir` is the run folder.
    Returns:
        The finished model's folder, `final/` in the run folder. A run that is finished already returns at once.
    Raises:
        Interrupted: stopped by a signal, with the state saved.
        RunFailed: a loss that is not finite, a full disk, too little memory, too many bad samples.
        ValueError: settings, data, model or checkpoint do not fit each other; the message says what to change.
    """
    # Setup
    engine = engine_name(cfg.run.deepspeed)
    ranks = start_together(cfg, with_deepspeed=engine != "plain")
    run = RunFolder(cfg.run.output_dir)
    if from_main(run.is_finished and cfg.run.resume):
        run.say_finished(cfg)
        return run.final
    signals = StopSignal()
    try:
        return _train(_set_up(cfg, run, ranks, engine, signals))
    except KeyboardInterrupt:
        raise Interrupted(f"aborted at once; {way_on(run)}") from None
    finally:
        signals.close()


def _set_up(cfg: Stage1Config, run: RunFolder, ranks: Ranks, engine: str, signals: StopSignal) -> _Job:
    """Make folder and process ready, and find the checkpoint to go on from."""
    examples_per_step = cfg.run.batch_size * cfg.run.accumulation_steps * ranks.world_size
    fit = {"examples_per_step": examples_per_step, "engine": engine, "world_size": ranks.world_size}
    checkpoint = on_main(lambda: run.start(cfg, cfg.run.resume))
    if checkpoint:
        check_fits(checkpoint, **fit)
        logger.info("going on from %s", checkpoint)
    seed_everything(cfg.run.seed)
    disable_progress_bar()  # transformers' own, of loading and saving
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    return _Job(cfg, run, ranks, signals, fit, checkpoint)


def _train(job: _Job) -> Path:
    """`train`, once it is known that there is something to do."""
    cfg, run, checkpoint = job.cfg, job.run, job.checkpoint

    # Model: the arguments come first, because under ZeRO-3 they decide how `from_pretrained` spreads the weights.
    arguments = training_arguments(cfg, run.path)
    with explaining_full_disk(run):  # a model in parts is put together in the run folder
        start = start_model(cfg, run.path / "base")
    set_arithmetic(start.mllm.model, cfg)
    accept_saved_names(start.trained)
    if checkpoint:
        check_same_adapter(checkpoint, start.trained)

    # Data
    data, held_out = _build_data(job, start.mllm)
    total_steps = len(data) // job.examples_per_step
    samples_per_epoch = rows_per_epoch([len(source) for source in data.sources], [s.weight for s in data.sources])
    epochs = len(data) / samples_per_epoch
    logger.info(
        "%d steps of %d examples, %.3g epochs of %d", total_steps, job.examples_per_step, epochs, samples_per_epoch
    )
    _log_shares(data)

    # Trainer
    progress = RunProgress(total_steps, shown=job.ranks.is_main)
    figures, callbacks = _callbacks(job, start, progress, len(data), samples_per_epoch)
    if cfg.run.sample_every_steps and cfg.samples.rows:
        answer = _answerer(job, start.mllm, held_out)
        callbacks.append(SampleReplies(cfg.run.sample_every_steps, answer, figures))
    feed = make_feed(cfg, data, job.examples_per_step)
    trainer = _trainer(cfg, start, arguments, feed, held_out, callbacks)

    # Run
    if job.signals.agreed():
        raise Interrupted(f"stopped by {job.signals.received} before the first step; {way_on(run)}")
    with progress, explaining_full_disk(run), explaining_memory(cfg.run):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if step < total_steps:
        raise Interrupted(f"stopped by {job.signals.received} after step {step} of {total_steps}; {way_on(run)}")

    # Save
    _save(cfg, run, trainer, start, figures)
    logger.info("finished after %d steps and %d trained tokens: %s", step, figures.totals["trained_tokens"], run.final)
    return run.final


def _build_data(job: _Job, mllm: Mllm) -> tuple[Stage1Dataset, dict[str, Stage1Dataset]]:
    """Training data exactly as long as the run, and the held-out sets by name."""
    cfg, bad_samples_path = job.cfg, job.run.path / BAD_SAMPLES_FILE
    steps = cfg.run.max_steps
    if steps is None:  # `run.epochs` decides; a last step that would not be full is filled up
        data, _ = build_datasets(cfg, mllm.processor, None, bad_samples_path)
        steps = math.ceil(len(data) / job.examples_per_step)
    return build_datasets(cfg, mllm.processor, steps * job.examples_per_step, bad_samples_path)


def _log_shares(data: Stage1Dataset) -> None:
    """What each source gives to the whole run."""
    assert isinstance(data.order, Mixture)
    for share in data.order.summary():
        logger.info(
            "source %s: %d of the %d examples (%.3g %%), each of its %d rows %.3g times",
            *(share.name, share.draws, len(data), 100 * share.draws / len(data), share.rows, share.epochs),
        )


def _callbacks(
    job: _Job, start: Start, progress: RunProgress, num_examples: int, samples_per_epoch: int
) -> tuple[Figures, list[TrainerCallback]]:
    """What happens beside the loop, in order; the figures first, because the others read their clock."""
    cfg, run = job.cfg, job.run
    watch = BatchWatch(run.path, job.ranks, start.mllm.tokenizer.decode, cfg.run.record_sample_ids)
    watch.attach(start.mllm.model)
    bad_samples = _bad_samples(job, num_examples)
    figures = Figures(run.metrics, watch, progress, job.ranks, samples_per_epoch, bad_samples.counts)
    if job.checkpoint:
        figures.totals = read_marker(job.checkpoint)["totals"]
    checkpoints = CompleteCheckpoints(
        run.path,
        cfg.run.keep_last,
        start.mllm.processor,
        lambda: {**job.fit, "totals": figures.take_counts()},
        lambda folder: complete_checkpoint(folder, start.trained),
    )
    return figures, [figures, watch, bad_samples, StopWhenAsked(job.signals), checkpoints]


def _bad_samples(job: _Job, num_examples: int) -> BadSamples:
    """What counts the samples that could not be read, without those behind the checkpoint."""
    budget = BadSampleBudget(job.run.path / BAD_SAMPLES_FILE, job.cfg.data.max_bad_share, num_examples)
    on_main(lambda: budget.forget_after(job.first_step * job.examples_per_step))
    return BadSamples(budget, job.examples_per_step)


def _answerer(job: _Job, mllm: Mllm, held_out: dict[str, Stage1Dataset]) -> Callable[[int], None]:
    """What answers the sample conversations after a step and writes their pages."""
    samples, is_main = job.cfg.samples, job.ranks.is_main
    questions = draw_questions(held_out, samples.rows)
    pages = SamplePages(job.run.samples, questions)
    if is_main:
        pages.cut_after(job.first_step)

    def answer(step: int) -> None:
        if job.fit["engine"] != "zero3" and not is_main:
            return  # the others have nothing to give, and wait at the next step
        replies = answer_questions(mllm, questions, samples.max_new_tokens, job.cfg.run.batch_size)
        if is_main:
            pages.write(step, replies)

    return answer


def _muon(model: torch.nn.Module, optim: MllmOptimConfig) -> Muon | None:
    """Muon for the blocks of the LLM, where the settings want it."""
    if optim.matrix_lr is None:
        return None
    settings = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    return Muon(model, is_in_llm_block, optim.lr, optim.matrix_lr, **settings)


def _trainer(
    cfg: Stage1Config,
    start: Start,
    arguments: TrainingArguments,
    feed: Feed,
    held_out: dict[str, Stage1Dataset],
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The Trainer, with its callbacks in order."""
    trainer = Trainer(
        model=start.trained,
        args=arguments,
        data_collator=NamedBatches(feed),
        train_dataset=feed.data,
        eval_dataset=held_out or None,
        compute_metrics=mean_token_loss,
        preprocess_logits_for_metrics=token_losses,
        callbacks=callbacks,
        optimizers=(_muon(start.trained, cfg.optim), None),  # for None the Trainer makes its own: AdamW, the schedule
    )
    _order_callbacks(trainer)
    return trainer


def _order_callbacks(trainer: Trainer) -> None:
    """The trackers behind ours, which complete the figures; the Trainer's own printing goes."""
    trainer.remove_callback(PrinterCallback)
    for tracker in (WandbCallback, TensorBoardCallback):
        if (callback := trainer.pop_callback(tracker)) is not None:
            trainer.add_callback(callback)


def _save(cfg: Stage1Config, run: RunFolder, trainer: Trainer, start: Start, figures: Figures) -> None:
    """Write `final/`; all ranks call, rank 0 writes."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # ZeRO-3: all ranks give, rank 0 receives
    start.mllm.model.config.use_cache = True  # the Trainer has set it to False
    provenance = _provenance(cfg, start, trainer.state.global_step, figures)
    with explaining_full_disk(run):
        on_main(lambda: save_result(cfg, start, state_dict, run.final, provenance))


def _provenance(cfg: Stage1Config, start: Start, step: int, figures: Figures) -> dict[str, Any]:
    """What the model was made from, for `final/provenance.json`."""
    return {
        "stage": 1,
        "base": str(start.base),
        "chat_template": row_of(start.mllm.tokenizer.chat_template) or "the tokenizer's own",
        "steps": step,
        **figures.totals,
        "inputs": hashes([*(path for _, path in paths_in(cfg.model)), *(source.path for source in cfg.data.sources)]),
        "config": dump_config(cfg),
        **made_with(),
    }
