"""Pretrain the toy vision tower: a CLIP vision transformer that learns to see scenes.

It stands where CLIP's contrastive pretraining stands for LLaVA. Exact labels replace image-text pairs: from every patch
token alone linear heads read in which row and column of the scene its cell lies, the background, and shape, size,
colour and texture of the object there; the heads are then thrown away. A language model can so look anything up with
one glance at one token. Half of the pictures have holes, since stage 1 shows the tower masked pictures.

The heads have rows of one fixed length and read tokens of one fixed length, so a token must give each fact a like share
of itself. With free heads a token's cell made up 3 % of its variance, and a language model learned to look things up by
what they look like, but not by where they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llmga.masks import random_mask
from llmga.toyworld.render import render
from llmga.toyworld.scene import ATTRIBUTES, BACKGROUNDS, PRESETS, Scene, sample_scene
from llmga.toyworld.visibility import MIN_VISIBLE, visible_share

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
UNSEEN = -100
"""Label of what cannot be told from the picture; cross-entropy ignores it."""
KINDS = {"present": ("no", "yes"), **ATTRIBUTES}
HEAD_SCALE = 1.5
"""Length of a head's rows: eight facts can be told with confidence only when each has its share of the token."""


@dataclass(frozen=True)
class TowerRecipe:
    """Size and training of the tower; the defaults are those of the shipped one (about three minutes on 2 cores)."""

    hidden_size: int = 192
    num_layers: int = 3
    num_heads: int = 6
    patch_size: int = 16
    picture_size: int = 64
    num_scenes: int = 24_000
    batch_size: int = 128
    steps: int = 1_000
    lr: float = 1e-3
    seed: int = 0

    @property
    def side(self) -> int:
        """Patches along a side of a picture; whole patches lie in each cell of the learnable world."""
        return self.picture_size // self.patch_size


def build_tower(recipe: TowerRecipe) -> CLIPVisionModel:
    """A tower with fresh weights."""
    torch.manual_seed(recipe.seed)
    config = CLIPVisionConfig(
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        image_size=recipe.picture_size,
        patch_size=recipe.patch_size,
    )
    tower = CLIPVisionModel(config)
    for name, parameter in tower.named_parameters():
        if parameter.ndim >= 2 and "position" not in name:  # CLIP's own depth-scaled start is slow for a shallow net
            nn.init.trunc_normal_(parameter, std=0.02)
    return tower


class SceneHeads(nn.Module):
    """Linear readers of a patch token: its place, the background, and the attributes of its cell's object."""

    def __init__(self, hidden_size: int, grid: int) -> None:
        super().__init__()
        sizes = {"row": grid, "column": grid, "background": len(BACKGROUNDS), **{k: len(v) for k, v in KINDS.items()}}
        self.heads = nn.ParameterDict({k: nn.Parameter(torch.randn(size, hidden_size)) for k, size in sizes.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens (B, 1 + N, D), CLS first -> kind -> logits (B, N, values)."""
        patches = F.layer_norm(tokens[:, 1:], tokens.shape[-1:])
        return {k: F.linear(patches, HEAD_SCALE * F.normalize(head, dim=-1)) for k, head in self.heads.items()}


def scene_labels(scene: Scene, hole: np.ndarray | None, side: int) -> dict[str, np.ndarray]:
    """Class indices for each of side x side patches, row by row; `UNSEEN` where the hole hides the cell's object."""
    cells = scene.geometry.grid**2
    labels = {kind: np.full(cells, UNSEEN) for kind in KINDS}
    for cell in range(cells):
        obj = scene.object_at(cell)
        visible = 1.0 if hole is None else visible_share(scene, cell, hole)
        if visible >= MIN_VISIBLE:
            labels["present"][cell] = int(obj is not None)
            for kind, value in obj.attributes().items() if obj else ():
                labels[kind][cell] = ATTRIBUTES[kind].index(value)
    grid = scene.geometry.grid
    row, column = np.array(np.divmod(np.arange(side**2), side)) * grid // side
    cell_of_patch = row * grid + column
    return {
        "row": row,
        "column": column,
        "background": np.full(side**2, list(BACKGROUNDS).index(scene.background)),
        **{kind: values[cell_of_patch] for kind, values in labels.items()},
    }


def train_tower(recipe: TowerRecipe, log: Callable[[str], None]) -> CLIPVisionModel:
    """Train a tower on scenes of the train split; deterministic for a recipe on one machine.

    Returns:
        the tower in eval mode, its heads dropped.
    """
    tower, heads = build_tower(recipe), SceneHeads(recipe.hidden_size, PRESETS["learnable"].grid)
    pictures, labels = _examples(range(recipe.num_scenes), recipe)
    held_out = _examples(range(10_000_000, 10_000_512), recipe, masked_share=0.0)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.01, fused=True)
    warmup = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
    )
    order, started = torch.Generator().manual_seed(recipe.seed), time.monotonic()
    for step in range(1, recipe.steps + 1):
        batch = torch.randint(len(pictures), (recipe.batch_size,), generator=order)
        logits = heads(tower(normalise(pictures[batch])).last_hidden_state)
        loss = scene_loss(logits, {kind: values[batch] for kind, values in labels.items()})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == recipe.steps:
            seconds = time.monotonic() - started
            eta = seconds / step * (recipe.steps - step)
            accuracy = ", ".join(f"{kind} {100 * share:.1f}" for kind, share in _accuracy(tower, heads, *held_out))
            log(f"tower: step {step}/{recipe.steps}, loss {loss.item():.3f}, held out %: {accuracy}, {eta:.0f} s left")
    return tower.eval()


def normalise(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 as CLIP's image processor gives it."""
    pixels = pictures.float().div(255).sub(torch.tensor(CLIP_MEAN)).div(torch.tensor(CLIP_STD))
    return pixels.permute(0, 3, 1, 2).contiguous()


def scene_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Sum of the mean cross-entropies of all kinds, over what is visible."""
    losses = [F.cross_entropy(logits[k].flatten(0, -2), labels[k].flatten(), ignore_index=UNSEEN) for k in labels]
    return torch.stack(losses).sum()


def _examples(seeds: range, recipe: TowerRecipe, masked_share: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    size = recipe.picture_size
    pictures, labels = np.empty((len(seeds), size, size, 3), np.uint8), []
    for index, seed in enumerate(seeds):
        rng, scene, hole = np.random.default_rng([recipe.seed, seed]), sample_scene(seed), None
        pictures[index] = render(scene, size)
        if rng.random() < masked_share:
            hole = random_mask(rng, size, size).hole
            pictures[index] *= 1 - hole[..., None]
        labels.append(scene_labels(scene, hole, recipe.side))
    stacked = {kind: torch.from_numpy(np.array([row[kind] for row in labels])) for kind in labels[0]}
    return torch.from_numpy(pictures), stacked


@torch.no_grad()
def _accuracy(
    tower: CLIPVisionModel, heads: SceneHeads, pictures: Tensor, labels: dict[str, Tensor]
) -> list[tuple[str, float]]:
    tower.eval()
    logits = heads(tower(normalise(pictures)).last_hidden_state)
    tower.train()
    right = {k: (logits[k].argmax(-1) == labels[k])[labels[k] != UNSEEN].float().mean().item() for k in labels}
    return list(right.items())
