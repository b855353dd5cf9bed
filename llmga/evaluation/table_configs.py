"""Settings of each protocol."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, AtLeastOne, NotNegative, combination
from llmga.evaluation.config import (
    ClipConfig,
    ExtractorConfig,
    MeasureConfig,
    Name,
    PaintConfig,
    PresetConfig,
    ReferenceConfig,
    SetConfig,
    SetMetric,
    SystemConfig,
    something_of_each,
)
from llmga.files import no_such_file


@dataclass(config=STRICT)
class TextToImageConfig:
    """Table 1: every system with short captions and with refined prompts."""

    out: Path
    rows: SetConfig
    systems: list[SystemConfig]  # the first is what the others are compared with
    short: Literal["short_caption", "caption"] = "short_caption"  # the column with what was asked for
    refined: Literal["prompt", "caption"] = "prompt"  # the column with what the MLLM made of it
    conditions: list[Literal["short", "refined"]] = field(default_factory=lambda: ["short", "refined"])
    metrics: list[SetMetric | Literal["clip", "world"]] = field(
        default_factory=lambda: ["frechet", "kernel", "inception_score", "clip"]
    )
    sanity: list[Literal["oracle", "autoencoder", "another_seed"]] = field(default_factory=list)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    paint: PaintConfig = field(default_factory=PaintConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    preset: PresetConfig = field(default_factory=PresetConfig)

    @combination("systems", "conditions", "metrics")
    def _something(self) -> str | None:
        return something_of_each(self.systems, self.conditions, self.metrics)


@dataclass(config=STRICT)
class DinoConfig(ExtractorConfig):
    """The network that edits are compared with their targets by."""

    name: str = "dino-s16"


@dataclass(config=STRICT)
class SmallClipConfig(ClipConfig):
    """The CLIP that editing is published with."""

    name: str = "clip-b32"


@dataclass(config=STRICT)
class EditMeasureConfig(MeasureConfig):
    """How edits are measured."""

    features: DinoConfig = field(default_factory=DinoConfig)
    clip: SmallClipConfig = field(default_factory=SmallClipConfig)


@dataclass(config=STRICT)
class EditedConfig:
    """A system's results, as a folder."""

    name: Name
    pictures: Path  # <session>/<session>_1.png, _inde_2.png, _iter_2.png for MagicBrush, else a picture for each row

    @combination("pictures", machine=True)
    def _there(self) -> str | None:
        return None if self.pictures.is_dir() else f"system {self.name}: {self.pictures} is not a folder"


@dataclass(config=STRICT)
class MagicBrushConfig:
    """MagicBrush as its authors ship it."""

    folder: Path  # a split, with edit_sessions.json and images/
    captions: dict[str, Path] = field(default_factory=dict)  # name -> JSON: session -> target's file -> caption
    turns: Literal["single", "multi"] = "single"  # every turn from the true picture before it, or the last of a chain

    @combination("folder", "captions", machine=True)
    def _files_exist(self) -> str | None:
        lacking = [path for path in (self.folder / "edit_sessions.json", *self.captions.values()) if not path.is_file()]
        return no_such_file(lacking[0]) if lacking else None


@dataclass(config=STRICT)
class EditingConfig:
    """Table 2: edited pictures against their targets."""

    out: Path
    systems: list[EditedConfig]  # the first is what the others are compared with
    magicbrush: MagicBrushConfig | None = None  # what was asked: MagicBrush,
    rows: SetConfig | None = None  # or rows of the task editing
    targets: Path | None = None  # of rows: a folder with the target of each; None: their scenes of the toy world
    metrics: list[Literal["pixels", "clip", "dino", "world"]] = field(
        default_factory=lambda: ["pixels", "clip", "dino"]
    )
    measure: EditMeasureConfig = field(default_factory=EditMeasureConfig)
    preset: PresetConfig = field(default_factory=PresetConfig)

    @combination("magicbrush", "rows")
    def _one_set(self) -> str | None:
        if (self.magicbrush is None) != (self.rows is None):
            return None
        return "expected one of the two: MagicBrush's folder, or rows of a manifest"

    @combination("systems", "metrics")
    def _something(self) -> str | None:
        return something_of_each(self.systems, self.metrics)


