"""Hazards: a random head, a lost factor, code in a pickle, half a folder; what does not fit is told, never guessed."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from llmga.cli import app
from llmga.config import RunConfig
from llmga.runtime import RunFailed
from llmga.stage1.added_tokens import add_generation_tags
from llmga.stage1.config import DataConfig, ModelConfig, SourceConfig, Stage1Config
from llmga.stage1.conversation import Turn, encode_conversation
from llmga.stage1.convert import ConvertError, convert_checkpoint
from llmga.stage1.families import FAMILIES
from llmga.stage1.model import choose_tags, load_mllm, save_mllm
from llmga.stage1.released_projector import read_projector
from llmga.stage1.start import load_start_processor, start_model
from llmga.tokens import GEN_IMAGE, GEN_IMG
from tests.released import HIDDEN, KINDS, VISION_WIDTH, projector_shapes, random_tensors, released_folder

WEIGHTS = "model.safetensors"


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes a key out."""
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        found |= load_file(shard)
    return found


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert right[name].dtype == tensor.dtype, name
        assert torch.equal(right[name], tensor), name


# ---------------------------------------------------------------- forth and back


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_speaks_and_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    source = released_folder(tmp_path / "source", kind)
    report = convert_checkpoint(source, tmp_path / "hf", needs_tokenizer=True)
    family = FAMILIES[kind.split("-")[0]]
    assert report.family == family.name

    mllm = load_mllm(tmp_path / "hf")  # refuses anything missing
    assert mllm.tags == GEN_IMAGE
    assert not mllm.tags_are_tokens
    assert mllm.model.config.released["template"] == family.template
    assert mllm.image_token_id == len(mllm.tokenizer) - 1
    turns = [Turn("user", "What is it?", has_picture=True), Turn("assistant", "A kite.")]
    encoded = encode_conversation(mllm.tokenizer, turns, "<image>", mllm.num_image_tokens)
    assert encoded.input_ids.count(mllm.image_token_id) == 4
    stops = mllm.model.generation_config.eos_token_id
    assert mllm.tokenizer.convert_tokens_to_ids(family.stop_tokens[0]) in (
        stops if isinstance(stops, list) else [stops]
    )
    assert mllm.tokenizer.pad_token == family.pad_token

    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="llava", needs_tokenizer=True)
    assert_same(tensors(source), tensors(tmp_path / "back"))
    for path in source.iterdir():  # config and tokenizer, too
        if path.name == "config.json":
            assert json.loads(path.read_text()) == json.loads((tmp_path / "back" / path.name).read_text())
        elif path.name != WEIGHTS:
            assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_report_names_what_was_found_and_written(tmp_path: Path) -> None:
    text = str(convert_checkpoint(released_folder(tmp_path / "source", "vicuna"), tmp_path / "hf"))
    for line in (
        "(vicuna)",
        "dtype: bfloat16",
        "tied head: no",
        "vision tower: inside",
        "tokenizer: LlamaTokenizer, 401 tokens",
        "picture token: <image> = 400",
        "vocabulary: 400 rows grown to 448",
        "template: released_vicuna, with space marks",
        "note: the vicuna weights were trained with a system text of 154 characters",
    ):
        assert line in text
    provenance = json.loads((tmp_path / "hf" / "provenance.json").read_text())
    assert {Path(entry["path"]).name for entry in provenance["inputs"]} >= {"config.json", WEIGHTS}


