"""The toy world's UNets: diffusers' UNet2DConditionModel at small width, trained on latents made beforehand.

`base` sees captions that fit CLIP's window. The inpainting twin starts from it with five more channels, whose weights
are zero at first: the mask, and the latents of the picture with its hole in mid-grey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from llmga.masks import random_mask
from llmga.tokens import CHUNK_TOKENS, CLIP_WINDOW, clip_tokenizer
from llmga.toyworld.autoencoder import decode_latents, draw, encode_pictures
from llmga.toyworld.describe import Caption, describe
from llmga.toyworld.readings import count_right, in_words, shares
from llmga.toyworld.scene import SPLITS, Facts, Scene, sample_scene
from llmga.toyworld.training import Schedule, batches, fit, quick_arithmetic

BRIEF_SHARE = 0.15


@dataclass(frozen=True)
class UnetRecipe:
    """Size and training; the defaults are those of the shipped `base`."""

    widths: tuple[int, ...] = (64, 128)
    num_heads: int = 4
    layers_per_block: int = 1
    num_scenes: int = 16_000
    captions_per_scene: int = 2
    num_held_out: int = 48
    batch_size: int = 64
    empty_share: float = 0.1
    seed: int = 0
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=600, lr=1.5e-3, matrix_lr=3e-3, report_every=200))
    inpainting: Schedule = field(
        default_factory=lambda: Schedule(steps=400, lr=7e-4, matrix_lr=1.5e-3, report_every=200)
    )


@dataclass(frozen=True)
class Latents:
    """What a UNet learns from.

    Attributes:
        clean: (N, 4, 8, 8) scaled latents.
        conditions: (N, 5, 8, 8) mask and masked latents of the inpainting twin; None for text to image.
        states: (N, captions, 77, D) float16, what the text encoder says of the captions.
        empty: (77, D) float16, what it says of no text.
    """

    clean: Tensor
    conditions: Tensor | None
    states: Tensor
    empty: Tensor


def build_scheduler() -> DDIMScheduler:
    """SD's noise, with the UNet predicting v: its target keeps unit variance at every step."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_unet(recipe: UnetRecipe, text_width: int) -> UNet2DConditionModel:
    """Fresh weights; every level but the first looks at the text, for there each place is near enough to the border to
    know where it is, and a look costs little.
    """
    torch.manual_seed(recipe.seed)
    lower = len(recipe.widths) - 1
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * lower],
        up_block_types=[*["CrossAttnUpBlock2D"] * lower, "UpBlock2D"],
        block_out_channels=recipe.widths,
        layers_per_block=recipe.layers_per_block,
        cross_attention_dim=text_width,
        attention_head_dim=recipe.num_heads,
        norm_num_groups=16,
    )


