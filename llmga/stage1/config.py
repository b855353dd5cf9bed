"""Settings of stage 1: the MLLM learns to answer with generation prompts."""

import importlib.util
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, AtLeastOne, NotNegative, OptimConfig, RunConfig, Share, combination
from llmga.files import no_such_file

Task = Literal["prompt_refinement", "similar_image", "inpainting", "outpainting", "editing", "vqa", "qa"]


@dataclass(config=STRICT)
class ModelConfig:
    """The MLLM to start from, and what of it learns."""

    path: Path  # folder of a LLaVA model in transformers' format
    tags: Literal["tokens", "text"] = "tokens"  # generation tags as added tokens, or spelt with the old vocabulary
    tag_name: Literal["gen_img", "gen_image"] = "gen_img"  # the paper's spelling, or that of the released weights
    trainable: Literal["projector", "projector+llm"] = "projector+llm"  # the vision tower is always frozen
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    cross_entropy: Literal["full", "chunked"] = "chunked"  # of all tokens at once, or of the trained ones in pieces
    liger: bool = False  # fused kernels for the LLM's norms, rotary embedding and MLP; CUDA only

    @combination("path", machine=True)
    def _model_folder(self) -> str | None:
        if (self.path / "config.json").is_file():
            return None
        what = "a folder without config.json" if self.path.is_dir() else "no such folder"
        return f"{self.path} is {what}, expected a LLaVA model saved by transformers"

    @combination("attention", machine=True)
    def _flash_attention_installed(self) -> str | None:
        if self.attention != "flash_attention_2" or importlib.util.find_spec("flash_attn"):
            return None
        return "flash_attention_2 needs the package flash-attn, which is not installed; sdpa needs nothing"

    @combination("liger", machine=True)
    def _liger_installed(self) -> str | None:
        if not self.liger or importlib.util.find_spec("liger_kernel"):
            return None
        return "Liger's kernels need the package liger-kernel, which is not installed; pip install liger-kernel"


@dataclass(config=STRICT)
class SourceConfig:
    """One file of rows and how often it is drawn."""

    path: Path
    format: Literal["manifest", "llmga_t2i", "llmga_sg", "llmga_inpainting", "llmga_edit", "llava", "sharegpt"] = (
        "manifest"  # our own rows, or one of the published layouts
    )
    image_root: Path | None = None  # folder the rows' pictures are relative to; None: the file's own folder
    weight: Annotated[float, Limits(ge=0)] | None = None  # against the other sources; None: its number of rows
    name: str | None = None  # in logs and tables; None: the file's name
    tasks: Annotated[list[Task], Limits(min_length=1)] | None = None  # keep rows of these tasks only
    max_rows: AtLeastOne | None = None  # the first so many rows

    @combination("path", machine=True)
    def _file_exists(self) -> str | None:
        if self.path.is_file():
            return None
        toy = "; `llmga world` makes the toy data" if self.path.parts[:2] == ("data", "toy") else ""
        return no_such_file(self.path) + toy

    @combination("image_root", machine=True)
    def _image_root_exists(self) -> str | None:
        if self.image_root is None or self.image_root.is_dir():
            return None
        return f"found {self.image_root}, expected a folder there"


@dataclass(config=STRICT)
class DataConfig:
    """What is trained on, and how a row becomes a conversation."""

    sources: list[SourceConfig]  # drawn by weight
    validation: list[SourceConfig] = field(default_factory=list)  # held out: loss and sample replies
    picture_size: AtLeastOne = 512  # pixels a side before the vision tower's own resizing; masks are drawn at it
    picture_mode: Literal["squash", "crop", "pad", "laion"] = "squash"  # how a picture becomes square
    max_length: AtLeastOne = 2048  # tokens, picture tokens included
    packing: bool = False  # a batch's conversations end to end in one row, without padding: same loss, less time
    too_long: Literal["drop", "error"] = "drop"  # a longer example is replaced and counted, or stops the run
    max_bad_share: Share = 0.001  # the run stops when more of the examples had an unreadable picture
    similar_generate_share: Share = 0.7  # similar image: asked to generate (tagged), else to describe
    refine_generate_share: Share = 0.5  # prompt refinement: asked to generate (tagged), else to expand the text
    instruction_behind_share: Share = 0.5  # prompt refinement: instruction behind the caption, else before
    language: str = "en"  # of the instruction templates

    @combination("sources")
    def _at_least_one_source(self) -> str | None:
        return None if self.sources else "found an empty list, expected at least one source with a path"

    @combination("sources")
    def _some_weight(self) -> str | None:
        if not self.sources or any(source.weight is None or source.weight > 0 for source in self.sources):
            return None
        return "every weight is 0, so nothing would ever be drawn; give one source a weight above 0"


@dataclass(config=STRICT)
class SamplesConfig:
    """Replies written while training, with their pictures, every `run.sample_every_steps`."""

    rows: NotNegative = 8  # conversations answered each time
    max_new_tokens: AtLeastOne = 256


@dataclass(config=STRICT)
class Stage1Config:
    """Fine-tune a LLaVA-style MLLM on requests, answers and generation prompts."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @combination("model.attention", "run.precision")
    def _flash_attention_precision(self) -> str | None:
        if self.model.attention != "flash_attention_2" or self.run.precision == "bf16":
            return None
        return f"flash_attention_2 computes in bf16 only, found {self.run.precision}; set one of the two otherwise"

    @combination("data.packing", "model.attention")
    def _packing_needs_separation(self) -> str | None:
        if not self.data.packing or self.model.attention != "eager":
            return None
        return "eager attention cannot keep packed conversations apart; use sdpa, or set data.packing=false"

    @combination("run.eval_every_steps", "data.validation")
    def _something_to_evaluate(self) -> str | None:
        if self.run.eval_every_steps == 0 or self.data.validation:
            return None
        return f"held-out loss every {self.run.eval_every_steps} steps needs at least one source under data.validation"

    @combination("run.sample_every_steps", "data.validation")
    def _something_to_answer(self) -> str | None:
        if self.run.sample_every_steps == 0 or self.samples.rows == 0 or self.data.validation:
            return None
        return (
            f"sample replies every {self.run.sample_every_steps} steps need at least one source under data.validation"
        )
