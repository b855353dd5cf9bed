"""Hazards: a silently random head, torchvision pixels, odd ZeRO-3 names, and folders only we can load."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llmga.stage1.added_tokens import add_generation_tags
from llmga.stage1.config import LoraConfig
from llmga.stage1.lora import add_adapter
from llmga.stage1.model import (
    VISION_SHARD,
    Mllm,
    ModelError,
    count_parameters,
    load_mllm,
    read_picture_shape,
    save_mllm,
    set_trainable,
    standard_names,
)
from llmga.tokens import GEN_IMAGE, GEN_IMG
from tests.toy import toy_llava, toy_processor, toy_tokenizer

LAYER = [
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
VISION_LAYER = [
    f"{part}.{kind}"
    for part in (
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
    )
    for kind in ("weight", "bias")
]
# What transformers 5.23 itself writes for this architecture; other tools read these names.
STANDARD_KEYS = {
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    *(f"language_model.model.layers.{layer}.{name}" for layer in (0, 1) for name in LAYER),
    *(f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
    *("vision_tower.embeddings.class_embedding", "vision_tower.embeddings.patch_embedding.weight"),
    "vision_tower.embeddings.position_embedding.weight",
    *(f"vision_tower.{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")),
    *(f"vision_tower.encoder.layers.{layer}.{name}" for layer in (0, 1) for name in VISION_LAYER),
}


def tiny_mllm(tied: bool = False, spare_rows: int = 0) -> Mllm:
    """The toy LLaVA with what these tests vary: 263 tokens, 4 picture tokens, 32 channels."""
    tokenizer = toy_tokenizer()
    model = toy_llava(tokenizer)
    if tied or spare_rows:
        config = model.config
        config.text_config.vocab_size += spare_rows
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    return Mllm(model, toy_processor(tokenizer), GEN_IMG)


def keys_on_disk(folder: Path) -> set[str]:
    keys: set[str] = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            keys |= set(file.keys())
    return keys


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_mllm(tiny_mllm(), None, tmp_path / "model", {"commit": "abc"})


def test_saved_folder_has_standard_keys_and_loads_in_plain_transformers(saved: Path) -> None:
    assert keys_on_disk(saved) == STANDARD_KEYS
    assert {file.name for file in saved.iterdir()} == {
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
        *("provenance.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert json.loads((saved / "provenance.json").read_text()) == {"commit": "abc"}
    plain, info = LlavaForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    assert same_weights(plain, tiny_mllm().model)
    assert AutoProcessor.from_pretrained(saved).chat_template == tiny_mllm().tokenizer.chat_template


def test_tied_head_is_saved_once_whether_or_not_the_state_dict_has_it(tmp_path: Path) -> None:
    mllm = tiny_mllm(tied=True)
    state_dict = mllm.model.state_dict()
    with_head = save_mllm(mllm, state_dict, tmp_path / "a", {})
    del state_dict["lm_head.weight"]
    without_head = save_mllm(mllm, state_dict, tmp_path / "b", {})
    assert keys_on_disk(with_head) == keys_on_disk(without_head) == STANDARD_KEYS - {"language_model.lm_head.weight"}
    reloaded = load_mllm(without_head).model
    assert reloaded.lm_head.weight is reloaded.model.language_model.embed_tokens.weight


def test_names_written_under_zero3_are_normalised(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    state_dict = mllm.model.state_dict()
    odd = {  # what transformers 5.23 saved after a ZeRO-3 run of a model that came from a folder
        name.replace("model.language_model.", "language_model.model.model.")
        .replace("model.vision_tower.", "vision_tower.vision_model.")
        .replace("model.multi_modal_projector.", "multi_modal_projector.")
        .replace("lm_head.", "language_model.lm_head."): tensor
        for name, tensor in state_dict.items()
    }
    assert not odd.keys() & state_dict.keys()
    folder = save_mllm(mllm, odd, tmp_path / "model", {})
    assert keys_on_disk(folder) == STANDARD_KEYS
    assert same_weights(load_mllm(folder).model, mllm.model)


def test_standard_names_reads_every_spelling(saved: Path) -> None:
    state_dict = tiny_mllm().model.state_dict()
    on_disk = load_file(saved / "model.safetensors")
    for spelling in (
        state_dict,
        on_disk,
        {f"module.{name}": tensor for name, tensor in state_dict.items()},
        {f"_orig_mod.{name}": tensor for name, tensor in state_dict.items()},
        {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in on_disk.items()},
    ):
        assert standard_names(spelling).keys() == state_dict.keys()


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    state_dict = mllm.model.state_dict()
    del state_dict["lm_head.weight"]
    with pytest.raises(ModelError, match=r"1 weights do not fit the config, first lm_head.weight is missing"):
        save_mllm(mllm, state_dict, tmp_path / "model", {})
    state_dict["lm_head.weight"] = torch.zeros(3, 3)
    with pytest.raises(ModelError, match=r"lm_head.weight has shape \(3, 3\), expected \(263, 32\)"):
        save_mllm(mllm, state_dict, tmp_path / "model", {})
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    mllm.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"lm_head.weight read back differs"):
        save_mllm(mllm, None, tmp_path / "model", {})
    assert not list(tmp_path.iterdir())


def test_lower_precision_on_disk(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    folder = save_mllm(mllm, None, tmp_path / "half", {}, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert mllm.model.dtype == torch.float32
    torch.testing.assert_close(load_mllm(folder).model.lm_head.weight, mllm.model.lm_head.weight.half().float())


def test_vision_tower_in_its_own_file_can_be_shared_by_a_symlink(tmp_path: Path) -> None:
    base = save_mllm(tiny_mllm(), None, tmp_path / "base", {}, split_vision=True)
    tuned = tiny_mllm()
    torch.nn.init.normal_(tuned.model.lm_head.weight)
    folder = save_mllm(tuned, None, tmp_path / "tuned", {}, split_vision=True)
    assert keys_on_disk(folder) == STANDARD_KEYS
    vision = load_file(folder / VISION_SHARD)
    assert vision.keys() == {key for key in STANDARD_KEYS if key.startswith("vision_tower.")}
    assert (folder / VISION_SHARD).read_bytes() == (base / VISION_SHARD).read_bytes()
    assert same_weights(load_mllm(folder).model, tuned.model)
    (folder / VISION_SHARD).unlink()
    (folder / VISION_SHARD).symlink_to(Path("..") / "base" / VISION_SHARD)
    assert same_weights(load_mllm(folder).model, tuned.model)


def test_loading_refuses_weights_that_would_stay_random(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["somebody.elses.weight"] = weights.pop("language_model.lm_head.weight")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing_keys, first lm_head.weight; 1 unexpected_keys, first somebody"):
        load_mllm(saved)


def test_loading_refuses_a_folder_that_is_not_llava(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json there"):
        load_mllm(tmp_path / "nowhere")
    settings = (saved / "config.json").read_text()
    (saved / "config.json").write_text(settings[:-9])
    with pytest.raises(ModelError, match=r"config.json cannot be read as JSON \(.*line .*\); save or download"):
        load_mllm(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json holds a list, expected an object"):
        load_mllm(saved)
    (saved / "config.json").write_text(settings)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "llava_llama"}))
    with pytest.raises(ModelError, match="model_type is 'llava_llama', expected 'llava'"):
        load_mllm(saved)


def inner(part: str, **changes: object) -> Callable[[dict], dict]:
    """What changes the settings of the LLM or the vision tower."""
    return lambda config: config | {part: config[part] | changes}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: {k: v for k, v in config.items() if k != "text_config"}, "'llava' without text_config, expect"),
        (lambda config: config | {"vision_config": [1]}, r"cannot read it \(.*'vision_config'.*\); save or download"),
        (
            inner("text_config", model_type="new"),
            r"without code from outside \(Unrecognized model type.* new\); choose",
        ),
        (
            inner("text_config", hidden_size="32"),
            r"cannot read it \(.*'hidden_size' expected int.*\); save or download",
        ),
        (
            inner("text_config", model_type="qwen2"),
            r"which says model_type 'llava' with 'qwen2' in it \(6 missing_keys",
        ),
        (inner("text_config", vocab_size=270), r"the weights have 263 rows, so set vocab_size \(now 270\) to that"),
        (lambda config: config | {"tie_word_embeddings": True}, "hold a head that differs .*; set it to false there"),
    ],
    ids=["no LLM", "a list", "unknown LLM", "no number", "other LLM", "odd embedding", "tied"],
)
def test_a_config_that_is_not_that_of_the_weights_is_one_sentence(
    saved: Path, change: Callable[[dict], dict], reason: str
) -> None:
    """A head that is saved as tied would be lost; a config without sizes is that of a model of 7 billion weights."""
    file = saved / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ModelError, match=reason) as raised:
        load_mllm(saved)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("processor_config.json", None),
        ("processor_config.json", "{"),
    ],
)
def test_tokenizer_and_processor_are_looked_at_before_any_weights(saved: Path, name: str, content: str | None) -> None:
    (saved / name).unlink() if content is None else (saved / name).write_text(content)
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"tokenizer and image processor cannot be loaded \(.*\); save or download"
    ) as one:
        load_mllm(saved)
    assert "\n" not in str(one.value)


def test_loading_refuses_a_placeholder_that_is_no_token(saved: Path) -> None:
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"reads <image> as ids \[.+, .+\], expected the one id 258"):
        load_mllm(saved)


def test_pictures_are_prepared_by_pillow_after_reloading_twice(saved: Path, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 70, 3), generator=rng, dtype=torch.uint8).numpy()
    expected = tiny_mllm().processor.image_processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    again = load_mllm(save_mllm(load_mllm(saved), None, tmp_path / "again", {}))
    prepared = again.processor.image_processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    assert torch.equal(prepared, expected)
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["backend"] == "tokenizers"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare_rows", [0, 1, 5])
def test_tags_become_tokens_with_mean_rows(tied: bool, spare_rows: int) -> None:
    mllm = tiny_mllm(tied=tied, spare_rows=spare_rows)
    known = mllm.model.get_output_embeddings().weight[:263].detach().clone()
    assert not mllm.tags_are_tokens
    assert add_generation_tags(mllm, GEN_IMG) == 2
    assert add_generation_tags(mllm, GEN_IMG) == 0
    assert mllm.tags_are_tokens
    rows = 263 + max(2, spare_rows)
    assert mllm.model.config.text_config.vocab_size == rows
    for layer in (mllm.model.get_input_embeddings(), mllm.model.get_output_embeddings()):
        assert layer.weight.shape == (rows, 32)
        torch.testing.assert_close(layer.weight[263:265], layer.weight[:263].mean(0).expand(2, 32))
    torch.testing.assert_close(mllm.model.get_output_embeddings().weight[:263], known, rtol=0, atol=0)


def test_tags_survive_saving_and_decoding(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    add_generation_tags(mllm, GEN_IMG)
    reloaded = load_mllm(save_mllm(mllm, None, tmp_path / "model", {}))
    assert add_generation_tags(reloaded, GEN_IMG) == 0
    ids = reloaded.tokenizer.encode("a <gen_img> b </gen_img>", add_special_tokens=False)
    assert ids.count(263) == ids.count(264) == 1
    assert reloaded.tokenizer.decode(ids, skip_special_tokens=True) == "a <gen_img> b </gen_img>"


def test_a_saved_folder_remembers_its_spelling_of_the_tags(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    mllm.write_tags(GEN_IMAGE)  # as plain text: nothing is added
    folder = save_mllm(mllm, None, tmp_path / "model", {})
    assert load_mllm(folder).tags == GEN_IMAGE
    assert not load_mllm(folder).tags_are_tokens
    assert len(load_mllm(folder).tokenizer) == 263
    assert load_mllm(folder, tags=GEN_IMG).tags == GEN_IMG


def test_a_saved_folder_remembers_how_its_pictures_were_made_square(tmp_path: Path) -> None:
    mllm = tiny_mllm()
    unsaid = save_mllm(mllm, None, tmp_path / "unsaid", {})
    assert read_picture_shape(unsaid) == load_mllm(unsaid).picture_shape == (None, "squash")
    mllm.write_picture_shape(48, "pad")
    folder = save_mllm(mllm, None, tmp_path / "model", {})
    again = save_mllm(load_mllm(folder), None, tmp_path / "again", {})
    assert read_picture_shape(again) == load_mllm(again).picture_shape == (48, "pad")
    _, info = LlavaForConditionalGeneration.from_pretrained(again, output_loading_info=True)
    assert not any(info.values())
    assert AutoProcessor.from_pretrained(again).tokenizer is not None


def test_set_trainable_freezes_the_vision_tower_and_keeps_it_in_eval_mode() -> None:
    mllm = tiny_mllm()
    model = mllm.model
    vision = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    projector = 2 * (32 * 32 + 32)
    set_trainable(model, "projector")
    assert count_parameters(model) == (projector, total - projector)
    set_trainable(model, "projector+llm")
    assert count_parameters(model) == (total - vision, vision)
    model.train()
    ids = torch.tensor([[257, 258, 258, 258, 258, 9, 262]])
    model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32), labels=ids).loss.backward()
    assert model.training
    assert not any(module.training for module in model.model.vision_tower.modules())
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "vision_tower" not in name}


def a_step(kind: str, checkpointing: bool) -> tuple[bool, torch.Tensor, dict[str, torch.Tensor]]:
    """Whether features of a picture carry a graph into the projector; loss and gradients, in train mode."""
    mllm = tiny_mllm()
    model = mllm.model
    set_trainable(model, "projector" if kind == "projector" else "projector+llm")
    torch.manual_seed(0)
    if kind == "adapters":
        add_adapter(mllm, LoraConfig(rank=2, dropout=0.0), Path("base"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # they start at 0 and would give the others no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    if kind == "tower too":
        model.model.vision_tower.requires_grad_(True)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    carried: list[bool] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: carried.append(args[0].requires_grad)
    )
    ids = torch.tensor([[257, 258, 258, 258, 258, 9, 262]])
    loss = model(input_ids=ids, pixel_values=torch.rand(1, 3, 32, 32), labels=ids, use_cache=False).loss
    loss.backward()
    hook.remove()
    return carried == [True], loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["projector", "projector+llm", "adapters", "tower too"])
def test_checkpointing_draws_no_gradients_through_a_frozen_tower_and_changes_none(kind: str) -> None:
    """It asks every input embedding for gradients, the tower's too, which would go backward through it for nothing."""
    carries, loss, gradients = a_step(kind, checkpointing=True)
    without, expected_loss, expected = a_step(kind, checkpointing=False)
    assert carries == without == (kind == "tower too")
    assert any("vision_tower" in name for name in gradients) == (kind == "tower too")
    assert any("language_model" in name for name in gradients) == (kind != "projector")
    assert torch.equal(loss, expected_loss) and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_gradients_are_back_after_a_tower_that_raised() -> None:
    model = tiny_mllm().model
    set_trainable(model, "projector+llm")
    with pytest.raises(ValueError, match="doesn't match model"):
        model.get_image_features(pixel_values=torch.rand(1, 3, 48, 48))
    assert torch.is_grad_enabled()


