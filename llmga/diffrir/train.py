"""Restoration training: phase after phase, each a run of `llmga.loop` in its own folder below `run.output_dir`.

Phases hand over files: the restorer's folder that one exports is what the next starts from, and phase prior's is the
teacher of all that follow. So a phase can be repeated, left out, or replaced by a converted release.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llmga.bad_samples import BAD_SAMPLES_FILE, BadSampleBudget
from llmga.checkpoint import write_folder_atomically
from llmga.diffrir.config import DiffRIRConfig, PhaseConfig, vgg19_file
from llmga.diffrir.data import PairSettings, RestorationDataset, collate, held_out_pairs, list_pictures
from llmga.diffrir.discriminator import Discriminator
from llmga.diffrir.held_out import Strips, validate
from llmga.diffrir.network import DiffRIR, Phase, RestorerError, load_restorer
from llmga.diffrir.perceptual import load_perceptual
from llmga.diffrir.phases import DiscriminatorLoss, PredictionLoss, PriorLoss
from llmga.learner import Learner
from llmga.loop import Job, Place, run_loop
from llmga.metrics.lpips import Lpips, missing_for_lpips
from llmga.run_folder import RunFolder, explaining_full_disk, hashes
from llmga.runtime import on_main
from llmga.trackers import log_pictures

logger = logging.getLogger(__name__)
_STRIPS = 8  # pictures shown while training


def train(cfg: DiffRIRConfig) -> Path:
    """Train every phase, or go on where training stopped.

    Args:
        cfg: checked settings; `cfg.run.output_dir` gets a run folder for each phase, and `final/`.
    Returns:
        The last phase's restorer, `final/`. Phases that are finished already are passed over.
    Raises:
        Interrupted, RunFailed, ValueError: as `llmga.loop.run_loop`; the phases before are kept.
    """
    made = Path()
    teacher, restorer = cfg.teacher, cfg.restorer
    for phase in cfg.phases:
        own = phase_config(cfg, phase, teacher, restorer)
        logger.info("phase %s: %d steps, %s", phase.name, phase.steps, own.run.output_dir)
        made = run_loop(own, partial(build_job, own))
        teacher, restorer = (made, None) if phase.name == "prior" else (teacher, made)
    final = cfg.run.output_dir / "final"
    with explaining_full_disk(RunFolder(cfg.run.output_dir)):
        on_main(lambda: _copy_whole(made, final))
    return final


def phase_config(cfg: DiffRIRConfig, phase: PhaseConfig, teacher: Path | None, restorer: Path | None) -> DiffRIRConfig:
    """The settings of one phase's run: its length, its learning rate, its folder, and what it starts from."""
    run = replace(
        cfg.run,
        output_dir=cfg.run.output_dir / phase.name,
        max_steps=phase.steps,
        epochs=None,
        eval_every_steps=cfg.run.eval_every_steps if phase.eval_every_steps is None else phase.eval_every_steps,
    )
    return replace(cfg, run=run, phases=[phase], teacher=teacher, restorer=restorer)


# ---------------------------------------------------------------- one phase


def build_job(cfg: DiffRIRConfig, place: Place) -> Job:
    """Everything of one phase, ready to run.

    Raises:
        ValueError: pictures, folders or settings that do not fit; the message says what to change.
    """
    [phase] = cfg.phases
    device = place.accelerator.device
    restorer = start_restorer(cfg, phase)
    if cfg.run.gradient_checkpointing:
        restorer.use_checkpointing()
    start_learning(restorer, phase)
    learners = _build_learners(cfg, phase, restorer.to(device), device)

    total = phase.steps * place.examples_per_step
    sources = [list_pictures(source) for source in cfg.data.sources]
    settings = PairSettings.of(cfg.data, phase, cfg.model.scale)
    bad_samples_path = place.run.path / BAD_SAMPLES_FILE
    weights = [source.weight for source in cfg.data.sources]
    examples = RestorationDataset(sources, weights, total, cfg.run.seed, settings, bad_samples_path)
    budget = BadSampleBudget(bad_samples_path, cfg.data.max_bad_share, total)
    on_main(lambda: budget.forget_after(place.first_step * place.examples_per_step))

    held_out = [path for source in cfg.data.validation for path in list_pictures(source)]
    pairs = held_out_pairs(held_out[: cfg.data.validation_pictures], settings)
    return Job(
        total_steps=phase.steps,
        examples=examples,
        collate=collate,
        learners=learners,
        export=partial(_export, learners),
        samples_per_epoch=sum(len(source) for source in sources),
        validate=_validator(cfg, phase, place, learners[0], pairs) if pairs else None,
        show=_shower(cfg, place, learners[0], pairs[:_STRIPS]) if pairs else None,
        figures=partial(_bad_pictures, budget, place.examples_per_step),
        provenance=_provenance(cfg, phase),
    )


