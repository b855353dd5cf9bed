"""Settings of stage 2: Stable Diffusion learns to follow long prompts."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, AtLeastOne, NotNegative, OptimConfig, RunConfig, Share, combination
from llmga.files import no_such_file
from llmga.records import Task as RecordTask

Task = Literal["text_to_image", "inpainting"]


@dataclass(config=STRICT)
class LoraConfig:
    """Low-rank adapters on the UNet's attention, instead of training all its weights."""

    rank: AtLeastOne = 64
    alpha: Annotated[float, Limits(gt=0)] = 64.0  # adapters are scaled by alpha / rank
    dropout: Annotated[float, Limits(ge=0, lt=1)] = 0.0
    target: Literal["attention", "attention+feed_forward"] = "attention"


@dataclass(config=STRICT)
class ModelConfig:
    """The pipeline to start from; SD1.5 or SDXL, text-to-image or inpainting, as its folder says."""

    path: Path  # folder of a diffusers pipeline
    layout: Literal["masked", "masked_mean", "published", "published_keep"] | None = None  # None: what the folder names
    max_chunks: AtLeastOne | None = None  # of 75 CLIP tokens; None: what the folder names, else 4
    lora: LoraConfig | None = None
    save_precision: Literal["fp32", "fp16", "bf16"] = "fp32"  # of the UNet in final/

    @combination("path", machine=True)
    def _pipeline_folder(self) -> str | None:
        if (self.path / "model_index.json").is_file():
            return None
        what = "a folder without model_index.json" if self.path.is_dir() else "no such folder"
        toy = "; `make toy-sd` makes the toy pipelines" if "toyworld" in self.path.parts else ""
        return f"{self.path} is {what}, expected a pipeline saved by diffusers{toy}"


@dataclass(config=STRICT)
class SourceConfig:
    """One manifest of pictures with prompts and how often it is drawn."""

    path: Path
    image_root: Path | None = None  # folder the rows' pictures are relative to; None: the file's own folder
    weight: Annotated[float, Limits(ge=0)] | None = None  # against the other sources; None: its number of rows
    name: str | None = None  # in logs; None: the file's name
    text: Literal["prompt", "caption"] = "prompt"  # what is trained on: the MLLM's recorded prompt, or the caption
    tasks: Annotated[list[RecordTask], Limits(min_length=1)] | None = None  # keep rows of these tasks only
    max_rows: AtLeastOne | None = None  # the first so many rows
    quarantine: Path | None = None  # list of rows to leave out, as `llmga check` writes it

    @combination("path", machine=True)
    def _file_exists(self) -> str | None:
        if self.path.is_file():
            return None
        how = ""
        if self.path.stem == "recorded" or self.path.parent.name == "recorded":
            how = "; `make record` writes it"
        elif self.path.parts[:2] == ("data", "toy"):
            how = "; `llmga world` makes the toy data"
        return no_such_file(self.path) + how

    @combination("image_root", machine=True)
    def _image_root_exists(self) -> str | None:
        if self.image_root is None or self.image_root.is_dir():
            return None
        return f"found {self.image_root}, expected a folder there"

    @combination("quarantine", machine=True)
    def _quarantine_exists(self) -> str | None:
        return None if self.quarantine is None or self.quarantine.is_file() else no_such_file(self.quarantine)


@dataclass(config=STRICT)
class MaskConfig:
    """Masks of inpainting; kinds are weighed against each other where the mask is not blank."""

    blank_share: Share = 0.25  # everything is to be generated
    irregular: Annotated[float, Limits(ge=0)] = 0.25  # thick strokes
    box: Annotated[float, Limits(ge=0)] = 0.25
    outpainting: Annotated[float, Limits(ge=0)] = 0.5  # strips along the border, 0.25 to 0.40 deep
    use_recorded: bool = False  # a row's own mask file, where it has one

    @combination("blank_share", "irregular", "box", "outpainting")
    def _some_kind(self) -> str | None:
        if self.blank_share == 1 or self.irregular + self.box + self.outpainting > 0:
            return None
        return "every kind has weight 0, yet masks are not always blank; give one a weight, or set blank_share to 1"