def widen_for_inpainting(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet with 9 input channels: noisy latents, mask, masked latents. At first it ignores the new ones."""
    twin = UNet2DConditionModel.from_config(unet.config, in_channels=9)
    weights = unet.state_dict()
    narrow = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([narrow, narrow.new_zeros(len(narrow), 5, *narrow.shape[2:])], dim=1)
    twin.load_state_dict(weights)
    return twin


def prepare_latents(
    recipe: UnetRecipe, autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, inpainting: bool = False
) -> Latents:
    """Latents and captions' states of the first scenes of the train split; frozen parts need to look but once."""
    seeds = SPLITS["train"][: recipe.num_scenes]
    clean, conditions = [], []
    for part in batches(512, len(seeds)):
        pictures = draw(seeds[part])
        clean.append(encode_pictures(autoencoder, pictures))
        if inpainting:
            holes = np.stack([random_mask(np.random.default_rng([1, seed]), 64, 64).hole for seed in seeds[part]])
            conditions.append(inpainting_conditions(autoencoder, pictures, holes))
    captions = [caption_of(seed, number).text for seed in seeds for number in range(recipe.captions_per_scene)]
    states = encode_texts(text_encoder, captions).unflatten(0, (len(seeds), recipe.captions_per_scene))
    empty = encode_texts(text_encoder, [""])[0]
    return Latents(torch.cat(clean), torch.cat(conditions) if inpainting else None, states, empty)


@torch.no_grad()
def encode_texts(text_encoder: CLIPTextModel, texts: Sequence[str]) -> Tensor:
    """(N, 77, D) float16: what the text encoder says of each text's first window."""
    text_encoder.eval().requires_grad_(False)
    parts = [tokenize(texts[part]) for part in batches(256, len(texts))]
    return torch.cat([text_encoder(ids).last_hidden_state.half() for ids in parts])


def inpainting_conditions(autoencoder: AutoencoderKL, pictures: np.ndarray, holes: np.ndarray) -> Tensor:
    """(N, 64, 64, 3) uint8 and (N, 64, 64) holes, 1 = draw -> (N, 5, 8, 8): mask, then latents with the hole grey."""
    hidden = np.where(holes[..., None] > 0, np.uint8(128), pictures)
    mask = F.interpolate(torch.from_numpy(holes.astype(np.float32))[:, None], (8, 8))
    return torch.cat([mask, encode_pictures(autoencoder, hidden)], dim=1)


def caption_of(seed: int, number: int = 0, brief_share: float = BRIEF_SHARE) -> Caption:
    """A caption of a scene that SD could have met: brief, or the facts in any order; what exceeds a window is cut."""
    rng = np.random.default_rng([2, seed, number])
    return describe(sample_scene(seed), rng, "brief" if rng.random() < brief_share else "medium")


def tokenize(texts: Sequence[str]) -> Tensor:
    """(N, 77) int64 as stock pipelines make them: cut at the window, padded with EOS."""
    return clip_tokenizer()(
        list(texts), padding="max_length", truncation=True, max_length=CLIP_WINDOW, return_tensors="pt"
    ).input_ids


def train_unet(
    unet: UNet2DConditionModel,
    latents: Latents,
    text_encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    recipe: UnetRecipe,
    state_path: Path,
    log: Callable[[str], None],
) -> UNet2DConditionModel:
    """Train text to image, or inpainting where the latents have conditions; judged by the parser on held-out scenes."""
    noise_scheduler = build_scheduler()
    is_inpainting = latents.conditions is not None

    def loss_of_step(step: int) -> Tensor:
        rng, generator = np.random.default_rng([recipe.seed, step]), torch.Generator().manual_seed(step)
        rows = torch.from_numpy(rng.integers(0, len(latents.clean), recipe.batch_size))
        states = latents.states[rows, torch.from_numpy(rng.integers(0, latents.states.shape[1], len(rows)))]
        states[torch.from_numpy(rng.random(len(rows)) < recipe.empty_share)] = latents.empty
        clean = latents.clean[rows]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1_000, (len(rows),), generator=generator)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        if latents.conditions is not None:
            noisy = torch.cat([noisy, latents.conditions[rows]], dim=1)
        with quick_arithmetic():
            predicted = unet(noisy, timesteps, states.float()).sample
        return F.mse_loss(predicted.float(), noise_scheduler.get_velocity(clean, noise, timesteps))

    held_out = SPLITS["validation"][: recipe.num_held_out]
    schedule = recipe.inpainting if is_inpainting else recipe.schedule
    return fit(
        "inpainting UNet" if is_inpainting else "UNet", unet, loss_of_step, schedule, state_path,
        lambda now: in_words(read_samples(now, text_encoder, autoencoder, held_out)), log,
    )  # fmt: skip


def read_samples(
    unet: nn.Module,
    text_encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    seeds: Sequence[int],
    steps: int = 12,
    guidance_scale: float = 2.5,
) -> dict[str, float]:
    """Share right, by kind, of what medium captions of scenes ask for and a picture painted for each shows."""
    captions, scenes = [caption_of(seed, brief_share=0) for seed in seeds], [sample_scene(seed) for seed in seeds]
    conditions = None
    if unet.config.in_channels == 9:
        holes = np.stack([random_mask(np.random.default_rng([1, seed]), 64, 64).hole for seed in seeds])
        conditions = inpainting_conditions(autoencoder, draw(seeds), holes)
    painted = paint(unet, text_encoder, [caption.text for caption in captions], conditions, steps, guidance_scale)
    asked = [_asked(caption, scene) for caption, scene in zip(captions, scenes, strict=True)]
    return shares(count_right(decode_latents(autoencoder, painted), scenes, asked))


def _asked(caption: Caption, scene: Scene) -> Facts:
    """The scene's facts that a caption says within CLIP's window."""
    said = {
        (fact.kind, fact.cell)
        for fact, position in zip(caption.facts, caption.positions, strict=True)
        if position <= CHUNK_TOKENS
    }
    return {key: value for key, value in scene.facts().items() if key in said}


@torch.no_grad()
def paint(
    unet: nn.Module,
    text_encoder: CLIPTextModel,
    texts: Sequence[str],
    conditions: Tensor | None,
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Latents (N, 4, 8, 8) for captions, with a few steps of DPM-Solver++ and classifier-free guidance."""
    scheduler = DPMSolverMultistepScheduler.from_config(build_scheduler().config)
    scheduler.set_timesteps(steps)
    states = torch.cat([text_encoder(tokenize(list(side))).last_hidden_state for side in ([""] * len(texts), texts)])
    latents = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        inputs = latents if conditions is None else torch.cat([latents, conditions], dim=1)
        without, with_text = unet(torch.cat([inputs] * 2), timestep, states).sample.chunk(2)
        latents = scheduler.step(without + guidance_scale * (with_text - without), timestep, latents).prev_sample
    return latents
