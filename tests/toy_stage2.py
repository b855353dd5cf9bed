"""Inputs of a stage-2 run that is small enough for a test: a pipeline folder, pictures and manifests."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from llmga.config import load_config
from llmga.records import Record, write_manifest
from llmga.stage2.config import Stage2Config
from tests.toy_diffusion import toy_sd_pipeline, toy_sdxl_pipeline

SIDE = 16  # pixels


def make_inputs(folder: Path, inpainting: bool = False, sdxl: bool = False) -> Path:
    """Write a pipeline, pictures and manifests below `folder`, and settings that use them; return the latter."""
    name = "StableDiffusion" + ("XL" if sdxl else "") + ("InpaintPipeline" if inpainting else "Pipeline")
    build = toy_sdxl_pipeline if sdxl else toy_sd_pipeline
    build(name, in_channels=9 if inpainting else 4).save_pretrained(folder / "pipeline")
    rng = np.random.default_rng(0)
    for split, rows in (("train", 12), ("held_out", 3)):
        records = []
        for i in range(rows):
            width, height = [(SIDE, SIDE), (2 * SIDE, SIDE), (SIDE, 20)][i % 3]
            colour = rng.integers(0, 256, 3)
            picture = np.clip(rng.normal(colour, 30, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{split}{i}.png")
            prompt = " ".join([f"thing number {i} and"] * (1 + 20 * (i % 2)))  # one chunk, or two
            image = f"{split}{i}.png"
            records.append(
                Record(f"{split}{i}", "similar_image", image=image, prompt=prompt, short_caption=f"thing {i}")
            )
        write_manifest(folder / f"{split}.jsonl", records)
    settings: dict[str, Any] = {
        "task": "inpainting" if inpainting else "text_to_image",
        "model": {"path": str(folder / "pipeline"), "max_chunks": 2},
        "data": {
            "sources": [{"path": str(folder / "train.jsonl")}],
            "validation": [{"path": str(folder / "held_out.jsonl")}],
            "resolution": SIDE,
        },
        "samples": {"rows": 2, "steps": 2},
        "optim": {"lr": 1e-3},
        "run": {
            "output_dir": str(folder / "run"),
            "max_steps": 4,
            "batch_size": 2,
            "precision": "fp32",
            "num_workers": 0,
            "log_every_steps": 1,
            "save_every_steps": 2,
            "threads": 1,
        },
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def load(settings: Path, *overrides: str) -> Stage2Config:
    return load_config(Stage2Config, settings, overrides)
