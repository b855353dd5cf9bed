"""One picture file: opened exactly as training opens it, and everything about it that a report wants to know."""

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from llmga.check.settings import CheckSettings
from llmga.checkpoint import sha256
from llmga.images import PictureError, fit_mask, open_picture, picture_path, read_orientation
from llmga.problem import Problem

SIGNATURE_SIDE = 9  # 9 x 9 cells: 72 differences across and 72 down, of which 64 each are kept
_MASK_PX = 512  # the side at which training sees a mask by default
_GREY_SHARE = 0.01  # of a mask's pixels may lie between black and white; JPEG leaves some at its edges
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),  # what some cameras write: several JPEG pictures in one file
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc"),
    "ICO": (".ico",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
PICTURE_SUFFIXES = frozenset(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
_MODE_CODES = {"P": "palette", "PA": "palette", "CMYK": "cmyk", "L": "grey", "LA": "grey", "1": "grey"}


@dataclass
class PictureFacts:
    """What is known of one picture file.

    Attributes:
        problems: what was found; an error among them says that it cannot be used.
        size: (width, height) as a viewer shows it, 0 x 0 when it does not open.
        signature: (9, 9, 3) uint8 as bytes, the picture at 9 x 9 pixels; empty when it does not open, or is plain.
        coverage: of a mask, the share it hides.
    """

    problems: list[Problem] = field(default_factory=list)
    num_bytes: int = 0
    sha256: str = ""
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    signature: bytes = b""
    coverage: float | None = None


def check_picture(root: str, name: str, role: str, settings: CheckSettings) -> PictureFacts:
    """Open and fully decode a picture or mask below a folder.

    Args:
        role: "mask" also looks at it as a mask; "image" and "reference" do not.
    """
    facts = PictureFacts()
    try:
        path = picture_path(root, name)
        if problem := _name_problem(Path(root), name):
            facts.problems.append(problem)
            return facts
        _read_bytes(path, facts)
        upright = open_picture(path, settings.max_pixels, lambda stored: _look(stored, name, role, facts))
        _judge(upright, role, facts, settings)
    except MemoryError:
        facts.problems.append(Problem("picture_crashes", "it opens, but there is no memory to look at it"))
    except PictureError as error:
        code = "picture_crashes" if isinstance(error.__cause__, MemoryError) else error.code
        facts.problems.append(Problem(code, error.reason))
    return facts


def _judge(upright: Image.Image, role: str, facts: PictureFacts, settings: CheckSettings) -> None:
    """Note what an opened picture looks like."""
    facts.size = upright.size
    if role == "mask":
        _check_mask(upright, facts, settings)
        return
    facts.problems += _shape_problems(upright.size, settings)
    # With a gap of 3 copies of other sizes give nearly the same small picture, at a quarter of the time without one.
    small = upright.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    facts.signature = small.tobytes()
    if upright.getcolors(1) is not None:
        facts.problems.append(Problem("blank_picture", f"every pixel is {upright.getpixel((0, 0))}"))
        facts.signature = b""


def _read_bytes(path: Path, facts: PictureFacts) -> None:
    """Size and hash, read block by block; what cannot be read, or is no file, is `open_picture`'s to explain."""
    try:
        if not path.is_file():
            return
        facts.num_bytes, facts.sha256 = path.stat().st_size, sha256(path)
    except OSError:
        return


def _look(stored: Image.Image, name: str, role: str, facts: PictureFacts) -> None:
    """Note what the file holds before it is converted; any mode serves for a mask."""
    facts.format, facts.mode = stored.format or "", stored.mode
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in _SUFFIXES.get(facts.format, (suffix,)):
        facts.problems.append(Problem("wrong_suffix", f"a {facts.format} file with the suffix {suffix or 'none'!r}"))
    if getattr(stored, "is_animated", False) and facts.format != "MPO":
        facts.problems.append(Problem("animated", f"{getattr(stored, 'n_frames', 2)} frames"))
    if (orientation := read_orientation(stored)) != 1:
        facts.problems.append(Problem("rotated", f"EXIF orientation {orientation}"))
    if role == "mask":
        return
    if stored.has_transparency_data:
        facts.problems.append(Problem("alpha", f"mode {stored.mode}"))
    if code := _MODE_CODES.get(stored.mode):
        facts.problems.append(Problem(code, f"mode {stored.mode}"))
    if stored.mode.startswith("I"):
        facts.problems.append(Problem("deep", f"mode {stored.mode}"))


def _shape_problems(size: tuple[int, int], settings: CheckSettings) -> list[Problem]:
    short, long = sorted(size)
    problems = []
    if short < settings.min_side:
        problems.append(Problem("small_picture", f"{size[0]} x {size[1]}, expected {settings.min_side} or more"))
    if long > settings.max_ratio * short:
        problems.append(Problem("extreme_ratio", f"{size[0]} x {size[1]}, {long / short:.0f} to 1"))
    return problems


def _check_mask(picture: Image.Image, facts: PictureFacts, settings: CheckSettings) -> None:
    """What training would make of a mask: its area, its kind, and how far it is from black and white."""
    mask = fit_mask(picture, _MASK_PX)
    facts.coverage = mask.coverage
    low, high = settings.mask_area
    if not mask.hole.any():
        facts.problems.append(Problem("mask_empty", "nothing in it is white (125 or above)"))
    elif not low <= mask.coverage <= high:
        facts.problems.append(Problem("mask_area", f"it covers {mask.coverage:.1%}, expected {low:.1%} to {high:.1%}"))
    if mask.kind == "irregular":  # read where an outpainting row uses it
        facts.problems.append(Problem("mask_not_border", "what it keeps is not one rectangle"))
    histogram = np.array(picture.convert("L").histogram())
    if histogram[2:].any() and (share := histogram[16:240].sum() / histogram.sum()) > _GREY_SHARE:
        facts.problems.append(Problem("mask_grey", f"{share:.1%} of its pixels are neither black nor white"))


# ---------------------------------------------------------------- names


def _name_problem(root: Path, name: str) -> Problem | None:
    """Whether the file exists under exactly this name, or only under one in another case."""
    exists = os.path.exists(root / name)
    if exists and not _ignores_case(str(root)):
        return None
    found = _spelling_on_disk(root, name)
    if found is None or found == name:
        return None
    return Problem("picture_case", f"the file is called {found!r}")


@lru_cache(maxsize=64)
def _ignores_case(root: str) -> bool:
    """Whether the file system takes A for a (macOS, Windows, some network disks); checks must not pass by that."""
    name = os.path.basename(os.path.realpath(root))
    other = os.path.join(os.path.dirname(os.path.realpath(root)), name.swapcase())
    return name.swapcase() != name and os.path.exists(other) and os.path.samefile(root, other)


def _spelling_on_disk(root: Path, name: str) -> str | None:
    """The name as the disk has it, upper and lower case aside; None when no such file is there."""
    folder, spelled = root, []
    for part in name.split("/"):
        if part in ("", "."):
            continue
        exact, folded = _names_in(str(folder))
        actual = part if part in exact else folded.get(part.casefold())
        if actual is None:
            return None
        spelled.append(actual)
        folder = folder / actual
    return "/".join(spelled)


@lru_cache(maxsize=8)
def _names_in(folder: str) -> tuple[frozenset[str], dict[str, str]]:
    """Names in a folder, and by their casefolded form; pictures come by name, so a few folders at a time will do."""
    try:
        names = os.listdir(folder)
    except OSError:
        names = []
    return frozenset(names), {name.casefold(): name for name in names}
