"""Any base model through the real trainer: from its parts, with fresh or trained projector, whole or through adapters.

A family that builds may still not train: a head that stays behind, a template the data cannot use.
Run: pytest tests/e2e/test_stage1_families.py
"""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, Trainer

from llmga.checkpoint import latest_checkpoint
from llmga.config import load_config
from llmga.run_folder import ResumeError
from llmga.stage1.config import Stage1Config
from llmga.stage1.conversation import Turn
from llmga.stage1.lora import merge_adapter
from llmga.stage1.model import ModelError, load_mllm
from llmga.stage1.preview import write_preview
from llmga.stage1.reply import Prompt, generate_replies
from llmga.stage1.train import train
from tests.base_models import FAMILIES, IMAGE_SIZE_PX, make_llm, make_tower
from tests.e2e.stage1_run import ROOT, losses, make_inputs, sample_ids, succeed, weights

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ZERO2 = f"run.deepspeed={ROOT / 'configs/deepspeed/zero2.json'}"
ZERO3 = f"run.deepspeed={ROOT / 'configs/deepspeed/zero3.json'}"
LORA = ("model.lora.rank=4", "model.lora.alpha=8", "model.lora.dropout=0")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings on a toy LLaVA, and parts of every family beside it."""
    path = make_inputs(tmp_path_factory.mktemp("families"))
    make_tower(path.parent / "clip")
    make_tower(path.parent / "siglip", "siglip")
    for name, family in FAMILIES.items():
        make_llm(path.parent / name, family)
    return path


def of_parts(settings: Path, llm: str, tower: str = "clip", *overrides: str) -> Stage1Config:
    """The settings on parts instead, in a run folder named like the LLM unless overrides say otherwise."""
    folder = settings.parent
    parts = [f"model.llm={folder / llm}", f"model.vision_tower={folder / tower}", "model.path=null"]
    return load_config(Stage1Config, settings, [*parts, f"run.output_dir={folder / 'runs' / llm}", *overrides])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_answers_and_is_saved(name: str, settings: Path) -> None:
    family = FAMILIES[name]
    overrides = ["run.max_steps=1", "optim.warmup=0", "data.validation=[]", f"model.chat_template={family.row}"]
    if not family.named:
        overrides.pop()
    if name == "gemma2":
        overrides.append("model.attention=eager")
    final = train(of_parts(settings, name, "siglip" if name in ("mistral", "gemma") else "clip", *overrides))
    before, after = weights(final.parent / "base"), weights(final)
    assert before.keys() == after.keys()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert not any(key.startswith("vision_tower.") for key in moved)
    assert {"multi_modal_projector.linear_1.weight", "language_model.model.embed_tokens.weight"} <= moved
    mllm = load_mllm(final)
    assert mllm.tags_are_tokens
    assert len(generate_replies(mllm, [Prompt([Turn("user", "Hello")])], max_new_tokens=4)) == 1


def test_a_pretrained_projector_starts_the_next_run(settings: Path) -> None:
    folder = settings.parent / "runs"
    first = ("model.trainable=projector", "model.tags=text", "run.max_steps=2", f"run.output_dir={folder / 'pretrain'}")
    final = train(of_parts(settings, "qwen2", "clip", *first))
    before, after = weights(final.parent / "base"), load_mllm(final).model.state_dict()
    moved = {key for key, tensor in after.items() if "projector" in key or "lm_head" in key}
    assert any(not torch.equal(before[key.removeprefix("model.")], after[key]) for key in moved if "projector" in key)
    second = (f"model.projector={final}", "run.max_steps=1", f"run.output_dir={folder / 'tuned'}")
    cfg = of_parts(settings, "qwen2", "clip", *second)
    train(cfg)
    start = weights(folder / "tuned" / "base")
    for name, tensor in after.items():
        if "projector" in name:
            assert torch.equal(start[name.removeprefix("model.")], tensor)
    assert "What" in write_preview(cfg, folder / "preview.html", num_examples=2, num_measured=4).read_text()


def test_a_projector_is_pretrained_in_bf16_on_a_frozen_llm_in_bf16(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the projector recipes do it; what learns is float32 all the same, or steps of 1e-3 would be lost."""
    folder, seen = settings.parent / "runs" / "pretrain_bf16", {}
    step = Trainer.training_step

    def spy(self: Trainer, model: torch.nn.Module, *how: Any) -> torch.Tensor:
        seen.update({name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()})
        return step(self, model, *how)

    monkeypatch.setattr(Trainer, "training_step", spy)
    overrides = ("model.trainable=projector", "model.tags=text", "run.precision=bf16", "data.picture_mode=clip")
    overrides += (f"data.picture_size={IMAGE_SIZE_PX}", f"run.output_dir={folder}")
    final = train(of_parts(settings, "qwen2", "clip", *overrides))
    projector = {name for name in seen if "multi_modal_projector" in name}
    assert {seen[name] for name in projector} == {(True, torch.float32)} and len(projector) == 4
    assert {seen[name] for name in seen.keys() - projector} == {(False, torch.bfloat16)}
    whole = train(
        of_parts(settings, "qwen2", "clip", *overrides, "run.precision=fp32", f"run.output_dir={folder}_fp32")
    )
    figures, expected = losses(folder), losses(whole.parent)
    assert list(figures) == [1, 2, 3, 4, 5, 6] and figures != expected
    assert figures == pytest.approx(expected, abs=0.02)
    before, after = weights(folder / "base"), weights(final)
    for name, tensor in after.items():
        if name in before:  # the projector lies there a second time, in a file of its own
            same = torch.equal(tensor, before[name].to(torch.bfloat16))
            assert tensor.dtype == torch.bfloat16 and same != ("multi_modal_projector" in name), name


