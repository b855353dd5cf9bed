"""What stage 2 minimises, as one function of tensors; and what an inpainting UNet is shown.

z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps;  L = E || target - eps_theta(z_t, t, c) ||^2, the target being eps, or
v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0 (Salimans and Ho, arXiv 2202.00512, section 4).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

PREDICTION_TYPES = ("epsilon", "v_prediction")


def noise_prediction_loss(
    unet: Any,
    noise_scheduler: Any,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    *,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    condition: Tensor | None = None,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    min_snr_gamma: float | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Mean squared error of what the UNet predicts from noisy latents.

    Args:
        unet: a UNet2DConditionModel, or a wrapper that is called like one.
        noise_scheduler: of diffusers, with `add_noise`, `alphas_cumprod` and a `prediction_type` in its config.
        latents: (B, C, h, w) clean, already scaled.
        encoder_hidden_states: (B, S, D) of the prompts.
        noise: (B, C, h, w); None: drawn from torch's generator.
        timesteps: (B,) int64 in [0, num_train_timesteps); None: drawn uniformly.
        encoder_attention_mask: (B, S) bool, False on padding.
        condition: (B, 5, h, w) for an inpainting UNet, see `inpainting_condition`.
        added_cond_kwargs: SDXL's `text_embeds` (B, P) and `time_ids` (B, 6).
        min_snr_gamma: weigh timesteps by min(SNR, gamma) / SNR (arXiv 2303.09556); None: all alike.
        reduction: "none" gives one loss per example.
    Returns:
        () or (B,) float32, mean over all elements of an example.
    Raises:
        ValueError: the scheduler's prediction type is neither epsilon nor v_prediction.
    Source: arXiv 2311.16500 and its published stage-2 code.
    """
    if noise is None:
        noise = torch.randn_like(latents)
    if timesteps is None:
        limit = noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, limit, (len(latents),), device=latents.device)
    kind = checked_prediction_type(noise_scheduler.config.prediction_type)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    seen = noisy_latents if condition is None else torch.cat([noisy_latents, condition], dim=1)
    keywords: dict[str, Any] = {"encoder_hidden_states": encoder_hidden_states}
    if encoder_attention_mask is not None:
        keywords["encoder_attention_mask"] = encoder_attention_mask
    if added_cond_kwargs is not None:
        keywords["added_cond_kwargs"] = dict(added_cond_kwargs)
    predicted = unet(seen, timesteps, **keywords, return_dict=False)[0]
    target = noise if kind == "epsilon" else noise_scheduler.get_velocity(latents, noise, timesteps)
    losses = functional.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)
    if min_snr_gamma is not None:
        losses = losses * min_snr_weight(signal_to_noise(noise_scheduler, timesteps), min_snr_gamma, kind)
    return losses.mean() if reduction == "mean" else losses


def checked_prediction_type(kind: str) -> str:
    """The prediction type, if it is one that is trained here.

    Raises:
        ValueError: it is another.
    """
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"the scheduler's prediction_type is {kind!r}, expected {' or '.join(PREDICTION_TYPES)}")
    return kind


def signal_to_noise(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """(B,) abar_t / (1 - abar_t)."""
    kept = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return kept / (1 - kept)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight of each example: min(SNR, gamma) over SNR, or over SNR + 1 where v is predicted; 0 <= weight <= 1."""
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)  # written so that an SNR of 0 has weight 1
    return snr.clamp(max=gamma) / (snr + 1)


def offset_noise(noise: Tensor, shift: Tensor, offset: float) -> Tensor:
    """Noise whose mean varies, so that brightness is learned too (noise offset).

    Args:
        noise: (..., C, h, w) standard normal.
        shift: (..., C, 1, 1) standard normal.
        offset: how much of the shift is added; 0 gives the noise back.
    """
    return noise + offset * shift if offset else noise


# ---------------------------------------------------------------- inpainting


def hide(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pictures with what is to be generated in mid-grey, the 0 of [-1, 1].

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W), 1 = generate; binarised at 0.5.
    """
    return pixels * (mask < 0.5)


def inpainting_condition(mask: Tensor, masked_latents: Tensor) -> Tensor:
    """What an inpainting UNet sees behind the four channels of noisy latents.

    Args:
        mask: (B, 1, H, W), 1 = generate; any size that has the latents' shape, binarised at 0.5.
        masked_latents: (B, 4, h, w) of the hidden pictures, scaled.
    Returns:
        (B, 5, h, w): the mask at the latents' size (nearest pixel), then the masked latents.
    """
    binary = (mask >= 0.5).to(masked_latents.dtype)
    small = functional.interpolate(binary, size=masked_latents.shape[-2:], mode="nearest")
    return torch.cat([small, masked_latents], dim=1)
