"""A step told from few layers must be the step of all layers, byte for byte, whichever of its moments is the fullest.

Run: pytest tests/integration/test_plan_depth.py
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from llmga.stage1.config import LoraConfig
from llmga.stage1.lora import add_adapter
from llmga.stage1.model import set_trainable
from llmga.stage1.plan.depth import peaks_at_full_depth
from llmga.stage1.plan.live_bytes import fullest
from llmga.stage1.plan.rehearsal import BatchShape, HowToStep, rehearse_stages

PADDED = BatchShape(2, 48, 2, 60)


def deep_llava(
    family: str = "llama", depth: int = 6, trainable: str = "projector+llm", tower_depth: int = 5, **text: Any
) -> Any:
    """A narrow model of many layers on the meta device."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
    llm = AutoConfig.for_model(family, **sizes, num_key_value_heads=2, num_hidden_layers=depth, **text)
    widths = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    tower = CLIPVisionConfig(**widths, num_hidden_layers=tower_depth, image_size=32, patch_size=8)
    config = LlavaConfig(vision_config=tower, text_config=llm, image_token_id=511, vision_feature_layer=-2)
    attention = "eager" if family == "gemma2" else "sdpa"
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=torch.float32)
        set_trainable(model, trainable)
    return model


def adapted_llava() -> Any:
    """The same with adapters in its LLM."""
    model = deep_llava()
    with torch.device("meta"):
        add_adapter(SimpleNamespace(model=model, tags_are_tokens=False), LoraConfig(rank=4), Path())  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(
    ("model", "batch", "how"),
    [
        (deep_llava, PADDED, HowToStep()),
        (deep_llava, PADDED, HowToStep(autocast=True, checkpointing=True, chunked=True, gradients="leave")),
        (deep_llava, BatchShape(1, 24, 1, 3), HowToStep(checkpointing=True, chunked=True)),
        (deep_llava, BatchShape(1, 260, 16, 10, packed=3), HowToStep(chunked=True, gradients="stay")),
        (adapted_llava, PADDED, HowToStep(autocast=True, checkpointing=True, chunked=True)),
        (lambda: deep_llava(trainable="projector"), PADDED, HowToStep(chunked=True)),
        (lambda: deep_llava("gemma2", depth=12), PADDED, HowToStep(chunked=True, gradients="leave")),
    ],
    ids=[
        "all logits",
        "ZeRO",
        "mostly gradients",
        "packed, gradients stay",
        "adapters",
        "projector alone",
        "two kinds of layers in turn",
    ],
)
def test_few_layers_tell_of_all(model: Any, batch: BatchShape, how: HowToStep) -> None:
    deep = model()
    depths = []

    def rehearse(few: Any) -> Any:
        depths.append(num_layers(few))
        return rehearse_stages(few, batch, how)

    told = peaks_at_full_depth(deep, rehearse)
    whole = rehearse_stages(deep, batch, how)
    assert len(depths) == 2 and sum(depths) < num_layers(deep)
    assert fullest(told) == fullest(whole)
    assert told == {stage: whole[stage] for stage in told}


def num_layers(model: Any) -> int:
    return len(model.model.language_model.layers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_of_more_layers_keeps_no_more(checkpointing: bool) -> None:
    how = HowToStep(checkpointing=checkpointing, chunked=True)
    few, many = (fullest(rehearse_stages(deep_llava(tower_depth=n), PADDED, how)) for n in (5, 11))
    assert few == many


@pytest.mark.parametrize(
    "text",
    [
        {"depth": 5},
        {"family": "qwen2", "depth": 12, "use_sliding_window": True, "max_window_layers": 5},
        {"family": "smollm3", "depth": 12, "pad_token_id": 0},  # each fourth layer without positions
    ],
    ids=["shallow", "one kind below, another above", "a long period"],
)
def test_layers_that_do_not_come_again_are_all_taken(text: dict[str, Any]) -> None:
    model = deep_llava(**text)
    depths = []
    peaks_at_full_depth(model, lambda few: depths.append(num_layers(few)) or {})
    assert depths == [num_layers(model)] == [text["depth"]]