def test_a_resize_adds_silent_rows_and_changes_no_logit(tmp_path: Path) -> None:
    source = released_folder(tmp_path / "source", "mistral", dtype=torch.float32)
    convert_checkpoint(source, tmp_path / "grown")
    convert_checkpoint(
        released_folder(tmp_path / "spare", "mistral", dtype=torch.float32, spare_rows=5), tmp_path / "b"
    )
    grown, spare = (LlavaForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("grown", "b"))
    assert grown.lm_head.weight.shape == grown.model.language_model.embed_tokens.weight.shape == (448, HIDDEN)
    assert not grown.lm_head.weight[400:].any()
    assert grown.generation_config.suppress_tokens == list(range(400, 448))
    assert spare.config.text_config.vocab_size == 405
    assert spare.config.image_token_id == 400
    plain = shutil.copytree(source, tmp_path / "plain")
    (plain / "tokenizer.model").unlink()
    convert_checkpoint(plain, tmp_path / "c", image_token_id=7)
    ids, pixels = torch.tensor([[1, 400, 400, 400, 400, 20, 30]]), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = LlavaForConditionalGeneration.from_pretrained(tmp_path / "c")(
            input_ids=torch.where(ids == 400, 7, ids), pixel_values=pixels
        ).logits
        torch.testing.assert_close(grown(input_ids=ids, pixel_values=pixels).logits[..., :400], expected)


def test_a_reserved_token_stands_for_pictures_without_a_resize(tmp_path: Path) -> None:
    source = released_folder(tmp_path / "source", "llama3")
    convert_checkpoint(source, tmp_path / "hf", image_token="<|reserved_special_token_1|>")
    mllm = load_mllm(tmp_path / "hf")
    assert mllm.processor.image_token == "<|reserved_special_token_1|>"
    assert mllm.model.config.text_config.vocab_size == 407
    assert "<|reserved_special_token_1|>" in mllm.tokenizer.chat_template


