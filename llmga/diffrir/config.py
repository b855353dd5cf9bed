"""Settings of restoration training: one file holds a network, its data, and the phases it is trained in."""

import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, AtLeastOne, NotNegative, RunConfig, Share, combination
from llmga.files import no_such_file

PhaseName = Literal["prior", "encoder", "joint", "gan"]
PHASES: tuple[PhaseName, ...] = ("prior", "encoder", "joint", "gan")
GRID_PX = 32  # crops are multiples of it
Positive = Annotated[float, Limits(gt=0)]
Weight = Annotated[float, Limits(ge=0)]


@dataclass(config=STRICT)
class ModelConfig:
    """The network; the defaults are the published one."""

    scale: Literal[1, 2, 4] = 1  # output side over input side
    reference: bool = True  # the kept pixels as an input; false is DiffIR
    dim: AtLeastOne = 64
    num_blocks: tuple[AtLeastOne, AtLeastOne, AtLeastOne, AtLeastOne] = (13, 1, 1, 1)
    num_refinement_blocks: AtLeastOne = 13
    heads: tuple[AtLeastOne, AtLeastOne, AtLeastOne, AtLeastOne] = (1, 2, 4, 8)
    ffn_expansion_factor: Positive = 2.2
    prior_width: AtLeastOne = 256
    num_prior_blocks: AtLeastOne = 9
    num_denoiser_layers: NotNegative = 1
    timesteps: AtLeastOne = 4
    linear_start: Annotated[float, Limits(gt=0, lt=1)] = 0.1
    linear_end: Annotated[float, Limits(gt=0, lt=1)] = 0.99


@dataclass(config=STRICT)
class SourceConfig:
    """Pictures to train on."""

    path: Path  # a folder, read with its subfolders, or a text file with a picture's path first on each line
    weight: Weight | None = None  # against the other sources; None: its number of pictures

    @combination("path", machine=True)
    def _exists(self) -> str | None:
        if self.path.exists():
            return None
        toy = "; `llmga world` makes the toy data" if self.path.parts[:2] == ("data", "toy") else ""
        return no_such_file(self.path) + toy


@dataclass(config=STRICT)
class DataConfig:
    """Clean pictures, and what is done to them."""

    sources: list[SourceConfig]
    validation: list[SourceConfig] = field(default_factory=list)  # held out: figures and picture strips
    picture_size: AtLeastOne = 400  # side of the random window that is degraded; smaller pictures are mirrored
    crop: AtLeastOne = 256  # side of what is trained on, cut out of it afterwards
    strength: Share = 1.0  # of blur, resizing, noise and JPEG; 1 is published
    contrast: Share = 0.08  # the largest change of gain; a phase may say otherwise
    brightness: Share = 0.05  # the largest change of bias
    colour_order: Literal["after", "before"] = "after"  # contrast and brightness change behind the degradation
    validation_pictures: AtLeastOne = 64  # the first so many
    max_bad_share: Share = 0.001  # of the run's examples; it stops when more pictures could not be read

    @combination("sources")
    def _at_least_one_source(self) -> str | None:
        return None if self.sources else "found an empty list, expected at least one source with a path"

    @combination("crop", "picture_size")
    def _crop_fits(self) -> str | None:
        if self.crop % GRID_PX == 0 and self.crop <= self.picture_size and self.picture_size % 4 == 0:
            return None
        return (
            f"found a crop of {self.crop} and a picture of {self.picture_size}; expected a crop that is a multiple of "
            f"{GRID_PX} and no larger than the picture, and a picture that is a multiple of 4"
        )


@dataclass(config=STRICT)
class AdamConfig:
    """Adam; learning rates are the phases'."""

    betas: tuple[Annotated[float, Limits(ge=0, lt=1)], Annotated[float, Limits(ge=0, lt=1)]] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: Weight = 0.0
    max_grad_norm: Weight = 0.0  # 0 does not clip


@dataclass(config=STRICT)
class LossConfig:
    """Weights of what a phase minimises; terms that a phase does not have are left out whatever they weigh."""

    pixel: Weight = 1.0
    distillation: Weight = 1.0  # mean absolute difference of the priors
    divergence: Weight = 0.0  # of the priors as distributions; published runs only log it
    perceptual: Weight = 1.0  # gan: VGG19 features; 0 needs no VGG19 weights
    adversarial: Weight = 1.0  # gan
    hole_average: bool = False  # joint at scale 1: the pixel loss averages over the hole, not over all pixels


