"""`llmga sample`: what was typed becomes pictures in a folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmga.files import no_such_file
from llmga.stage2.recipe import read_recipe
from llmga.stage2.sample import Painted, SampleError, Sampler, Settings


@dataclass(frozen=True)
class Asked:
    """What was typed.

    Attributes:
        prompts_file: one prompt a line, behind those typed.
        count: pictures of each prompt, with seeds that count on.
        extend: left, top, right, bottom, as text: "128,0,0.25,0".
        recipe: a picture to paint again; nothing else is read then but model and out.
    """

    out: Path
    model: Path | None = None
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    negative: str | None = None
    seed: int = 0
    count: int = 1
    picture: Path | None = None
    mask: Path | None = None
    extend: str | None = None
    recipe: Path | None = None


def sample_to_folder(asked: Asked, settings: Settings) -> Iterator[Path]:
    """Paint, write PNGs named by number and seed, and yield their paths; existing files are never replaced.

    Raises:
        SampleError: what was typed does not go together; other errors of ours as in `llmga.stage2.sample`.
    """
    if asked.recipe is not None:
        recipe = read_recipe(asked.recipe)
        painted = [Sampler.load(asked.model or recipe.model).repeat(recipe)]
    else:
        painted = _paint(asked, settings)
    asked.out.mkdir(parents=True, exist_ok=True)
    number = _next_number(asked.out)
    for offset, one in enumerate(painted):
        path = asked.out / f"{number + offset:05d}-seed{one.recipe.seed}.png"
        one.save(path)
        yield path


def _paint(asked: Asked, settings: Settings) -> list[Painted]:
    texts = [text for text in (*asked.prompts, *_lines(asked.prompts_file)) for _ in range(asked.count)]
    if not texts:
        raise SampleError(
            'there is nothing to paint; type prompts, or name a file: --prompts-file, or "" for no prompt'
        )
    if asked.model is None:
        raise SampleError("no model is named; give the folder of a diffusers pipeline with --model")
    if asked.mask is not None and asked.extend is not None:
        raise SampleError("found --mask and --extend, expected one of the two: a hole, or sides that grow")
    if (asked.picture is None) != (asked.mask is None and asked.extend is None):
        found = "--picture" if asked.picture is not None else "--mask or --extend"
        raise SampleError(f"found {found} alone; a picture to complete needs --picture with --mask or --extend")
    margins = None if asked.extend is None else _numbers(asked.extend)
    sampler = Sampler.load(asked.model)
    common: dict[str, Any] = {"negatives": asked.negative, "seed": asked.seed, "settings": settings}
    if asked.picture is None:
        return sampler.text_to_image(texts, **common)
    if margins is not None:
        return sampler.outpaint(texts, asked.picture, margins, **common)
    assert asked.mask is not None
    return sampler.inpaint(texts, asked.picture, asked.mask, **common)


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        raise SampleError(f"--prompts-file: {no_such_file(path)}") from None
    except UnicodeDecodeError:
        raise SampleError(f"--prompts-file: {path} is not UTF-8; save it so, with a prompt on each line") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SampleError(f"--extend is {text!r}, expected left,top,right,bottom such as 128,0,0.25,0") from None


def _next_number(folder: Path) -> int:
    """One more than the highest number in front of a PNG's name."""
    numbers = [int(path.name[:5]) for path in folder.glob("[0-9]" * 5 + "-seed*.png")]
    return max(numbers, default=-1) + 1
