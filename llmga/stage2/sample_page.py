"""Pictures of fixed prompts and seeds while the UNet learns, and a page that lays them out over the steps.

samples/index.html     one row for each prompt, one column for each step
samples/step-500/0.png
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from llmga.stage2.sample import Painted, Sampler
from llmga.stage2.sample_inputs import Settings
from llmga.stage2.sources import Source
from llmga.trackers import log_pictures


class SamplePictures:
    """Paints the same prompts from the same noise at every step, with the averaged weights, on rank 0.

    It paints as `llmga sample` does, through the same code, so that what is seen here is what will be had.
    """

    def __init__(
        self, cfg: Stage2Config, parts: Parts, learner: Learner, place: Place, held_out: Sequence[Source]
    ) -> None:
        self.cfg, self.learner, self.place = cfg, learner, place
        self.sampler = Sampler(parts.pipeline)
        self.side = _painted_side(cfg.data.resolution, self.sampler.multiple)
        rows = [(source, row) for source in held_out for row in range(len(source))][: cfg.samples.rows]
        self.prompts = list(cfg.samples.prompts) or [source.check(row, source[row]) for source, row in rows]
        self.holes: list[tuple[Image.Image, np.ndarray]] = []
        if cfg.task == "inpainting":
            self.prompts = [source.check(row, source[row]) for source, row in rows]
            self.holes = [self._hole(number, source, row) for number, (source, row) in enumerate(rows)]
        self.page = SamplePage(place.run.samples, self.prompts)
        if place.ranks.is_main:
            self.page.cut_after(place.first_step)
            if self.holes:
                self.page.save_given([_shown(picture, hole) for picture, hole in self.holes])

    def paint(self, step: int) -> None:
        """Add the pictures of a step; all ranks call, the first one paints."""
        if not self.place.ranks.is_main:
            return  # the others wait at the next step
        self.sampler.model = f"{self.place.run.path} after step {step}"
        with self.learner.averaged(), _in_float32(self.sampler.pipeline):
            painted = self._paint()
        self.page.write(step, painted)
        log_pictures(self.place.accelerator.trackers, step, [np.asarray(one.picture) for one in painted])

    def _paint(self) -> list[Painted]:
        samples = self.cfg.samples
        settings = Settings(
            steps=samples.steps,
            guidance_scale=samples.guidance_scale,
            width=self.side,
            height=self.side,
            batch_size=self.cfg.run.batch_size,
        )
        if not self.holes:
            return self.sampler.text_to_image(self.prompts, seed=samples.seed, settings=settings)
        pictures, masks = [picture for picture, _ in self.holes], [hole for _, hole in self.holes]
        return self.sampler.inpaint(self.prompts, pictures, masks, seed=samples.seed, settings=settings)

    def _hole(self, number: int, source: Source, row: int) -> tuple[Image.Image, np.ndarray]:
        """The picture of a held-out row, and its mask, which is the same in all runs."""
        side = self.side
        picture = open_picture(picture_path(source.image_root, source[row].image or ""))
        cut, _ = crop_picture(picture, Crop((side, side)))
        hole = random_mask(np.random.default_rng(number), side, side, mask_mixture(self.cfg.data.masks)).hole
        return Image.fromarray(np.ascontiguousarray(cut)), hole * np.uint8(255)


@contextmanager
def _in_float32(pipeline: Any) -> Iterator[None]:
    """What is frozen in one precision, as stock pipelines want it; the UNet's forward has its own. Nothing is lost."""
    frozen = [pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    former = [(part, part.dtype) for part in frozen if part is not None and part.dtype != torch.float32]
    for part, _ in former:
        part.float()
    try:
        yield
    finally:
        for part, dtype in former:
            part.to(dtype)


def _painted_side(resolution: int, multiple: int) -> int:
    """The side that is trained on, or the nearest that pipelines paint."""
    return max(multiple, round(resolution / multiple) * multiple)


def _shown(picture: Image.Image, hole: np.ndarray) -> Image.Image:
    """A picture with its hole in grey."""
    return Image.fromarray(np.where(hole[:, :, None] > 0, np.uint8(127), np.asarray(picture)))


class SamplePage:
    """The folder `samples/` with its page."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        self.folder, self.prompts = folder, list(prompts)
        self.log = MetricsLog(folder / "steps.jsonl")

    def cut_after(self, step: int) -> None:
        """Forget the pictures past `step`, which the resumed run will paint again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.cut_after(step)

    def save_given(self, pictures: Sequence[Image.Image]) -> None:
        """Write what is to be completed, with its holes."""
        for number, picture in enumerate(pictures):
            with written_aside(self.folder / "given" / f"{number}.png") as aside:
                picture.save(aside, format="PNG")

    def write(self, step: int, painted: Sequence[Painted]) -> Path:
        """Add the pictures of a step, each with its recipe, and return the page."""
        for number, one in enumerate(painted):
            one.save(self.folder / f"step-{step}" / f"{number}.png")
        self.log.write(step, pictures=len(painted))
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
