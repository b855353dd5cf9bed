"""Adapters: only the LLM is adapted, what was trained is what is saved, and merging changes nothing.

A bare `q_proj` also adapts the vision tower; rows of added tags left out of the file come back untrained.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.models.qwen2 import modeling_qwen2
from typer.testing import CliRunner

from llmga.cli import app
from llmga.config import EXIT_BAD_INPUT, EXIT_OK
from llmga.stage1 import lora
from llmga.stage1.added_tokens import add_generation_tags
from llmga.stage1.build import build_mllm
from llmga.stage1.config import LoraConfig
from llmga.stage1.lora import add_adapter, load_adapter, merge_adapter, save_adapter, target_pattern
from llmga.stage1.model import Mllm, ModelError, count_parameters, load_mllm, save_mllm, set_trainable
from llmga.tokens import GEN_IMG
from tests.base_models import FAMILIES, make_llm, make_tower

# The families' names for the linear layers of a block, written down apart from the code that finds them.
SPLIT = re.compile(
    r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down|gate_up)_proj)"
)
TRIED = ["llama3", "qwen2", "phi3", "gemma"]  # one of each: untied, tied with spare rows, fused names, scaled embedding


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA folders whose tags are tokens."""
    folder = tmp_path_factory.mktemp("bases")
    make_tower(folder / "clip")
    for name in TRIED:
        mllm = build_mllm(make_llm(folder / f"{name}_llm", FAMILIES[name]), folder / "clip")
        add_generation_tags(mllm, GEN_IMG)
        save_mllm(mllm, None, folder / name, {})
    return folder


def adapted(base: Path, target: str = "all", dtype: torch.dtype = torch.float32) -> tuple[Mllm, PeftModel]:
    """A model with adapters whose trained weights have all moved, as training would move them."""
    mllm = load_mllm(base, dtype=dtype)
    set_trainable(mllm.model, "projector+llm")
    torch.manual_seed(0)
    model = add_adapter(mllm, LoraConfig(rank=4, alpha=8, dropout=0.0, target=target), base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return mllm, model.eval()


def logits(model: torch.nn.Module, mllm: Mllm) -> torch.Tensor:
    ids = [[9, *[mllm.image_token_id] * 4, *mllm.tokenizer.convert_tokens_to_ids(["<gen_img>", "</gen_img>"]), 30, 31]]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), pixel_values=pixels).logits


@pytest.fixture
def saved(bases: Path, tmp_path: Path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        mllm, model = adapted(bases / name)
        return save_adapter(mllm, model, model.state_dict(), tmp_path / "adapter", {"commit": "abc"})

    return save


@pytest.mark.parametrize("name", TRIED)
def test_linear_layers_of_the_llm_are_adapted_and_nothing_else(name: str, bases: Path) -> None:
    mllm = load_mllm(bases / name)
    linear = {n for n, module in mllm.model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {n for n in linear if SPLIT.fullmatch(n)}
    for target, part in (("all", ""), ("attention", "self_attn"), ("mlp", "mlp")):
        pattern = target_pattern(mllm.model, target)
        assert {n for n in linear if re.fullmatch(pattern, n)} == {n for n in wanted if part in n} != set()
    _, model = adapted(bases / name)
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower" in n or "base_layer" in n or "original_module" in n for n in trained)
    assert sum("lora_" in n for n in trained) == 2 * len(wanted)
    assert sum("multi_modal_projector" in n for n in trained) == 4
    assert sum("trainable_tokens_delta" in n for n in trained) == (1 if FAMILIES[name].tied else 2)


@pytest.mark.parametrize("name", TRIED)
def test_an_adapter_loads_in_plain_peft_and_merges_without_a_difference(
    name: str, bases: Path, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = saved(name)
    assert {file.name for file in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "processor_config.json"),
        *("provenance.json", "tokenizer.json", "tokenizer_config.json"),
    }
    mllm, model = adapted(bases / name)
    expected, untrained = logits(model, mllm), logits(load_mllm(bases / name).model, mllm)
    scale = float(expected.abs().max())
    assert float((expected - untrained).abs().max()) > 0.05 * scale
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(bases / name), folder)
    torch.testing.assert_close(logits(plain, mllm), expected, rtol=0, atol=0)
    difference = merge_adapter(folder, tmp_path / "merged")
    assert difference < 1e-6 * max(1.0, scale)
    merged, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(merged, mllm), expected, rtol=0, atol=1e-6 * max(1.0, scale))
    for loaded in (load_mllm(folder), load_mllm(tmp_path / "merged")):
        assert loaded.tags_are_tokens and loaded.tokenizer.chat_template == mllm.tokenizer.chat_template
        assert torch.equal(logits(loaded.model, mllm), logits(merged, mllm))


