"""Stage 1: the MLLM learns to write generation prompts. This file reads in the order things happen.

transformers' Trainer runs the loop, as it is: no subclass, no override. Example i of the data is a pure function of
(seed, i) and the Trainer takes the examples in order, in one epoch as long as the run. So the order does not depend
on the number of ranks, and resuming is nothing but starting at a later example.
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.utils.logging import disable_progress_bar

from llmga.bad_samples import BAD_SAMPLES_FILE, BadSampleBudget
from llmga.checkpoint import checkpoint_step, read_marker
from llmga.config import dump_config, paths_in
from llmga.engine import engine_name
from llmga.mixture import rows_per_epoch
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
from llmga.stage1.balance import BalancedDataset
from llmga.stage1.callbacks import BadSamples, CompleteCheckpoints, Figures, SampleReplies, StopWhenAsked
from llmga.stage1.chat_rows import row_of
from llmga.stage1.config import MllmOptimConfig, Stage1Config
from llmga.stage1.data import Collator, Stage1Dataset, build_datasets
from llmga.stage1.held_out import mean_token_loss, token_losses
from llmga.stage1.model import Mllm
from llmga.stage1.packing import PackingCollator
from llmga.stage1.resume import accept_saved_names, check_same_adapter, complete_checkpoint
from llmga.stage1.sample_page import SamplePages
from llmga.stage1.samples import answer_questions, draw_questions
from llmga.stage1.start import Start, save_result, start_model
from llmga.stage1.watch import BatchWatch, NamedBatches

logger = logging.getLogger(__name__)


def train(cfg: Stage1Config) -> Path:
    """Run stage 1, or go on with it, to its end.

    Args:
        cfg: checked settings; `cfg.run.output_dir` is the run folder.
    Returns:
        The finished model's folder, `final/` in the run folder. A run that is finished already returns at once.
    Raises:
        Interrupted: stopped by a signal, with the state saved.
        RunFailed: a loss that is not finite, a full disk, too many bad samples.
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
        return _train(cfg, run, ranks, engine, signals)
    except KeyboardInterrupt:
        raise Interrupted(f"aborted at once; {way_on(run)}") from None
    finally:
        signals.close()


def _train(cfg: Stage1Config, run: RunFolder, ranks: Ranks, engine: str, signals: StopSignal) -> Path:
    """`train`, once it is known that there is something to do."""
    examples_per_step = cfg.run.batch_size * cfg.run.accumulation_steps * ranks.world_size
    fit = {"examples_per_step": examples_per_step, "engine": engine, "world_size": ranks.world_size}
    checkpoint = _start(cfg, run, fit)

    # Model: the arguments come first, because under ZeRO-3 they decide how `from_pretrained` spreads the weights.
    arguments = training_arguments(cfg, run.path)
    start = start_model(cfg, run.path / "base")
    mllm = start.mllm
    set_arithmetic(mllm.model, cfg)
    accept_saved_names(start.trained)
    if checkpoint:
        check_same_adapter(checkpoint, start.trained)

    # Data
    data, held_out = _build_data(cfg, mllm, run, examples_per_step)
    total_steps = len(data) // examples_per_step
    samples_per_epoch = rows_per_epoch([len(source) for source in data.sources], [s.weight for s in data.sources])
    epochs = len(data) / samples_per_epoch
    logger.info("%d steps of %d examples, %.3g epochs of %d", total_steps, examples_per_step, epochs, samples_per_epoch)

    # Trainer
    watch = BatchWatch(run.path, ranks, mllm.tokenizer.decode, cfg.run.record_sample_ids)
    watch.attach(mllm.model)
    progress = RunProgress(total_steps, shown=ranks.is_main)
    bad_samples = _bad_samples(cfg, run, len(data), examples_per_step, checkpoint)
    figures = Figures(run.metrics, watch, progress, ranks, samples_per_epoch, bad_samples.counts)
    if checkpoint:
        figures.totals = read_marker(checkpoint)["totals"]
    callbacks = [
        figures,
        watch,
        bad_samples,
        StopWhenAsked(signals),
        CompleteCheckpoints(
            run.path,
            cfg.run.keep_last,
            mllm.processor,
            lambda: {**fit, "totals": figures.take_counts()},
            lambda folder: complete_checkpoint(folder, start.trained),
        ),
    ]
    if cfg.run.sample_every_steps and cfg.samples.rows:
        answer = _answerer(cfg, run, ranks, engine, mllm, held_out, checkpoint)
        callbacks.append(SampleReplies(cfg.run.sample_every_steps, answer, figures))
    fed, collator = _feed(cfg, data, examples_per_step)
    trainer = _trainer(cfg, start, arguments, fed, collator, held_out, callbacks)

    # Run
    if signals.agreed():
        raise Interrupted(f"stopped by {signals.received} before the first step; {way_on(run)}")
    with progress, explaining_full_disk(run):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if step < total_steps:
        raise Interrupted(f"stopped by {signals.received} after step {step} of {total_steps}; {way_on(run)}")

    # Save
    _save(cfg, run, trainer, start, figures)
    logger.info("finished after %d steps and %d trained tokens: %s", step, figures.totals["trained_tokens"], run.final)
    return run.final