def start_learning(restorer: DiffRIR, phase: PhaseConfig) -> None:
    """Freeze what a phase does not train."""
    if phase.name == "encoder":
        restorer.generator.requires_grad_(False)  # it is not run: frozen, or data parallelism would wait for it


def start_restorer(cfg: DiffRIRConfig, phase: PhaseConfig) -> DiffRIR:
    """The network that a phase trains, with the weights it begins with.

    Phase encoder (or joint, without it) takes the teacher's generator; condition and denoiser are fresh then. All
    else goes on from `restorer`.

    Raises:
        RestorerError: a folder holds another scale, phase or size than the settings say.
    """
    wanted: Phase = "prior" if phase.name == "prior" else "diffusion"
    torch.manual_seed(cfg.run.seed)
    model = build_restorer(cfg, wanted)
    if cfg.restorer is not None:
        _take_weights(model, load_restorer(cfg.restorer, cfg.model.scale, wanted), cfg.restorer, "")
    elif wanted == "diffusion":
        assert cfg.teacher is not None, "the settings ask for it"
        _take_weights(model, load_restorer(cfg.teacher, cfg.model.scale, "prior"), cfg.teacher, "generator.")
    return model


def build_restorer(cfg: DiffRIRConfig, phase: Phase) -> DiffRIR:
    """A network with fresh weights, as the settings describe it."""
    model = cfg.model
    return DiffRIR(
        scale=model.scale,
        phase=phase,
        reference=model.reference,
        dim=model.dim,
        num_blocks=model.num_blocks,
        num_refinement_blocks=model.num_refinement_blocks,
        heads=model.heads,
        ffn_expansion_factor=model.ffn_expansion_factor,
        prior_width=model.prior_width,
        num_prior_blocks=model.num_prior_blocks,
        num_denoiser_layers=model.num_denoiser_layers,
        timesteps=model.timesteps,
        linear_start=model.linear_start,
        linear_end=model.linear_end,
    )


def _take_weights(model: DiffRIR, source: DiffRIR, path: Path, prefix: str) -> None:
    """Copy all weights whose name begins with `prefix`."""
    own = model.state_dict()
    taken = {name: value for name, value in source.state_dict().items() if name.startswith(prefix)}
    wrong = [n for n in own if n.startswith(prefix) and (n not in taken or taken[n].shape != own[n].shape)]
    if wrong or set(taken) - set(own):
        raise RestorerError(
            f"{path} ({source.describe()}) does not fit the settings of the model ({model.describe()}): "
            f"{(wrong or sorted(set(taken) - set(own)))[0]} differs; set model.* as it was trained with"
        )
    model.load_state_dict({**own, **taken})


