"""Rows become examples, examples become batches; every example is a pure function of (seed, index).

    Stage2Dataset   index -> (source, row, epoch) -> record -> prompt, picture or cached latents, mask, noise, timestep
    Stage2Collator  examples -> one batch, prompts as tokens

Noise and timestep are drawn here too, by the loading workers: so a run is the same on any device and any number of
processes. What cannot be read is replaced by another row of its source, chosen by the seed, and written down.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llmga.bad_samples import TRAIN, write_down
from llmga.images import MASK_THRESHOLD, PictureError, open_picture, picture_path
from llmga.masks import BOXES, STROKES, Full, MaskMixture, Strips, random_mask
from llmga.mixture import Mixture
from llmga.records import Record
from llmga.stage2.config import MaskConfig, Stage2Config
from llmga.stage2.pixels import Crop, Size, bucket_sizes, crop_picture, group_by_bucket, to_unit_range
from llmga.stage2.prompt_batch import UNCONDITIONAL, Prompt, PromptTokenizer, join_windows
from llmga.stage2.sources import Source, Stage2DataError

if TYPE_CHECKING:
    from llmga.stage2.cache import LatentCache
    from llmga.stage2.text_cache import TextCache

MAX_NEIGHBOURS = 10  # rows tried in place of one whose picture cannot be read
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_NOISE_STREAM, _ROW_STREAM = 0, 1  # random streams of an example


@dataclass(frozen=True)
class LatentShape:
    """What the networks of a run make of pictures.

    Attributes:
        channels: of a latent.
        factor: pixels of a latent's side.
        num_timesteps: of the noise schedule.
    """

    channels: int
    factor: int
    num_timesteps: int


class Stage2Dataset:
    """The examples of a run in their order.

    Args:
        cfg: the settings.
        sources: where rows come from.
        order: (source, row, epoch) of the example at each position.
        positions: for each index the position in `order`; None: the index itself. Its examples are of one bucket in
            every step.
        buckets: for each source the bucket of each row; None: all are of the first size.
        shape: of latents.
        seed: of everything that is drawn.
        bad_samples: file that names what was replaced.
        caches: for each source its latents, or None.
        texts: for each source its encoded prompts; None: they are encoded while training.
        held_out: no mirroring, no dropout, centre crops; for measuring.
    """

    def __init__(
        self,
        cfg: Stage2Config,
        sources: Sequence[Source],
        order: Any,
        shape: LatentShape,
        seed: int,
        *,
        positions: np.ndarray | None = None,
        buckets: Sequence[np.ndarray] | None = None,
        bad_samples: Path | None = None,
        caches: "Sequence[LatentCache | None] | None" = None,
        texts: "Sequence[TextCache] | None" = None,
        held_out: bool = False,
    ) -> None:
        self.data, self.task, self.objective = cfg.data, cfg.task, cfg.objective
        self.sources, self.order, self.positions, self.buckets = list(sources), order, positions, buckets
        self.shape, self.seed, self.bad_samples = shape, seed, bad_samples
        self.caches = list(caches) if caches is not None else [None] * len(self.sources)
        self.texts, self.held_out = texts, held_out
        self.sizes = sizes_of(cfg)
        self.masks = mask_mixture(cfg.data.masks)

    def __len__(self) -> int:
        return len(self.order) if self.positions is None else len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index`; see `Stage2Collator` for what it holds.

        Raises:
            Stage2DataError: a row without prompt, or no readable picture in its neighbourhood.
        """
        position = index if self.positions is None else int(self.positions[index])
        number, first_row, _ = self.order[position]
        source, size = self.sources[number], self._size(number, first_row)
        rows = self._rows_to_try(source, first_row, position)
        for attempt, row in enumerate(rows):
            record = source[row]
            text = source.check(row, record)
            try:
                return self._example(index, position, number, row, record, text, size)
            except PictureError as error:
                if self.bad_samples is not None:
                    self._write_down(index, source, row, record, error)
                if attempt + 1 == MAX_NEIGHBOURS:
                    raise Stage2DataError(
                        f"{source.path}: {MAX_NEIGHBOURS} pictures in a row cannot be read, the last is {error}; is "
                        f"{source.key}.image_root right?"
                    ) from error
        raise AssertionError("unreachable")

    def _rows_to_try(self, source: Source, first: int, position: int) -> Iterator[int]:
        yield first
        rng = np.random.default_rng([self.seed, position, _ROW_STREAM])
        while True:
            yield int(rng.integers(len(source)))

    def _size(self, number: int, row: int) -> Size:
        return self.sizes[0 if self.buckets is None else int(self.buckets[number][row])]

    def _example(
        self, index: int, position: int, number: int, row: int, record: Record, text: str, size: Size
    ) -> dict[str, Any]:
        """An example of a row."""
        rng = np.random.default_rng([self.seed, position, _NOISE_STREAM])
        prompt = self._prompt(rng, record, text)
        cache = self.caches[number]
        crop, variant = self._crop(rng, size, text, cache)
        latent_size = size[0] // self.shape.factor, size[1] // self.shape.factor
        noise = rng.standard_normal((2, self.shape.channels, *latent_size), dtype=np.float32)
        shift = rng.standard_normal((self.shape.channels, 1, 1), dtype=np.float32)
        example: dict[str, Any] = {
            "index": index,
            "sample_id": record.id,
            "prompt": prompt,
            "timestep": int(rng.integers(self.shape.num_timesteps)),
            "noise": noise[0] + np.float32(self.objective.noise_offset) * shift,
            "posterior_noise": noise[1],
        }
        if self.texts is not None:
            example["windows"] = self.texts[number].read(row, prompt)
        mask = self._mask(rng, record, number, crop) if self.task == "inpainting" else None
        hides_all = mask is not None and bool(mask.all())
        if cache is not None:
            crop = cache.crop_of(row, variant, size)
            moments, time_ids = cache.read(row, variant)
            example |= {"mean": moments[0], "std": moments[1], "time_ids": time_ids}
        if cache is None or (mask is not None and not hides_all):
            picture = open_picture(picture_path(self.sources[number].image_root, record.image or ""))
            cut, time_ids = crop_picture(picture, crop)
            example |= {"pixels": cut, "time_ids": time_ids}
        if mask is not None:
            example["mask"] = mask
        return example

    def _prompt(self, rng: np.random.Generator, record: Record, text: str) -> Prompt:
        """The prompt, or nothing, or the short caption."""
        draw = rng.random()
        if self.held_out:
            return text
        if draw < self.data.prompt_dropout:
            return UNCONDITIONAL
        if draw < self.data.prompt_dropout + self.data.short_caption_share and record.short_caption:
            return record.short_caption
        return text

    def _crop(
        self, rng: np.random.Generator, size: Size, text: str, cache: "LatentCache | None"
    ) -> tuple[Crop, tuple[int, bool]]:
        """Which part of the picture; and which of the cached ones that is: number of the crop, mirrored or not."""
        flip, vertical, horizontal, which = rng.random(4)
        may_flip = self.data.flip_sides or not _SIDES.search(text)
        flipped = bool(not self.held_out and may_flip and flip < self.data.flip_share)
        if self.held_out or self.data.crop == "center":
            return Crop(size, flipped=flipped), (0, flipped)
        number = int(which * cache.crops) if cache is not None else 0
        return Crop(size, (vertical, horizontal), flipped), (number, flipped)

    def _mask(self, rng: np.random.Generator, record: Record, number: int, crop: Crop) -> np.ndarray:
        """(H, W) uint8, 1 = generate."""
        height, width = crop.size
        drawn = random_mask(rng, height, width, self.masks).hole
        if not (self.data.masks.use_recorded and record.mask):
            return drawn
        grey = open_picture(picture_path(self.sources[number].image_root, record.mask)).convert("L")
        values = np.asarray(grey)
        if values.max() <= 1:  # files of 0 and 1 count as well
            grey = Image.fromarray(values * np.uint8(255))
        return (crop_picture(grey, crop)[0] >= MASK_THRESHOLD).astype(np.uint8)

    def _write_down(self, index: int, source: Source, row: int, record: Record, error: PictureError) -> None:
        entry = {
            "set": "held out" if self.held_out else TRAIN,
            "index": index,
            "kind": "picture",
            "path": str(source.path),
            "row": row,
            "id": record.id,
            "picture": record.image,
            "reason": error.reason,
        }
        assert self.bad_samples is not None
        write_down(self.bad_samples, entry)


