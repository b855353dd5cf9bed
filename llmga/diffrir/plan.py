"""What a restoration training will do, without running it: pictures, phases, parameters, and what they weigh."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmga.diffrir.config import DiffRIRConfig, PhaseConfig, SourceConfig
from llmga.diffrir.data import SourceError, list_pictures
from llmga.diffrir.discriminator import Discriminator
from llmga.diffrir.train import build_restorer, start_learning
from llmga.recipe import plan_page

_FLOAT = 4  # bytes; weights, gradients, Adam's two moments and averages are float32 whatever run.precision says


@dataclass(frozen=True)
class PhasePlan:
    """One phase.

    Attributes:
        examples: that it sees, over all devices.
        learning, frozen: parameters of its networks.
        state_bytes: of weights, gradients, moments and averages on each device.
    """

    settings: PhaseConfig
    examples: int
    learning: int
    frozen: int
    state_bytes: int


@dataclass(frozen=True)
class DiffRIRPlan:
    """Everything that is told.

    Attributes:
        pictures: of each source, by its path; None where it is not on this machine.
        held_out: pictures that are measured; None likewise.
        missing: what is not on this machine.
    """

    cfg: DiffRIRConfig
    devices: int
    pictures: Mapping[str, int | None]
    held_out: int | None
    phases: Sequence[PhasePlan]
    missing: Sequence[str]


def make_plan(cfg: DiffRIRConfig, devices: int = 1) -> DiffRIRPlan:
    """Plan a training; what is not on this machine is named in `missing`.

    Raises:
        RestorerError: sizes of the network that do not go together.
    """
    missing: list[str] = []
    pictures = {str(source.path): _count(source, missing) for source in cfg.data.sources}
    counts = [_count(source, missing) for source in cfg.data.validation]
    known = [count for count in counts if count is not None]
    held_out = min(sum(known), cfg.data.validation_pictures) if len(known) == len(counts) else None
    per_step = cfg.run.batch_size * cfg.run.accumulation_steps * devices
    phases = [_phase(cfg, phase, per_step) for phase in cfg.phases]
    return DiffRIRPlan(cfg, devices, pictures, held_out, phases, missing)


def _count(source: SourceConfig, missing: list[str]) -> int | None:
    try:
        return len(list_pictures(source))
    except (SourceError, OSError) as error:
        missing.append(str(error) if isinstance(error, SourceError) else f"{source.path}")
        return None


def _phase(cfg: DiffRIRConfig, phase: PhaseConfig, per_step: int) -> PhasePlan:
    """Count a phase's networks, built without numbers."""
    with torch.device("meta"):
        restorer = build_restorer(cfg, "prior" if phase.name == "prior" else "diffusion")
        start_learning(restorer, phase)
        teacher = None if phase.name == "prior" else build_restorer(cfg, "prior").requires_grad_(False)
        adversary = Discriminator(phase.discriminator_width) if phase.name == "gan" and phase.loss.adversarial else None
    networks = [network for network in (restorer, teacher, adversary) if network is not None]
    learning, frozen = (sum(_size(network, learns) for network in networks) for learns in (True, False))
    averaged = _size(restorer, True) if phase.ema is not None and phase.name != "prior" else 0
    state_bytes = _FLOAT * (4 * learning + frozen + averaged)
    return PhasePlan(phase, phase.steps * per_step, learning, frozen, state_bytes)


def _size(network: nn.Module, learns: bool) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad == learns)


def plan_text(plan: DiffRIRPlan) -> str:
    """A plan as text for a terminal."""
    cfg, run = plan.cfg, plan.cfg.run
    per_step = run.batch_size * run.accumulation_steps * plan.devices
    whole = sum(count for count in plan.pictures.values() if count is not None)
    sections = {
        "data": [
            *(f"{_number(count):>9} pictures in {path}" for path, count in plan.pictures.items()),
            f"{_number(plan.held_out):>9} pictures are held out",
            f"{run.batch_size} examples x {run.accumulation_steps} forward passes x {plan.devices} devices = "
            f"{per_step:,} examples a step; crops of {cfg.data.crop} px",
        ],
        "phases": [
            f"{'':<8} {'steps':>9} {'examples':>12} {'epochs':>8} {'learning':>12} {'frozen':>12} {'state, GiB':>11}",
            *(_row(phase, whole if None not in plan.pictures.values() else None) for phase in plan.phases),
            "state: weights, gradients, moments and averages on each device; activations come on top",
        ],
        "written": [
            *(f"{run.output_dir / phase.settings.name}" for phase in plan.phases),
            f"{run.output_dir / 'final'}: the restorer of phase {plan.phases[-1].settings.name}",
        ],
        "not on this machine": [f"- {note}" for note in plan.missing],
    }
    return plan_page(cfg, sections, "nothing was trained and nothing written")


def _row(phase: PhasePlan, pictures: int | None) -> str:
    epochs = "?" if pictures is None else f"{phase.examples / pictures:,.1f}"
    settings = phase.settings
    return (
        f"{settings.name:<8} {settings.steps:>9,} {phase.examples:>12,} {epochs:>8} {phase.learning:>12,} "
        f"{phase.frozen:>12,} {phase.state_bytes / 2**30:>11.3f}"
    )


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"
