"""Settings of stage 1: the MLLM learns to answer with generation prompts."""

import importlib.util
import json
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, AtLeastOne, NotNegative, OptimConfig, RunConfig, Share, combination
from llmga.config_report import nearest_word
from llmga.files import no_such_file
from llmga.records import Task
from llmga.stage1.chat_rows import template_names
from llmga.stage1.instructions import languages


@dataclass(config=STRICT)
class LoraConfig:
    """Low-rank adapters on the LLM's linear layers; defaults as in LLaVA's code (its recipe: 128 and 256)."""

    rank: AtLeastOne = 64
    alpha: Annotated[float, Limits(gt=0)] = 16.0  # adapters are scaled by alpha / rank
    dropout: Annotated[float, Limits(ge=0, lt=1)] = 0.05
    target: Literal["all", "attention", "mlp"] = "all"  # linear layers of the LLM's blocks; never the tower or the head


@dataclass(config=STRICT)
class ModelConfig:
    """The MLLM to start from, whole or from its parts, and what of it learns."""

    path: Path | None = None  # folder of a LLaVA model in transformers' format
    llm: Path | None = None  # instead of path: folder of a causal LM, together with vision_tower
    vision_tower: Path | None = None  # folder of a CLIP or SigLIP model; its text half is left out
    projector: Path | None = None  # trained projector weights for the parts, a file or a run's final/; None: fresh ones
    chat_template: str | None = None  # a row of llmga.stage1.chat_rows; None: the tokenizer's own, else what fits
    system_prompt: Path | None = None  # text file that replaces our own system text; an empty file: no system text
    lora: LoraConfig | None = None  # train adapters and the projector instead of all weights
    quantize: Literal["none", "nf4"] = "none"  # of the LLM's frozen weights, under adapters
    tags: Literal["tokens", "text"] = "tokens"  # generation tags as added tokens, or spelt with the old vocabulary
    tag_name: Literal["gen_img", "gen_image"] | None = None  # None: the pair that path was saved with, else gen_img
    trainable: Literal["projector", "projector+llm"] = "projector+llm"  # the vision tower is always frozen
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    cross_entropy: Literal["full", "chunked"] = "chunked"  # of all tokens at once, or of the trained ones in pieces
    liger: bool = False  # fused kernels for the LLM's norms, rotary embedding and MLP; CUDA only

    @combination("path", "llm", "vision_tower", "projector")
    def _whole_or_parts(self) -> str | None:
        parts = [name for name in ("llm", "vision_tower", "projector") if getattr(self, name) is not None]
        if self.path is not None and parts:
            return f"found path together with {', '.join(parts)}; give a whole model (path) or its parts, not both"
        if self.path is None and not {"llm", "vision_tower"} <= {*parts}:
            return f"found {', '.join(parts) or 'neither path nor parts'}, expected path, or llm and vision_tower"
        return None

    @combination("path", machine=True)
    def _model_folder(self) -> str | None:
        return without_model(self.path, "a LLaVA model saved by transformers")

    @combination("llm", machine=True)
    def _llm_folder(self) -> str | None:
        return without_model(self.llm, "a causal LM saved by transformers")

    @combination("vision_tower", machine=True)
    def _tower_folder(self) -> str | None:
        return without_model(self.vision_tower, "a CLIP or SigLIP model saved by transformers")

    @combination("projector", machine=True)
    def _projector_there(self) -> str | None:
        return None if self.projector is None or self.projector.exists() else no_such_file(self.projector)

    @combination("chat_template")
    def _template_known(self) -> str | None:
        known = template_names()
        if self.chat_template is None or self.chat_template in known:
            return None
        return (
            f"found {self.chat_template}, expected one of {', '.join(known)}{nearest_word(self.chat_template, known)}"
        )

    @combination("system_prompt", machine=True)
    def _system_prompt_there(self) -> str | None:
        if self.system_prompt is None or self.system_prompt.is_file():
            return None
        return no_such_file(self.system_prompt)

    @combination("lora", "trainable")
    def _adapters_on_a_trained_llm(self) -> str | None:
        if self.lora is None or self.trainable == "projector+llm":
            return None
        return "adapters train the LLM, but trainable is projector; remove lora, or set trainable to projector+llm"

    @combination("quantize", "lora")
    def _quantized_weights_are_frozen(self) -> str | None:
        if self.quantize == "none" or self.lora is not None:
            return None
        return f"{self.quantize} weights cannot be trained themselves; add lora, such as `lora: {{rank: 64}}`"

    @combination("quantize", machine=True)
    def _bitsandbytes_installed(self) -> str | None:
        if self.quantize == "none" or importlib.util.find_spec("bitsandbytes"):
            return None
        return f"{self.quantize} needs the package bitsandbytes, which is not installed; pip install '.[gpu]'"

    @combination("attention", machine=True)
    def _flash_attention_installed(self) -> str | None:
        if self.attention != "flash_attention_2" or importlib.util.find_spec("flash_attn"):
            return None
        return "flash_attention_2 needs the package flash-attn, which is not installed; sdpa needs nothing"

    @combination("liger", machine=True)
    def _liger_installed(self) -> str | None:
        if not self.liger or importlib.util.find_spec("liger_kernel"):
            return None
        return "Liger's kernels need the package liger-kernel, which is not installed; pip install '.[gpu]'"


