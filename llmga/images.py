"""Pictures in: any file becomes 8-bit RGB or a `PictureError` that names it; then a square of known size."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from llmga.masks import Mask, MaskKind
from llmga.problem import Problem

PictureMode = Literal["squash", "crop", "pad", "laion", "clip"]

MAX_PIXELS = 89_478_485  # 0.25 GiB as RGB; Pillow's own threshold for decompression bombs
_EXACT_RATIO = 16
PAD_COLOUR = (122, 116, 104)  # CLIP's mean colour in 8 bits, what LLaVA pads with
MASK_THRESHOLD = 125  # grey levels from here on mean "generate", as in the published code

# By content, whatever the suffix says. Formats that run other programs (EPS, WMF) or that no web picture uses stay out.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture cannot be used; survives pickling between workers.

    Attributes:
        path: the file.
        reason: one sentence.
        code: what kind of problem it is, as in the table of `llmga.check.kinds`.
    """

    def __init__(self, path: str | PathLike[str], reason: str, code: str = "picture_damaged") -> None:
        super().__init__(path, reason, code)
        self.path = Path(path)
        self.reason = reason
        self.code = code

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


# ---------------------------------------------------------------- reading


def picture_path(root: str | PathLike[str], name: str) -> Path:
    """The file `name` below `root`, with symbolic links resolved; whether it exists is `open_picture`'s business.

    Raises:
        PictureError: the name is empty or leaves the root, be it by `..`, as an absolute path or through a link.
    """
    if not name or "\0" in name:
        reason = f"a record names the picture {name!r}; expected a path below this folder"
        raise PictureError(Path(root), reason, "picture_path")
    try:
        base = _resolved(str(root))
        path = (base / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name longer than the file system takes
        raise PictureError(Path(root) / name, f"the path cannot be resolved ({error})", "picture_path") from error
    if not path.is_relative_to(base):
        raise PictureError(
            Path(root) / name,
            f"the picture lies at {path}, outside {base}; move it below, or set image_root to a folder that holds it",
            "picture_outside",
        )
    return path


@lru_cache(maxsize=256)
def _resolved(root: str) -> Path:
    """A root without links; cached, as it is asked once per picture."""
    return Path(root).resolve()


def open_picture(
    path: str | PathLike[str], max_pixels: int = MAX_PIXELS, look: Callable[[Image.Image], None] | None = None
) -> Image.Image:
    """Read and fully decode a picture file as upright 8-bit RGB.

    The type is found by content, not by suffix. EXIF orientation is applied; transparent parts lie on white; 16-bit
    grey is scaled, not clipped; CMYK, palettes and grey are converted (colour profiles are ignored); of an animation
    the first frame counts. Any aspect ratio is read.

    Args:
        max_pixels: refuse larger pictures before decoding them. Above twice Pillow's `Image.MAX_IMAGE_PIXELS` that
            limit has to be raised as well.
        look: is shown the decoded picture as the file stores it, before it is converted and turned upright.
    Raises:
        PictureError: missing, empty, not a file, not a picture, cut short, damaged, too large, or of an unknown value
            range.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures and of damaged EXIF; the first are judged here, the second do no harm.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            rgb, orientation = _decode(path, max_pixels, look)
    except PictureError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error...
        problem = _explain(path, error)
        raise PictureError(path, problem, problem.code) from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def open_mask(path: str | PathLike[str], size: int, mode: PictureMode = "squash", source: str = "") -> Mask:
    """Read a mask file, brought to the same square as its picture; see `fit_mask`.

    Raises:
        PictureError: as `open_picture`.
    """
    return fit_mask(open_picture(path), size, mode, source)


def fit_mask(picture: Image.Image, size: int, mode: PictureMode = "squash", source: str | PathLike[str] = "") -> Mask:
    """The mask that a picture stands for, brought to the same square as the picture it belongs to.

    Any picture serves: black, white and RGB; files that hold 0 and 1 count as well. Light (125 and above) means
    "generate". The kind is "outpainting" when exactly one rectangle is kept, "full" when nothing is.

    Args:
        source: the path of the picture to be masked, for mode "laion", which depends on it.
    """
    fitted = fit_picture(grey_mask(picture), size, mode, source)
    hole = (np.asarray(fitted) >= MASK_THRESHOLD).astype(np.uint8)
    return Mask(hole, _name_kind(hole))


def grey_mask(picture: Image.Image) -> Image.Image:
    """A mask of any mode as 8-bit grey; one that holds 0 and 1 is stretched to 0 and 255."""
    grey = np.asarray(picture.convert("L"))
    return Image.fromarray(grey * np.uint8(255) if grey.max() <= 1 else grey)


def _name_kind(hole: np.ndarray) -> MaskKind:
    """Full when nothing is kept, outpainting when exactly one rectangle is, irregular otherwise."""
    if hole.all():
        return "full"
    rows, columns = np.flatnonzero(~hole.all(axis=1)), np.flatnonzero(~hole.all(axis=0))
    kept = hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return "outpainting" if hole.any() and not kept.any() else "irregular"


def _decode(path: Path, max_pixels: int, look: Callable[[Image.Image], None] | None) -> tuple[Image.Image, int]:
    """8-bit RGB as stored, and its EXIF orientation."""
    if not path.is_file() and path.exists() and not path.is_dir():  # opening a named pipe would wait for ever
        raise PictureError(path, "this is a pipe or a device; put the picture's file there", "picture_unreadable")
    with Image.open(path, formats=_FORMATS) as picture:
        width, height = picture.size
        if width * height > max_pixels:
            reason = f"{width} x {height} is more than {max_pixels:,} pixels; shrink it or raise the limit"
            raise PictureError(path, reason, "picture_too_large")
        picture.load()
        if look is not None:
            look(picture)
        return _convert_to_rgb(path, picture), read_orientation(picture)


def read_orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none or the EXIF block is damaged."""
    try:
        return int(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # Pillow's EXIF reader has no error type of its own; the pixels are fine without it
        return 1


def _convert_to_rgb(path: Path, picture: Image.Image) -> Image.Image:
    """8-bit RGB of a decoded picture of any mode."""
    if picture.mode == "F":
        reason = "floating-point pixels have no fixed range; save it with 8 or 16 bits"
        raise PictureError(path, reason, "picture_values")
    if picture.mode.startswith("I"):
        return _convert_deep_grey(path, picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _convert_deep_grey(path: Path, picture: Image.Image) -> Image.Image:
    """8-bit RGB of 16-bit grey: Pillow's own conversion would clip everything above 255 to white."""
    grey = np.asarray(picture)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        reason = f"grey values run from {low} to {high}; expected 0 to 65535; save it with 16 bits"
        raise PictureError(path, reason, "picture_values")
    scaled = grey.astype(np.uint32)  # 65535 * 255 fits; in place, for the largest pictures take gigabytes otherwise
    scaled *= 255
    scaled += 32767
    scaled //= 65535
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _explain(path: Path, error: Exception) -> Problem:
    """Why a file could not be read, in the reader's terms."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        return Problem("picture_missing", "the file does not exist")
    except IsADirectoryError:
        return Problem("picture_missing", "this is a folder, expected a picture file")
    except (OSError, ValueError) as cause:
        return Problem("picture_unreadable", f"the file cannot be read ({cause})")
    if not head:
        return Problem("picture_empty", "the file is empty")
    if isinstance(error, Image.UnidentifiedImageError):
        return Problem("not_a_picture", f"not a picture in a known format; its first bytes are {head!r}")
    if isinstance(error, Image.DecompressionBombError):
        reason = f"too many pixels for Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS ({error})"
        return Problem("picture_too_large", reason)
    return Problem("picture_damaged", f"the picture is damaged or cut short ({error})")


# ---------------------------------------------------------------- shaping


def fit_picture(picture: Image.Image, size: int, mode: PictureMode, source: str | PathLike[str] = "") -> Image.Image:
    """Bring a picture to size x size pixels, by LANCZOS unless the mode says otherwise.

    Memory is bounded by the picture and the square, whatever the aspect ratio.

    Args:
        picture: 8-bit RGB, or grey ("L") for masks.
        mode: "squash" ignores the aspect ratio; "crop" scales the short side to `size` (the long one truncated to
            whole pixels) and takes the centre; "pad" scales the long side and fills with CLIP's mean colour (a mask
            with 0, keep); "laion" crops where `source` contains "laion" in any case and squashes elsewhere; "clip"
            crops as CLIP's image processor does, bicubic and to the bit, so that a processor of this size leaves the
            picture as it is. Beyond a ratio of 16 single values may differ by one.
        source: the picture's path, read by "laion" alone.
    Raises:
        ValueError: unknown mode, or a size below 1.
    Source: squash and laion as in the published stage-1 code, whose path test is case-sensitive and thus never fires
        on the documented folder LAION.
    """
    if mode not in get_args(PictureMode):
        raise ValueError(f"picture mode {mode!r} is unknown; expected one of {', '.join(get_args(PictureMode))}")
    if size < 1:
        raise ValueError(f"picture size is {size}; expected 1 pixel or more")
    if mode == "laion":
        mode = "crop" if "laion" in str(source).lower() else "squash"
    if mode == "crop":
        return _crop_centre(picture, size, Image.Resampling.LANCZOS)
    if mode == "clip":
        return _crop_centre(picture, size, Image.Resampling.BICUBIC, exact_up_to=_EXACT_RATIO)
    if mode == "pad":
        return _pad_to_square(picture, size)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _crop_centre(picture: Image.Image, size: int, resampling: Image.Resampling, exact_up_to: float = 0) -> Image.Image:
    """Scale the short side to `size`, cut the centre; past a ratio of sides, only the part that stays is computed."""
    width, height = picture.size
    short = min(width, height)
    out_width, out_height = int(width * size / short), int(height * size / short)
    left, top = (out_width - size) // 2, (out_height - size) // 2
    if max(width, height) <= exact_up_to * short:
        whole = picture.resize((out_width, out_height), resampling)
        return whole.crop((left, top, left + size, top + size))
    x_scale, y_scale = width / out_width, height / out_height
    box = (left * x_scale, top * y_scale, min(width, (left + size) * x_scale), min(height, (top + size) * y_scale))
    return picture.resize((size, size), resampling, box=box)


def _pad_to_square(picture: Image.Image, size: int) -> Image.Image:
    """Scale the long side to `size`, centre the rest on the padding colour."""
    long = max(picture.size)
    inner_width, inner_height = (max(1, round(side * size / long)) for side in picture.size)
    square = Image.new(picture.mode, (size, size), PAD_COLOUR if picture.mode == "RGB" else 0)
    inner = picture.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
    square.paste(inner, ((size - inner_width) // 2, (size - inner_height) // 2))
    return square


def blank_holes(picture: Image.Image, mask: Mask) -> Image.Image:
    """The picture with the mask's holes black and every kept pixel exactly as it was.

    Raises:
        ValueError: picture and mask differ in size.
    """
    height, width = mask.hole.shape
    if picture.size != (width, height):
        raise ValueError(
            f"the picture is {picture.width} x {picture.height}, its mask {width} x {height}; expected equal"
        )
    return Image.fromarray(np.asarray(picture) * (1 - mask.hole)[:, :, None])


def data_url(picture: Image.Image) -> str:
    """A picture as the text of an `src` attribute, without loss: pages hold their pictures and open offline."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
