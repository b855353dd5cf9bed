"""Pictures with holes to paint: squares cut from the rows' pictures, seeded masks, and rows to ask an MLLM with.

<out>/inputs/pictures/<id>.png        the true pictures
<out>/inputs/in_narrow/<id>.png       masks, white where something is to be painted
<out>/inputs/in_narrow.jsonl          both as rows, for `make record` or for whoever paints elsewhere
<out>/inputs/in_narrow_recorded.jsonl the prompts that an MLLM inferred from what is left, where they are recorded
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from llmga.evaluation.bench import Work
from llmga.evaluation.paint import painted_files, save_picture
from llmga.evaluation.rows import Rows, RowsError
from llmga.evaluation.table_configs import HoleKind, PaintingConfig
from llmga.images import open_picture
from llmga.masks import (
    MEDIUM,
    NARROW,
    OUTPAINTING_NARROW,
    OUTPAINTING_WIDE,
    WIDE,
    MaskMixture,
    random_mask,
)
from llmga.metrics.features import name_some
from llmga.metrics.picture_files import file_name
from llmga.records import Record, open_manifest, write_manifest

MIXTURES: dict[HoleKind, MaskMixture] = {
    "in_narrow": NARROW,
    "in_medium": MEDIUM,
    "in_wide": WIDE,
    "out_narrow": OUTPAINTING_NARROW,
    "out_wide": OUTPAINTING_WIDE,
}


@dataclass(frozen=True)
class Holes:
    """The pictures of a set with holes of one kind, by id; files of other processes may not be there yet."""

    kind: HoleKind
    truths: Mapping[str, Path]
    masks: Mapping[str, Path]


def make_holes(config: PaintingConfig, rows: Rows, work: Work) -> dict[HoleKind, Holes]:
    """Cut pictures and draw masks, this process's share; the first process writes the rows.

    Raises:
        RowsError: a row has no picture.
        PictureError: one cannot be read.
    """
    root = config.out / "inputs"
    own = rows.own_pictures(root / "drawn", work)
    truths = painted_files(root / "pictures", rows.ids)
    made = {kind: Holes(kind, truths, painted_files(root / kind, rows.ids)) for kind in config.kinds}
    for id in work.mine(rows.ids):
        if not truths[id].is_file():
            save_picture(
                square(open_picture(own[id]), config.side, _generator(config.hole_seed, id, "crop")), truths[id]
            )
        for kind, holes in made.items():
            if not holes.masks[id].is_file():
                rng = _generator(config.hole_seed, id, kind)
                hole = random_mask(rng, config.side, config.side, MIXTURES[kind]).hole
                save_picture(Image.fromarray(hole * np.uint8(255)), holes.masks[id])
    if work.ranks.is_main:
        for kind in config.kinds:
            write_manifest(root / f"{kind}.jsonl", (_row(record, kind) for record in rows.records.values()))
    return made


def square(picture: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """The short side brought to `side`, bicubic, and a square cut out at a random place of the long one."""
    width, height = picture.size
    scale = side / min(width, height)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    left, top = (int(rng.integers(0, length - side + 1)) for length in size)
    scaled = picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + side, top + side))


def prompts_for(config: PaintingConfig, rows: Rows, kind: HoleKind, condition: str) -> dict[str, str]:
    """What each hole is painted with.

    Raises:
        RowsError: descriptions are missing, or prompts were not recorded yet; it says how.
    """
    if condition == "empty":
        return dict.fromkeys(rows.ids, "")
    if condition == "true":
        return rows.texts(config.true)
    path = config.out / "inputs" / f"{kind}_recorded.jsonl"
    if not path.is_file():
        source = path.with_name(f"{kind}.jsonl")
        raise RowsError(
            f"prompts for {kind} are not recorded; have an MLLM infer them: python scripts/record_prompts.py "
            f"configs/record/toy.yaml source.path={source} source.tasks=null source.max_rows=null out={path}"
        )
    found = {record.id: record.prompt or "" for record in open_manifest(path)}
    lacking = [id for id in rows.ids if not found.get(id)]
    if lacking:
        raise RowsError(
            f"{path} lacks the prompts of {len(lacking)} of {len(rows.ids)} rows: {name_some(lacking)}; look into its "
            "quarantine list, or leave those rows out"
        )
    return {id: found[id] for id in rows.ids}


def _row(record: Record, kind: HoleKind) -> Record:
    name = file_name(record.id)
    return Record(
        id=record.id,
        task="outpainting" if kind.startswith("out") else "inpainting",
        image=f"pictures/{name}",
        mask=f"{kind}/{name}",
        caption=record.caption,
        source=record.source,
        split=record.split,
        meta=record.meta,
    )


def _generator(seed: int, id: str, what: str) -> np.random.Generator:
    own = int.from_bytes(sha256(f"{id}\0{what}".encode()).digest()[:8])
    return np.random.default_rng([seed, own])