def test_a_run_folder_keeps_to_its_parts(settings: Path) -> None:
    where = f"run.output_dir={settings.parent / 'runs' / 'kept'}"
    final = train(of_parts(settings, "gemma", "clip", "run.max_steps=1", where))
    shutil.rmtree(final)
    with pytest.raises(ResumeError, match=r"was trained otherwise: model.llm was .*gemma"):
        train(of_parts(settings, "phi3", "clip", "run.max_steps=1", where))


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def alone(settings: Path) -> Path:
    """The run folder of an adapter trained by one process without a break."""
    where = f"run.output_dir={settings.parent / 'runs' / 'lora'}"
    return train(load_config(Stage1Config, settings, [*LORA, where])).parent


def test_an_adapter_stands_on_a_base_with_rows_for_the_tags(alone: Path) -> None:
    config = json.loads((alone / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(alone / "base"), alone / "final")
    assert set(plain.peft_config["default"].trainable_token_indices) == {"model.language_model.embed_tokens", "lm_head"}
    rows = weights(alone / "final")
    trained = next(tensor for name, tensor in rows.items() if "embed_tokens" in name)
    mean = weights(alone / "base")["language_model.model.embed_tokens.weight"][-2:]
    assert float((trained - mean).abs().min(dim=1).values.max()) > 0  # both rows have moved, each its own way
    assert not torch.equal(trained[0], trained[1])
    assert merge_adapter(alone / "final", alone / "merged") < 2e-6
    assert load_mllm(alone / "merged").tags_are_tokens


def test_a_run_folder_may_move_and_its_checkpoints_are_adapters_too(alone: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(alone, tmp_path / "elsewhere" / "run")
    whole = load_mllm(alone / "final").model.state_dict()
    for folder in (moved / "final", moved / "checkpoint-6"):
        found = load_mllm(folder).model.state_dict()
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_checkpoint_whose_adapter_reads_back_otherwise_ends_the_run(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = settings.parent / "runs" / "lora_broken"
    save = PeftModel.save_pretrained

    def save_wrongly(self: PeftModel, path: str, **how: Any) -> None:
        save(self, path, **how)
        tensors = load_file(Path(path) / "adapter_model.safetensors")
        next(tensor for name, tensor in tensors.items() if "lora_B" in name).add_(1e-7)
        save_file(tensors, Path(path) / "adapter_model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PeftModel, "save_pretrained", save_wrongly)
    with pytest.raises(ModelError, match=r"checkpoint-2: \S+lora_B\S+ read back differs from what was saved"):
        train(load_config(Stage1Config, settings, [*LORA, f"run.output_dir={folder}"]))
    assert latest_checkpoint(folder) is None


def test_an_adapter_run_resumes_to_the_bit(settings: Path, alone: Path) -> None:
    folder = settings.parent / "runs" / "lora_again"
    shutil.copytree(alone, folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-6")
    overrides = [*LORA, f"run.output_dir={folder}"]
    train(load_config(Stage1Config, settings, overrides))
    expected = weights(alone / "final")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder / "final").items())
    assert losses(folder) == losses(alone)
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-6")
    with pytest.raises(
        ResumeError, match=r"holds adapters of rank 4 on .*, this run trains adapters of rank 8 on .*; set"
    ):
        train(load_config(Stage1Config, settings, [*overrides, "model.lora.rank=8", "run.resume_anyway=true"]))
    with pytest.raises(
        ResumeError, match=r"holds adapters of rank 4 on .*, this run trains whole weights; set model.lora"
    ):
        train(load_config(Stage1Config, settings, [overrides[-1], "run.resume_anyway=true"]))


@pytest.mark.parametrize(("engine", "tags"), [("ddp", "tokens"), ("zero2", "tokens"), ("zero3", "text")])
def test_two_processes_train_the_adapter_of_one(engine: str, tags: str, settings: Path, alone: Path) -> None:
    runs, reference = settings.parent / "runs", alone
    if tags == "text":
        overrides = [*LORA, "model.tags=text", f"run.output_dir={runs / 'lora_text'}"]
        reference = train(load_config(Stage1Config, settings, overrides)).parent
    folder = runs / f"lora_{engine}"
    how = {"ddp": (), "zero2": (ZERO2,), "zero3": (ZERO3,)}[engine]
    overrides = (*LORA, *how, f"model.tags={tags}", f"run.output_dir={folder}", "run.batch_size=1")
    succeed(settings, *overrides, processes=2)
    assert sample_ids(folder) == sample_ids(reference)
    assert list(losses(folder).values()) == pytest.approx(list(losses(reference).values()), abs=5e-6)
    made, wanted = weights(folder / "final"), weights(reference / "final")
    assert made.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(made[name], wanted[name], rtol=0, atol=2.5e-4, msg=name)
    assert load_mllm(folder / "final").tags_are_tokens == (tags == "tokens")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_train_on_4_bit_weights(precision: str, settings: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    folder = settings.parent
    wide = replace(FAMILIES["mistral"], extra={"hidden_size": 64, "intermediate_size": 128})  # its kernels want 64s
    if not (folder / "wide").exists():
        make_llm(folder / "wide", wide)
    overrides = (*LORA, "model.quantize=nf4", f"run.precision={precision}", f"run.output_dir={folder}/runs/{precision}")
    final = train(of_parts(settings, "wide", "clip", *overrides))
    values = list(losses(final.parent).values())
    assert values[-1] < values[0] - 0.1
    quantised = load_mllm(final.parent / "base", quantize="nf4").model
    found = {name for name, module in quantised.named_modules() if isinstance(module, Linear4bit)}
    assert len(found) == 2 * 7 and all(name.startswith("model.language_model.layers.") for name in found)
    assert merge_adapter(final, final.parent / "merged") < 1e-5
    assert load_mllm(final.parent / "merged").tags_are_tokens
