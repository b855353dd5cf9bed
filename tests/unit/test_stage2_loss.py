"""The objective of stage 2 against diffusers' arithmetic and closed forms; and what an inpainting UNet is shown.

Run: pytest tests/unit/test_stage2_loss.py
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from llmga.stage2.loss import (
    hide,
    inpainting_condition,
    min_snr_weight,
    noise_prediction_loss,
    offset_noise,
    signal_to_noise,
)
from tests.toy_diffusion import WIDTH, toy_unet


def scheduler(kind: str = "epsilon", **changes: Any) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, **changes
    )


class Says:
    """A UNet that answers with what it is told to, and remembers what it was shown."""

    def __init__(self, answer: Tensor | float) -> None:
        self.answer = answer

    def __call__(self, sample: Tensor, timesteps: Tensor, **keywords: Any) -> tuple[Tensor]:
        self.sample, self.timesteps, self.keywords = sample, timesteps, keywords
        return (torch.as_tensor(self.answer).expand(len(sample), 4, *sample.shape[2:]),)


LATENTS, NOISE = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
STEPS = torch.tensor([0, 400, 999])
TEXT = torch.zeros(3, 5, WIDTH)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_prediction_type_says(kind: str) -> None:
    noises = scheduler(kind)
    kept = noises.alphas_cumprod[STEPS][:, None, None, None]
    target = NOISE if kind == "epsilon" else kept.sqrt() * NOISE - (1 - kept).sqrt() * LATENTS
    unet = Says(0.25)
    losses = noise_prediction_loss(unet, noises, LATENTS, TEXT, noise=NOISE, timesteps=STEPS, reduction="none")
    torch.testing.assert_close(losses, ((0.25 - target) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(unet.sample, kept.sqrt() * LATENTS + (1 - kept).sqrt() * NOISE)
    mean = noise_prediction_loss(Says(0.25), noises, LATENTS, TEXT, noise=NOISE, timesteps=STEPS)
    assert mean.shape == () and mean.item() == pytest.approx(losses.mean().item())
    perfect = noise_prediction_loss(Says(target), noises, LATENTS, TEXT, noise=NOISE, timesteps=STEPS)
    assert perfect.item() < 1e-12


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_as_its_paper_says(kind: str) -> None:
    from diffusers.training_utils import compute_snr  # takes seconds to import

    noises = scheduler(kind)
    snr = signal_to_noise(noises, torch.arange(1000))
    torch.testing.assert_close(snr, compute_snr(noises, torch.arange(1000)), rtol=1e-4, atol=0)
    divisor = snr if kind == "epsilon" else snr + 1
    torch.testing.assert_close(min_snr_weight(snr, 5.0, kind), torch.minimum(snr, torch.tensor(5.0)) / divisor)
    plain, weighed = (
        noise_prediction_loss(
            Says(0.0), noises, LATENTS, TEXT, noise=NOISE, timesteps=STEPS, min_snr_gamma=gamma, reduction="none"
        )
        for gamma in (None, 5.0)
    )
    torch.testing.assert_close(weighed / plain, min_snr_weight(snr[STEPS], 5.0, kind))


def test_weights_stay_finite_where_nothing_is_left_of_the_picture() -> None:
    noises = scheduler("v_prediction", rescale_betas_zero_snr=True)
    assert signal_to_noise(noises, torch.tensor([999])).item() < 1e-6
    assert min_snr_weight(torch.tensor([0.0]), 5.0, "epsilon").tolist() == [1.0]
    assert min_snr_weight(torch.tensor([0.0]), 5.0, "v_prediction").tolist() == [0.0]


def test_drawn_timesteps_are_uniform_and_noise_is_standard() -> None:
    torch.manual_seed(0)
    unet = Says(0.0)
    loss = noise_prediction_loss(unet, scheduler(), torch.zeros(4000, 4, 2, 2), torch.zeros(4000, 1, 1))
    assert loss.item() == pytest.approx(1.0, abs=0.02)  # nothing predicted of standard noise
    assert unet.timesteps.min() >= 0 and unet.timesteps.max() <= 999
    counts = torch.bincount(unet.timesteps // 100, minlength=10)
    assert counts.min() > 320 and counts.max() < 480


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"prediction_type is 'sample', expected epsilon or v_prediction"):
        noise_prediction_loss(Says(0.0), scheduler("sample"), LATENTS, TEXT)


def test_noise_offset_moves_each_channel_as_a_whole() -> None:
    shift = torch.randn(3, 4, 1, 1)
    moved = offset_noise(NOISE, shift, 0.1)
    torch.testing.assert_close((moved - NOISE).mean((2, 3)), 0.1 * shift[:, :, 0, 0])
    assert offset_noise(NOISE, shift, 0.0) is NOISE


def test_nine_channels_are_noisy_latents_mask_and_masked_latents_in_this_order() -> None:
    mask = torch.zeros(3, 1, 48, 48)
    mask[:, :, :24, 8:] = 0.7  # grey: 0.5 and more means generate
    masked = torch.randn(3, 4, 6, 6)
    condition = inpainting_condition(mask, masked)
    unet = Says(0.0)
    noise_prediction_loss(unet, scheduler(), LATENTS, TEXT, noise=NOISE, timesteps=STEPS, condition=condition)
    assert unet.sample.shape == (3, 9, 6, 6)
    expected = torch.zeros(6, 6)
    expected[:3, 1:] = 1
    assert torch.equal(unet.sample[0, 4], expected)
    assert torch.equal(unet.sample[:, 5:], masked)
    torch.testing.assert_close(unet.sample[:, :4], scheduler().add_noise(LATENTS, NOISE, STEPS))


def test_hidden_pixels_are_mid_grey_and_an_empty_mask_hides_nothing() -> None:
    pixels = torch.rand(1, 3, 4, 4) * 2 - 1
    mask = torch.zeros(1, 1, 4, 4)
    assert torch.equal(hide(pixels, mask), pixels)
    mask[..., :2] = 1
    hidden = hide(pixels, mask)
    assert hidden[..., :2].abs().max() == 0 and torch.equal(hidden[..., 2:], pixels[..., 2:])
    assert hide(pixels, torch.full_like(mask, 0.5)).abs().max() == 0


def test_gradients_reach_the_unet_alone_and_overfitting_one_batch_works() -> None:
    torch.manual_seed(0)
    unet = toy_unet().train()
    latents = torch.randn(2, 4, 8, 8)
    text = torch.randn(2, 7, WIDTH, requires_grad=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, fused=True)
    fixed = {"noise": torch.randn(2, 4, 8, 8), "timesteps": torch.tensor([300, 700])}
    seen = []
    for _ in range(25):
        loss = noise_prediction_loss(unet, scheduler(), latents, text.detach(), **fixed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < 0.6 * seen[0]
    assert text.grad is None and SimpleNamespace(**fixed).noise.grad is None
