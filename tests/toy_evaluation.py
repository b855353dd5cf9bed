"""Sets and systems for evaluations that take seconds: toy rows, and folders of pictures that are right or wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from llmga.metrics.picture_files import file_name
from llmga.records import Record, open_manifest, write_manifest
from llmga.toyworld.build import build_world
from llmga.toyworld.describe import Caption
from llmga.toyworld.picture_scores import WINDOW_TOKENS, read_text
from llmga.toyworld.render import render
from llmga.toyworld.scene import ATTRIBUTES, BACKGROUNDS, Scene

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "quick_gelu": True,
}
CLIP_MEAN, CLIP_STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)
RANDOM_NETWORK = {"name": "seeded-conv", "allow_random": True}


def refinement_rows(folder: Path, count: int) -> Path:
    """A manifest of brief captions with prompts, as `make record` leaves it; rows have no pictures."""
    build_world(folder / "world", splits={"test": count}, weights={"prompt_refinement": 1.0}, sheet=False)
    records = [replace(record, prompt=record.caption) for record in open_manifest(folder / "world/test.jsonl")]
    write_manifest(folder / "rows.jsonl", records)
    return folder / "rows.jsonl"


def scene_of(record: Record) -> Scene:
    return Scene.from_dict(record.meta["scene"])


def write_pictures(folder: Path, rows: Path, paint: Callable[[Record, np.random.Generator], np.ndarray]) -> Path:
    """One picture for each row, 64 px."""
    folder.mkdir(parents=True)
    for number, record in enumerate(open_manifest(rows)):
        Image.fromarray(paint(record, np.random.default_rng(number))).save(folder / file_name(record.id))
    return folder


def perfect(record: Record, rng: np.random.Generator) -> np.ndarray:
    """What the long prompt says."""
    return render(scene_of(record))


def first_window(record: Record, rng: np.random.Generator) -> np.ndarray:
    """What a system paints that cannot read past the first window of the prompt: the rest is guessed."""
    return render(guessed_past(scene_of(record), read_text(record.prompt or ""), rng))


def anything(record: Record, rng: np.random.Generator) -> np.ndarray:
    """A system that reads nothing."""
    return render(guessed_past(scene_of(record), Caption("", ()), rng))


def guessed_past(scene: Scene, caption: Caption, rng: np.random.Generator) -> Scene:
    """The scene with everything drawn at random that the caption does not say within its first window."""
    seen = {(f.kind, f.cell) for f, p in zip(caption.facts, caption.positions, strict=True) if p <= WINDOW_TOKENS}
    objects = [
        replace(obj, **{k: str(rng.choice(v)) for k, v in ATTRIBUTES.items() if (k, obj.cell) not in seen})
        for obj in scene.objects
    ]
    ground = scene.background if ("background", None) in seen else str(rng.choice(list(BACKGROUNDS)))
    return replace(scene.with_objects(objects), background=ground)


def toy_clip_folder(path: Path) -> Path:
    """A CLIP of the real architecture at small width, with random weights, as open_clip saves it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**CLIP_CONFIG).state_dict(), path / "open_clip_model.safetensors")
    preprocess = {"mean": CLIP_MEAN, "std": CLIP_STD}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}))
    return path


def settings_file(path: Path, **settings: Any) -> Path:
    """A YAML file of settings."""
    path.write_text(yaml.safe_dump(settings))
    return path