def test_processor_prepares_pictures_with_pillow(tmp_path: Path) -> None:
    convert_checkpoint(released_folder(tmp_path / "source", "qwen2"), tmp_path / "hf")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    short = picture.resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    expected = (np.asarray(short, np.float32) / 255 - mean) / std
    prepared = load_mllm(tmp_path / "hf").processor.image_processor(picture, return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(prepared.transpose(1, 2, 0), expected, atol=1e-6)


def test_tags_added_since_the_release_go_along(tmp_path: Path) -> None:
    convert_checkpoint(released_folder(tmp_path / "source", "vicuna"), tmp_path / "hf")
    mllm = load_mllm(tmp_path / "hf")
    add_generation_tags(mllm, GEN_IMAGE)
    save_mllm(mllm, None, tmp_path / "tuned", {}, dtype=torch.bfloat16)
    report = convert_checkpoint(tmp_path / "tuned", tmp_path / "back", to="llava")
    assert "2 tokens were added since the release (</gen_image>, <gen_image>)" in report.warnings[0]
    assert tensors(tmp_path / "back")["lm_head.weight"].shape == (448, HIDDEN)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 448


@pytest.mark.parametrize("name", [None, "gen_image", "gen_img"])
def test_a_run_keeps_the_tags_of_the_release_unless_told_otherwise(
    name: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert_checkpoint(released_folder(tmp_path / "source", "vicuna"), tmp_path / "hf")
    cfg = Stage1Config(
        model=ModelConfig(path=tmp_path / "hf", tag_name=name),
        data=DataConfig(sources=[SourceConfig(path=tmp_path / "rows.jsonl")]),
        run=RunConfig(output_dir=tmp_path / "run", precision="fp32"),
    )
    caplog.set_level("INFO", "llmga")
    mllm = start_model(cfg, tmp_path / "base").mllm
    kept = name != "gen_img"
    assert mllm.tags == (GEN_IMAGE if kept else GEN_IMG) and mllm.tags_are_tokens
    assert mllm.model.config.generation_tags == ("gen_image" if kept else "gen_img")
    assert choose_tags(name, cfg.model.path) == mllm.tags
    assert ("<gen_img> from now on" in caplog.text) is not kept
    processor = load_start_processor(cfg.model)
    assert mllm.tags.open in processor.tokenizer.get_added_vocab()


def test_a_folder_trained_here_goes_out_without_the_source_files(tmp_path: Path) -> None:
    source = released_folder(tmp_path / "source", "phi3")
    convert_checkpoint(source, tmp_path / "hf")
    save_mllm(load_mllm(tmp_path / "hf"), None, tmp_path / "tuned", {}, dtype=torch.bfloat16)
    convert_checkpoint(tmp_path / "tuned", tmp_path / "back", to="llava")
    assert_same(tensors(source), tensors(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    released = json.loads((source / "config.json").read_text())
    assert config["rope_scaling"] == released["rope_scaling"]
    same = ("model_type", "vocab_size", "hidden_size", "mm_projector_type", "mm_vision_select_layer", "torch_dtype")
    same += ("original_max_position_embeddings", "max_position_embeddings", "num_key_value_heads")
    assert {key: config[key] for key in same} == {key: released[key] for key in same}
    config["mm_vision_tower"] = "../clip"
    (tmp_path / "back" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "back", tmp_path / "again")  # and it is read like a released one
    assert "<image>" not in {
        t["content"] for t in json.loads((tmp_path / "back/tokenizer.json").read_text())["added_tokens"]
    }


# ---------------------------------------------------------------- kinds of files


def as_bin(folder: Path, num_shards: int, **options: object) -> None:
    """Replace a folder's weights by pickled shards with an index, as older checkpoints have them."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"pytorch_model-{number + 1:05d}-of-{num_shards:05d}.bin" for number in range(num_shards)]
    for number, name in enumerate(names):
        shard = {
            key: tensor for position, (key, tensor) in enumerate(weights.items()) if position % num_shards == number
        }
        if number == 0:  # buffers that older libraries stored
            shard["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)
            shard["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        torch.save(shard, folder / name, **options)
    weight_map = {key: names[position % num_shards] for position, key in enumerate(weights)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before torch 1.6"])
def test_bin_shards_become_safetensors_shards(tmp_path: Path, options: dict) -> None:
    source = released_folder(tmp_path / "source", "vicuna")
    expected = tensors(source)
    as_bin(source, 3, **options)
    report = convert_checkpoint(source, tmp_path / "hf", shard_bytes=20_000)
    assert report.found["weights"] == "3 shards (.bin)"
    files = sorted(path.name for path in (tmp_path / "hf").glob("model*"))
    assert len(files) > 2
    assert not list((tmp_path / "hf").glob("*.bin"))
    assert max((tmp_path / "hf" / name).stat().st_size for name in files) < 30_000
    load_mllm(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="llava")
    assert_same(expected, tensors(tmp_path / "back"))


@pytest.mark.parametrize("weights_in", ["config.json", "--vision-tower"])
def test_a_tower_outside_is_taken_along_and_left_out_on_the_way_back(tmp_path: Path, weights_in: str) -> None:
    source = released_folder(tmp_path / "source", "vicuna", with_tower=False)
    given = None
    if weights_in == "--vision-tower":
        edit(source / "config.json", mm_vision_tower="somewhere/else")
        given = (tmp_path / "clip").rename(tmp_path / "other")
    report = convert_checkpoint(source, tmp_path / "hf", vision_tower=given)
    assert report.found["vision tower"].startswith("outside, read from ")
    load_mllm(tmp_path / "hf")
    written = tensors(tmp_path / "hf")["vision_tower.encoder.layers.1.mlp.fc2.weight"]
    tower = load_file((given or tmp_path / "clip") / WEIGHTS)["vision_model.encoder.layers.1.mlp.fc2.weight"]
    assert torch.equal(written, tower.bfloat16())
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="llava")
    assert_same(tensors(source), tensors(tmp_path / "back"))


def test_a_whole_clip_folder_serves_as_tower(tmp_path: Path) -> None:
    source = released_folder(tmp_path / "source", "qwen2", with_tower=False)
    clip = tmp_path / "clip"
    vision = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}}))
    more = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    save_file(load_file(clip / WEIGHTS) | more, clip / WEIGHTS, metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "hf")
    load_mllm(tmp_path / "hf")


def test_a_tied_head_that_was_stored_comes_back(tmp_path: Path) -> None:
    source = released_folder(tmp_path / "source", "qwen2")
    weights = load_file(source / WEIGHTS)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    convert_checkpoint(source, tmp_path / "hf")
    assert "language_model.lm_head.weight" not in tensors(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="llava")
    assert_same(weights, tensors(tmp_path / "back"))
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConvertError, match=r"lm_head.weight differs from the embedding although tie_word_embeddings"):
        convert_checkpoint(source, tmp_path / "again")


# ---------------------------------------------------------------- projectors


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", ""])
def test_a_bare_projector_forth_and_back(tmp_path: Path, prefix: str) -> None:
    weights = random_tensors(projector_shapes(prefix), torch.bfloat16)
    torch.save(weights, tmp_path / "mm_projector.bin")
    report = convert_checkpoint(tmp_path / "mm_projector.bin", tmp_path / "p.safetensors", family="vicuna")
    assert report.found["vision width"] == VISION_WIDTH
    written = load_file(tmp_path / "p.safetensors")
    assert torch.equal(written["multi_modal_projector.linear_2.weight"], weights[f"{prefix}2.weight"])
    convert_checkpoint(tmp_path / "p.safetensors", tmp_path / "back.safetensors", to="llava", family="vicuna")
    back = {
        name.removeprefix("model.mm_projector."): tensor
        for name, tensor in load_file(tmp_path / "back.safetensors").items()
    }
    assert_same({name.removeprefix(prefix): tensor for name, tensor in weights.items()}, back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gemmas_factor_is_exact_both_ways(tmp_path: Path, dtype: torch.dtype) -> None:
    width = 2048  # sqrt(2048) is no power of two, so a product rounded to bfloat16 would not come back
    rng = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (width, 3), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    weights = {f"mm_projector.{name}": torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "mm_projector.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_gemma", "mm_hidden_size": 3}))
    report = convert_checkpoint(tmp_path, tmp_path / "out" / "p.safetensors")
    assert report.wrote["factor"] == "sqrt(2048) on the last layer"
    scaled = read_projector(tmp_path / "out" / "p.safetensors", None)
    torch.testing.assert_close(scaled["linear_2.bias"].double(), weights["mm_projector.2.bias"].double() * 2048**0.5)
    assert torch.equal(scaled["linear_1.weight"], weights["mm_projector.0.weight"])
    convert_checkpoint(tmp_path / "out" / "p.safetensors", tmp_path / "b.safetensors", to="llava", family="gemma")
    assert_same({f"model.{name}": tensor for name, tensor in weights.items()}, load_file(tmp_path / "b.safetensors"))


def test_projectors_that_are_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "mm_projector.bin", tmp_path / "p.safetensors"
    weights = random_tensors(projector_shapes("mm_projector."), torch.float32)
    torch.save(weights, path)
    with pytest.raises(ConvertError, match=r"has LLaVA's names, which depend on the LLM; name it with --family"):
        convert_checkpoint(path, out)
    with pytest.raises(ConvertError, match=r"written to a file whose name ends with .safetensors"):
        convert_checkpoint(path, tmp_path / "folder", family="vicuna")
    torch.save(weights | {"mm_projector.4.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ConvertError, match=r"mm_projector.4.weight is no layer of a projector of two layers"):
        convert_checkpoint(path, out, family="vicuna")
    torch.save({name: tensor for name, tensor in weights.items() if "2.bias" not in name}, path)
    with pytest.raises(ConvertError, match=r"expected weight and bias of two layers"):
        convert_checkpoint(path, out, family="vicuna")
    torch.save(weights | {"mm_projector.2.weight": torch.ones(3, HIDDEN)}, path)
    with pytest.raises(ConvertError, match=r"shapes .* do not fit together, expected"):
        convert_checkpoint(path, out, family="vicuna")
    save_file(random_tensors(projector_shapes(""), torch.float32), tmp_path / "q.safetensors")
    with pytest.raises(ConvertError, match=r"family is 'qwen', expected one of vicuna, llama3"):
        convert_checkpoint(tmp_path / "q.safetensors", out, family="qwen")


# ---------------------------------------------------------------- system texts


def test_system_texts_are_checked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from llmga.stage1.families import SystemText

    known = SystemText(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")  # SHA-256 of abc
    monkeypatch.setitem(FAMILIES, "vicuna", dataclasses.replace(FAMILIES["vicuna"], system_text=known))
    source, text = released_folder(tmp_path / "source", "vicuna"), tmp_path / "system.txt"
    text.write_bytes(b"abc\n")
    report = convert_checkpoint(source, tmp_path / "a", system_prompt=text)
    assert report.wrote["system text"] == "3 characters, the trained text"
    assert report.warnings == ()
    rendered = load_mllm(tmp_path / "a").tokenizer.apply_chat_template(
        [{"role": "user", "content": "U"}], tokenize=False
    )
    assert rendered == "<s> abc USER: U "
    text.write_text("abd")
    report = convert_checkpoint(source, tmp_path / "b", system_prompt=text)
    assert "is not the text that the vicuna weights were trained with: it has 3 characters" in report.warnings[0]
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(ConvertError, match=r"--system-prompt .* cannot be read as UTF-8 text"):
        convert_checkpoint(source, tmp_path / "c", system_prompt=text)
    with pytest.raises(ConvertError, match=r"the gemma weights were trained without a system text; leave --system-pr"):
        convert_checkpoint(released_folder(tmp_path / "gemma", "gemma"), tmp_path / "d", system_prompt=text)


# ---------------------------------------------------------------- what is refused


class Attack:
    """A pickle that makes a file when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_never_executed(tmp_path: Path) -> None:
    source = released_folder(tmp_path / "source", "vicuna")
    (source / WEIGHTS).unlink()
    for write in (
        lambda value, path: torch.save(value, path),
        lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    ):
        write({"lm_head.weight": Attack(tmp_path / "broken-in")}, source / "pytorch_model.bin")
        with pytest.raises(
            ConvertError, match="a pickle that asks for more than tensors, which may be an attack; nothing"
        ):
            convert_checkpoint(source, tmp_path / "hf")
        shutil.copyfile(source / "pytorch_model.bin", tmp_path / "mm_projector.bin")
        with pytest.raises(ConvertError, match="which may be an attack"):
            convert_checkpoint(tmp_path / "mm_projector.bin", tmp_path / "p.safetensors", family="vicuna")
    assert not (tmp_path / "broken-in").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_mpt"}, r"model_type is 'llava_mpt', expected one of llava, llava_Phi3, .*llava_llama"),
        ({"model_type": "llama"}, r"model_type is 'llama', expected one of"),
        (
            {"text_config": {}, "model_type": "llava"},
            r"is transformers' own format already; convert it back with --to ll",
        ),
        ({"mm_vision_tower": None, "mm_hidden_size": None}, r"neither mm_vision_tower nor mm_hidden_size, so this LLM"),
        ({"mm_projector_type": "linear"}, r"mm_projector_type is 'linear', expected 'mlp2x_gelu'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, r"mm_patch_merge_type is 'spatial_unpad', expected 'flat'"),
        ({"mm_use_im_start_end": True}, r"mm_use_im_start_end is True, expected False"),
        (
            {"mm_vision_tower": "google/siglip"},
            r"the vision tower 'google/siglip' is no folder here and not known by na",
        ),
        ({"hidden_size": "wide"}, r"these are no settings of a llama model: .*hidden_size"),
        (
            {"num_hidden_layers": 2},
            r"lacks 9 of the 64 tensors that config.json asks for, first model.layers.1.input_la",
        ),
        (
            {"num_hidden_layers": 0},
            r"holds 9 tensors that config.json knows nothing of, first model.layers.0.input_laye",
        ),
        ({"intermediate_size": 25}, r"model.layers.0.mlp.gate_proj.weight has shape \(24, 16\), expected \(25, 16\)"),
        (
            {"model_type": "llava_Phi3"},
            r"the tokenizer lacks the token that ends an answer, expected <\|end\|> \(phi3\)",
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    source = released_folder(tmp_path / "source", "vicuna")
    edit(source / "config.json", **changes)
    with pytest.raises(ConvertError, match=message):
        convert_checkpoint(source, tmp_path / "hf")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("source", "clip")]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", {}, r"generation_config.json cannot be read as JSON \(.*\); download it again"),
        ("[]", {}, r"generation_config.json holds a list, expected an object; download it again"),
        ("version https://git-lfs.github.com/spec/v1", {}, r"generation_config.json is a Git LFS pointer"),
        ('{"pad_token_id": -3}', {"image_token_id": 3}, r"no settings of generation \(.*pad_token_id.*-3\); correct"),
    ],
)
def test_a_damaged_generation_config_is_told_before_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, options: dict, message: str
) -> None:
    source = released_folder(tmp_path / "source", "vicuna")
    if options:
        (source / "tokenizer.model").unlink()  # else its padding counts and not the file's
    (source / "generation_config.json").write_text(content)
    monkeypatch.setattr("llmga.stage1.released_weights.save_file", _full_disk)
    with pytest.raises(ConvertError, match=message):
        convert_checkpoint(source, tmp_path / "hf", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "source"]


def test_folders_and_files_that_are_refused(tmp_path: Path) -> None:
    source, out = released_folder(tmp_path / "source", "vicuna"), tmp_path / "hf"
    with pytest.raises(ConvertError, match=r"nowhere does not exist; SRC is the folder of a checkpoint"):
        convert_checkpoint(tmp_path / "nowhere", out)
    with pytest.raises(ConvertError, match=r"clip exists already; move it away or choose another place"):
        convert_checkpoint(source, tmp_path / "clip")
    with pytest.raises(ConvertError, match=r"to is 'onnx', expected 'hf'"):
        convert_checkpoint(source, out, to="onnx")  # type: ignore[arg-type]
    with pytest.raises(ConvertError, match=r"says 'llava_llama', which is vicuna or llama3 and not gemma"):
        convert_checkpoint(source, out, family="gemma")
    with pytest.raises(
        ConvertError, match=r"model_type is 'llava_llama' without a text_config, expected transformers'"
    ):
        convert_checkpoint(source, out, to="llava")
    with pytest.raises(ConvertError, match=r"empty: no config.json there; --vision-tower names the folder"):
        convert_checkpoint(source, out, vision_tower=tmp_path / "empty")
    with pytest.raises(ConvertError, match=r"--image-token-id is for folders without a tokenizer"):
        convert_checkpoint(source, out, image_token_id=3)
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ConvertError, match=r"holds a LoRA adapter \(adapter_config.json\) and not a whole model"):
        convert_checkpoint(source, out)
    (tmp_path / "clip" / "notes.txt").write_text("x")
    with pytest.raises(ConvertError, match=r"notes.txt is a file; expected the folder of a checkpoint"):
        convert_checkpoint(tmp_path / "clip" / "notes.txt", out)
    (source / "config.json").write_text("{")
    (source / "adapter_config.json").unlink()
    with pytest.raises(ConvertError, match=r"config.json cannot be read as JSON"):
        convert_checkpoint(source, out)


def test_weights_that_are_refused(tmp_path: Path) -> None:
    source, out = released_folder(tmp_path / "source", "vicuna"), tmp_path / "hf"
    weights = load_file(source / WEIGHTS)
    save_file(weights | {"model.image_newline": torch.ones(2)}, source / WEIGHTS)
    with pytest.raises(ConvertError, match=r"model.image_newline is no tensor of a LLaVA model"):
        convert_checkpoint(source, out)
    (source / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConvertError, match=r"is a Git LFS pointer and not the data itself"):
        convert_checkpoint(source, out)
    (source / WEIGHTS).write_bytes(b"1234567890")
    with pytest.raises(ConvertError, match=r"is no safetensors file"):
        convert_checkpoint(source, out)
    (source / WEIGHTS).unlink()
    with pytest.raises(
        ConvertError, match=r"holds no weights; expected model.safetensors, pytorch_model.bin or an ind"
    ):
        convert_checkpoint(source, out)
    torch.save([1, 2], source / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=r"pytorch_model.bin holds list, expected names with a tensor each"):
        convert_checkpoint(source, out)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "a.safetensors", "x": "b.safetensors"}}))
    with pytest.raises(ConvertError, match=r"names 2 shards, of which 2 are missing, first a.safetensors"):
        convert_checkpoint(source, out)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../a.safetensors"}}))
    with pytest.raises(ConvertError, match=r"which lies elsewhere; shards stand beside their index"):
        convert_checkpoint(source, out)
    for content, message in (("[]", "holds a list, expected an object"), ("{}", "is no index of shards")):
        index.write_text(content)
        with pytest.raises(ConvertError, match=message):
            convert_checkpoint(source, out)
    save_file(weights, source / "a.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*weights, "lost"], "a.safetensors")}))
    with pytest.raises(ConvertError, match=r"lacks 1 tensors that the index puts there, first lost"):
        convert_checkpoint(source, out)
    shutil.copyfile(source / "a.safetensors", source / "b.safetensors")
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors") | {"lm_head.weight": "b.safetensors"}})
    )
    with pytest.raises(ConvertError, match=r"is also in an earlier shard"):
        convert_checkpoint(source, out)


