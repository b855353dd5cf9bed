"""Folders of pictures as evaluations take them: one file for each id, all of one size, and nothing else.

A picture's name is its id and a suffix; characters that file names cannot have are written as %XX.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llmga.images import fit_picture, open_picture
from llmga.metrics.features import MetricError, name_some

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def file_name(id: str) -> str:
    """The name of the PNG of an id."""
    name = quote(id, safe=" ")
    return (f"%2E{name[1:]}" if name.startswith(".") else name) + ".png"


def picture_files(folder: Path, name: str) -> dict[str, Path]:
    """Every picture in a folder by its id, in the order of the ids; folders inside it are not looked into.

    Args:
        name: how messages call the set.
    Raises:
        MetricError: no such folder, no pictures in it, or an id that two files have.
    """
    if not folder.is_dir():
        raise MetricError(f"{name}: {folder} is not a folder; expected one with a picture for each id")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            id = unquote(path.stem)
            if id in files:
                raise MetricError(f"{name}: {files[id].name} and {path.name} in {folder} have one id; keep one of them")
            files[id] = path
    if not files:
        raise MetricError(f"{name}: {folder} holds no pictures ({', '.join(SUFFIXES)})")
    return files


def pictures_of(folder: Path, ids: Sequence[str], name: str, known: Collection[str] = ()) -> dict[str, Path]:
    """The pictures of these ids, in their order.

    Args:
        known: other ids that the folder may hold, such as those past a limit.
    Raises:
        MetricError: as `picture_files`; a picture is missing, or one is there that nobody asked for.
    """
    files = picture_files(folder, name)
    lacking = [id for id in ids if id not in files]
    if lacking:
        raise MetricError(
            f"{name}: {folder} lacks {len(lacking):,} of {len(ids):,} pictures: {name_some(lacking)}; expected a file "
            f"{file_name(lacking[0])}"
        )
    strange = files.keys() - set(ids) - set(known)
    if strange:
        raise MetricError(
            f"{name}: {folder} holds {len(strange):,} pictures that are not asked for: {name_some(sorted(strange))}; "
            "take them out, or ask for them"
        )
    return {id: files[id] for id in ids}


def read_pictures(files: Mapping[str, Path], side: int | None = None) -> Tensor:
    """Pictures as (N, 3, H, W) uint8.

    Args:
        side: bring each to a square of this side: bicubic on the short side, then the centre. None: they stay as they
            are, and must be of one size.
    Raises:
        MetricError: sizes differ.
        PictureError: a file cannot be read.
    """
    pictures = {id: open_picture(path) for id, path in files.items()}
    if side is not None:
        pictures = {id: fit_picture(picture, side, "clip") for id, picture in pictures.items()}
    return as_tensor(pictures, files)


def as_tensor(pictures: Mapping[str, Image.Image], files: Mapping[str, Path]) -> Tensor:
    """Pictures of one size as (N, 3, H, W) uint8; errors as `read_pictures`."""
    first, *others = pictures
    for id in others:
        if pictures[id].size != pictures[first].size:
            (width, height), (other_width, other_height) = pictures[first].size, pictures[id].size
            raise MetricError(
                f"{files[first]} is {width} x {height} and {files[id]} {other_width} x {other_height}; expected one "
                "size in a set: bring all to it by one rule first"
            )
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures.values()])).permute(0, 3, 1, 2)
