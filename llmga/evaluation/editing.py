"""Table 2: edited pictures against their targets, beside copying the input and the targets themselves.

Pixel errors reward doing nothing, so the copied input stands in every table, and where masks tell what may change,
errors inside and outside are given apart. Averages are over edits; intervals draw whole sessions.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llmga.evaluation.bench import Bench, Cell, Columns, Meter, Score, Work
from llmga.evaluation.edits import Edits, open_edits
from llmga.evaluation.meters import (
    COSINE,
    RATE,
    build_clip,
    build_features,
    clip_columns,
    clip_protocol,
    file_meter,
    read_scenes,
    texts_hash,
    unit_range,
)
from llmga.evaluation.numbers import Sides
from llmga.evaluation.paint import device_of
from llmga.evaluation.protocol import UNKNOWN_GENERATION, Entry, Protocol, run_protocol
from llmga.evaluation.table_configs import EditingConfig
from llmga.images import grey_mask, open_picture
from llmga.metrics.clip import Clip
from llmga.metrics.clip_score import score_features
from llmga.metrics.extractors import Extractor, protocol_of
from llmga.metrics.features import paired_cosine
from llmga.metrics.holes import hole_l1, preserved_l1
from llmga.metrics.picture_files import as_tensor, read_pictures
from llmga.metrics.pictures import l1, l2
from llmga.runtime import Ranks
from llmga.toyworld.edits import Edit, all_facts

HEADERS = {
    "l1": "L1",
    "l2": "L2",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "clip_t_local": "CLIP-T, local",
    "clip_t_global": "CLIP-T, global",
    "clip_t_target": "CLIP-T",
    "l1_inside": "L1 inside the mask",
    "l1_outside": "L1 outside",
    "requested": "change made, %",
    "preserved": "other facts kept, %",
    "locality": "all others kept, %",
    "joint": "joint success, %",
}
COPY, ORACLE = "copy", "oracle"
_ERROR = Score("of [0, 1]", False)


def evaluate_editing(config: EditingConfig, ranks: Ranks) -> str | None:
    """Measure and compare; see `llmga.evaluation.protocol.run_protocol`."""
    with Work(ranks) as work:
        edits = open_edits(config, work)
        protocol = _protocol(config, edits, device_of(ranks))
        bench = Bench(config.out / "measured", work, config.measure.batch_size)
        return run_protocol(config.out, protocol, list(_entries(config, edits)), list(_sides(config)), bench)


def _entries(config: EditingConfig, edits: Edits) -> Iterator[Entry]:
    beside = {"target": edits.targets, "mask": edits.masks}
    for system in config.systems:
        cell = Cell(system.name, edits.results(system.pictures, system.name), beside)
        facts = {"name": system.name, "pictures": str(system.pictures)}
        yield Entry(cell, facts, {}, warnings=[UNKNOWN_GENERATION])
    yield Entry(Cell(COPY, edits.sources, beside), {"name": "the input, as it is"}, {})
    yield Entry(Cell(ORACLE, edits.targets, beside), {"name": "the targets"}, {}, compared=False)


def _sides(config: EditingConfig) -> Iterator[Sides]:
    first, *others = [system.name for system in config.systems]
    yield from (Sides.of(first, other, f"{first} beats {other}") for other in others)
    yield from (Sides.of(name, COPY, "better than doing nothing") for name in (first, *others))


def _protocol(config: EditingConfig, edits: Edits, device: torch.device) -> Protocol:
    meters = []
    if "pixels" in config.metrics:
        meters.append(_pixel_meter(edits))
    if "clip" in config.metrics:
        meters.append(_clip_meter(build_clip(config.measure.clip, device), edits))
    if "dino" in config.metrics:
        meters.append(_dino_meter(build_features(config.measure.features, device), edits))
    if "world" in config.metrics:
        meters.append(_world_meter(config.measure.preset, edits.edits))
    ids = list(edits.targets)
    return Protocol(
        task="editing",
        data={**edits.data, "masks": len(edits.masks)},
        measure=config.measure,
        preset=config.preset,
        meters=meters,
        headers=HEADERS,
        compared=tuple(name for name in HEADERS if name != "preserved"),
        reference=Cell("targets", edits.targets),
        reference_meters=[file_meter(side=1)],
        clusters=[edits.sessions[id] for id in ids],
    )


# ---------------------------------------------------------------- meters


def _pixel_meter(edits: Edits) -> Meter:
    """L1 and L2 to the target, the result resized to its size; and L1 inside and outside of masks."""

    def measure(files: Mapping[str, Path]) -> Columns:
        rows = [_pixel_errors(path, edits.targets[id], edits.masks.get(id)) for id, path in files.items()]
        return dict(zip(("l1", "l2", "l1_inside", "l1_outside"), np.array(rows).T, strict=True))

    scores = dict.fromkeys(("l1", "l2", "l1_inside", "l1_outside"), _ERROR)
    return Meter("pixels", {"resize": "bicubic, to the target", "range": "[0, 1]"}, measure, scores)


def _pixel_errors(result: Path, target: Path, mask: Path | None) -> tuple[float, float, float, float]:
    wanted, picture = open_picture(target), open_picture(result)
    if picture.size != wanted.size:
        picture = picture.resize(wanted.size, Image.Resampling.BICUBIC)
    x, y = (unit_range(as_tensor({"": each}, {})) for each in (picture, wanted))
    errors = float(l1(x, y)), float(l2(x, y))
    if mask is None:
        return *errors, np.nan, np.nan
    grey = grey_mask(open_picture(mask)).resize(wanted.size, Image.Resampling.NEAREST)
    hole = torch.from_numpy(np.asarray(grey) >= 125)[None, None]
    return *errors, float(hole_l1(x, y, hole)), float(preserved_l1(x, y, hole))


def _clip_meter(clip: Clip, edits: Edits) -> Meter:
    """CLIP-I, the cosine with the target's features, and CLIP-T, with those of its captions."""

    def measure(files: Mapping[str, Path]) -> Columns:
        features = _features(clip, files)
        columns: Columns = {"clip_i": paired_cosine(features, _features(clip, {id: edits.targets[id] for id in files}))}
        for name, texts in edits.captions.items():
            columns |= clip_columns(f"clip_t_{name}", score_features(clip, features, [texts[id] for id in files]))
        return columns

    made_by = {**clip_protocol(clip), **{f"{name}_sha256": texts_hash(t) for name, t in edits.captions.items()}}
    return Meter("clip", made_by, measure, {"clip_i": COSINE, **{f"clip_t_{name}": COSINE for name in edits.captions}})


