"""What a release holds: the same numbers in safetensors of the asked size, a card, and nothing of this machine.

Run: pytest tests/integration/test_release_export.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from llmga.config import ConfigError, load_config
from llmga.release.config import ReleaseConfig
from llmga.release.contents import portable, portable_text
from llmga.release.export import export
from llmga.release.kinds import ReleaseError
from llmga.release.listing import check_listing
from llmga.release.weights import count_same, reshard
from tests.toy import toy_mllm_folder, toy_restorer

REPOSITORY = Path(__file__).parents[2]
TUNED = REPOSITORY / "llmga/toyworld/checkpoints/tuned/mllm"
SD15 = ("base_model.id=stable-diffusion-v1-5/stable-diffusion-v1-5", "licence=creativeml-openrail-m")


def settings(folder: Path, out: Path, *overrides: str) -> ReleaseConfig:
    words = [
        f"folder={folder}",
        f"export_dir={out}",
        "repo=me/toy",
        "licence=apache-2.0",
        "data=[{name: COCO, licence: cc-by-4.0, rows: 118287}]",
        *overrides,
    ]
    scratch = [] if any(word.startswith("base") for word in overrides) else ["from_scratch=true"]
    return load_config(ReleaseConfig, None, [*words, *scratch])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def head_of(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / "README.md").data.to_dict()


@pytest.fixture(scope="module")
def restorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restorer")
    toy_restorer(phase="diffusion").save_pretrained(folder)
    (folder / "provenance.json").write_text(
        json.dumps({"inputs": [{"path": "/home/someone/photos/a.png"}], "config": {"run": {"seed": 7}}})
    )
    return folder


def test_the_shipped_toy_is_released_with_its_metrics_in_small_shards(tmp_path: Path) -> None:
    overrides = ["repo=me/llmga-toy", f"export_dir={tmp_path / 'out'}", "shard_gb=0.002"]
    cfg = load_config(ReleaseConfig, REPOSITORY / "configs/release/toy.yaml", overrides)
    exported = export(cfg)
    out = tmp_path / "out"
    shards = sorted(out.glob("model-*.safetensors"))
    assert (exported.kind, exported.comparison.tensors, exported.comparison.difference) == ("mllm", 97, 0)
    assert len(shards) == 4 and all(shard.stat().st_size < 2.1e6 for shard in shards)
    source = weights_of(TUNED)
    assert all(torch.equal(tensor, source[name]) for name, tensor in weights_of(out).items())
    metrics = {
        (result["task"]["name"], metric["type"]): metric
        for result in head_of(out)["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    joint = next(
        row
        for row in json.loads((REPOSITORY / "docs/results/stage1_language.json").read_text())["metrics"]
        if (row["system"], row["task"], row["name"]) == ("tuned", "editing", "joint")
    )
    found = metrics["editing: generation", "joint"]
    assert (found["value"], found["args"]["n"], found["args"]["ci_low"]) == (
        joint["value"],
        joint["n"],
        joint["ci_low"],
    )
    assert head_of(out)["pipeline_tag"] == "image-text-to-text" and "base_model" not in head_of(out)
    assert "_name_or_path" not in (out / "config.json").read_text()
    assert check_listing(out) == len([path for path in out.rglob("*") if path.is_file()]) - 1
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    export(cfg)  # the same again, so that an interrupted push finds what it sent
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("in_channels", [4, 9])
def test_a_pipeline_is_released_with_its_parts(tmp_path: Path, in_channels: int) -> None:
    from tests.toy_diffusion import toy_sd_pipeline

    kind = "StableDiffusionPipeline" if in_channels == 4 else "StableDiffusionInpaintPipeline"
    source = tmp_path / "source"
    toy_sd_pipeline(kind, in_channels).save_pretrained(source)
    (source / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    exported = export(settings(source, tmp_path / "out", "shard_gb=0.0001", *SD15))
    unet = tmp_path / "out" / "unet"
    assert len(list(unet.glob("*.safetensors"))) > 1
    assert exported.left_out == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    whole = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights_of(unet).keys() == whole.keys()
    head = head_of(tmp_path / "out")
    assert head["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert head["pipeline_tag"] == ("text-to-image" if in_channels == 4 else "image-to-image")
    assert "pass on to this model" in (tmp_path / "out" / "README.md").read_text()


def test_a_restorer_is_released_without_paths_of_this_machine(tmp_path: Path, restorer: Path) -> None:
    exported = export(settings(restorer, tmp_path / "out"))
    assert exported.kind == "restorer" and exported.comparison.tensors == len(weights_of(restorer))
    assert json.loads((tmp_path / "out/provenance.json").read_text())["inputs"] == [{"path": "a.png"}]
    text = (tmp_path / "out/README.md").read_text()
    assert 'DiffRIR.from_pretrained("me/toy")' in text and "| `config.run.seed` | 7 |" in text
    assert "| COCO | 118,287 | cc-by-4.0 |" in text


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmga.stage1.config import LoraConfig
    from llmga.stage1.lora import add_adapter, save_adapter
    from llmga.stage1.model import load_mllm

    folder = tmp_path_factory.mktemp("adapter")
    base = toy_mllm_folder(folder / "base", ("<gen_img>", "</gen_img>"))
    mllm = load_mllm(base)
    torch.manual_seed(0)
    model = add_adapter(mllm, LoraConfig(rank=2, alpha=4), base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return save_adapter(mllm, model, model.state_dict(), folder / "run", {"stage": 1})


def test_an_adapter_is_released_for_its_base_on_the_hub_or_merged_into_it(tmp_path: Path, adapter: Path) -> None:
    named = ("base_model.id=them/llava-toy", "base_model.licence=apache-2.0")
    exported = export(settings(adapter, tmp_path / "alone", *named))
    assert exported.kind == "adapter" and head_of(tmp_path / "alone")["base_model_relation"] == "adapter"
    config = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "them/llava-toy"
    assert "multi_modal_projector" in str(weights_of(tmp_path / "alone").keys())  # projector and LoRA together
    merged = export(settings(adapter, tmp_path / "merged", *named, "merge=true"))
    assert merged.kind == "mllm" and not (tmp_path / "merged/adapter_config.json").exists()
    assert not any("lora" in name for name in weights_of(tmp_path / "merged"))
    assert head_of(tmp_path / "merged")["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("optimizer.pt", b"x", "optimizer.pt is a pickle.* release its final/ instead of a checkpoint"),
        ("pytorch_model.bin", b"x", "pytorch_model.bin is a pickle.*save_pretrained"),
        ("modeling.py", b"", "modeling.py is code"),
        ("notes.dat", b"\x80\x04.", "notes.dat is a pickle or an archive under another name"),
    ],
)
def test_pickles_and_code_are_refused_by_name(
    tmp_path: Path, restorer: Path, name: str, content: bytes, said: str
) -> None:
    shutil.copytree(restorer, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ReleaseError, match=said):
        export(settings(tmp_path / "model", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("base_model.id=me/unheard-of",), "base_model.licence: that of me/unheard-of is not known here"),
        (
            ("base_model.id=runwayml/stable-diffusion-v1-5",),
            "gone from the Hub; its weights are stable-diffusion-v1-5/",
        ),
        (SD15[:1], "licence: found apache-2.0; .* the release is under creativeml-openrail-m too"),
        ((*SD15, "base_model.licence=mit"), "base_model.licence: found mit, and .* is under creativeml-openrail-m"),
        (("merge=true",), "is a DiffRIR restorer and no adapter"),
    ],
)
def test_what_does_not_go_together_leaves_nothing(
    tmp_path: Path, restorer: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ReleaseError, match=said):
        export(settings(restorer, tmp_path / "out", *overrides))
    assert [path for path in tmp_path.iterdir()] == []


def test_a_local_path_is_no_base_model(tmp_path: Path, restorer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    for name in ("runs/base", str(restorer)):
        with pytest.raises(ConfigError, match=r"base_model.id.*a path on this machine"):
            settings(restorer, tmp_path / "out", f"base_model.id={name}")
    with pytest.raises(ConfigError, match=r"no base; set base_model.id"):
        load_config(ReleaseConfig, None, [f"folder={restorer}", "repo=me/x", "licence=mit", "data=[]"])


def test_an_earlier_release_makes_room_and_nothing_else_does(tmp_path: Path, restorer: Path) -> None:
    cfg = settings(restorer, tmp_path / "out")
    export(cfg)
    export(cfg)
    (tmp_path / "out/release.json").unlink()
    with pytest.raises(ReleaseError, match="holds something that is no release"):
        export(cfg)


def test_pictures_lose_everything_but_pixels(tmp_path: Path, restorer: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("where", "/home/someone/secret")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "p.png", pnginfo=info)
    picture = f"pictures=[{{path: {tmp_path / 'p.png'}, caption: A red square}}]"
    export(settings(restorer, tmp_path / "out", picture))
    assert b"someone" not in (tmp_path / "out/pictures/01.png").read_bytes()
    assert Image.open(tmp_path / "out/pictures/01.png").getpixel((3, 3)) == (255, 0, 0)
    assert "![A red square](pictures/01.png)" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ReleaseError, match=r"pictures.0.caption is missing"):
        export(settings(restorer, tmp_path / "out", f"pictures=[{{path: {tmp_path / 'p.png'}}}]"))


def test_results_of_another_model_are_refused(tmp_path: Path, restorer: Path) -> None:
    document = REPOSITORY / "docs/results/stage1_language.json"
    results = f"results={{path: {document}, dataset: toy"
    for more, said in (("}", "found None; .* has base, tuned"), (", system: tuned}", "measured .* is released")):
        with pytest.raises(ReleaseError, match=said):
            export(settings(restorer, tmp_path / "out", results + more))


def test_shards_hold_every_tensor_once_and_a_changed_one_is_found(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.randn(100) for index in range(5)} | {"nan": torch.tensor([float("nan")])}
    save_file(tensors, tmp_path / "model.safetensors")
    given = [tmp_path / "model.safetensors"]
    (tmp_path / "out").mkdir()
    found = reshard(given, tmp_path / "out", "model", 900)
    assert [path.name for path in found] == [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys() and index["metadata"]["total_size"] == 2004
    assert count_same(given, found) == 6
    changed = load_file(found[0])
    changed[max(changed)][0] += 1e-6
    save_file(changed, found[0])
    with pytest.raises(ReleaseError, match=f"{max(changed)} read back differs"):
        count_same(given, found)
    found[0].write_bytes(found[0].read_bytes()[:50])
    with pytest.raises(ReleaseError, match="no whole safetensors file"):
        count_same(given, found)


def test_absolute_paths_count_from_here_or_are_cut_to_their_name() -> None:
    here = Path.cwd()
    assert portable_text(f"train {here}/runs/a/final and /data/big/coco.json") == "train runs/a/final and coco.json"
    for text in ("https://huggingface.co/a/b", "runs/x/final", "<s>/</s>", "a/b", "{% if x %}/{% endif %}"):
        assert portable_text(text) == text
    assert portable({"_name_or_path": "/a/b", "x": ["/a/b/c", 1]}) == {"x": ["c", 1]}