class Stage2Collator:
    """Examples to a batch.

    Returns a dict of
        prompts: `PromptBatch`; texts: what was tokenized; sample_ids: of the rows.
        encoded: what the text encoders say of the prompts, where that is cached; for each of them `EncodedRows`.
        noise, posterior_noise: (B, C, h, w) float32; timesteps: (B,) int64; time_ids: (B, 6) float32.
        pixels: (B, 3, H, W) float32 in [-1, 1]; or mean, std: (B, C, h, w) float32, where latents are cached.
        mask: (B, 1, H, W) float32, 1 = generate; hidden_rows: (M,) int64, rows whose mask keeps something, and
            hidden_pixels: (M, 3, H, W), their pictures with the rest in mid-grey.
    """

    def __init__(self, tokenize: PromptTokenizer) -> None:
        self.tokenize = tokenize

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        prompts = [example["prompt"] for example in examples]
        batch: dict[str, Any] = {
            "prompts": self.tokenize(prompts),
            "texts": ["" if prompt is UNCONDITIONAL else prompt for prompt in prompts],
            "sample_ids": [example["sample_id"] for example in examples],
            "timesteps": torch.tensor([example["timestep"] for example in examples]),
            "time_ids": _stacked(examples, "time_ids"),
            "noise": _stacked(examples, "noise"),
            "posterior_noise": _stacked(examples, "posterior_noise"),
        }
        if "windows" in examples[0]:
            batch["encoded"] = join_windows([example["windows"] for example in examples], batch["prompts"])
        if "mean" in examples[0]:
            batch |= {"mean": _stacked(examples, "mean"), "std": _stacked(examples, "std")}
        else:
            batch["pixels"] = torch.from_numpy(np.stack([to_unit_range(example["pixels"]) for example in examples]))
        if "mask" in examples[0]:
            batch |= _masked(examples)
        return batch


