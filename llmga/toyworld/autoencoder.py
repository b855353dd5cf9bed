"""The toy world's autoencoder: diffusers' AutoencoderKL at small width, 64 px pictures to 4 x 8 x 8 latents.

What it blurs, no sampler can draw, and the parser's reading of its reconstructions bounds every toy accuracy. Three
losses make facts survive in little time: L1 on pixels, L1 on differences of neighbours (textures and outlines), and
the distance between the vision tower's views of picture and reconstruction, which knows what a scene consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPVisionModel

from llmga.toyworld.readings import count_right, in_words, shares
from llmga.toyworld.render import render
from llmga.toyworld.scene import SPLITS, Scene, sample_scene
from llmga.toyworld.tower import CLIP_MEAN, CLIP_STD
from llmga.toyworld.training import Schedule, batches, fit, quick_arithmetic


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Size and training; the defaults are those of the shipped one."""

    widths: tuple[int, ...] = (16, 32, 96, 128)
    latent_channels: int = 4
    batch_size: int = 24
    edge_weight: float = 1.0
    tower_weight: float = 0.1
    kl_weight: float = 1e-6
    num_held_out: int = 256
    seed: int = 0
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=500, lr=1.5e-3, matrix_lr=3e-3, ema_decay=0.99))


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderKL:
    """Fresh weights; each width but the last halves the side."""
    torch.manual_seed(recipe.seed)
    levels = len(recipe.widths)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=recipe.widths,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=64,
    )


def train_autoencoder(
    recipe: AutoencoderRecipe, tower: CLIPVisionModel, state_path: Path, log: Callable[[str], None]
) -> AutoencoderKL:
    """Train on scenes of the train split, drawn on the fly; its latents are scaled to unit variance by its config."""
    model = build_autoencoder(recipe)
    tower = tower.eval().requires_grad_(False)

    def loss_of_step(step: int) -> Tensor:
        rng = np.random.default_rng([recipe.seed, step])
        pictures = to_pixels(draw(rng.integers(0, SPLITS["train"].stop, recipe.batch_size)))
        with quick_arithmetic():
            posterior = model.encode(pictures).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            rebuilt = model.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean()
        return reconstruction_loss(rebuilt.float(), pictures, tower, recipe) + recipe.kl_weight * kl

    held_out = [sample_scene(seed) for seed in SPLITS["validation"][: recipe.num_held_out]]
    autoencoder = fit(
        "autoencoder", model, loss_of_step, recipe.schedule, state_path,
        lambda now: f"read % {in_words(parse_ceiling(now, held_out))}", log,
    )  # fmt: skip
    scale = 1 / encode_pictures(autoencoder, draw(SPLITS["train"][:1_024]), scaled=False).std().item()
    autoencoder.register_to_config(scaling_factor=round(scale, 5))
    return autoencoder


def reconstruction_loss(rebuilt: Tensor, pictures: Tensor, tower: CLIPVisionModel, recipe: AutoencoderRecipe) -> Tensor:
    """The three distances; both pictures are (B, 3, 64, 64) in [-1, 1]."""
    edges = [(rebuilt.diff(dim=dim) - pictures.diff(dim=dim)).abs().mean() for dim in (-1, -2)]
    seen = F.mse_loss(look(tower, rebuilt), look(tower, pictures).detach())
    return (rebuilt - pictures).abs().mean() + recipe.edge_weight * sum(edges) + recipe.tower_weight * seen


def look(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the tower's tokens (B, 1 + N, D), each of unit variance."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    tokens = tower((pixels / 2 + 0.5 - mean) / std).last_hidden_state
    return F.layer_norm(tokens, tokens.shape[-1:])


def parse_ceiling(autoencoder: nn.Module, scenes: Sequence[Scene]) -> dict[str, float]:
    """What the parser still reads of scenes after encoding and decoding: no sampler on these latents can do better."""
    pictures = np.stack([render(scene) for scene in scenes])
    return shares(count_right(decode_latents(autoencoder, encode_pictures(autoencoder, pictures)), scenes))


@torch.no_grad()
def encode_pictures(autoencoder: AutoencoderKL, pictures: np.ndarray, scaled: bool = True) -> Tensor:
    """(N, 64, 64, 3) uint8 -> posterior means (N, 4, 8, 8), scaled as the UNet reads them."""
    parts = [to_pixels(pictures[part]) for part in batches(64, len(pictures))]
    latents = torch.cat([autoencoder.encode(pixels).latent_dist.mode() for pixels in parts])
    return latents * autoencoder.config.scaling_factor if scaled else latents


@torch.no_grad()
def decode_latents(autoencoder: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """(N, 4, 8, 8), scaled -> (N, 64, 64, 3) uint8."""
    parts = [latents[part] / autoencoder.config.scaling_factor for part in batches(64, len(latents))]
    pixels = torch.cat([autoencoder.decode(part).sample for part in parts])
    return (pixels.float().clamp(-1, 1) * 127.5 + 128).clamp(max=255).byte().permute(0, 2, 3, 1).numpy()


def draw(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) uint8 pictures of the scenes of these seeds."""
    return np.stack([render(sample_scene(int(seed))) for seed in seeds])


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
