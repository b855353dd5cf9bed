"""What sampling is asked: settings, prompts with their negatives and seeds, pictures as files or in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmga.checkpoint import sha256 as file_sha256
from llmga.images import open_picture
from llmga.prompt_chunks import PromptError
from llmga.stage2.canvas import OVERLAP_PX, PASTES, Paste
from llmga.stage2.recipe import RecipeError

PictureLike = Image.Image | str | Path
MAX_SEED = 2**63 - 1


class SampleError(ValueError):
    """A setting that no picture can be painted with."""


@dataclass(frozen=True)
class Settings:
    """How to paint; None takes what the model is known to do well with.

    Attributes:
        steps: of the sampler.
        guidance_scale: None: 7.5, or 5.0 for SDXL's text to image; 1 and below paint without guidance.
        scheduler: a key of `llmga.stage2.schedulers.SCHEDULERS`; None: the pipeline's own.
        width, height: pixels; None: what the UNet was trained at, and for pictures to complete their own shape.
        batch_size: pictures painted together.
        strength: of completing; 1 starts from pure noise, so that nothing hidden leaks.
        paste: see `llmga.stage2.canvas.paste_back`.
        feather_px, overlap_px: see `llmga.stage2.canvas`.
        weighted: read brackets in prompts as weights.
    """

    steps: int = 50
    guidance_scale: float | None = None
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 4
    strength: float = 1.0
    paste: Paste = "none"
    feather_px: int = OVERLAP_PX
    overlap_px: int = OVERLAP_PX
    weighted: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise SampleError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("feather_px", "overlap_px"):
            if getattr(self, name) < 0:
                raise SampleError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if not 0 < self.strength <= 1:
            raise SampleError(f"strength is {self.strength}, expected above 0, up to 1")
        if self.paste not in PASTES:
            raise SampleError(f"paste is {self.paste!r}, expected one of {', '.join(PASTES)}")


def aligned(
    prompts: str | Sequence[str], negatives: str | Sequence[str | None] | None, seed: int | Sequence[int]
) -> tuple[list[str], list[str | None], list[int]]:
    """Prompts, and a negative and a seed for each of them."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise PromptError("there is no prompt; give at least one, which may be empty")
    against = [negatives] * len(texts) if isinstance(negatives, str | None) else list(negatives)
    seeds = [seed + number for number in range(len(texts))] if isinstance(seed, int) else list(seed)
    for name, values in (("negative prompts", against), ("seeds", seeds)):
        if len(values) != len(texts):
            raise SampleError(f"there are {len(values)} {name} for {len(texts)} prompts; expected one for each")
    if bad := [one for one in seeds if not 0 <= one <= MAX_SEED]:
        raise SampleError(f"seed {bad[0]} is out of range, expected 0 to {MAX_SEED}")
    return texts, against, seeds


def one_each(name: str, values: Any, texts: Sequence[str]) -> list[Any]:
    """A value for each prompt, given one for all or one for each."""
    given = list(values) if isinstance(values, list | tuple) else [values] * len(texts)
    if len(given) != len(texts):
        raise SampleError(
            f"there are {len(given)} {name} for {len(texts)} prompts; expected one for all or one for each"
        )
    return given


def opened(picture: PictureLike) -> Image.Image:
    """A picture, read where it is a file."""
    return picture if isinstance(picture, Image.Image) else open_picture(picture)


def origin_of(picture: Any) -> dict[str, str | None]:
    """Where a picture came from, and the hash of its file or of its pixels."""
    if isinstance(picture, str | Path):
        return {"path": str(Path(picture).absolute()), "sha256": file_sha256(Path(picture))}
    return {"path": None, "sha256": sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()}


def recorded_file(origin: dict[str, str | None] | None, what: str) -> Path:
    """The file that a recipe names, if it is still the same."""
    if origin is None or origin.get("path") is None:
        raise RecipeError(f"the recipe's {what} was no file when it was painted; it cannot be painted again from here")
    path = Path(str(origin["path"]))
    if not path.is_file() or file_sha256(path) != origin.get("sha256"):
        state = "has changed since" if path.is_file() else "is gone"
        raise RecipeError(f"the recipe's {what} {path} {state}; put the file back that it was painted with")
    return path
