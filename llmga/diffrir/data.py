"""Clean pictures become training pairs; every example is a pure function of (seed, index).

    RestorationDataset   index -> (source, picture, epoch) -> window -> degraded picture, crops, mask
    collate              examples -> one batch

Each picture is degraded by itself, by the process that loads it, with draws of its own. The published code degrades
batches that share some draws, and mixes them through a pool; here nothing is shared, so there is nothing to mix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmga.bad_samples import TRAIN, write_down
from llmga.diffrir.blur import sharpen
from llmga.diffrir.config import DataConfig, PhaseConfig, SourceConfig
from llmga.diffrir.degradation import DegradationSettings, degrade, draw_degradation, scaled
from llmga.diffrir.padding import reflect
from llmga.diffrir.pairs import Pairs, random_crop
from llmga.images import PictureError, open_picture
from llmga.masks import RESTORATION, random_mask
from llmga.mixture import Mixture

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
VALIDATION_SEED = 0  # not the run's: held-out figures of all runs are about the same examples
_MAX_ATTEMPTS = 10  # pictures tried in place of one that cannot be read


class SourceError(ValueError):
    """A source without pictures, or none of whose pictures can be read; the message names it."""


@dataclass(frozen=True)
class PairSettings:
    """How a clean picture becomes a pair.

    Attributes:
        scale: output side over input side.
        picture_size: side of the window that is degraded.
        crop: side of what is cut out of it, at output resolution.
        degradation: what may happen.
        sharpened: whether what the network sees and aims at is sharpened.
    """

    scale: int
    picture_size: int
    crop: int
    degradation: DegradationSettings
    sharpened: bool = False

    @classmethod
    def of(cls, data: DataConfig, phase: PhaseConfig, scale: int) -> "PairSettings":
        """From checked settings."""
        contrast = data.contrast if phase.contrast is None else phase.contrast
        settings = scaled(data.strength, gain=contrast, bias=data.brightness, colour_order=data.colour_order)
        return cls(scale, data.picture_size, data.crop, settings, phase.sharpened)


class RestorationDataset(Dataset[dict[str, Any]]):
    """`dataset[i]` is example i of a run: tensors without a batch axis, and where they come from.

    Args:
        sources: pictures of each source.
        weights: of the sources; None for the number of pictures.
        total: examples in the run.
        seed: of order, windows, masks and degradations.
        settings: how a picture becomes a pair.
        bad_samples_path: where pictures that cannot be read are written down, if anywhere.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Path]],
        weights: Sequence[float | None],
        total: int,
        seed: int,
        settings: PairSettings,
        bad_samples_path: Path | None = None,
    ) -> None:
        self.sources, self.seed, self.settings = sources, seed, settings
        self.order = Mixture([len(source) for source in sources], weights, total, seed)
        self.bad_samples_path = bad_samples_path

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row, epoch = self.order[index]
        source = self.sources[number]
        for attempt in range(_MAX_ATTEMPTS):
            path = source[(row + attempt) % len(source)]
            try:
                pixels = read_pixels(path)
            except PictureError as error:
                self._write_down(index, number, row, error)
                continue
            pair = make_pair(pixels, (self.seed, number, row, epoch, attempt), self.settings)
            return {**pair, "sample_ids": str(path), "index": index}
        raise SourceError(f"{path} and {_MAX_ATTEMPTS - 1} pictures before it cannot be read; check data.sources")

    def _write_down(self, index: int, number: int, row: int, error: PictureError) -> None:
        if self.bad_samples_path is not None:
            entry = {"set": TRAIN, "index": index, "kind": "picture", "path": f"source {number}", "row": row}
            write_down(self.bad_samples_path, {**entry, "picture": str(error.path), "reason": error.reason})


def make_pair(pixels: Tensor, seed: Sequence[int], settings: PairSettings) -> dict[str, Tensor]:
    """One training pair, all of it decided by the seed.

    Args:
        pixels: (3, H, W) uint8 of any size.
    Returns:
        `low_quality` (3, c/s, c/s), `ground_truth` (3, c, c), `edit_mask` (1, c, c) for a crop of c; `target` as
        ground_truth where that is sharpened. Floats in [0, 1].
    """
    rng = np.random.default_rng([*seed, 0])
    size = settings.picture_size
    truth = _window(pixels, size, rng)
    clean = sharpen(truth) if settings.sharpened else truth
    low_quality = degrade(clean, draw_degradation([*seed, 1], 1, settings.degradation), settings.scale)
    mask = torch.from_numpy(random_mask(rng, size, size, RESTORATION).hole)[None, None].float()
    corner = int(rng.integers(2**62))  # the same window out of the sharpened picture and the plain one
    pairs = random_crop(Pairs(low_quality, truth, mask), settings.crop, [np.random.default_rng(corner)])
    pair = {name: values[0].contiguous() for name, values in pairs._asdict().items()}
    if settings.sharpened:
        again = random_crop(Pairs(low_quality, clean, mask), settings.crop, [np.random.default_rng(corner)])
        pair["target"] = again.ground_truth[0].contiguous()
    return pair


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Examples to a batch."""
    tensors = [name for name, value in examples[0].items() if torch.is_tensor(value)]
    batch: dict[str, Any] = {name: torch.stack([example[name] for example in examples]) for name in tensors}
    return {**batch, "sample_ids": [example["sample_ids"] for example in examples]}


def held_out_pairs(files: Sequence[Path], settings: PairSettings) -> list[dict[str, Any]]:
    """The same pair of each held-out picture in every run and at every step.

    Raises:
        PictureError: a file that cannot be read.
    """
    return [
        {**make_pair(read_pixels(path), (VALIDATION_SEED, index), settings), "sample_ids": str(path)}
        for index, path in enumerate(files)
    ]


def list_pictures(source: SourceConfig) -> list[Path]:
    """The picture files of a source, in a fixed order.

    Raises:
        SourceError: there are none.
    """
    path = source.path
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [path.parent / line.split()[0] for line in lines if line.strip()]
    if not found:
        what = f"holds no pictures ({', '.join(PICTURE_SUFFIXES)})" if path.is_dir() else "lists no pictures"
        raise SourceError(f"{path} {what}; check data.sources and data.validation")
    return found


def read_pixels(path: Path) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(open_picture(path))).permute(2, 0, 1)


def _window(pixels: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """A random square of a picture, mirrored half of the time; (1, 3, size, size) in [0, 1]."""
    if rng.random() < 0.5:
        pixels = pixels.flip(-1)
    height, width = pixels.shape[-2:]
    right, below = max(0, size - width), max(0, size - height)
    if right or below:
        pixels = reflect(pixels[None], 0, right, 0, below)[0]
    top, left = (int(rng.integers(side - size + 1)) for side in pixels.shape[-2:])
    return pixels[None, :, top : top + size, left : left + size].float() / 255
