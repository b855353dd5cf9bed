"""The three pictures that restoration needs, read from files and checked against each other."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from llmga.diffrir.reference import MASK_THRESHOLD, InputError
from llmga.images import open_picture

_SHOWN_GREY_SHARE = 0.01  # masks with fewer grey pixels have soft borders, as any that was scaled


@dataclass(frozen=True, eq=False)
class RestorationInputs:
    """One picture to restore, as 8-bit arrays.

    Attributes:
        generated: (h, w, 3) the generated picture.
        known: (H, W, 3) the picture whose pixels outside the hole are right.
        hole: (H, W) bool, True where pixels were generated.
        remarks: what a person should know about them, one sentence each.
    """

    generated: np.ndarray
    known: np.ndarray
    hole: np.ndarray
    remarks: tuple[str, ...] = field(default=())


class _Stored(NamedTuple):
    """What a file stores: its mode, and where it is transparent, if it can be."""

    mode: str
    transparent: np.ndarray | None


def read_inputs(generated: Path, mask: Path, known: Path, scale: int) -> RestorationInputs:
    """Read and check three files.

    Light mask pixels (from half on; files of 0 and 1 count too) mean "generated". 16-bit pictures are taken at 8 bits.

    Args:
        scale: of the restorer; mask and known have to be so many times the size of generated.
    Raises:
        PictureError: a file that is no picture.
        InputError: sizes that do not go together, or transparent pixels that would be looked at; all three are named.
    """
    files = {"generated": generated, "mask": mask, "known": known}
    stored: dict[str, _Stored] = {}
    pictures: dict[str, Image.Image] = {}
    for name, path in files.items():
        pictures[name] = open_picture(path, look=partial(_note, stored, name))
    names = ", ".join(
        f"{name} {files[name]} ({picture.width} x {picture.height}, {stored[name].mode})"
        for name, picture in pictures.items()
    )
    _check_sizes(pictures, scale, names)
    levels = np.asarray(pictures["mask"].convert("L"))
    if levels.max() <= 1:
        levels = levels * np.uint8(255)
    hole = levels >= round(MASK_THRESHOLD * 255)
    _check_transparency(stored, hole, names)
    return RestorationInputs(
        np.asarray(pictures["generated"]),
        np.asarray(pictures["known"]),
        hole,
        tuple(_remarks(levels, hole, files, stored)),
    )


def check_arrays(generated: np.ndarray, known: np.ndarray, hole: np.ndarray, scale: int) -> None:
    """Raise `InputError`, which names all three, where arrays are not as `RestorationInputs` holds them."""
    named = {"generated": generated, "known": known, "hole": hole}
    names = ", ".join(f"{name} is {array.shape} {array.dtype}" for name, array in named.items())
    shapes = generated.ndim == known.ndim == 3 and hole.ndim == 2 and generated.shape[2] == known.shape[2] == 3
    if not shapes or generated.dtype != np.uint8 or known.dtype != np.uint8 or hole.dtype != bool:
        raise InputError(f"{names}; expected (h, w, 3) uint8, (H, W, 3) uint8 and (H, W) bool")
    wanted = (generated.shape[0] * scale, generated.shape[1] * scale)
    if known.shape[:2] != wanted or hole.shape != wanted or 0 in wanted:
        raise InputError(f"{names}; expected known and hole {scale} times as high and wide as generated")


def _note(stored: dict[str, _Stored], name: str, picture: Image.Image) -> None:
    alpha = np.asarray(picture.convert("RGBA").getchannel("A")) if picture.has_transparency_data else None
    stored[name] = _Stored(picture.mode, None if alpha is None else alpha < 255)


def _check_sizes(pictures: dict[str, Image.Image], scale: int, names: str) -> None:
    wanted = (pictures["generated"].width * scale, pictures["generated"].height * scale)
    if pictures["mask"].size != wanted or pictures["known"].size != wanted:
        times = "as large as generated" if scale == 1 else f"{scale} times as wide and high as generated"
        raise InputError(
            f"{names}; this restorer is of scale {scale}: mask and known should be {times}, {wanted[0]} x {wanted[1]}"
        )


def _check_transparency(stored: dict[str, _Stored], hole: np.ndarray, names: str) -> None:
    """Transparent pixels have no colour that could be right, unless nobody looks at them."""
    for name, (_, seen) in stored.items():
        if seen is None:
            continue
        if name == "known" and seen.shape == hole.shape:
            seen = seen & ~hole
        if seen.any():
            raise InputError(
                f"{names}; {name} has {100 * seen.mean():.1f} % transparent pixels"
                f"{' outside the hole' if name == 'known' else ''}, whose colour is unknown; "
                "flatten it (save it without alpha) first"
            )


def _remarks(levels: np.ndarray, hole: np.ndarray, files: dict[str, Path], stored: dict[str, _Stored]) -> list[str]:
    remarks = []
    if not hole.any():
        remarks.append(f"{files['mask']} has no hole (no pixel of half brightness or more): nothing is to be restored")
    if hole.all():
        remarks.append(f"{files['mask']} is all hole: no pixel is known, so that the reference is empty")
    grey = float(((levels > 0) & (levels < 255)).mean())
    if grey > _SHOWN_GREY_SHARE:
        remarks.append(f"{files['mask']} has {100 * grey:.0f} % grey pixels; from half brightness on they are hole")
    for name in ("generated", "known"):
        if stored[name].mode.startswith("I"):
            remarks.append(f"{files[name]} has 16 bits a channel; it is restored, and kept, at 8")
    return remarks
