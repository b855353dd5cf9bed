"""What an evaluation writes: a document and the numbers of every picture for each cell, comparisons, and a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from llmga.config import STRICT
from llmga.evaluation.bench import Columns, Meter
from llmga.evaluation.config import PresetConfig
from llmga.files import atomic_write
from llmga.metrics.result import FILE, SCHEMA_VERSION, Metric, Preset, Result, origin, write_document
from llmga.metrics.verdicts import Comparison, Contrast, judge

ITEMS_FILE = "items.jsonl"
COMPARISONS_FILE = "comparisons.json"
TABLE_FILE = "table.md"


@dataclass(config=STRICT)
class Comparisons:
    """All comparisons of one evaluation, judged together."""

    task: str
    data: dict[str, Any]
    protocol: dict[str, Any]
    comparisons: list[Comparison]
    preset: Preset = field(default_factory=Preset)
    schema_version: int = SCHEMA_VERSION
    created: str = ""
    code: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


def preset_of(config: PresetConfig) -> Preset:
    """What settings stand for, as documents say it."""
    return Preset(config.name, list(config.notes))


def write_cell(folder: Path, result: Result, ids: Sequence[str], meters: Sequence[Meter], columns: Columns) -> None:
    """Write a cell's document, and the scores of each of its pictures beside it."""
    names = [name for meter in meters for name in meter.scores if name in columns]
    lines = (
        json.dumps({"id": id, **{name: _plain(columns[name][row]) for name in names}}, ensure_ascii=False)
        for row, id in enumerate(ids)
    )
    atomic_write(folder / result.name / ITEMS_FILE, "".join(f"{line}\n" for line in lines))
    result.per_item = ITEMS_FILE
    for key, value in origin().items():
        setattr(result, key, value)
    write_document(folder / result.name / FILE, result)


def write_comparisons(folder: Path, of: Result, contrasts: Sequence[Contrast]) -> list[Comparison]:
    """Judge contrasts together and write them.

    Args:
        of: any of the results compared; they share data and protocol.
    """
    judged = judge(contrasts)
    document = Comparisons(of.task, of.data, of.protocol, judged, of.preset, **origin())
    write_document(folder / COMPARISONS_FILE, document)
    return judged


def write_table(
    folder: Path, results: Sequence[Result], headers: Mapping[str, str], judged: Sequence[Comparison]
) -> str:
    """Write the table and its comparisons as Markdown, and return the text."""
    parts = [table(results, headers), comparison_table(judged, headers), *_remarks(results)]
    text = "\n\n".join(part for part in parts if part)
    atomic_write(folder / TABLE_FILE, text + "\n")
    return text


def publish(out: Path, folder: Path) -> None:
    """Copy what an evaluation found, without pictures and their scores; kinds of holes have folders of their own."""
    for name in (TABLE_FILE, COMPARISONS_FILE, FILE):
        for path in sorted(out.rglob(name)):
            atomic_write(folder / path.relative_to(out), path.read_text(encoding="utf-8"))


def table(results: Sequence[Result], headers: Mapping[str, str]) -> str:
    """Results down, metrics across; metrics that nobody has are left out.

    Args:
        headers: name of a metric -> the words above its column.
    """
    shown = [name for name in headers if any(result.metric(name) for result in results)]
    lines = ["| | n | " + " | ".join(headers[name] for name in shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for result in results:
        cells = [_shown(result.metric(name)) for name in shown]
        lines.append(f"| {result.name} | {result.data.get('n', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_table(judged: Sequence[Comparison], headers: Mapping[str, str]) -> str:
    """One line for each comparison, with its verdict."""
    if not judged:
        return ""
    lines = ["| a | b | metric | a - b | p (Holm) | a is better |", "|---|---|---|---|---|---|"]
    for each in judged:
        scale = 100 if _is_share(each.metric, headers) else 1
        numbers = [scale * value for value in (each.difference, each.ci_low, each.ci_high)]
        said = f"{numbers[0]:+.4g} [{numbers[1]:+.4g}, {numbers[2]:+.4g}]"
        p = "" if each.p_holm is None else f"{each.p_holm:.2g}"
        lines.append(
            f"| {each.a} | {each.b} | {headers.get(each.metric, each.metric)} | {said} | {p} | {each.verdict} |"
        )
    return "\n".join(lines)


def _shown(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    scale = 100 if metric.unit == "share" else 1  # the header says so
    value = f"{scale * metric.value:.4g}"
    if metric.ci_low is None or metric.ci_high is None:
        return value
    return f"{value} [{scale * metric.ci_low:.4g}, {scale * metric.ci_high:.4g}]"


def _is_share(name: str, headers: Mapping[str, str]) -> bool:
    return headers.get(name, "").endswith("%")


def _remarks(results: Sequence[Result]) -> list[str]:
    notes = [f"- {note}" for result in results for note in result.preset.notes]
    warned = [f"- {result.name}: {warning}" for result in results for warning in result.warnings]
    return ["\n".join(dict.fromkeys(part)) for part in (notes, warned) if part]


def _plain(value: Any) -> Any:
    """A row of a column as JSON has it; what was not measured is null."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if not np.isfinite(value) else value.item()
