"""Which model a config trains, in sizes alone: from the folder's config.json, or from the table of published models."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration

from llmga.stage1.build import llava_config
from llmga.stage1.config import ModelConfig, Stage1Config
from llmga.stage1.model import read_config, set_trainable
from llmga.stage1.model_checks import has_class_token, read_model_config

PUBLISHED = Path(__file__).with_name("architectures.yaml")
SHIPPED_TOY = Path(__file__).parents[2] / "toyworld/checkpoints/base/mllm"
_TOY_RUNS = {"toy_base", "toy_tuned"}  # folders in which `make toy-base` and `make toy-tuned` make models of its sizes
PARTS = ("vision tower", "projector", "LLM layers", "embeddings and head", "adapters")


class UnknownArchitecture(Exception):
    """Neither a folder on this machine nor a published row says how large a model is."""


@dataclass(frozen=True)
class Architecture:
    """A model's sizes.

    Attributes:
        config: of the whole LLaVA.
        sources: one sentence for each part, saying where its sizes come from.
    """

    config: LlavaConfig
    sources: list[str]


@dataclass(frozen=True)
class Counts:
    """Parameters of one part."""

    trained: int
    frozen: int


def read_architecture(model: ModelConfig) -> Architecture:
    """Find the sizes of a config's model without its weights. The few rows of added tokens are left out.

    Raises:
        UnknownArchitecture: a part is not on this machine and not in the table; names both.
        ValueError: a config.json that is no LLaVA, or that transformers cannot read.
    """
    if model.path is not None:
        return _whole(model.path)
    assert model.llm is not None and model.vision_tower is not None
    llm, llm_source = _part(model.llm, "llms")
    tower, tower_source = _part(model.vision_tower, "vision_towers")
    with torch.device("meta"):
        class_token = has_class_token(AutoModel.from_config(tower))
    return Architecture(llava_config(llm, tower, llm.vocab_size - 1, class_token), [llm_source, tower_source])


def _whole(folder: Path) -> Architecture:
    """A LLaVA from its folder; a toy model that is not made yet has the sizes of the shipped one."""
    if (folder / "config.json").is_file():
        return Architecture(read_config(folder), [f"sizes from {folder}/config.json"])
    if _TOY_RUNS.isdisjoint(folder.parts):
        raise UnknownArchitecture(f"{folder} is not here: parameters and memory cannot be told")
    return Architecture(read_config(SHIPPED_TOY), [f"{folder} is not made yet: sizes of the shipped toy base model"])


def build_without_weights(architecture: Architecture, cfg: Stage1Config, dtype: torch.dtype) -> Any:
    """The model of a config on the meta device, with what learns marked as training marks it.

    Args:
        dtype: of the weights; adapters are float32, as in training, unless DeepSpeed lowers them.
    """
    attention = "sdpa" if cfg.model.attention == "flash_attention_2" else cfg.model.attention  # keeps the same tensors
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft, about a name of transformers'
        model = LlavaForConditionalGeneration._from_config(
            architecture.config, attn_implementation=attention, dtype=dtype
        )
        set_trainable(model, cfg.model.trainable)
        if cfg.model.lora is not None:
            from llmga.stage1.lora import add_adapter  # peft takes seconds to import

            without_tokenizer: Any = SimpleNamespace(model=model, tags_are_tokens=False)
            add_adapter(without_tokenizer, cfg.model.lora, Path())
    return model


def count_by_part(model: nn.Module) -> dict[str, Counts]:
    """Trained and frozen parameters of each of `PARTS` that the model has, peft's copy of what it trains left out."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():  # a tied head comes once
        if ".original_module." in name:
            continue
        counts[part_of(name)][not parameter.requires_grad] += parameter.numel()
    return {part: Counts(*both) for part, both in counts.items() if any(both)}


def published(kind: str) -> dict[str, dict[str, Any]]:
    """Rows of the table: "llms" or "vision_towers", by the name of the usual folder."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))[kind]
    return rows


def _part(folder: Path, kind: str) -> tuple[Any, str]:
    """transformers' config of an LLM or a vision tower, and where its sizes come from."""
    if (folder / "config.json").is_file():
        config = read_model_config(folder)
        return getattr(config, "vision_config", config), f"sizes from {folder}/config.json"
    rows = published(kind)
    row = next((row for name, row in rows.items() if name.lower() == folder.name.lower()), None)
    if row is None:
        raise UnknownArchitecture(
            f"{folder} is not here, and {folder.name!r} is no published model of the table ({', '.join(rows)}): "
            "parameters and memory cannot be told"
        )
    return AutoConfig.for_model(**row["config"]), f"{folder} is not here: sizes as published in {row['source']}"


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    if "lora_" in name:
        return "adapters"
    if "vision_tower." in name:
        return "vision tower"
    if "multi_modal_projector." in name:
        return "projector"
    return "embeddings and head" if "embed_tokens." in name or "lm_head." in name else "LLM layers"
