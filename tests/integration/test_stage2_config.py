"""Every shipped stage-2 config loads and can be planned; sizes are those of the published networks.

Run: pytest tests/integration/test_stage2_config.py
"""

from pathlib import Path

import pytest
import torch
import yaml

from llmga.config import load_config
from llmga.stage2.config import Stage2Config
from llmga.stage2.parts import PipelineError
from llmga.stage2.plan import count_example, make_plan, plan_text
from tests.toy_diffusion import WIDTH, toy_unet

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs/stage2").glob("*.yaml"))
PUBLISHED = {
    "sd15_text_to_image": (512, 32, 1, 0.0, 4),
    "sd15_inpainting": (512, 32, 1, 0.05, 9),
    "sdxl_text_to_image": (1024, 4, 4, 0.05, 4),
    "sdxl_inpainting": (1024, 4, 4, 0.05, 9),
}


def load(path: Path, *overrides: str) -> Stage2Config:
    return load_config(Stage2Config, path, overrides, check_machine=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_opens_with_the_command_that_runs_it(path: Path) -> None:
    cfg = load(path)
    assert path.stem.startswith("toy") == (cfg.model.path.parts[0] == "llmga")
    header = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"make stage2 CONFIG={path.relative_to(ROOT)}" in header or path.name == "toy.yaml"
    assert yaml.safe_load(path.read_text())["task"] if "base" not in yaml.safe_load(path.read_text()) else True


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    cfg = load(ROOT / "configs/stage2" / f"{name}.yaml")
    resolution, batch, accumulation, short, channels = PUBLISHED[name]
    assert (cfg.data.resolution, cfg.run.batch_size, cfg.run.accumulation_steps) == (resolution, batch, accumulation)
    assert cfg.data.short_caption_share == short and cfg.run.max_steps == 50_000 and cfg.run.precision == "bf16"
    optim = cfg.optim
    assert (optim.lr, optim.weight_decay, optim.betas, optim.eps) == (2e-5, 0.01, (0.9, 0.999), 1e-8)
    assert (optim.schedule, optim.warmup, optim.max_grad_norm) == ("constant", 0, 1.0)
    assert cfg.run.gradient_checkpointing and cfg.run.save_every_steps == 2000 and cfg.run.keep_last == 2
    assert (cfg.task == "inpainting") == (channels == 9) and cfg.model.max_chunks == 4


def test_presets_make_the_published_steps_on_one_card() -> None:
    for path in CONFIGS:
        if path.stem.endswith("gb"):
            cfg = load(path)
            assert cfg.run.batch_size * cfg.run.accumulation_steps == (256 if "sd15" in path.stem else 128)


COUNTED = ["sd15_text_to_image", "sd15_inpainting", "sd15_text_to_image_24gb"]


@pytest.mark.parametrize("name", COUNTED)
def test_a_plan_counts_the_published_unet_and_its_memory(name: str) -> None:
    plan = make_plan(load(ROOT / "configs/stage2" / f"{name}.yaml"), devices=8)
    table = yaml.safe_load((ROOT / "llmga/stage2/architectures.yaml").read_text())
    row = table["sd15_inpainting" if "inpainting" in name else "sd15"]
    assert plan.parameters == row["parameters"] and plan.trained == row["parameters"]["unet"]
    forward = (plan.flops_per_step / 8 / plan.cfg.run.batch_size / plan.cfg.run.accumulation_steps) / 1e9
    pictures = (plan.cfg.cache.path is None) + ("inpainting" in name)
    assert forward == pytest.approx(4 * 822 + 1117 * pictures, rel=0.01)  # GFLOP: counted on the true architecture
    assert sum(plan.memory.values()) < (24 if "24gb" in name else 80)
    text = plan_text(plan)
    assert "50,000 steps" in text and "models/stable-diffusion" in text and "859,5" in text


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem not in COUNTED], ids=lambda path: path.stem)
def test_every_other_config_is_planned_without_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cfg = load(path)
    if path.stem.startswith("toy"):
        assert sum(make_plan(cfg).memory.values()) < 8
        return
    plan = make_plan(cfg, devices=1 if path.stem.endswith("gb") else 8)
    table = yaml.safe_load((ROOT / "llmga/stage2/architectures.yaml").read_text())
    [row] = [row for row in table.values() if cfg.model.path.name in row["folders"]]
    assert plan.parameters == row["parameters"]
    assert plan.trained == row["parameters"]["unet"] or (cfg.model.lora and plan.trained < plan.parameters["unet"] / 20)
    assert sum(plan.memory.values()) < (24 if path.stem.endswith("24gb") else 80)
    assert "50,000 steps" in plan_text(plan)


def test_a_pipeline_that_is_neither_here_nor_known_is_named() -> None:
    with pytest.raises(PipelineError, match=r"models/mine is not on this machine, .*known are stable-diffusion-v1-5"):
        make_plan(load(ROOT / "configs/stage2/sd15_text_to_image.yaml", "model.path=models/mine"))


def test_kept_bytes_are_those_that_autograd_keeps() -> None:
    """Counted without numbers, and with them on a real forward pass."""
    overrides = ("data.resolution=16", "model.max_chunks=1", "run.precision=fp32")
    cfg = load(ROOT / "configs/stage2/sd15_text_to_image.yaml", *overrides)
    with torch.device("meta"):
        blank = type(toy_unet()).from_config(toy_unet().config)
    counted = count_example(blank, cfg, torch.float32, WIDTH, factor=2)
    real = toy_unet().train()
    seen = {parameter.data_ptr() for parameter in real.parameters()}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            seen.add(storage.data_ptr())
            kept.append(storage.nbytes())
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real(torch.zeros(1, 4, 8, 8), torch.zeros(1), encoder_hidden_states=torch.zeros(1, 77, WIDTH))
    assert counted.kept_bytes == pytest.approx(sum(kept), rel=0.1)
    assert 0 < counted.checkpointed_bytes < counted.kept_bytes