def test_number_of_picture_tokens_is_what_the_model_makes_of_a_picture() -> None:
    mllm = tiny_mllm()
    features = mllm.model.get_image_features(pixel_values=torch.zeros(1, 3, 32, 32)).pooler_output
    assert mllm.num_image_tokens == features[0].shape[0] == 4


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (lambda content: None, r"no file named model\.safetensors"),
        (lambda content: content[:-100], r"not fully covered|incomplete"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", r"model\.safetensors is a Git LFS pointer"),
        (lambda content: b"<!DOCTYPE html>", r"model\.safetensors is a web page"),
    ],
    ids=["missing", "cut short", "pointer", "page"],
)
def test_weights_that_cannot_be_read_are_one_sentence(
    saved: Path, kept: Callable[[bytes], bytes | None], reason: str
) -> None:
    file = saved / "model.safetensors"
    content = kept(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        ModelError, match=rf"the weights cannot be read \(.*({reason}).*\); copy or download them again$"
    ):
        load_mllm(saved)


def test_flash_attention_that_is_not_here_is_one_sentence(saved: Path) -> None:
    if importlib.util.find_spec("flash_attn") and torch.cuda.is_available():
        pytest.skip("flash attention is here")
    with pytest.raises(
        ModelError, match=r"^flash_attention_2 cannot be used here \(.*\); set model.attention to sdpa$"
    ):
        load_mllm(saved, attention="flash_attention_2")