@dataclass(config=STRICT)
class PhaseConfig:
    """One phase: how long, how fast, against what."""

    name: PhaseName
    steps: AtLeastOne
    lr: Positive = 2e-4
    milestones: list[AtLeastOne] = field(default_factory=list)  # steps at which the learning rate falls
    decay: Annotated[float, Limits(gt=0, le=1)] = 0.5  # to this share, each time
    ema: Annotated[float, Limits(ge=0, lt=1)] | None = 0.999  # running average of the weights; never in phase prior
    contrast: Share | None = None  # instead of data.contrast
    sharpened: bool = False  # V2: everything but the discriminator's real pictures is sharpened
    discriminator_lr: Positive = 1e-4
    discriminator_width: AtLeastOne = 64
    eval_every_steps: NotNegative | None = None  # instead of run.eval_every_steps
    border: NotNegative = 0  # pixels that PSNR and SSIM leave out at every side
    loss: LossConfig = field(default_factory=LossConfig)

    @combination("milestones", "steps")
    def _milestones_inside(self) -> str | None:
        if self.milestones == sorted(set(self.milestones)) and all(at < self.steps for at in self.milestones):
            return None
        return f"found {self.milestones} in a phase of {self.steps} steps; expected rising numbers below it"


@dataclass(config=STRICT)
class DiffRIRConfig:
    """Train a restorer, phase after phase; each writes a run folder of its own below run.output_dir."""

    data: DataConfig
    run: RunConfig
    phases: list[PhaseConfig]
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: AdamConfig = field(default_factory=AdamConfig)
    teacher: Path | None = None  # folder of a phase-prior restorer; None: what phase prior of this run made
    restorer: Path | None = None  # folder to start the first phase from; None: fresh weights, or the teacher's
    perceptual_weights: Path | None = None  # of VGG19, a .pth or .safetensors file; None: torchvision's, if downloaded

    @combination("phases")
    def _in_order(self) -> str | None:
        names = [phase.name for phase in self.phases]
        if names and names == sorted(set(names), key=PHASES.index):
            return None
        return f"found {names or 'an empty list'}, expected some of {', '.join(PHASES)}, once each and in this order"

    @combination("phases", "teacher", "restorer")
    def _something_to_start_from(self) -> str | None:
        names = [phase.name for phase in self.phases] or [PHASES[0]]
        if "prior" not in names and self.teacher is None:
            return f"{names[0]} learns from a phase-prior restorer; give teacher, or train phase prior first"
        if names[0] == "gan" and self.restorer is None:
            return "gan goes on from a phase-joint restorer; give restorer, or train phase joint first"
        return None

    @combination("teacher", "restorer", machine=True)
    def _folders_there(self) -> str | None:
        for path in (self.teacher, self.restorer):
            if path is not None and not (path / "config.json").is_file():
                return f"{path} holds no config.json; expected a restorer's folder, such as final/ of a phase"
        return None

    @combination("run.max_steps", "run.epochs")
    def _phases_decide(self) -> str | None:
        if self.run.max_steps is None and self.run.epochs in (None, 1.0):
            return None
        return "the phases say how long they are; remove run.max_steps and run.epochs"

    @combination("run.deepspeed")
    def _no_deepspeed(self) -> str | None:
        return None if self.run.deepspeed is None else "restoration trains plainly or with DDP; remove run.deepspeed"

    @combination("run.eval_every_steps", "run.sample_every_steps", "data.validation")
    def _something_to_evaluate(self) -> str | None:
        if self.data.validation or not (self.run.eval_every_steps or self.run.sample_every_steps):
            return None
        return "held-out figures and picture strips need at least one source under data.validation"

    @combination("phases", "perceptual_weights", machine=True)
    def _vgg_there(self) -> str | None:
        for index, phase in enumerate(self.phases):
            if phase.name == "gan" and phase.loss.perceptual and not vgg19_file(self.perceptual_weights).is_file():
                return (
                    f"the perceptual loss needs VGG19's ImageNet weights, which are not at "
                    f'{vgg19_file(self.perceptual_weights)}. Where there is a network, python -c "import torchvision; '
                    "torchvision.models.vgg19(weights='IMAGENET1K_V1')\" puts them there; or give "
                    f"perceptual_weights, or do without: phases.{index}.loss.perceptual=0"
                )
        return None


def vgg19_file(given: Path | None) -> Path:
    """Where VGG19's weights are looked for: the given file, else where torchvision downloads them to."""
    if given is not None:
        return given
    home = os.environ.get("TORCH_HOME")
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(home) if home else shared / "torch") / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth"
