"""The UNet of SD1.5 in its true size, with random weights, makes one step of the published config on a CPU.

In bfloat16, so that weights, gradients and AdamW's states fit into 7 GB; on pictures of 64 px, so that it takes
seconds. Run: pytest tests/e2e/test_stage2_real_size.py
"""

import os
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from llmga.config import load_config
from llmga.learner import fused_adamw
from llmga.stage2.config import Stage2Config
from llmga.stage2.loss import inpainting_condition, noise_prediction_loss

ROOT = Path(__file__).parents[2]
NEEDED_GB = 9
AVAILABLE_GB = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(AVAILABLE_GB < NEEDED_GB, reason=f"needs {NEEDED_GB} GB of memory")]


@pytest.fixture
def products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for bfloat16 takes three times as long for them."""
    convolve = torch.nn.Conv2d._conv_forward

    def conv_forward(self: torch.nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(self, x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    def linear_forward(self: torch.nn.Linear, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", conv_forward)
    monkeypatch.setattr(torch.nn.Linear, "forward", linear_forward)


@pytest.mark.usefixtures("products_in_float32")
def test_one_step_of_the_published_inpainting_config() -> None:
    cfg = load_config(Stage2Config, ROOT / "configs/stage2/sd15_inpainting.yaml", check_machine=False)
    table = yaml.safe_load((ROOT / "llmga/stage2/architectures.yaml").read_text())["sd15_inpainting"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(table["unet"])
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").train()
    torch.manual_seed(0)
    drawn = torch.empty(1_000_003).uniform_(-0.02, 0.02).to(torch.bfloat16)  # again and again: drawing takes a while
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float("norm" in name))
            else:
                count = parameter.numel()
                parameter.copy_(drawn.repeat(count // len(drawn) + 1)[:count].view_as(parameter))
    unet.enable_gradient_checkpointing()
    assert sum(parameter.numel() for parameter in unet.parameters()) == table["parameters"]["unet"]
    optimizer = fused_adamw(unet.parameters(), cfg.optim)
    low = torch.bfloat16
    condition = inpainting_condition(torch.ones(1, 1, 64, 64), torch.randn(1, 4, 8, 8, dtype=low))
    text = torch.randn(1, 75 * (cfg.model.max_chunks or 4) + 2, table["text_width"], dtype=low)
    before = unet.conv_in.weight.detach().clone()
    noises = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    loss = noise_prediction_loss(
        unet, noises, torch.randn(1, 4, 8, 8, dtype=low), text, timesteps=torch.tensor([500]), condition=condition
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), cfg.optim.max_grad_norm)
    optimizer.step()
    assert loss.isfinite() and norm.isfinite() and norm > 0
    assert not torch.equal(unet.conv_in.weight, before)
    assert all(parameter.grad is not None for parameter in unet.parameters())
