"""Settings that all protocols share: what is asked for, by whom, how it is painted, and how it is measured."""

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, AtLeastOne, NotNegative, combination
from llmga.files import no_such_file

SetMetric = Literal["frechet", "kernel", "inception_score"]
Name = Annotated[str, Limits(pattern=r"^[A-Za-z0-9_.]+$")]  # of folders; a dash joins names


@dataclass(config=STRICT)
class SetConfig:
    """Rows of a manifest: what is asked for."""

    path: Path
    image_root: Path | None = None  # folder that `image` counts from; None: the manifest's own
    tasks: list[str] | None = None  # rows of these tasks alone
    max_rows: AtLeastOne | None = None  # the first so many
    name: str = ""  # in documents; by default the file's stem

    @combination("path", machine=True)
    def _file_exists(self) -> str | None:
        if self.path.is_file():
            return None
        toy = "; `llmga world` makes the toy data" if self.path.parts[:2] == ("data", "toy") else ""
        return no_such_file(self.path) + toy


@dataclass(config=STRICT)
class SystemConfig:
    """Who made the pictures: a pipeline that paints them now, or a folder of those that it painted elsewhere."""

    name: Name
    pipeline: Path | None = None  # folder of a diffusers pipeline
    max_chunks: AtLeastOne | None = None  # of its prompts; 1 cuts them to CLIP's window; None: as it was trained
    pictures: Path | None = None  # holds a folder for each condition, with a picture named by the id of each row
    trained_on: list[Path] = field(default_factory=list)  # manifests, which the reference must not overlap

    @combination("pipeline", "pictures")
    def _one_source(self) -> str | None:
        if (self.pipeline is None) != (self.pictures is None):
            return None
        return f"system {self.name}: expected one of the two, a pipeline that paints or a folder of pictures"

    @combination("pipeline", "pictures", "trained_on", machine=True)
    def _there(self) -> str | None:
        folders = [path for path in (self.pipeline, self.pictures) if path is not None and not path.is_dir()]
        lacking = folders + [path for path in self.trained_on if not path.is_file()]
        return f"system {self.name}: {lacking[0]} does not exist" if lacking else None


@dataclass(config=STRICT)
class PaintConfig:
    """How pictures are painted, where the system is a pipeline."""

    steps: AtLeastOne = 50
    guidance_scale: float | None = None  # None: 7.5, and 5.0 for SDXL's text to image
    scheduler: str | None = None  # None: the pipeline's own
    side: AtLeastOne | None = None  # pixels; None: what the UNet was trained at
    batch_size: AtLeastOne = 4
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: fp16 on a GPU, fp32 elsewhere
    seed: NotNegative = 0  # a picture's own seed comes of it and of its id


@dataclass(config=STRICT)
class ExtractorConfig:
    """The network whose features sets are compared by."""

    name: str = "inception-tf"
    weights: Path | None = None  # a file; None: where its library keeps it
    rule: Literal["clean", "tf1"] = "clean"  # how Inception's pictures are resized
    allow_random: bool = False  # take a network without training, for tests


@dataclass(config=STRICT)
class ClipConfig:
    """The model of the CLIP score."""

    name: str = "clip-l14"  # or a folder as open_clip saves one
    weights: Path | None = None


@dataclass(config=STRICT)
class ReferenceConfig:
    """The real pictures that sets are compared with."""

    folder: Path | None = None  # None: the pictures of the rows themselves
    pictures: AtLeastOne | None = None  # of the folder, the first so many; None: all
    side: AtLeastOne | None = None  # each brought to a square of it, bicubic and centred; None: they are so already
    allow_overlap: bool = False  # also where a system was trained on some of them, which is then counted


@dataclass(config=STRICT)
class TestsConfig:
    """How sure a number is, and whether two differ."""

    bootstrap: AtLeastOne = 10_000  # draws
    permutations: AtLeastOne = 999  # of outputs between two systems, for distances of sets; tenfold for means
    halves: Annotated[int, Limits(ge=2)] = 100  # half-samples, for intervals of distances
    seed: NotNegative = 0
    compared: list[str] = field(default_factory=list)  # metrics that systems are compared by; empty: the table's
    smallest_effects: dict[str, float] = field(default_factory=dict)  # metric -> a difference that does not count yet


@dataclass(config=STRICT)
class MeasureConfig:
    """How pictures are measured."""

    batch_size: AtLeastOne = 32
    preset: str = "learnable"  # of the toy world, where pictures are read by its parser
    features: ExtractorConfig = field(default_factory=ExtractorConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    splits: AtLeastOne = 10  # of the Inception score
    tests: TestsConfig = field(default_factory=TestsConfig)


@dataclass(config=STRICT)
class PresetConfig:
    """What these settings stand for."""

    name: str = ""
    notes: list[str] = field(default_factory=list)  # a sentence for each thing that the paper leaves open


def something_of_each(systems: Sequence[Any], *lists: Sequence[str]) -> str | None:
    """What is wrong with systems, conditions and metrics: none, or one twice."""
    for found in ([system.name for system in systems], *lists):
        if not found or len(set(found)) < len(found):
            return f"found {', '.join(found) or 'nothing'}; expected one or more, each once"
    return None