def _build_learners(cfg: DiffRIRConfig, phase: PhaseConfig, restorer: DiffRIR, device: torch.device) -> list[Learner]:
    """The restorer, and in phase gan the discriminator behind it."""
    factor = partial(_falling, phase.milestones, phase.decay)
    if phase.name == "prior":
        loss: Any = PriorLoss(cfg.model.reference, phase.loss)
        return [_learner("restorer", restorer, cfg, phase.lr, loss, factor)]
    assert cfg.teacher is not None, "the settings ask for it"
    teacher = load_restorer(cfg.teacher, cfg.model.scale, "prior", device).eval().requires_grad_(False)
    if teacher.reference != cfg.model.reference or teacher.prior_width != cfg.model.prior_width:
        raise RestorerError(f"{cfg.teacher} ({teacher.describe()}) does not fit model.reference or model.prior_width")
    if phase.name != "gan":
        loss = PredictionLoss(teacher, phase.name, phase.loss)
        return [_learner("restorer", restorer, cfg, phase.lr, loss, factor, phase.ema)]
    perceptual = load_perceptual(vgg19_file(cfg.perceptual_weights)).to(device) if phase.loss.perceptual else None
    if not phase.loss.adversarial:
        loss = PredictionLoss(teacher, "gan", phase.loss, perceptual)
        return [_learner("restorer", restorer, cfg, phase.lr, loss, factor, phase.ema)]
    discriminator = Discriminator(phase.discriminator_width).to(device)
    loss = PredictionLoss(teacher, "gan", phase.loss, perceptual, discriminator)
    return [
        _learner("restorer", restorer, cfg, phase.lr, loss, factor, phase.ema),
        _learner(
            "discriminator", discriminator, cfg, phase.discriminator_lr, DiscriminatorLoss(loss), lambda done: 1.0
        ),
    ]


def _learner(
    name: str,
    module: nn.Module,
    cfg: DiffRIRConfig,
    lr: float,
    loss: Any,
    factor: Callable[[int], float],
    ema: float | None = None,
) -> Learner:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optim = cfg.optim
    optimizer = torch.optim.AdamW(
        trained, lr=lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    return Learner(name, module, optimizer, loss, factor, optim.max_grad_norm, ema)


def _falling(milestones: list[int], decay: float, done: int) -> float:
    """The learning rate's factor after so many steps."""
    return decay ** sum(done >= milestone for milestone in milestones)


# ---------------------------------------------------------------- beside the loop


def _validator(
    cfg: DiffRIRConfig, phase: PhaseConfig, place: Place, learner: Learner, pairs: list[dict[str, Any]]
) -> Callable[[int], dict[str, float]]:
    problem = missing_for_lpips()
    if problem and phase.name == "gan":
        logger.warning("held-out figures leave LPIPS out: %s", problem)
    lpips = None if problem or phase.name != "gan" else Lpips(place.accelerator.device)

    def figures(step: int) -> dict[str, float]:
        with learner.averaged() as model:
            return validate(model, pairs, cfg.run.batch_size, place.ranks, phase.border, lpips)

    return figures


def _shower(cfg: DiffRIRConfig, place: Place, learner: Learner, pairs: list[dict[str, Any]]) -> Callable[[int], None]:
    strips = Strips(place.run.samples, pairs, cfg.model.reference)
    on_main(lambda: strips.cut_after(place.first_step))

    def show(step: int) -> None:
        if place.ranks.is_main:
            with learner.averaged() as model:
                rows = strips.write(model, step, cfg.run.batch_size)
            log_pictures(place.accelerator.trackers, step, rows)

    return show


def _bad_pictures(budget: BadSampleBudget, examples_per_step: int, step: int) -> dict[str, float]:
    budget.check(step * examples_per_step)
    return {"replaced_picture": budget.counts(step * examples_per_step)["picture"]}


def _export(learners: list[Learner], folder: Path) -> None:
    """The restorer with its averaged weights, and the discriminator, should somebody want to go on with it."""
    with learners[0].averaged() as model:
        model.save_pretrained(folder)
    for learner in learners[1:]:
        state = {name: value.detach().cpu().contiguous() for name, value in learner.module.state_dict().items()}
        save_file(state, folder / f"{learner.name}.safetensors")


def _provenance(cfg: DiffRIRConfig, phase: PhaseConfig) -> dict[str, Any]:
    starts = [path for path in (cfg.teacher, cfg.restorer) if path is not None]
    lists = [source.path for source in cfg.data.sources if source.path.is_file()]
    return {"stage": "diffrir", "phase": phase.name, "inputs": hashes([*starts, *lists])}


def _copy_whole(source: Path, destination: Path) -> None:
    """The last phase's result where people look for it; one of other origin gives way."""
    origins = [folder / "provenance.json" for folder in (source, destination)]
    if origins[1].is_file() and origins[0].read_bytes() == origins[1].read_bytes():
        return
    if destination.is_dir():
        shutil.rmtree(destination)
    with write_folder_atomically(destination) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
