"""A page of what restoration is trained on: clean, degraded, reference and target side by side, with what was done."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from torch import Tensor

from llmga.checkpoint import atomic_write
from llmga.diffrir.blur import sharpen
from llmga.diffrir.degradation import Degradation, DegradationSettings, RoundDraw, degrade, draw_degradation
from llmga.diffrir.reference import concat_reference
from llmga.images import data_url, fit_picture, open_picture
from llmga.masks import RESTORATION, random_mask

_WORDS = {"iso": "round", "aniso": "oblong", "sinc": "ringing"}


def write_gallery(
    path: Path,
    pictures: Sequence[Path],
    *,
    scale: int = 1,
    size: int = 256,
    seed: int = 0,
    settings: DegradationSettings | None = None,
    sharpened: bool = False,
) -> None:
    """Write the page: one file with the pictures inside.

    Args:
        path: the HTML file.
        pictures: files of any size, brought to `size` squares.
        scale: 1, 2 or 4; degraded pictures are shown enlarged, pixel by pixel.
        size: side of the clean pictures, a multiple of the scale.
        seed: of masks and degradations; each picture is a batch of its own, so that no two share anything.
        settings: of the degradation; None is the published one.
        sharpened: whether target and reference are sharpened, as in the V2 runs.
    Raises:
        PictureError: a file that is no picture.
        InputError: a size that does not suit the scale.
    """
    cards = [
        _card(file, np.random.default_rng([seed, index]), (seed, index), scale, size, settings, sharpened)
        for index, file in enumerate(pictures)
    ]
    loader = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = loader.get_template("gallery.html.j2").render(cards=cards, scale=scale, size=size, sharpened=sharpened)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page)


def describe_degradation(draw: Degradation, index: int = 0) -> list[str]:
    """What was done to one picture of a batch, step by step, in words."""
    low_pass = "" if bool(draw.sinc_kernels[index].max() == 1) else ", with a ringing low-pass"
    last = "before" if draw.sinc_first else "after"
    return [
        *_describe_round(draw.first, index),
        *_describe_round(draw.second, index),
        f"resize to full size ({draw.mode}){low_pass}, {last} the last JPEG",
        f"contrast x {draw.gain[index]:.3f}, brightness {draw.bias[index]:+.3f}",
    ]


def _describe_round(part: RoundDraw, index: int) -> list[str]:
    family, _, shape = part.kinds[index].rpartition("_")
    kind = "Gaussian" if part.gaussian else "Poisson"
    unit = " of 255" if part.gaussian else " times"
    return [
        f"{_WORDS[shape]} {family} blur".replace("  ", " ") if part.blurred else "no blur",
        f"resize x {part.factor:.2f} ({part.mode})",
        f"{'grey' if part.gray[index] else 'colour'} {kind} noise, {part.strength[index]:.2f}{unit}",
        f"JPEG {part.quality[index]:.0f}",
    ]


def _card(
    file: Path,
    rng: np.random.Generator,
    seed: tuple[int, int],
    scale: int,
    size: int,
    settings: DegradationSettings | None,
    sharpened: bool,
) -> dict[str, Any]:
    """What the template shows of a picture."""
    clean = _tensor(fit_picture(open_picture(file), size, "crop"))
    target = sharpen(clean) if sharpened else clean
    mask = random_mask(rng, size, size, RESTORATION)
    draw = draw_degradation(seed, 1, settings)
    low_quality = degrade(target, draw, scale)
    inputs = concat_reference(low_quality, target, torch.from_numpy(mask.hole)[None, None])
    shots = {
        "clean": clean,
        "degraded": low_quality,
        "reference": torch.nn.functional.pixel_shuffle(inputs[:, 3:], scale),
        "target": target,
    }
    return {
        "name": file.name,
        "steps": describe_degradation(draw),
        "mask": f"{mask.kind} mask, {100 * mask.coverage:.0f} % to restore",
        "shots": [(name, data_url(_picture(image))) for name, image in shots.items()],
    }


def _tensor(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def _picture(image: Tensor) -> Image.Image:
    levels = (image[0].clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