HoleKind = Literal["in_narrow", "in_medium", "in_wide", "out_narrow", "out_wide"]


@dataclass(config=STRICT)
class PaintingConfig:
    """Table 3: holes of several kinds, painted without a prompt, with an inferred one, or with the true one."""

    out: Path
    rows: SetConfig  # with pictures
    systems: list[SystemConfig]  # the first is what the others are compared with; pictures: <kind>-<condition>/
    side: AtLeastOne = 512  # pictures are squares of it: bicubic on the short side, cut out at a random place
    kinds: list[HoleKind] = field(default_factory=lambda: ["out_narrow", "out_wide", "in_narrow", "in_wide"])
    conditions: list[Literal["empty", "inferred", "true"]] = field(default_factory=lambda: ["empty", "inferred"])
    true: Literal["caption", "prompt"] = "caption"  # the column with the true description
    metrics: list[Literal["frechet", "kernel", "lpips", "pixels", "world"]] = field(
        default_factory=lambda: ["frechet", "lpips", "pixels"]
    )
    sanity: list[Literal["oracle", "autoencoder"]] = field(default_factory=list)
    hole_seed: NotNegative = 0  # of places and masks; a picture's own comes of it and of its id
    paint: PaintConfig = field(default_factory=PaintConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    preset: PresetConfig = field(default_factory=PresetConfig)

    @combination("systems", "kinds", "conditions", "metrics")
    def _something(self) -> str | None:
        return something_of_each(self.systems, self.kinds, self.conditions, self.metrics)


@dataclass(config=STRICT)
class TalkerConfig:
    """Who answers and paints in a conversation: an MLLM and a pipeline, or pictures from elsewhere."""

    name: Name
    mllm: Path | None = None  # folder of the MLLM that answers
    pipeline: Path | None = None  # folder of the pipeline that paints what it asks for
    pictures: Path | None = None  # holds a folder for each turn, turn1 and on, with a picture for each row

    @combination("mllm", "pipeline", "pictures")
    def _one_source(self) -> str | None:
        here = [self.mllm is not None, self.pipeline is not None]
        if all(here) if self.pictures is None else not any(here):
            return None
        return f"system {self.name}: expected an MLLM with a pipeline, or a folder of pictures"

    @combination("mllm", "pipeline", "pictures", machine=True)
    def _there(self) -> str | None:
        lacking = [p for p in (self.mllm, self.pipeline, self.pictures) if p is not None and not p.is_dir()]
        return f"system {self.name}: {lacking[0]} does not exist" if lacking else None


@dataclass(config=STRICT)
class TurnsConfig:
    """Figure 5: the same picture is asked for again and again, with other talk between."""

    out: Path
    rows: SetConfig  # of the task prompt_refinement: what is asked for
    talk: SetConfig  # rows with messages: what else is said; the answers are taken from them, alike for all systems
    systems: list[TalkerConfig]  # the first is what the others are compared with
    turns: Annotated[int, Limits(ge=2)] = 6
    metrics: list[Literal["frechet", "kernel", "clip", "world"]] = field(default_factory=lambda: ["frechet", "clip"])
    max_new_tokens: AtLeastOne = 512
    answers_at_once: AtLeastOne = 32
    precision: Literal["bf16", "fp32"] = "bf16"  # of the MLLM
    phrasing: Literal["train", "held_out"] = "train"  # which instructions are drawn
    seed: NotNegative = 0  # of wording and talk
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    paint: PaintConfig = field(default_factory=PaintConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    preset: PresetConfig = field(default_factory=PresetConfig)

    @combination("systems", "metrics")
    def _something(self) -> str | None:
        return something_of_each(self.systems, self.metrics)