def _masked(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Masks, and the pictures of those that keep something with the rest hidden; blank ones share a constant."""
    masks = np.stack([example["mask"] for example in examples])
    rows = [row for row, example in enumerate(examples) if not masks[row].all()]
    hidden = [to_unit_range(examples[row]["pixels"]) * (1 - masks[row].astype(np.float32)) for row in rows]
    shape = (0, 3, *masks.shape[1:])
    return {
        "mask": torch.from_numpy(masks[:, None].astype(np.float32)),
        "hidden_rows": torch.tensor(rows, dtype=torch.int64),
        "hidden_pixels": torch.from_numpy(np.stack(hidden) if hidden else np.zeros(shape, np.float32)),
    }


def _stacked(examples: Sequence[dict[str, Any]], key: str) -> Tensor:
    return torch.from_numpy(np.stack([example[key] for example in examples]).astype(np.float32, copy=False))


# ---------------------------------------------------------------- the order of a run


def sizes_of(cfg: Stage2Config) -> list[Size]:
    """The rectangles that pictures are cut to, (height, width); one square without buckets."""
    data = cfg.data
    if not data.aspect_buckets:
        return [(data.resolution, data.resolution)]
    return bucket_sizes(data.resolution, data.bucket_step, data.max_aspect)


def mask_mixture(masks: MaskConfig) -> MaskMixture:
    """The settings as `random_mask` takes them; the strips of stage 2 may be thinner than stage 1's."""
    kinds = ((masks.irregular, STROKES), (masks.box, BOXES), (masks.outpainting, Strips(depth=(0.25, 0.40))))
    total = sum(weight for weight, _ in kinds) or 1.0
    share = (1 - masks.blank_share) / total
    return MaskMixture(((masks.blank_share, Full()), *((weight * share, kind) for weight, kind in kinds)))


def training_order(
    cfg: Stage2Config,
    sources: Sequence[Source],
    total_steps: int,
    per_step: int,
    buckets: Sequence[np.ndarray] | None,
) -> tuple[Mixture, np.ndarray | None]:
    """The mixture of a run; and with buckets its positions, regrouped so that each step's examples share a shape."""
    lengths, weights = [len(source) for source in sources], [source.weight for source in sources]
    names = [source.name for source in sources]
    total = total_steps * per_step
    if buckets is None:
        return Mixture(lengths, weights, total, cfg.run.seed, names), None
    spare = per_step * (len(sizes_of(cfg)) - 1)  # what may still wait in its bucket when the last step is full
    order = Mixture(lengths, weights, total + spare, cfg.run.seed, names)
    bucket_of = (int(buckets[order[position][0]][order[position][1]]) for position in count())
    steps = list(group_by_bucket(bucket_of, per_step, total_steps))
    return order, np.array(steps, np.int64).reshape(-1)
