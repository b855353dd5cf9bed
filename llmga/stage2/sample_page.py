"""Pictures of fixed prompts and seeds while the UNet learns, and a page that lays them out over the steps.

samples/index.html     one row for each prompt, one column for each step
samples/step-500/0.png
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image

from llmga.files import atomic_write, written_aside
from llmga.images import open_picture, picture_path
from llmga.learner import Learner
from llmga.loop import Place
from llmga.masks import random_mask
from llmga.runtime import MetricsLog
from llmga.stage2.config import Stage2Config
from llmga.stage2.data import mask_mixture
from llmga.stage2.parts import Parts
from llmga.stage2.pixels import Crop, crop_picture
from llmga.stage2.prompt_batch import attending_to
from llmga.stage2.sources import Source


class SamplePictures:
    """Paints the same prompts from the same noise at every step, with the averaged weights, on rank 0."""

    def __init__(
        self, cfg: Stage2Config, parts: Parts, learner: Learner, place: Place, held_out: Sequence[Source]
    ) -> None:
        self.cfg, self.parts, self.learner, self.place = cfg, parts, learner, place
        rows = [(source, row) for source in held_out for row in range(len(source))][: cfg.samples.rows]
        self.prompts = list(cfg.samples.prompts) or [source.check(row, source[row]) for source, row in rows]
        self.inputs: dict[str, Any] = {}
        if cfg.task == "inpainting":
            self.prompts, self.inputs = self._holes(rows)
        self.page = SamplePage(place.run.samples, self.prompts)
        if place.ranks.is_main:
            self.page.cut_after(place.first_step)
            if self.inputs:
                self.page.save("given", self.inputs["shown"])

    def paint(self, step: int) -> None:
        """Add the pictures of a step; all ranks call, the first one paints."""
        if not self.place.ranks.is_main:
            return  # the others wait at the next step
        pictures = self._paint()
        self.page.write(step, pictures)
        for tracker in self.place.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"samples": np.stack([np.asarray(picture) for picture in pictures])}, step=step)

    @torch.no_grad()
    def _paint(self) -> list[Image.Image]:
        pipeline, samples, side = self.parts.pipeline, self.cfg.samples, self.cfg.data.resolution
        vae_dtype = pipeline.vae.dtype
        painted: list[Image.Image] = []
        with self.learner.averaged() as unet:
            if vae_dtype != torch.float32:  # stock pipelines want one precision; the UNet's forward has its own
                pipeline.vae.float()
            try:
                for start in range(0, len(self.prompts), self.cfg.run.batch_size):
                    part = slice(start, start + self.cfg.run.batch_size)
                    pair = self.parts.encoder.encode_pair(self.prompts[part])
                    seeds = range(start, start + len(self.prompts[part]))
                    generators = [torch.Generator().manual_seed(samples.seed + number) for number in seeds]
                    with attending_to(unet, pair):
                        painted += pipeline(
                            **{name: value.float() for name, value in pair.pipeline_arguments().items()},
                            **{name: values[part] for name, values in self.inputs.items() if name != "shown"},
                            height=side,
                            width=side,
                            num_inference_steps=samples.steps,
                            guidance_scale=samples.guidance_scale,
                            generator=generators,
                            output_type="pil",
                        ).images
            finally:
                if vae_dtype != torch.float32:
                    pipeline.vae.to(vae_dtype)
        return painted

    def _holes(self, rows: Sequence[tuple[Source, int]]) -> tuple[list[str], dict[str, Any]]:
        """Pictures, masks and prompts of held-out rows; the masks are the same in all runs."""
        prompts, pictures, masks, shown = [], [], [], []
        side = self.cfg.data.resolution
        for number, (source, row) in enumerate(rows):
            record = source[row]
            prompts.append(source.check(row, record))
            picture = open_picture(picture_path(source.image_root, record.image or ""))
            cut, _ = crop_picture(picture, Crop((side, side)))
            hole = random_mask(np.random.default_rng(number), side, side, mask_mixture(self.cfg.data.masks)).hole
            pictures.append(Image.fromarray(np.ascontiguousarray(cut)))
            masks.append(Image.fromarray(hole * np.uint8(255)))
            shown.append(Image.fromarray(np.where(hole[:, :, None] == 1, np.uint8(127), cut)))
        return prompts, {"image": pictures, "mask_image": masks, "shown": shown}


class SamplePage:
    """The folder `samples/` with its page."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        self.folder, self.prompts = folder, list(prompts)
        self.log = MetricsLog(folder / "steps.jsonl")

    def cut_after(self, step: int) -> None:
        """Forget the pictures past `step`, which the resumed run will paint again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.cut_after(step)

    def save(self, name: str, pictures: Sequence[Image.Image]) -> None:
        """Write pictures into a folder of their own."""
        for number, picture in enumerate(pictures):
            with written_aside(self.folder / name / f"{number}.png") as aside:
                picture.save(aside, format="PNG")

    def write(self, step: int, pictures: Sequence[Image.Image]) -> Path:
        """Add the pictures of a step and return the page."""
        self.save(f"step-{step}", pictures)
        self.log.write(step, pictures=len(pictures))
        steps = sorted({line["step"] for line in self.log.read()})
        page = self.folder / "index.html"
        given = (self.folder / "given").is_dir()
        atomic_write(page, _TEMPLATE.render(prompts=self.prompts, steps=steps, given=given))
        return page


_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pictures while learning</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
  section { border-top: 1px solid #8886; padding: 1rem 0; }
  p { max-width: 60rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
  .strip { display: flex; gap: .6rem; overflow-x: auto; }
  figure { margin: 0; flex: none; } figcaption { font-size: 12px; opacity: .7; }
  img { width: 160px; border-radius: 4px; image-rendering: auto; }
</style>
<h1>Pictures while learning</h1>
<p>Same prompts, same noise; the steps go from left to right.</p>
{% for prompt in prompts %}
{% set number = loop.index0 %}
<section>
  <p>{{ prompt or "(no prompt)" }}</p>
  <div class="strip">
    {% if given %}
    <figure><img src="given/{{ number }}.png" alt="the picture with its hole" loading="lazy">
      <figcaption>given</figcaption></figure>
    {% endif %}
    {% for step in steps %}
    <figure><img src="step-{{ step }}/{{ number }}.png" alt="step {{ step }}" loading="lazy">
      <figcaption>step {{ step }}</figcaption></figure>
    {% endfor %}
  </div>
</section>
{% endfor %}
</html>
""")
