"""Edits that were asked for, with what they should have led to: MagicBrush's folder, or rows of a manifest."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmga.evaluation.bench import Work
from llmga.evaluation.paint import painted_files, save_picture
from llmga.evaluation.rows import Rows, RowsError
from llmga.evaluation.table_configs import EditingConfig, MagicBrushConfig
from llmga.images import picture_path
from llmga.metrics.features import MetricError, name_some
from llmga.metrics.picture_files import SUFFIXES, pictures_of
from llmga.toyworld.edits import Edit
from llmga.toyworld.parse import SIDE
from llmga.toyworld.render import cell_origin, render

SESSIONS_FILE = "edit_sessions.json"


@dataclass(frozen=True)
class Edits:
    """A set of edits by id.

    Attributes:
        data: for documents.
        sources, targets, masks: files; an edit may have no mask, which is light where something may change.
        captions: name -> id -> what the target shows.
        sessions: id -> what it was asked in; edits of one session are no independent samples.
        results: where a system's folder has the result of each edit.
        edits: of the toy world.
    """

    data: dict[str, Any]
    sources: dict[str, Path]
    targets: dict[str, Path]
    masks: dict[str, Path]
    captions: dict[str, dict[str, str]]
    sessions: dict[str, str]
    results: Callable[[Path, str], dict[str, Path]]
    edits: dict[str, Edit] = field(default_factory=dict)


def open_edits(config: EditingConfig, work: Work) -> Edits:
    """The edits that the settings ask for.

    Raises:
        RowsError, MetricError: files or captions are missing.
    """
    if config.magicbrush is not None:
        return magicbrush_edits(config.magicbrush)
    assert config.rows is not None
    return row_edits(config, Rows(config.rows), work)


# ---------------------------------------------------------------- MagicBrush


def magicbrush_edits(config: MagicBrushConfig) -> Edits:
    """MagicBrush: `single` takes every turn, from the true picture before it; `multi` the last turn of each session.

    Results lie as its own evaluation wants them: `S/S_1.png`, then `S/S_inde_2.png` where the input was the true
    picture, and `S/S_iter_2.png` where it was the system's own.
    """
    sessions = _json(config.folder / SESSIONS_FILE)
    wanted = [
        (session, turn, told)
        for session, turns in sorted(sessions.items())
        for turn, told in enumerate(turns, 1)
        if config.turns == "single" or turn == len(turns)
    ]
    ids = {f"{session}-{turn}": (session, turn, told) for session, turn, told in wanted}
    if not ids:
        raise RowsError(f"{config.folder / SESSIONS_FILE} holds no edits")
    files: dict[str, dict[str, Path]] = {"input": {}, "output": {}, "mask": {}}
    for id, (session, turn, told) in ids.items():
        first = sessions[session][0] if config.turns == "multi" else told
        names = {"input": first["input"], "output": told.get("output", f"{session}-output{turn}.png")}
        names["mask"] = told.get("mask", f"{session}-mask{turn}.png")
        for role, name in names.items():
            files[role][id] = config.folder / "images" / session / name
    masks = {id: path for id, path in files["mask"].items() if path.is_file()}
    _require_files({**files["input"], **{f"{id} (target)": path for id, path in files["output"].items()}})
    captions = {name: _captions(path, ids, files["output"]) for name, path in config.captions.items()}
    chain = "inde" if config.turns == "single" else "iter"

    def results(folder: Path, name: str) -> dict[str, Path]:
        found = {}
        for id, (session, turn, _) in ids.items():
            ending = "1" if turn == 1 else f"{chain}_{turn}"
            found[id] = _with_suffix(folder / session / f"{session}_{ending}")
        _require_files(found, f"system {name}: ")
        return found

    data = {"set": "MagicBrush", "turns": config.turns, "n": len(ids), "captions": sorted(captions)}
    owners = {id: session for id, (session, _, _) in ids.items()}
    return Edits(data, files["input"], files["output"], masks, captions, owners, results)


def _captions(path: Path, ids: Mapping[str, Any], targets: Mapping[str, Path]) -> dict[str, str]:
    told = _json(path)
    found = {id: told.get(session, {}).get(targets[id].name) for id, (session, _, _) in ids.items()}
    lacking = [id for id, text in found.items() if not text]
    if lacking:
        raise RowsError(f"{path} lacks the captions of {len(lacking)} of {len(found)} targets: {name_some(lacking)}")
    return {id: str(text) for id, text in found.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RowsError(f"{path} cannot be read ({error}); expected MagicBrush's file of that name") from None
    if not isinstance(found, dict):
        raise RowsError(f"{path} holds a {type(found).__name__}, expected an object by session")
    return found


def _with_suffix(stem: Path) -> Path:
    """The picture of that name, whatever its format is."""
    found = (stem.with_name(stem.name + suffix) for suffix in SUFFIXES)
    return next((path for path in found if path.is_file()), stem.with_name(stem.name + ".png"))


def _require_files(files: Mapping[str, Path], who: str = "") -> None:
    lacking = [path for path in files.values() if not path.is_file()]
    if lacking:
        raise MetricError(f"{who}{len(lacking)} of {len(files)} pictures are missing: {name_some(lacking)}")


# ---------------------------------------------------------------- rows


def row_edits(config: EditingConfig, rows: Rows, work: Work) -> Edits:
    """Rows of the task editing; targets from a folder, or drawn where the rows are about scenes of the toy world."""
    captions = {"target": rows.texts("target_caption")}
    sources = {id: picture_path(rows.image_root, record.image) for id, record in rows.records.items() if record.image}
    if len(sources) < len(rows.ids):
        lacking = [id for id in rows.ids if id not in sources]
        raise RowsError(f"{rows.config.path}: {len(lacking)} rows have no picture to edit: {name_some(lacking)}")
    edits = {id: Edit.from_dict(r.meta["edit"]) for id, r in rows.records.items() if "edit" in (r.meta or {})}
    masks = {id: picture_path(rows.image_root, record.mask) for id, record in rows.records.items() if record.mask}
    if config.targets is not None:
        targets = pictures_of(config.targets, rows.ids, "targets", rows.all_ids)
    elif len(edits) == len(rows.ids):
        targets = _drawn(config.out / "pictures/targets", {id: render(e.target) for id, e in edits.items()}, work)
        masks |= _drawn(config.out / "pictures/masks", {id: edited_cells(e) for id, e in edits.items()}, work)
    else:
        raise RowsError("targets: not set, and not all rows are edits of the toy world; name a folder with the targets")

    def results(folder: Path, name: str) -> dict[str, Path]:
        return pictures_of(folder, rows.ids, name, rows.all_ids)

    data = rows.facts("instruction", "target_caption")
    return Edits(data, sources, targets, masks, captions, {id: id for id in rows.ids}, results, edits)


def edited_cells(edit: Edit) -> np.ndarray:
    """(64, 64) uint8, 255 in cells that the edit may change; everywhere where it changes the background."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for _, cell in edit.requested:
        if cell is None:
            mask[:] = 255
            continue
        top, left = (round(origin) for origin in cell_origin(edit.target.preset, cell))
        side = round(edit.target.geometry.cell)
        mask[top : top + side, left : left + side] = 255
    return mask


def _drawn(folder: Path, pictures: Mapping[str, np.ndarray], work: Work) -> dict[str, Path]:
    """This process's share of pictures, written where they are not there."""
    files = painted_files(folder, list(pictures))
    for id in work.mine(list(pictures)):
        if not files[id].is_file():
            save_picture(Image.fromarray(pictures[id]), files[id])
    return files