@dataclass(config=STRICT)
class DataConfig:
    """What is trained on, and how a row becomes an example."""

    sources: list[SourceConfig]
    validation: list[SourceConfig] = field(default_factory=list)  # held out, for the loss by timestep
    resolution: AtLeastOne = 512  # pixels a side; of buckets, the side of the square of the same area
    aspect_buckets: bool = False  # keep pictures' shapes, batches of one shape; else centre squares
    bucket_step: AtLeastOne = 64  # sides of buckets are multiples of it
    max_aspect: Annotated[float, Limits(ge=1)] = 2.0  # longer pictures are cropped to it
    crop: Literal["center", "random"] = "center"
    flip_share: Share = 0.5  # mirrored left to right
    flip_sides: bool = False  # mirror also pictures whose prompt says left or right
    prompt_dropout: Share = 0.1  # no prompt at all, which guidance needs
    short_caption_share: Share = 0.0  # the row's short caption in place of the prompt, where it has one
    max_bad_share: Share = 0.001  # of the run's examples; it stops when more of them had an unreadable picture
    masks: MaskConfig = field(default_factory=MaskConfig)

    @combination("sources")
    def _at_least_one_source(self) -> str | None:
        return None if self.sources else "found an empty list, expected at least one source with a path"

    @combination("prompt_dropout", "short_caption_share")
    def _shares_fit(self) -> str | None:
        if self.prompt_dropout + self.short_caption_share <= 1:
            return None
        return f"found {self.prompt_dropout} and {self.short_caption_share}, expected a sum of 1 or less"


@dataclass(config=STRICT)
class CacheConfig:
    """Latents made ahead of training by scripts/cache_stage2.py; without a path they are made while training."""

    path: Path | None = None  # folder of the cache
    text: bool = False  # what the text encoders say of the prompts, too: 0.1 MB for each 75 tokens, SDXL 0.3 MB
    crops: AtLeastOne = 1  # random crops kept of each picture; 1 with crop: center
    precision: Literal["fp16", "fp32"] = "fp16"  # of what is stored
    rows_per_shard: AtLeastOne = 2048


@dataclass(config=STRICT)
class ObjectiveConfig:
    """What is minimised, and which weights are kept."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = None  # None: what the pipeline's scheduler says
    min_snr_gamma: Annotated[float, Limits(gt=0)] | None = None  # 5 is usual; None weighs all timesteps alike
    noise_offset: Annotated[float, Limits(ge=0)] = 0.0
    ema: bool = True  # the result is the running average of the weights
    ema_decay: Annotated[float, Limits(gt=0, lt=1)] = 0.9999  # its limit; it rises as (1 + s) / (10 + s)


@dataclass(config=STRICT)
class SamplesConfig:
    """Pictures of fixed prompts and seeds while training, every `run.sample_every_steps`."""

    prompts: list[str] = field(default_factory=list)  # none: the first held-out prompts
    rows: NotNegative = 8  # held-out rows that are taken where no prompts are given, and for inpainting
    steps: AtLeastOne = 30  # of the sampler
    guidance_scale: Annotated[float, Limits(ge=0)] = 7.5
    seed: NotNegative = 0


@dataclass(config=STRICT)
class Stage2Config:
    """Fine-tune the UNet of a Stable Diffusion pipeline on pictures with prompts of any length."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    task: Task = "text_to_image"
    cache: CacheConfig = field(default_factory=CacheConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @combination("cache.text", "cache.path")
    def _text_beside_latents(self) -> str | None:
        return (
            "encoded prompts lie beside the latents; set cache.path"
            if self.cache.text and not self.cache.path
            else None
        )

    @combination("data.crop", "cache.path", "cache.crops")
    def _crops_that_fit(self) -> str | None:
        if self.cache.crops == 1 or self.data.crop == "random":
            return None
        return f"{self.cache.crops} cached crops of centre crops would be equal; set data.crop to random, or crops to 1"

    @combination("run.eval_every_steps", "data.validation")
    def _something_to_evaluate(self) -> str | None:
        if self.run.eval_every_steps == 0 or self.data.validation:
            return None
        return f"held-out loss every {self.run.eval_every_steps} steps needs at least one source under data.validation"

    @combination("run.sample_every_steps", "samples.prompts", "samples.rows", "data.validation", "task")
    def _something_to_paint(self) -> str | None:
        if self.run.sample_every_steps == 0 or self.data.validation:
            return None
        if self.task == "inpainting":
            return "sample pictures of inpainting need pictures to repair; give a source under data.validation"
        return None if self.samples.prompts else "sample pictures need samples.prompts, or a source in data.validation"

    @combination("data.resolution", "data.bucket_step", "data.aspect_buckets")
    def _bucket_steps(self) -> str | None:
        if not self.data.aspect_buckets or self.data.bucket_step <= self.data.resolution:
            return None
        return (
            f"buckets in steps of {self.data.bucket_step} px cannot have the area of {self.data.resolution} px squares"
        )
