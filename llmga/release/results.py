"""A document of measurements as the Hub's metrics: one entry per row, its interval and sample size beside it."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from llmga.release.config import ResultsConfig
from llmga.release.kinds import ReleaseError, read_json

_ROW = ("task", "kind", "name", "value", "ci_low", "ci_high", "n")


class Metric(NamedTuple):
    """One row of a document of results."""

    task: str
    kind: str
    name: str
    value: float
    ci_low: float
    ci_high: float
    n: int


class Measured(NamedTuple):
    """The rows of one system, and how they were measured."""

    metrics: list[Metric]
    protocol: dict[str, Any]
    dataset: str


def read_results(cfg: ResultsConfig, folder: Path) -> Measured:
    """The rows of the released model.

    Args:
        folder: what is released; the document must have measured it.
    Raises:
        ReleaseError: another format, an unknown system, another folder, or a figure that is not finite.
    """
    document = read_json(cfg.path)
    if not isinstance(document.get("metrics"), list) or not isinstance(document.get("systems"), dict):
        raise ReleaseError(
            f"{cfg.path} has no lists of metrics and systems; expected a document as `make eval` writes it"
        )
    systems: dict[str, str] = document["systems"]
    system = cfg.system if cfg.system is not None or len(systems) != 1 else next(iter(systems))
    if system not in systems:
        raise ReleaseError(f"results.system: found {system}; {cfg.path} has {', '.join(sorted(systems))}")
    if not cfg.moved and Path(systems[system]).resolve() != folder.resolve():
        raise ReleaseError(
            f"{cfg.path} measured {systems[system]}, and {folder} is released; measure this one, or set "
            "results.moved=true if it is the same model in another place"
        )
    metrics = [_metric(row, cfg.path) for row in document["metrics"] if row.get("system") == system]
    if not metrics:
        raise ReleaseError(f"{cfg.path} has no rows of the system {system}")
    return Measured(metrics, document.get("protocol", {}), cfg.dataset)


def eval_results(measured: Measured, task_type: str) -> list[EvalResult]:
    """The same rows as huggingface_hub takes them for a card's `model-index`.

    Args:
        task_type: the Hub's name of what the model does.
    """
    interval = str(measured.protocol.get("interval", "95 %"))
    return [
        EvalResult(
            task_type=task_type,
            task_name=f"{metric.task}: {metric.kind}",
            dataset_type="llmga",
            dataset_name=measured.dataset,
            dataset_config=f"{metric.task}/{metric.kind}",
            dataset_split="test",
            metric_type=metric.name,
            metric_value=metric.value,
            metric_args={"n": metric.n, "ci_low": metric.ci_low, "ci_high": metric.ci_high, "interval": interval},
        )
        for metric in measured.metrics
    ]


def _metric(row: dict[str, Any], path: Path) -> Metric:
    missing = [name for name in _ROW if name not in row]
    if missing:
        raise ReleaseError(f"{path}: a row lacks {', '.join(missing)}: {json.dumps(row)[:120]}")
    metric = Metric(*(row[name] for name in _ROW))
    if not all(math.isfinite(figure) for figure in (metric.value, metric.ci_low, metric.ci_high)):
        raise ReleaseError(f"{path}: {metric.task} {metric.name} is {metric.value}; expected a finite number")
    return metric
