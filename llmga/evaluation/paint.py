"""Pictures painted once: by many processes, resumable, each with a seed of its own that comes of its id."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llmga.evaluation.bench import Work
from llmga.evaluation.config import PaintConfig, SystemConfig
from llmga.files import atomic_write, written_aside
from llmga.images import open_picture
from llmga.metrics.picture_files import file_name
from llmga.runtime import Ranks, device_index
from llmga.stage2.pipelines import load_pipeline
from llmga.stage2.prompt_layout import layout_of, prompt_layout, stamp_layout
from llmga.stage2.recipe import library_versions, weights_hash
from llmga.stage2.sample import Painted, Sampler
from llmga.stage2.sample_inputs import Settings

SETTINGS_FILE = "painted.json"
_BATCHES_AT_ONCE = 8  # given to a sampler together, which then sorts them by their number of chunks
_PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Painter = Callable[[Sampler, Sequence[str]], Sequence[Painted]]


class PaintError(ValueError):
    """A folder of pictures that were painted otherwise than asked now."""


def device_of(ranks: Ranks) -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", device_index(ranks, torch.cuda.device_count()))


def load_sampler(system: SystemConfig, paint: PaintConfig, device: torch.device) -> Sampler:
    """The pipeline of a system; errors as `load_pipeline`."""
    assert system.pipeline is not None
    pipeline = load_pipeline(system.pipeline, device, _PRECISIONS[paint.precision])
    if system.max_chunks is not None:
        layout = layout_of(pipeline.unet.config) or prompt_layout()
        stamp_layout(pipeline.unet, replace(layout, max_chunks=system.max_chunks))
    return Sampler(pipeline, str(system.pipeline), weights_hash(system.pipeline))


def paint_settings(paint: PaintConfig, **others: Any) -> Settings:
    """The sampler's settings."""
    return Settings(
        steps=paint.steps,
        guidance_scale=paint.guidance_scale,
        scheduler=paint.scheduler,
        width=paint.side,
        height=paint.side,
        batch_size=paint.batch_size,
        **others,
    )


def seed_of(seed: int, id: str) -> int:
    """A picture's own seed: equal for all systems, whatever else is painted."""
    return int.from_bytes(sha256(f"{seed}\0{id}".encode()).digest()[:8]) >> 1


def seeds_of(seed: int, ids: Sequence[str]) -> list[int]:
    """`seed_of` each."""
    return [seed_of(seed, id) for id in ids]


def generation_facts(paint: PaintConfig, **others: Any) -> dict[str, Any]:
    """How pictures are painted, for documents and to tell whether a folder holds what is asked."""
    return {
        "steps": paint.steps,
        "guidance_scale": paint.guidance_scale,
        "scheduler": paint.scheduler,
        "side": paint.side,
        "precision": paint.precision,
        "seed": paint.seed,
        "seed_rule": "sha256 of seed and id",
        "file_format": "PNG",
        **others,
    }


def system_facts(system: SystemConfig) -> dict[str, Any]:
    """Who painted, for documents."""
    if system.pipeline is None:
        return {"name": system.name, "pictures": os.path.relpath(system.pictures or "")}
    found = {
        "name": system.name,
        "pipeline": os.path.relpath(system.pipeline),
        "weights": weights_hash(system.pipeline),
    }
    return found | ({} if system.max_chunks is None else {"max_chunks": system.max_chunks})


def painted_files(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """Where the picture of each id is, or will be."""
    return {id: folder / file_name(id) for id in ids}


class Studio:
    """Paints with one pipeline after another, each loaded when there is something to paint with it.

    Args:
        work: this process's share of the pictures.
        paint: how pictures are painted.
    """

    def __init__(self, work: Work, paint: PaintConfig) -> None:
        self.work, self.paint = work, paint
        self.device = device_of(work.ranks)
        self._loaded: tuple[SystemConfig, Sampler] | None = None

    def sampler(self, system: SystemConfig) -> Sampler:
        """The pipeline of a system; the one before goes."""
        if self._loaded is None or self._loaded[0] != system:
            self._loaded = None
            self._loaded = system, load_sampler(system, self.paint, self.device)
        return self._loaded[1]

    def paint_share(
        self, system: SystemConfig, folder: Path, ids: Sequence[str], facts: Mapping[str, Any], painter: Painter
    ) -> dict[str, Path]:
        """Paint this process's share of the ids, as far as it is not painted.

        Args:
            facts: all that decides the pictures; a folder with others is refused.
            painter: is given the sampler and some ids, and paints one picture for each.
        Returns:
            The file of every id; those of other processes may not be there yet.
        Raises:
            PaintError: the folder was painted otherwise.
            Interrupted: a signal came; what is painted stays.
        """
        agree_on(folder, {**system_facts(system), **facts})
        files = painted_files(folder, ids)
        missing = [id for id in self.work.mine(ids) if not files[id].is_file()]
        for batch in self.work.batches(f"painting {folder.name}", missing, _BATCHES_AT_ONCE * self.paint.batch_size):
            for id, painted in zip(batch, painter(self.sampler(system), batch), strict=True):
                painted.save(files[id])
        return files


def agree_on(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write down what decides the files of a folder, or find that it was the same before.

    Raises:
        PaintError: it was not; the message names what differs.
    """
    path = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(facts, default=str))
    if not path.is_file():
        atomic_write(path, json.dumps({"decided_by": wanted, "versions": library_versions()}, indent=1) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))["decided_by"]
    changed = [
        f"{key} ({found.get(key)} there, {wanted.get(key)} now)"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if changed:
        raise PaintError(
            f"{folder} holds pictures painted with other settings: {', '.join(changed)}; choose another out, or delete "
            "the folder"
        )


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, aside and then renamed."""
    with written_aside(path) as aside:
        picture.save(aside, format="PNG")


@torch.no_grad()
def reconstruct(studio: Studio, system: SystemConfig, folder: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """What a system's autoencoder leaves of pictures: the best that it could paint.

    Returns:
        The file of every id; those of other processes may not be there yet.
    """
    agree_on(folder, {**system_facts(system), "autoencoder": True})
    made = painted_files(folder, list(files))
    missing = [id for id in studio.work.mine(list(files)) if not made[id].is_file()]
    for batch in studio.work.batches(f"reconstructing {folder.name}", missing, studio.paint.batch_size):
        pipeline = studio.sampler(system).pipeline
        pixels = pipeline.image_processor.preprocess([open_picture(files[id]) for id in batch])
        latents = pipeline.vae.encode(pixels.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist.mode()
        pictures = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pil")
        for id, picture in zip(batch, pictures, strict=True):
            save_picture(picture, made[id])
    return made
