"""What all evaluations do once their pictures are there: measure, compare, write.

entries (pictures of a system under a condition) --meters--> columns --> documents, comparisons, table
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from llmga.evaluation.bench import Bench, Cell, Columns, Meter
from llmga.evaluation.config import MeasureConfig, PresetConfig
from llmga.evaluation.documents import preset_of, write_cell, write_comparisons, write_table
from llmga.evaluation.numbers import (
    Clusters,
    Distance,
    Sides,
    distance_contrast,
    score_contrast,
    score_metrics,
    set_metrics,
)
from llmga.files import one_builder
from llmga.metrics.extractors import Extractor
from llmga.metrics.features import MetricError
from llmga.metrics.result import Result, require_comparable
from llmga.metrics.verdicts import Contrast

UNKNOWN_GENERATION = "how these pictures were made is not known: what they are compared with may be made otherwise"


@dataclass(frozen=True)
class Entry:
    """Pictures of one system under one condition.

    Attributes:
        system, generation: for its document; an empty `generation` is not known.
        compared: False for rows that only stand beside the others, such as what a perfect system would score.
        warnings: for its document.
    """

    cell: Cell
    system: Mapping[str, Any]
    generation: Mapping[str, Any]
    compared: bool = True
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Protocol:
    """What is the same for all entries.

    Attributes:
        data, facts: sections `data` and `protocol` of the documents; of the latter, what meters do not say.
        headers: metric -> the words above its column; those with a % are shares.
        compared: metrics that entries are compared by.
        varied: keys of `generation` that may differ between entries.
        distances: metric -> how sets are compared; needs an extractor and a reference.
        clusters: the unit that each id belongs to, where several come from one.
        warnings: for every document.
    """

    task: str
    data: Mapping[str, Any]
    measure: MeasureConfig
    preset: PresetConfig
    meters: Sequence[Meter]
    headers: Mapping[str, str]
    compared: Sequence[str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    varied: Sequence[str] = ()
    distances: Mapping[str, Distance] = field(default_factory=dict)
    extractor: Extractor | None = None
    reference: Cell | None = None
    reference_meters: Sequence[Meter] = ()
    clusters: Clusters = None
    warnings: Sequence[str] = ()


def run_protocol(
    out: Path, protocol: Protocol, entries: Sequence[Entry], sides: Sequence[Sides], bench: Bench
) -> str | None:
    """Measure this process's share of all entries; where nothing is missing then, write everything.

    Args:
        out: a folder is made in it for each entry.
        sides: which entries are compared.
    Returns:
        The table, or None where other processes still have work to do.
    Raises:
        MetricError, ResultError, PictureError: something cannot be measured or compared.
        Interrupted: a signal came; what is measured stays.
    """
    _check_names(protocol)
    todo: list[tuple[Cell, Sequence[Meter]]] = [(entry.cell, protocol.meters) for entry in entries]
    if protocol.reference is not None:
        todo.append((protocol.reference, protocol.reference_meters))
    for cell, meters in todo:
        bench.measure(cell, meters)
    if not all(bench.is_measured(cell, meters) for cell, meters in todo):
        return None
    with one_builder(out):
        return _conclude(out, protocol, entries, sides, bench)


def _conclude(out: Path, protocol: Protocol, entries: Sequence[Entry], sides: Sequence[Sides], bench: Bench) -> str:
    columns = {entry.cell.name: bench.read(entry.cell, protocol.meters) for entry in entries}
    reference: Columns = {}
    if protocol.reference is not None:
        reference = bench.read(protocol.reference, protocol.reference_meters)
    results = [_result(protocol, entry, columns[entry.cell.name], reference) for entry in entries]
    compared = [result for result, entry in zip(results, entries, strict=True) if entry.compared]
    for result in compared[1:]:
        require_comparable(compared[0], result, protocol.varied)
    for result, entry in zip(results, entries, strict=True):
        write_cell(out, result, list(entry.cell.files), protocol.meters, columns[entry.cell.name])
    contrasts = [contrast for side in sides for contrast in _contrasts(protocol, side, columns, reference)]
    judged = write_comparisons(out, results[0], contrasts) if contrasts else []
    return write_table(out, results, protocol.headers, judged)


def _result(protocol: Protocol, entry: Entry, columns: Columns, reference: Columns) -> Result:
    tests = protocol.measure.tests
    metrics = score_metrics(protocol.meters, columns, tests, protocol.clusters)
    if protocol.extractor is not None:
        metrics += set_metrics(protocol.distances, columns, reference, protocol.extractor, protocol.measure.splits)
    facts = {meter.name: dict(meter.made_by) for meter in protocol.meters if meter.made_by}
    if "size" in columns:
        width, height = columns["size"][0].tolist()
        formats = sorted({path.suffix.lower().lstrip(".") for path in entry.cell.files.values()})
        facts["pictures"] = {"width": width, "height": height, "format": ", ".join(formats)}
    if reference:
        facts["reference"] = {"n": len(reference["sha256"]), "sha256": set_hash(reference["sha256"])}
    return Result(
        name=entry.cell.name,
        task=protocol.task,
        system=dict(entry.system),
        data=dict(protocol.data),
        generation=dict(entry.generation),
        protocol={**facts, **protocol.facts, "intervals": f"95 %, {tests.bootstrap} draws, seed {tests.seed}"},
        metrics=metrics,
        warnings=[*protocol.warnings, *entry.warnings],
        preset=preset_of(protocol.preset),
    )


def _contrasts(protocol: Protocol, sides: Sides, columns: Mapping[str, Columns], reference: Columns) -> list[Contrast]:
    """Every metric that is compared, between two sides."""
    tests, found = protocol.measure.tests, []
    scores = {name: score for meter in protocol.meters for name, score in meter.scores.items()}
    for name in tests.compared or protocol.compared:
        if name in scores:
            values = {cell: columns[cell][name] for cell in sides.weights}
            contrast = score_contrast(name, scores[name], values, sides, tests, protocol.clusters)
            found += [contrast] if contrast is not None else []
        elif name in protocol.distances and protocol.distances[name].is_distance:
            found.append(distance_contrast(name, protocol.distances[name], columns, reference, sides, tests))
    return found


def _check_names(protocol: Protocol) -> None:
    """Refuse settings about metrics that are not measured."""
    tests = protocol.measure.tests
    measured = [name for meter in protocol.meters for name in meter.scores] + list(protocol.distances)
    for key, names in (("compared", tests.compared), ("smallest_effects", list(tests.smallest_effects))):
        if strange := [name for name in names if name not in measured]:
            raise MetricError(
                f"tests.{key}: {', '.join(strange)} is not measured; expected some of {', '.join(measured)}"
            )


def set_hash(hashes: np.ndarray) -> str:
    """One hash for a set of files, of their SHA-256, (N, 32) uint8, in any order."""
    return sha256(b"".join(sorted(row.tobytes() for row in hashes))).hexdigest()
