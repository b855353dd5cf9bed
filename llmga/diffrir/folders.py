"""Files and folders through the restorer: partners found by name, equal sizes in one batch, one result for each."""

import logging
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llmga.diffrir.inputs import RestorationInputs, read_inputs
from llmga.diffrir.network import DiffRIR
from llmga.diffrir.reference import InputError
from llmga.diffrir.restore import restore_arrays
from llmga.diffrir.tiles import Tiling
from llmga.files import written_aside
from llmga.images import PictureError
from llmga.progress import RunProgress

LOSSLESS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
_MASK_ENDINGS = ("", "_mask", "_mask000")  # the last one as published
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Three files and where their result goes."""

    generated: Path
    mask: Path
    known: Path
    out: Path


def find_tasks(generated: Path, mask: Path, known: Path, out: Path) -> list[Task]:
    """One task for three files, or one for each picture of three folders whose names agree but for the suffix.

    A mask may also be called `<name>_mask` or `<name>_mask000`. Results of folders are PNG files of the same name.

    Raises:
        InputError: files and folders mixed, nothing found, partners missing, or a result that would not be lossless.
    """
    paths = {"generated": generated, "mask": mask, "known": known}
    folders = [name for name, path in paths.items() if path.is_dir()]
    if not folders:
        if out.suffix.lower() not in LOSSLESS:
            raise InputError(f"out is {out}; expected a file that keeps every pixel: {', '.join(LOSSLESS)}")
        return [Task(generated, mask, known, out)]
    if len(folders) < len(paths):
        kinds = ", ".join(f"{name} {path} is {_kind(path)}" for name, path in paths.items())
        raise InputError(f"{kinds}; expected three files or three folders")
    if out.is_file():
        raise InputError(f"out {out} is a file, and the inputs are folders; expected a folder")
    masks, originals = _by_name(mask), _by_name(known)
    tasks, missing = [], []
    for name, path in _by_name(generated).items():
        found = next((masks[name + ending] for ending in _MASK_ENDINGS if name + ending in masks), None)
        missing += [f"{name} in {mask}"] * (found is None) + [f"{name} in {known}"] * (name not in originals)
        if found is not None and name in originals:
            tasks.append(Task(path, found, originals[name], out / f"{name}.png"))
    if missing:
        raise InputError(
            f"{len(missing)} pictures of {generated} lack a partner of the same name: {', '.join(missing[:5])}"
            + (", ..." if len(missing) > 5 else "")
        )
    if not tasks:
        raise InputError(f"{generated} holds no pictures ({', '.join(_PICTURES)})")
    return tasks


def restore_files(
    model: DiffRIR,
    tasks: Sequence[Task],
    *,
    seed: int = 0,
    batch_size: int = 4,
    tiling: Tiling | None = None,
    composed: bool = True,
    overwrite: bool = False,
    bf16: bool = False,
    shown: bool = True,
) -> list[str]:
    """Restore every task; a result that is there already stays. The noise of a picture depends on seed and name alone.

    Args:
        model: of phase "diffusion", on its device.
        batch_size: pictures of equal size that are restored at a time.
        tiling: how large ones are cut; None is the default.
        composed: whether known pixels come out as they went in.
        overwrite: restore again what is there.
        bf16: compute in bfloat16 where it is safe to.
        shown: show the progress.
    Returns:
        One sentence for each task that failed; the others are written.
    """
    failures: list[str] = []
    todo = [task for task in tasks if overwrite or not task.out.exists()]
    if len(todo) < len(tasks):
        logger.info("%d of %d results are there already and stay", len(tasks) - len(todo), len(tasks))
    with RunProgress(len(todo), shown) as progress:
        done = 0
        for batch in _batches(todo, batch_size):
            read = list(_read(batch, model.scale, failures))
            if read:
                with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16):
                    restored = restore_arrays(
                        model,
                        [inputs for _, inputs in read],
                        torch.cat([_noise(seed, task.generated.stem, model.prior_width) for task, _ in read]),
                        tiling or Tiling(),
                        composed,
                    )
                for (task, _), pixels in zip(read, restored, strict=True):
                    _save(pixels, task.out)
            done += len(batch)
            progress.advance(done)
            if shown and not sys.stderr.isatty():
                logger.info("%d/%d  %s", done, len(todo), batch[-1].out)
    return failures


def _batches(tasks: Sequence[Task], batch_size: int) -> Iterator[list[Task]]:
    """Tasks whose generated pictures have the same size, a few at a time."""
    for _, group in groupby(sorted(tasks, key=_size), key=_size):
        same = list(group)
        yield from (same[first : first + batch_size] for first in range(0, len(same), batch_size))


def _size(task: Task) -> tuple[int, int]:
    """Of the generated picture, from its header; what cannot be read is told when it is read in earnest."""
    try:
        with Image.open(task.generated) as picture:
            return picture.size
    except Exception:
        return 0, 0


def _read(batch: Sequence[Task], scale: int, failures: list[str]) -> Iterator[tuple[Task, RestorationInputs]]:
    for task in batch:
        try:
            inputs = read_inputs(task.generated, task.mask, task.known, scale)
        except (PictureError, InputError) as error:
            failures.append(str(error))
            continue
        for remark in inputs.remarks:
            logger.warning("%s", remark)
        yield task, inputs


def _noise(seed: int, name: str, width: int) -> torch.Tensor:
    """(1, width) standard normal numbers of one picture, whatever batch it is in."""
    drawn = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal((1, width), np.float32)
    return torch.from_numpy(drawn)


def _save(pixels: np.ndarray, path: Path) -> None:
    with written_aside(path) as aside:
        Image.fromarray(pixels).save(aside, format=LOSSLESS[path.suffix.lower()])


def _by_name(folder: Path) -> dict[str, Path]:
    """Pictures below a folder by their path in it without suffix, in order."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.is_file())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "a file" if path.exists() else "missing"
