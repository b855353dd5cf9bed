"""Prompts of any length to pictures: text to image, inpainting and outpainting, by stock diffusers pipelines.

    sampler = Sampler.load("runs/stage2_toy/final")
    for painted in sampler.text_to_image(["a red boat ...", "two cats ..."], seed=7):
        painted.save(Path("boat.png"))

Each picture has a seed of its own and is painted beside prompts of as many chunks, so that it depends neither on the
size of a batch nor on what else is in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llmga.stage2.canvas import (
    Canvas,
    extended_canvas,
    fit_canvas,
    margins_in_pixels,
    masked_canvas,
    paste_back,
    working_size,
)
from llmga.stage2.config import Task
from llmga.stage2.pipelines import PipelineError, load_pipeline, pipeline_for
from llmga.stage2.prompt_batch import UNCONDITIONAL, attending_to
from llmga.stage2.prompt_encoder import LongPromptEncoder
from llmga.stage2.recipe import Recipe, RecipeError, library_versions, save_with_recipe, weights_hash
from llmga.stage2.sample_inputs import (
    PictureLike,
    SampleError,
    Settings,
    aligned,
    one_each,
    opened,
    origin_of,
    recorded_file,
)
from llmga.stage2.schedulers import scheduler_by_name


@dataclass(frozen=True)
class Painted:
    """A picture, its recipe, and what it was painted on.

    Attributes:
        canvas: picture and hole, for what is completed: what restoration wants to know.
    """

    picture: Image.Image
    recipe: Recipe
    canvas: Canvas | None = None

    def save(self, path: Path) -> None:
        """Write a PNG that carries the recipe."""
        save_with_recipe(self.picture, self.recipe, path)


@dataclass(frozen=True)
class _Job:
    """One picture to paint."""

    prompt: str
    negative: str | None
    seed: int
    size: tuple[int, int]
    num_chunks: int = 1
    canvas: Canvas | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Sampler:
    """Paints with one pipeline, SD1.5 or SDXL, in the layout that it was trained with."""

    def __init__(self, pipeline: Any, model: str = "", model_hash: str = "") -> None:
        """Take a pipeline of stock diffusers.

        Args:
            model, model_hash: for recipes: its folder, and what tells its weights from others.
        Raises:
            PipelineError, TextEncoderError, LayoutError: its parts do not fit each other.
        """
        self.pipeline, self.model, self.model_hash = pipeline, model, model_hash
        if not hasattr(pipeline, "unet"):
            raise PipelineError(f"{type(pipeline).__name__} is not a Stable Diffusion pipeline; expected SD1.5 or SDXL")
        self.encoder = LongPromptEncoder.from_pipeline(pipeline)
        self.is_sdxl = "text_encoder_2" in pipeline.components
        self._own_scheduler = pipeline.scheduler

    @classmethod
    def load(
        cls, folder: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "Sampler":
        """Load a pipeline's folder; arguments and errors as `llmga.stage2.pipelines.load_pipeline`."""
        folder = Path(folder)
        pipeline = load_pipeline(folder, device, dtype)
        return cls(pipeline, str(folder), weights_hash(folder))

    @property
    def factor(self) -> int:
        """Pixels to a latent."""
        return int(2 ** (len(self.pipeline.vae.config.block_out_channels) - 1))

    @property
    def native_px(self) -> int:
        """Side of the pictures that the UNet was trained with."""
        return int(self.pipeline.unet.config.sample_size) * self.factor

    @property
    def multiple(self) -> int:
        """What sides must be multiples of."""
        return self.factor * (8 if self.is_sdxl else 1)

    # ------------------------------------------------------------ what can be asked for

    def text_to_image(
        self,
        prompts: str | Sequence[str],
        negatives: str | Sequence[str | None] | None = None,
        seed: int | Sequence[int] = 0,
        settings: Settings | None = None,
    ) -> list[Painted]:
        """Paint pictures.

        Args:
            prompts: one or several, of any length; an empty one leaves the model free.
            negatives: what to steer away from, one for all or one for each; None: the model's own "no prompt".
            seed: one for each prompt, or the first's: the others then count on from it.
        Raises:
            SampleError, PromptError, SchedulerError, PipelineError: something cannot be painted as asked.
        """
        settings = settings or Settings()
        size = self._asked_size(settings) or (self.native_px, self.native_px)
        jobs = [
            _Job(prompt, negative, one, size)
            for prompt, negative, one in zip(*aligned(prompts, negatives, seed), strict=True)
        ]
        return self._paint("text_to_image", "text_to_image", jobs, settings)

    def inpaint(
        self,
        prompts: str | Sequence[str],
        pictures: PictureLike | Sequence[PictureLike],
        masks: PictureLike | np.ndarray | Sequence[PictureLike | np.ndarray],
        negatives: str | Sequence[str | None] | None = None,
        seed: int | Sequence[int] = 0,
        settings: Settings | None = None,
    ) -> list[Painted]:
        """Paint the holes of pictures; light parts of a mask are generated.

        Args:
            prompts, negatives, seed: as `text_to_image`.
            pictures, masks: one for all prompts or one for each; files, Pillow pictures, arrays for masks. Pictures of
                any size: they are painted at the model's size, and come back so, or at their own with `paste`.
        Raises:
            as `text_to_image`; PictureError: a file cannot be read; CanvasError: a mask does not fit or hides nothing.
        """
        texts, negatives, seeds = aligned(prompts, negatives, seed)
        pictures, masks = one_each("pictures", pictures, texts), one_each("masks", masks, texts)
        settings, jobs = settings or Settings(), []
        for text, negative, one, picture, mask in zip(texts, negatives, seeds, pictures, masks, strict=True):
            hole = mask if isinstance(mask, np.ndarray) else opened(mask)
            canvas = masked_canvas(opened(picture), hole)
            facts = {"picture": origin_of(picture), "mask": origin_of(mask)}
            jobs.append(_Job(text, negative, one, self._size_for(canvas, settings), 1, canvas, facts))
        return self._paint("inpainting", "inpainting", jobs, settings)

    def outpaint(
        self,
        prompts: str | Sequence[str],
        pictures: PictureLike | Sequence[PictureLike],
        margins: Sequence[float],
        negatives: str | Sequence[str | None] | None = None,
        seed: int | Sequence[int] = 0,
        settings: Settings | None = None,
    ) -> list[Painted]:
        """Continue pictures past their borders.

        Args:
            margins: left, top, right, bottom in pixels of the picture, or below 1 in shares of its side.
            prompts, pictures, negatives, seed: as `inpaint`.
        Raises:
            as `inpaint`.
        """
        texts, negatives, seeds = aligned(prompts, negatives, seed)
        settings, jobs = settings or Settings(), []
        for text, negative, one, picture in zip(
            texts, negatives, seeds, one_each("pictures", pictures, texts), strict=True
        ):
            given = opened(picture)
            canvas = extended_canvas(given, margins, settings.overlap_px)
            facts = {"picture": origin_of(picture), "margins": list(margins_in_pixels(given.size, margins))}
            jobs.append(_Job(text, negative, one, self._size_for(canvas, settings), 1, canvas, facts))
        return self._paint("outpainting", "inpainting", jobs, settings)

    # ------------------------------------------------------------ how it is painted

    def _paint(self, told: str, task: Task, jobs: Sequence[_Job], settings: Settings) -> list[Painted]:
        """Paint jobs in batches of equal size and number of chunks, and return them in order."""
        pipeline = pipeline_for(self.pipeline, task)
        pipeline.scheduler = (
            scheduler_by_name(settings.scheduler, self._own_scheduler) if settings.scheduler else self._own_scheduler
        )
        jobs = [replace(job, num_chunks=self._count_chunks(job, settings)) for job in jobs]
        painted: list[Painted | None] = [None] * len(jobs)
        for batch in _batches(jobs, settings.batch_size):
            pictures = self._paint_batch(pipeline, [jobs[index] for index in batch], settings)
            for index, picture in zip(batch, pictures, strict=True):
                job = jobs[index]
                recipe = self._recipe(told, job, settings, pipeline)
                if job.canvas is not None:
                    picture = paste_back(picture, job.canvas, settings.paste, settings.feather_px)
                painted[index] = Painted(picture, recipe, job.canvas)
        return [one for one in painted if one is not None]

    @torch.no_grad()
    def _paint_batch(self, pipeline: Any, jobs: Sequence[_Job], settings: Settings) -> list[Image.Image]:
        pair = self.encoder.encode_pair(
            [job.prompt for job in jobs],
            [UNCONDITIONAL if job.negative is None else job.negative for job in jobs],
            settings.weighted,
        )
        guidance = self._guidance(jobs, settings)
        width, height = jobs[0].size
        arguments: dict[str, Any] = {
            **pair.pipeline_arguments(),
            "generator": [torch.Generator().manual_seed(job.seed) for job in jobs],
            "num_inference_steps": settings.steps,
            "guidance_scale": guidance,
            "width": width,
            "height": height,
            "output_type": "np",
        }
        if jobs[0].canvas is not None:
            fitted = [fit_canvas(job.canvas, job.size) for job in jobs if job.canvas is not None]
            arguments |= {"image": [picture for picture, _ in fitted], "mask_image": [mask for _, mask in fitted]}
            arguments["strength"] = settings.strength
        with attending_to(pipeline.unet, pair if guidance > 1 else pair.positive):
            images = pipeline(**arguments).images
        if not np.isfinite(images).all():
            raise SampleError("the model painted values that are no numbers; load it in float32 (dtype)")
        return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]

    def _count_chunks(self, job: _Job, settings: Settings) -> int:
        """Chunks of a prompt and its negative, the larger number of the two."""
        negative = UNCONDITIONAL if job.negative is None else job.negative
        return int(self.encoder.tokenize([job.prompt, negative], settings.weighted).towers[0].num_chunks.max())

    def _guidance(self, jobs: Sequence[_Job], settings: Settings) -> float:
        if settings.guidance_scale is not None:
            return settings.guidance_scale
        return 5.0 if self.is_sdxl and jobs[0].canvas is None else 7.5

    def _asked_size(self, settings: Settings) -> tuple[int, int] | None:
        if settings.width is None and settings.height is None:
            return None
        width, height = settings.width or self.native_px, settings.height or self.native_px
        for name, side in (("width", width), ("height", height)):
            if side < self.multiple or side % self.multiple:
                near = max(self.multiple, round(side / self.multiple) * self.multiple)
                raise SampleError(f"{name} is {side}, expected a multiple of {self.multiple}, such as {near}")
        return width, height

    def _size_for(self, canvas: Canvas, settings: Settings) -> tuple[int, int]:
        return self._asked_size(settings) or working_size(canvas.size, self.native_px, self.multiple)

    def _recipe(self, told: str, job: _Job, settings: Settings, pipeline: Any) -> Recipe:
        completes = job.canvas is not None
        return Recipe(
            task=told,
            model=self.model,
            model_hash=self.model_hash,
            prompt=job.prompt,
            negative=job.negative,
            seed=job.seed,
            steps=settings.steps,
            guidance_scale=self._guidance([job], settings),
            scheduler=settings.scheduler or type(pipeline.scheduler).__name__,
            layout=self.encoder.layout.name,
            max_chunks=self.encoder.layout.max_chunks,
            width=job.size[0],
            height=job.size[1],
            strength=settings.strength if completes else None,
            paste=settings.paste if completes else None,
            feather_px=settings.feather_px if completes else None,
            overlap_px=settings.overlap_px if told == "outpainting" else None,
            weighted=settings.weighted,
            versions=library_versions(),
            **job.facts,
        )

    # ------------------------------------------------------------ once more

    def repeat(self, recipe: Recipe, batch_size: int = 1) -> Painted:
        """Paint the picture of a recipe again.

        Raises:
            RecipeError: this model, or the picture or mask at the recorded path, is not what the recipe was made with.
        """
        if recipe.model_hash != self.model_hash:
            raise RecipeError(
                f"the recipe was made with weights {recipe.model_hash} of {recipe.model}, found {self.model_hash} in "
                f"{self.model}; load the pipeline that it names"
            )
        own = recipe.scheduler == type(self._own_scheduler).__name__
        settings = Settings(
            steps=recipe.steps,
            guidance_scale=recipe.guidance_scale,
            scheduler=None if own else recipe.scheduler,
            width=recipe.width,
            height=recipe.height,
            batch_size=batch_size,
            weighted=recipe.weighted,
            **{
                key: value
                for key in ("strength", "paste", "feather_px", "overlap_px")
                if (value := getattr(recipe, key)) is not None
            },
        )
        asked: dict[str, Any] = {
            "prompts": recipe.prompt,
            "negatives": recipe.negative,
            "seed": recipe.seed,
            "settings": settings,
        }
        if recipe.task == "text_to_image":
            return self.text_to_image(**asked)[0]
        picture = recorded_file(recipe.picture, "picture")
        if recipe.task == "outpainting":
            return self.outpaint(pictures=picture, margins=recipe.margins or (), **asked)[0]
        return self.inpaint(pictures=picture, masks=recorded_file(recipe.mask, "mask"), **asked)[0]


def _batches(jobs: Sequence[_Job], batch_size: int) -> Iterator[list[int]]:
    """Indices of jobs that fit together, those with the fewest chunks first."""
    groups: dict[tuple[int, tuple[int, int]], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault((job.num_chunks, job.size), []).append(index)
    for key in sorted(groups):
        for start in range(0, len(groups[key]), batch_size):
            yield groups[key][start : start + batch_size]