def test_rows_of_tags_and_the_projector_are_in_the_file(saved: Callable[[str], Path]) -> None:
    weights = load_file(saved("llama3") / "adapter_model.safetensors")
    rows = {name: tensor.shape for name, tensor in weights.items() if "trainable_tokens" in name}
    assert len(rows) == 2 and set(rows.values()) == {(2, 32)}
    assert sum("multi_modal_projector" in name for name in weights) == 4
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_an_adapter_that_is_not_finite_is_not_saved(bases: Path, tmp_path: Path) -> None:
    mllm, model = adapted(bases / "phi3")
    state_dict = model.state_dict()
    next(tensor for name, tensor in state_dict.items() if "lora_B" in name)[0, 0] = float("nan")
    with pytest.raises(ModelError, match="read back differs from what was saved"):
        save_adapter(mllm, model, state_dict, tmp_path / "adapter", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_adapter_that_answers_otherwise_is_not_saved(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """All weights are as they were, but the config scales them by another factor."""
    mllm, model = adapted(bases / "qwen2", dtype=dtype)
    save = PeftConfig.save_pretrained

    def save_wrongly(self: PeftConfig, path: str, **how: Any) -> None:
        save(self, path, **how)
        file = Path(path) / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 800}))

    save_adapter(mllm, model, model.state_dict(), tmp_path / "right", {})
    monkeypatch.setattr(PeftConfig, "save_pretrained", save_wrongly)
    with pytest.raises(ModelError, match=r"read back, the adapter answers otherwise: logits of up to .* differ by"):
        save_adapter(mllm, model, model.state_dict(), tmp_path / "wrong", {})
    assert not (tmp_path / "wrong").exists()


def test_frozen_weights_are_low_and_what_learns_is_float32(bases: Path) -> None:
    mllm = load_mllm(bases / "qwen2", dtype=torch.bfloat16)
    model = add_adapter(mllm, LoraConfig(rank=4), bases / "qwen2")
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    trained, frozen = count_parameters(model)
    assert 0 < trained < frozen


def test_a_base_that_moved_or_is_another_one(bases: Path, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved("llama3")
    moved = shutil.copytree(bases / "llama3", tmp_path / "moved")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases / "llama3")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/where"}))
    with pytest.raises(ModelError, match=r"was trained on /no/where, and no model is there; put it back, or name its"):
        load_mllm(folder)
    assert load_adapter(folder, base=moved).tags_are_tokens
    with pytest.raises(ModelError, match=r"the adapter does not fit .*qwen2 .*; name the base it was trained on"):
        load_adapter(folder, base=bases / "qwen2")


def test_a_base_is_found_again_after_both_have_moved(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    shutil.copytree(bases / "llama3", root / "models" / "llama3")
    monkeypatch.chdir(root)
    mllm, model = adapted(Path("models/llama3"))  # as a person gives it
    adapter = save_adapter(mllm, model, model.state_dict(), Path("runs/x/final"), {})
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "models/llama3"
    expected = load_mllm(adapter).model.state_dict()
    monkeypatch.chdir(tmp_path)
    moved = root.rename(tmp_path / "moved") / "runs" / "x" / "final"
    found = load_mllm(moved).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_is_compared_on_a_base_of_the_precision_it_was_trained_on(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm = load_mllm(bases / "qwen2", dtype=torch.bfloat16)
    model = add_adapter(mllm, LoraConfig(rank=4), bases / "qwen2")
    dtypes, load = [], lora.load_mllm
    monkeypatch.setattr(lora, "load_mllm", lambda *how: dtypes.append(how[3]) or load(*how))
    folder = save_adapter(mllm, model, model.state_dict(), tmp_path / "adapter", {})
    assert dtypes == [torch.bfloat16]  # float32 would take twice the memory
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}


def test_weights_missing_from_an_adapter(saved: Callable[[str], Path]) -> None:
    folder = saved("gemma")
    weights = load_file(folder / "adapter_model.safetensors")
    weights["somebody.elses"] = weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not fit .*1 weights missing, 1 unknown, first .*lora_A"):
        load_mllm(folder)


def test_an_adapter_that_is_damaged(saved: Callable[[str], Path]) -> None:
    folder = saved("gemma")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(ModelError, match=r"adapter: the weights cannot be read \(.*\); copy or download them again"):
        load_mllm(folder)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-9])
    with pytest.raises(
        ModelError, match=r"adapter_config.json cannot be read as JSON .*; save or download the adapter"
    ):
        load_mllm(folder)


def test_an_adapter_trained_with_kernels_for_gpus_is_not_asked_by_the_cpu(bases: Path, tmp_path: Path) -> None:
    """Liger exchanges the library's classes, so a model loaded to be compared would compute with its kernels too."""

    def on_gpus_alone(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    mllm, model = adapted(bases / "qwen2")
    kernels = type("LigerRMSNorm", (modeling_qwen2.Qwen2RMSNorm,), {"forward": on_gpus_alone})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(modeling_qwen2, "Qwen2RMSNorm", kernels)
        folder = save_adapter(mllm, model, model.state_dict(), tmp_path / "adapter", {})
    assert load_mllm(folder).tags_are_tokens


def test_the_command_merges_and_tells_what_is_wrong(saved: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = saved("phi3")
    result = CliRunner().invoke(app, ["merge", str(adapter), str(tmp_path / "whole"), "--dtype", "bfloat16"])
    assert result.exit_code == EXIT_OK and "no logit differs by more than" in result.stdout
    assert load_mllm(tmp_path / "whole", dtype=torch.bfloat16).tags_are_tokens
    assert {tensor.dtype for tensor in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.bfloat16}
    provenance = json.loads((tmp_path / "whole" / "provenance.json").read_text())
    assert provenance["merged_from"]["adapter"] == str(adapter) and provenance["adapter"]["commit"] == "abc"
    for arguments, message in (
        ([str(adapter), str(tmp_path / "whole")], "whole exists already and is not empty; move it away"),
        ([str(tmp_path), str(tmp_path / "other")], "no adapter_config.json there; give an adapter, such as final/"),
        ([str(adapter), str(tmp_path / "other"), "--dtype", "int8"], "expected float32, bfloat16 or float16"),
    ):
        result = CliRunner().invoke(app, ["merge", *arguments])
        assert result.exit_code == EXIT_BAD_INPUT and message in result.stderr.replace("\n", " ")
