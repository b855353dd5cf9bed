"""Fused kernels are for the LLM alone, without their losses, and never asked for in vain.

Run: pytest tests/unit/test_arithmetic.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmga.config import RunConfig
from llmga.runtime import RuntimeSetupError
from llmga.stage1.arithmetic import has_liger, set_arithmetic
from llmga.stage1.config import DataConfig, ModelConfig, SourceConfig, Stage1Config
from tests.toy import toy_llava

APPLY = "transformers.integrations.liger.apply_liger_kernel"
WITH_LIGER = Stage1Config(
    model=ModelConfig(path=Path("model"), liger=True),
    data=DataConfig(sources=[SourceConfig(path=Path("rows.jsonl"))]),
    run=RunConfig(output_dir=Path("run"), precision="fp32"),
)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_liger_is_given_the_llm_without_its_losses(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = toy_llava(), []

    def apply(part: nn.Module, kernels: dict[str, Any]) -> None:
        given.append((part, kernels))
        part.norm.__dict__["_get_name"] = lambda: "LigerRMSNorm"  # as it marks what it has exchanged

    monkeypatch.setattr(APPLY, apply)
    assert not has_liger(model)
    set_arithmetic(model, WITH_LIGER)
    assert given == [(model.model.language_model, {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    assert has_liger(model) and not has_liger(model.model.vision_tower)


def test_an_llm_that_liger_has_no_kernels_for_is_named(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(APPLY, lambda part, kernels: None)  # it only logs it
    with pytest.raises(RuntimeSetupError, match=r"no kernels for an LLM of model_type 'llama'; set model.liger=false"):
        set_arithmetic(toy_llava(), WITH_LIGER)


def test_without_a_gpu_liger_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeSetupError, match=r"model\.liger needs a CUDA device and none is visible"):
        set_arithmetic(toy_llava(), WITH_LIGER)
