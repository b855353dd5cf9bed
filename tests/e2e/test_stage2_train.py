"""A whole small run of stage 2 in this process: what it writes, what the pipeline carries, what it refuses.

Run: pytest tests/e2e/test_stage2_train.py
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from functorch.compile import make_boxed_func
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd

from llmga.records import open_manifest, write_manifest
from llmga.stage2.parts import PipelineError
from llmga.stage2.prompt_layout import load_layout
from llmga.stage2.sources import Stage2DataError
from llmga.stage2.train import train
from tests.toy_loop import lines, losses
from tests.toy_stage2 import load, make_inputs


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("stage2"))


def test_a_run_makes_a_pipeline_that_stock_diffusers_paints_with(settings: Path) -> None:
    run = train(load(settings, "run.sample_every_steps=2", "run.eval_every_steps=2", "data.prompt_dropout=0.25")).parent
    assert list(losses(run)) == [1, 2, 3, 4] and list(losses(run, "eval_loss")) == [2, 4]
    held_out = next(line for line in lines(run) if "eval_loss" in line)
    quarters = [held_out[f"eval_loss_t{first}"] for first in (0, 250, 500, 750)]
    assert held_out["eval_loss"] == pytest.approx(sum(quarters) / 4)
    page = (run / "samples" / "index.html").read_text()
    assert page.count("<img") == 4 and (run / "samples" / "step-4" / "1.png").is_file()
    final = run / "final"
    assert load_layout(final).name == "masked" and load_layout(final).max_chunks == 2
    before = load_file(settings.parent / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(final / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    average = load_file(run / "checkpoint-4" / "unet.ema.safetensors")
    assert all(torch.equal(after[name], average[name]) for name in average)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (settings.parent / "pipeline" / part).iterdir():
            assert (final / part / file.name).read_bytes() == file.read_bytes()
    provenance = json.loads((final / "provenance.json").read_text())
    assert provenance["stage"] == 2 and provenance["layout"] == "masked" and provenance["samples"] == 8
    assert {Path(entry["path"]).name for entry in provenance["inputs"]} >= {"train.jsonl", "config.json"}
    pipeline = DiffusionPipeline.from_pretrained(final, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a thing", num_inference_steps=1, height=16, width=16).images[0].size == (16, 16)


@pytest.mark.parametrize("sdxl", [False, True])
def test_inpainting_and_sdxl_train_by_the_same_code(tmp_path: Path, sdxl: bool) -> None:
    settings = make_inputs(tmp_path, inpainting=True, sdxl=sdxl)
    overrides = ("run.sample_every_steps=2", "run.max_steps=2", "run.save_every_steps=0", "data.masks.blank_share=0.5")
    run = train(load(settings, *overrides)).parent
    assert list(losses(run)) == [1, 2] and losses(run, "eval_loss")[2] > 0
    assert (run / "samples" / "given" / "0.png").is_file() and (run / "samples" / "step-2" / "0.png").is_file()
    config = json.loads((run / "final" / "unet" / "config.json").read_text())
    assert config["in_channels"] == 9


def test_adapters_buckets_random_crops_and_the_other_settings(settings: Path, tmp_path: Path) -> None:
    overrides = (
        f"run.output_dir={tmp_path / 'run'}", "model.lora={rank: 4}", "data.aspect_buckets=true",
        "data.bucket_step=4", "data.crop=random", "objective.min_snr_gamma=5", "objective.noise_offset=0.1",
        "run.gradient_checkpointing=true", "run.accumulation_steps=2", "model.layout=published",
        "model.save_precision=fp16", "objective.ema=false", "data.validation=[]",
    )  # fmt: skip
    run = train(load(settings, *overrides)).parent
    assert list(losses(run)) == [1, 2, 3, 4]
    adapter = load_file(run / "checkpoint-4" / "unet.safetensors")
    assert adapter and all("lora" in name for name in adapter)
    assert list((run / "final" / "lora").glob("*.safetensors")) and load_layout(run / "final").name == "published"
    weights = load_file(run / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    base = load_file(settings.parent / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == base.keys() and all(value.dtype == torch.float16 for value in weights.values())


def test_a_compiled_unet_trains_to_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through TorchDynamo and AOTAutograd; Inductor's kernels, which take minutes to build here, are left out.

    On a UNet of two blocks, since each block takes seconds. Prompts have one chunk or two: it is compiled twice.
    """
    settings = make_inputs(tmp_path)
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(tmp_path / "pipeline" / "unet"),
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    )
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    graphs: list[int] = []

    def counted(module: torch.nn.Module, **options: object) -> None:
        backend = aot_autograd(fw_compiler=lambda graph, inputs: graphs.append(1) or make_boxed_func(graph))
        whole(module, backend=backend, **options)

    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    torch._dynamo.reset()
    overrides = ("data.validation=[]", "run.max_steps=3")
    plain = train(load(settings, f"run.output_dir={tmp_path / 'plain'}", *overrides)).parent
    assert not graphs
    compiled = train(load(settings, f"run.output_dir={tmp_path / 'compiled'}", "run.compile=true", *overrides)).parent
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5) and len(graphs) >= 2
    weights = load_file(compiled / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == load_file(plain / "final/unet/diffusion_pytorch_model.safetensors").keys()


def test_what_does_not_fit_is_one_sentence_with_both_values(settings: Path, tmp_path: Path) -> None:
    fresh = f"run.output_dir={tmp_path / 'run'}"
    with pytest.raises(PipelineError, match=r"takes 4 channels, task inpainting has 9; set task=text_to_image, or"):
        train(load(settings, fresh, "task=inpainting"))
    with pytest.raises(PipelineError, match=r"prediction_type is v_prediction, the scheduler of .* says epsilon"):
        train(load(settings, fresh, "objective.prediction_type=v_prediction"))
    with pytest.raises(PipelineError, match=r"data.resolution is 18, .* expected a multiple of 4, such as 16"):
        train(load(settings, fresh, "data.resolution=18"))
    manifest = open_manifest(settings.parent / "train.jsonl")
    bare = [type(record)(record.id, record.task, image=record.image, caption="a") for record in manifest]
    write_manifest(settings.parent / "bare.jsonl", bare)
    with pytest.raises(Stage2DataError, match=r"bare.jsonl:1 .* no prompt; record prompts .*make record.*text=caption"):
        train(load(settings, fresh, f"data.sources.0.path={settings.parent / 'bare.jsonl'}"))
    caption = ("data.sources.0.text=caption", "run.max_steps=1", "data.validation=[]")
    train(load(settings, fresh, f"data.sources.0.path={settings.parent / 'bare.jsonl'}", *caption))


def test_a_text_encoder_of_another_width_is_named(tmp_path: Path) -> None:
    from llmga.stage2.prompt_encoder import TextEncoderError
    from tests.toy_diffusion import toy_text_encoder

    settings = make_inputs(tmp_path)
    toy_text_encoder(width=64).save_pretrained(tmp_path / "pipeline" / "text_encoder")
    with pytest.raises(TextEncoderError, match=r"give 64 channels, the UNet reads 32"):
        train(load(settings))


def test_pictures_that_cannot_be_read_are_replaced_and_counted(settings: Path, tmp_path: Path) -> None:
    manifest = [*open_manifest(settings.parent / "train.jsonl")]
    (settings.parent / "broken.png").write_bytes(b"no picture")
    rows = [manifest[0], type(manifest[0])("broken", "similar_image", image="broken.png", prompt="a"), *manifest[1:]]
    write_manifest(settings.parent / "broken.jsonl", rows)
    overrides = (f"run.output_dir={tmp_path / 'run'}", f"data.sources.0.path={settings.parent / 'broken.jsonl'}")
    once = ("run.max_steps=4", "run.batch_size=4", "run.save_every_steps=4", "data.validation=[]")
    run = train(load(settings, *overrides, *once, "data.max_bad_share=0.5")).parent
    written = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert {line["id"] for line in written} == {"broken"} and losses(run, "replaced_picture")[4] == len(written)
