"""Pictures that say how they were made: a recipe as JSON in a PNG's text, enough to paint the same again."""

import json
import platform
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from llmga.files import written_aside

CHUNK = "llmga"  # keyword of the PNG's tEXt chunk
VERSION = 1


class RecipeError(ValueError):
    """A picture without a recipe, or with one that cannot be followed."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a picture.

    Attributes:
        task: text_to_image, inpainting or outpainting.
        model, model_hash: folder of the pipeline, and what tells its weights from others.
        negative: None: the model's own input for "no prompt".
        layout, max_chunks: how prompts become sequences.
        width, height: pixels that the UNet painted.
        picture, mask: path and SHA-256 of what was completed; the path is None where it was not a file.
        margins: left, top, right, bottom in pixels of the picture, for outpainting.
        versions: of the libraries.
    """

    task: str
    model: str
    model_hash: str
    prompt: str
    negative: str | None
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str
    layout: str
    max_chunks: int
    width: int
    height: int
    strength: float | None = None
    paste: str | None = None
    feather_px: int | None = None
    overlap_px: int | None = None
    weighted: bool = False
    picture: dict[str, str | None] | None = None
    mask: dict[str, str | None] | None = None
    margins: list[int] | None = None
    versions: dict[str, str] = field(default_factory=dict)


def save_with_recipe(picture: Image.Image, recipe: Recipe, path: Path) -> None:
    """Write a PNG that carries its recipe, aside and then renamed.

    Raises:
        RecipeError: the name does not end in .png, which alone holds recipes.
    """
    if path.suffix.lower() != ".png":
        raise RecipeError(f"{path} would be no PNG, and other formats carry no recipe; name it {path.stem}.png")
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, json.dumps({"recipe": VERSION, **asdict(recipe)}))  # ASCII: tEXt holds Latin-1 alone
    with written_aside(path) as aside:
        picture.save(aside, format="PNG", pnginfo=info)


def read_recipe(path: Path) -> Recipe:
    """The recipe that a picture carries.

    Raises:
        RecipeError: no such file, no PNG, no recipe, or one of another version or that lacks something.
    """
    try:
        with Image.open(path) as picture:
            picture.load()  # chunks may stand behind the pixels
            text = getattr(picture, "text", {}).get(CHUNK)
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "is not a picture that can be read"
        raise RecipeError(f"{path} {reason}; expected a PNG as `llmga sample` writes it") from None
    if text is None:
        raise RecipeError(
            f"{path} carries no recipe; `llmga sample` writes them, and many programs drop them on saving"
        )
    try:
        content: dict[str, Any] = json.loads(text)
        version = content.pop("recipe")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise RecipeError(f"the recipe in {path} is damaged") from None
    known = {item.name for item in fields(Recipe)}
    if version != VERSION or not content.keys() <= known:
        extra = ", ".join(sorted(content.keys() - known))
        what = f"version {version}" if version != VERSION else f"the unknown keys {extra}"
        raise RecipeError(f"the recipe in {path} has {what}, this code reads version {VERSION}; update one of the two")
    try:
        return Recipe(**content)
    except TypeError as problem:
        raise RecipeError(f"the recipe in {path} is incomplete: {problem}") from None


def weights_hash(folder: Path) -> str:
    """16 digits that tell one pipeline folder from another: of the size and both ends of every weight file."""
    digest = sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with open(path, "rb") as file:
            for start in (0, size // 2, max(0, size - (1 << 16))):
                file.seek(start)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Versions of what a picture depends on."""
    import diffusers
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
    }