def _dino_meter(extractor: Extractor, edits: Edits) -> Meter:
    """The cosine with the target's features."""

    def measure(files: Mapping[str, Path]) -> Columns:
        targets = {id: edits.targets[id] for id in files}
        return {"dino": paired_cosine(_features(extractor, files), _features(extractor, targets))}

    return Meter("dino", protocol_of(extractor), measure, {"dino": COSINE})


def _features(extractor: Extractor | Clip, files: Mapping[str, Path]) -> torch.Tensor:
    """(N, D) of pictures of any sizes."""
    return torch.cat([extractor.features(read_pictures({id: path})) for id, path in files.items()])


def _world_meter(preset: str, edits: Mapping[str, Edit]) -> Meter:
    """Whether the change was made, and whether everything else stayed, by what the parser reads.

    `requested` all requested facts, `preserved` the share of all others, `locality` all others, `joint` all facts.
    """

    def measure(files: Mapping[str, Path]) -> Columns:
        rows: dict[str, list[tuple[int, int]]] = {name: [] for name in ("requested", "preserved", "locality", "joint")}
        for scene, id in zip(read_scenes(files, preset), files, strict=True):
            edit, read = edits[id], all_facts(scene.scene()).items()
            done, kept = edit.requested.items() <= read, len(edit.preserved.items() & read)
            untouched = kept == len(edit.preserved)
            rows["requested"].append((int(done), 1))
            rows["preserved"].append((kept, len(edit.preserved)))
            rows["locality"].append((int(untouched), 1))
            rows["joint"].append((int(done and untouched), 1))
        return {name: np.array(pairs, np.int64).reshape(-1, 2) for name, pairs in rows.items()}

    scores = dict.fromkeys(("requested", "preserved", "locality", "joint"), RATE)
    return Meter("world", {"preset": preset}, measure, scores)