def _start(cfg: Stage1Config, run: RunFolder, fit: dict[str, Any]) -> Path | None:
    """Make folder and process ready; returns the checkpoint that the run goes on from."""
    checkpoint = on_main(lambda: run.start(cfg, cfg.run.resume))
    if checkpoint:
        check_fits(checkpoint, **fit)
        logger.info("going on from %s", checkpoint)
    seed_everything(cfg.run.seed)
    disable_progress_bar()  # transformers' own, of loading and saving
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    return checkpoint


def _build_data(
    cfg: Stage1Config, mllm: Mllm, run: RunFolder, examples_per_step: int
) -> tuple[Stage1Dataset, dict[str, Stage1Dataset]]:
    """Training data exactly as long as the run, and the held-out sets by name."""
    bad_samples_path = run.path / BAD_SAMPLES_FILE
    steps = cfg.run.max_steps
    if steps is None:  # `run.epochs` decides; a last step that would not be full is filled up
        data, _ = build_datasets(cfg, mllm.processor, None, bad_samples_path)
        steps = math.ceil(len(data) / examples_per_step)
    return build_datasets(cfg, mllm.processor, steps * examples_per_step, bad_samples_path)


def _feed(cfg: Stage1Config, data: Stage1Dataset, examples_per_step: int) -> tuple[Dataset, Any]:
    """What the Trainer draws batches from, and what makes them: rows padded, or packed end to end."""
    padding = Collator.of(data)
    if not cfg.data.packing:
        return data, padding
    return BalancedDataset(data, cfg.run.batch_size, examples_per_step), PackingCollator(padding)


def _bad_samples(
    cfg: Stage1Config, run: RunFolder, num_examples: int, examples_per_step: int, checkpoint: Path | None
) -> BadSamples:
    """What counts the samples that could not be read, without those behind the checkpoint."""
    budget = BadSampleBudget(run.path / BAD_SAMPLES_FILE, cfg.data.max_bad_share, num_examples)
    on_main(lambda: budget.forget_after(checkpoint_step(checkpoint) * examples_per_step if checkpoint else 0))
    return BadSamples(budget, examples_per_step)


def _muon(model: torch.nn.Module, optim: MllmOptimConfig) -> Muon | None:
    """Muon for the blocks of the LLM, where the settings want it."""
    if optim.matrix_lr is None:
        return None
    settings = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    return Muon(model, is_in_llm_block, optim.lr, optim.matrix_lr, **settings)


def is_in_llm_block(name: str) -> bool:
    """Whether a parameter of a LLaVA model belongs to a layer of its LLM."""
    return ".layers." in name and "projector" not in name


def _trainer(
    cfg: Stage1Config,
    start: Start,
    arguments: TrainingArguments,
    fed: Dataset,
    collator: Any,
    held_out: dict[str, Stage1Dataset],
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The Trainer, with its callbacks in order."""
    trainer = Trainer(
        model=start.trained,
        args=arguments,
        data_collator=NamedBatches(collator),
        train_dataset=fed,
        eval_dataset=held_out or None,
        compute_metrics=mean_token_loss,
        preprocess_logits_for_metrics=token_losses,
        callbacks=callbacks,
        optimizers=(_muon(start.trained, cfg.optim), None),  # for None the Trainer makes its own: AdamW, the schedule
    )
    _order_callbacks(trainer)
    return trainer


def _answerer(
    cfg: Stage1Config,
    run: RunFolder,
    ranks: Ranks,
    engine: str,
    mllm: Mllm,
    held_out: dict[str, Stage1Dataset],
    checkpoint: Path | None,
) -> Callable[[int], None]:
    """What answers the sample conversations after a step and writes their pages."""
    questions = draw_questions(held_out, cfg.samples.rows)
    pages = SamplePages(run.samples, questions)
    if ranks.is_main:
        pages.cut_after(checkpoint_step(checkpoint) if checkpoint else 0)

    def answer(step: int) -> None:
        if engine != "zero3" and not ranks.is_main:
            return  # the others have nothing to give, and wait at the next step
        replies = answer_questions(mllm, questions, cfg.samples.max_new_tokens, cfg.run.batch_size)
        if ranks.is_main:
            pages.write(step, replies)

    return answer


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
