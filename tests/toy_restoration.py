"""Restoration training small enough for a test: a few pictures, a network of 8 channels, two or three steps a phase."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmga.config import load_config
from llmga.diffrir.config import DiffRIRConfig

STEPS = 4


def make_pictures(folder: Path, count: int = 6, side: int = 48) -> Path:
    """Smooth pictures with an edge each; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng([1, index])
        y, x = np.mgrid[0:side, 0:side] / side
        colours = np.stack([rng.uniform(40, 215) + rng.uniform(-40, 40) * (x if k % 2 else y) for k in range(3)], 2)
        colours[:, : side // 2] *= rng.uniform(0.5, 0.9)
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(folder / f"picture{index}.png")
    return folder


def settings(folder: Path, *phases: str, output_dir: str = "run", overrides: tuple[str, ...] = (), **run: Any) -> Any:
    """Checked settings of a run below `folder`, on pictures made there."""
    pictures = folder / "pictures"
    if not pictures.is_dir():
        make_pictures(pictures)
    names = phases or ("prior", "encoder", "joint", "gan")
    loss = "{perceptual: 0}"
    listed = ", ".join(
        f"{{name: {name}, steps: {STEPS}, lr: 1e-2, ema: 0.9, discriminator_width: 8, loss: {loss}}}" for name in names
    )
    given = {
        "batch_size": 2,
        "precision": "fp32",
        "num_workers": 0,
        "log_every_steps": 1,
        "save_every_steps": 2,
        "eval_every_steps": 2,
        "sample_every_steps": 4,
        "threads": 1,
        **run,
    }
    words = [
        f"data.sources=[{{path: {pictures}}}]",
        f"data.validation=[{{path: {pictures}}}]",
        "data.picture_size=32",
        "data.crop=32",
        "data.strength=0.2",
        "data.validation_pictures=3",
        f"phases=[{listed}]",
        "model={dim: 8, num_blocks: [1, 1, 1, 1], num_refinement_blocks: 1, prior_width: 16, num_prior_blocks: 1}",
        f"run.output_dir={folder / output_dir}",
        *(f"run.{name}={value}" for name, value in given.items()),
        *overrides,
    ]
    return load_config(DiffRIRConfig, None, words)


def with_phase(cfg: DiffRIRConfig, index: int, **changes: Any) -> DiffRIRConfig:
    """The same settings with one phase changed."""
    phases = list(cfg.phases)
    phases[index] = replace(phases[index], **changes)
    return replace(cfg, phases=phases)