def without_model(folder: Path | None, expected: str) -> str | None:
    """What is wrong with a model folder, None if nothing is."""
    if folder is None or (folder / "config.json").is_file():
        return None
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, expected {expected}; `llmga merge` makes a whole model of it"
    what = "a folder without config.json" if folder.is_dir() else "no such folder"
    return f"{folder} is {what}, expected {expected}"


@dataclass(config=STRICT)
class SourceConfig:
    """One file of rows and how often it is drawn."""

    path: Path
    format: Literal[
        "manifest",
        "llmga_t2i",
        "llmga_sg",
        "llmga_inpainting",
        "llmga_edit",
        "llmga_edit_legacy_drop_last_char",
        "llava",
        "sharegpt",
    ] = "manifest"  # our own rows, or one of the published layouts
    image_root: Path | None = None  # folder the rows' pictures are relative to; None: the file's own folder
    weight: Annotated[float, Limits(ge=0)] | None = None  # against the other sources; None: its number of rows
    name: str | None = None  # in logs and tables; None: the file's name
    tasks: Annotated[list[Task], Limits(min_length=1)] | None = None  # keep rows of these tasks only
    max_rows: AtLeastOne | None = None  # the first so many rows
    quarantine: Path | None = None  # list of rows to leave out, as `llmga check` writes it

    @combination("quarantine", machine=True)
    def _quarantine_exists(self) -> str | None:
        return None if self.quarantine is None or self.quarantine.is_file() else no_such_file(self.quarantine)

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
    picture_mode: Literal["squash", "crop", "pad", "laion", "clip"] = "squash"  # how a picture becomes square
    max_length: AtLeastOne = 2048  # tokens, picture tokens included
    packing: bool = False  # a batch's conversations end to end in one row, without padding: same loss, less time
    max_tokens: AtLeastOne | None = None  # of a packed row, what finds no room is left out; None: batch x max_length
    too_long: Literal["drop", "error"] = "drop"  # what is longer is replaced or left out, and counted; or stops the run
    max_bad_share: Share = 0.001  # of the run's examples; it stops when more of them had an unreadable picture
    similar_generate_share: Share = 0.7  # similar image: asked to generate (tagged), else to describe
    refine_generate_share: Share = 0.5  # prompt refinement: asked to generate (tagged), else to expand the text
    instruction_behind_share: Share = 0.5  # prompt refinement: instruction behind the caption, else before
    language: str = "en"  # of the instruction templates

    @combination("language")
    def _language_known(self) -> str | None:
        known = languages()
        if self.language in known:
            return None
        return (
            f"found {self.language}, expected a language of llmga/stage1/instructions.yaml: {', '.join(known)}"
            f"{nearest_word(self.language, known)}"
        )

    @combination("max_tokens", "packing", "max_length")
    def _row_holds_an_example(self) -> str | None:
        if self.max_tokens is None:
            return None
        if not self.packing:
            return f"{self.max_tokens} bounds packed rows, and packing is off; set packing, or remove max_tokens"
        if self.max_tokens < self.max_length:
            return (
                f"a row of {self.max_tokens} tokens has no room for an example of {self.max_length}; "
                "raise max_tokens, or lower max_length"
            )
        return None

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
class MllmOptimConfig(OptimConfig):
    """AdamW and its schedule, or Muon for the weight matrices of the LLM's blocks."""

    matrix_lr: Annotated[float, Limits(gt=0)] | None = None  # Muon's rate, in AdamW's scale; None: AdamW for all


@dataclass(config=STRICT)
class Stage1Config:
    """Fine-tune a LLaVA-style MLLM on requests, answers and generation prompts."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    optim: MllmOptimConfig = field(default_factory=MllmOptimConfig)

    @combination("model.attention", "run.precision")
    def _flash_attention_precision(self) -> str | None:
        if self.model.attention != "flash_attention_2" or self.run.precision == "bf16":
            return None
        return f"flash_attention_2 computes in bf16 only, found {self.run.precision}; set one of the two otherwise"

    @combination("optim.matrix_lr", "run.deepspeed")
    def _muon_needs_whole_matrices(self) -> str | None:
        if self.optim.matrix_lr is None or self.run.deepspeed is None:
            return None
        return "Muon needs each weight matrix whole, which DeepSpeed spreads; remove matrix_lr, or run.deepspeed"

    @combination("data.packing", "model.attention")
    def _packing_needs_separation(self) -> str | None:
        if not self.data.packing or self.model.attention != "eager":
            return None
        return "eager attention cannot keep packed conversations apart; use sdpa, or set data.packing=false"

    @combination("model.quantize", "model.lora", "model.tags", "run.deepspeed", machine=True)
    def _adapters_under_deepspeed(self) -> str | None:
        if self.model.lora is None or zero_stage(self.run.deepspeed) != 3:
            return None
        if self.model.quantize != "none":
            return f"{self.model.quantize} weights cannot be spread by ZeRO-3; give a DeepSpeed file of stage 2"
        if self.model.tags == "tokens":
            return "rows of added tags cannot be trained beside adapters under ZeRO-3; set tags to text, or use stage 2"
        return None

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


def zero_stage(deepspeed: Path | None) -> int:
    """The ZeRO stage that a DeepSpeed file asks for; 0 without a file, or with one that another check refuses."""
    try:
        settings = json.loads(deepspeed.read_text(encoding="utf-8")) if deepspeed else {}
        return int(settings.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError):
        return 0