def test_towers_that_are_refused(tmp_path: Path) -> None:
    source, out = released_folder(tmp_path / "source", "vicuna", with_tower=False), tmp_path / "hf"
    edit(source / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(
        ConvertError, match=r"holds no vision tower .* folder of openai/clip-vit-large-patch14-336 with -"
    ):
        convert_checkpoint(source, out)
    edit(tmp_path / "clip" / "config.json", model_type="siglip_vision_model")
    with pytest.raises(ConvertError, match=r"model_type is 'siglip_vision_model', expected clip or clip_vision_model"):
        convert_checkpoint(source, out, vision_tower=tmp_path / "clip")


def test_folders_of_transformers_that_are_refused(tmp_path: Path) -> None:
    convert_checkpoint(released_folder(tmp_path / "source", "vicuna"), tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    whole = config.read_text()
    text = json.loads(whole)["text_config"]
    for changes, message in (
        (
            {"text_config": text | {"model_type": "qwen3"}, "released": None},
            r"LLaVA's code has no 'qwen3' language model",
        ),
        ({"released": {"family": "opt"}}, r"unknown family 'opt'"),
        ({"vision_feature_layer": [-2, -1]}, r"features of several layers, or a projector without bias"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, r"vision tower is 'siglip_vision_model', expected"),
    ):
        edit(config, **changes)
        with pytest.raises(ConvertError, match=message):
            convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="llava")
        config.write_text(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    with pytest.raises(ConvertError, match=r"holds no tokenizer .* convert the weights alone with --no-tokenizer"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="llava", needs_tokenizer=True)


def test_a_disk_without_room_is_told_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = released_folder(tmp_path / "source", "vicuna")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ConvertError, match=r"hf needs 0.0 GB and .* has 0.0 GB free; make room or choose another"):
            convert_checkpoint(source, tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr("llmga.stage1.released_weights.save_file", _full_disk)
        with pytest.raises(RunFailed, match=r"hf could not be written, the disk is full"):
            convert_checkpoint(source, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "source"]


def _full_disk(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------- the command


def test_command_prints_the_report_and_exits_2_on_bad_input(tmp_path: Path) -> None:
    source = released_folder(tmp_path / "source", "vicuna")
    run = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "hf")])
    assert run.exit_code == 0, run.output
    assert "template: released_vicuna, with space marks" in run.output
    run = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "hf")])
    assert run.exit_code == 2
    assert "exists already" in run.output
    (source / "tokenizer.model").unlink()
    run = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "b")])
    assert run.exit_code == 2
    assert "convert the weights alone with --no-tokenizer" in run.output
    run = CliRunner().invoke(app, ["convert", "--no-tokenizer", str(source), str(tmp_path / "b")])
    assert run.exit_code == 0, run.output
    assert "row 399 of the embedding stands for pictures" in run.output
    assert (tmp_path / "b" / "preprocessor_config.json").is_file()
