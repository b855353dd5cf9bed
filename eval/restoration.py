"""Does the reference help, and does training with colour errors? Restored toy pictures, arm by arm and seed by seed.

    python eval/restoration.py                              # 4 arms x 3 seeds at the length of configs/diffrir/toy.yaml
    python eval/restoration.py --seeds 5 --set phases.0.steps=3000
    python eval/restoration.py --arms plain reference --seeds 1 --pictures 32

Held-out scenes are degraded, with contrast and brightness off, as only the arms with colour saw it in training:

    none                 the degraded picture itself
    plain                DiffIR: no reference input, no colour errors in training
    reference            with the reference input
    colour               without it, but with colour errors in training
    reference+colour     with both

Known pixels are pasted back everywhere. Each arm and seed trains in its own run folder below --out; what is finished
stays, and what was stopped goes on. After each seed it writes result.json (every number with its interval),
items.jsonl, grid.png and index.html.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, load_config
from llmga.diffrir.config import DiffRIRConfig, PhaseConfig, SourceConfig
from llmga.diffrir.data import PairSettings, collate, held_out_pairs, list_pictures
from llmga.diffrir.held_out import measure, restore_pairs
from llmga.diffrir.network import load_restorer
from llmga.diffrir.reference import compose
from llmga.diffrir.restore import to_uint8
from llmga.diffrir.train import train
from llmga.environment import environment
from llmga.files import atomic_write
from llmga.images import data_url
from llmga.machine import machine_in_words
from llmga.metrics.intervals import Interval, bootstrap_runs
from llmga.runtime import Interrupted, RunFailed

ARMS = {
    "plain": {"reference": False, "colour": False},
    "reference": {"reference": True, "colour": False},
    "colour": {"reference": False, "colour": True},
    "reference+colour": {"reference": True, "colour": True},
}
NONE = "none"
# Which steps are judged: the arm, and what it is better than. The last one asks for the reference once more, where
# training gives it something to correct.
STEPS = (("plain", NONE), ("reference", "plain"), ("reference+colour", "reference"), ("reference+colour", "colour"))
# What is compared, how it is called, and whether more is better.
FIGURES = {
    "bias_error": ("brightness error, abs(bias)", False),
    "gain_error": ("contrast error, abs(gain - 1)", False),
    "seam_error": ("seam, abs(excess)", False),
    "hole_psnr": ("PSNR in the hole, dB", True),
}
GRID_ROWS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, measure, write; returns the exit code."""
    args = parse_arguments(arguments)
    try:
        base = load_config(DiffRIRConfig, args.config, args.set)
        pairs = test_pairs(base, args.data, args.pictures)
        none = measure_none(pairs)
        figures: dict[str, list[dict[str, np.ndarray]]] = {NONE: [], **{arm: [] for arm in args.arms}}
        images = {NONE: [pair["low_quality"] for pair in pairs[:GRID_ROWS]]}
        for seed in range(args.seeds):
            for arm in args.arms:
                found, pictures = measure_arm(train(arm_config(base, arm, seed, args.out)), pairs)
                figures[arm].append(found)
                images.setdefault(arm, pictures)
                print(f"{arm}, seed {seed}: {show_means(found)}", flush=True)
            figures[NONE].append(none)
            result = report(args, base, figures, len(pairs))
            write(args.out, result, figures, grid(pairs, images), pairs)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return EXIT_INTERRUPTED
    except RunFailed as failure:
        print(failure, file=sys.stderr)
        return EXIT_FAILED
    except ValueError as error:
        if not type(error).__module__.startswith("llmga."):
            raise
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    if args.publish:
        atomic_write(args.publish, json.dumps(result, indent=1) + "\n")
    print(table(result))
    for comparison in result["comparisons"]:
        print(sentence(comparison))
    print(args.out / "index.html")
    return EXIT_OK


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/diffrir/toy.yaml"))
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=value", help="settings on top of the config's")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="training seeds of each arm")
    parser.add_argument("--data", type=Path, default=Path("data/toy/pictures/test"), help="held-out pictures")
    parser.add_argument("--pictures", type=int, default=300, help="of them, the first so many")
    parser.add_argument("--out", type=Path, default=Path("runs/eval_restoration"))
    parser.add_argument("--publish", type=Path, help="write result.json here too")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.pictures < 1:
        parser.error(f"found --seeds {args.seeds} and --pictures {args.pictures}, expected 1 or more of both")
    return args


def report(
    args: argparse.Namespace, base: DiffRIRConfig, figures: dict[str, list[dict[str, np.ndarray]]], count: int
) -> dict[str, Any]:
    """What result.json holds after the seeds so far."""
    return {
        "schema_version": 1,
        "machine": machine_in_words("torch"),
        "environment": {key: value for key, value in environment().items() if key in ("commit", "versions")},
        "protocol": {
            "config": str(args.config),
            "set": args.set,
            "data": str(args.data),
            "pictures": count,
            "seeds": len(figures[NONE]),
            "contrast": base.data.contrast,
            "brightness": base.data.brightness,
            "strength": base.data.strength,
            "interval": "95 %, bootstrap over training seeds, then pictures",
        },
        **summarise(figures),
    }


# ---------------------------------------------------------------- arms


def arm_config(base: DiffRIRConfig, arm: str, seed: int, out: Path) -> DiffRIRConfig:
    """The config's training with one arm's input and data, and its own folder."""
    how = ARMS[arm]
    colour = {} if how["colour"] else {"contrast": 0.0, "brightness": 0.0}
    phases = base.phases if how["colour"] else [replace(phase, contrast=None) for phase in base.phases]
    run = replace(base.run, seed=seed, output_dir=out / f"{arm}-seed{seed}")
    model = replace(base.model, reference=how["reference"])
    return replace(base, model=model, data=replace(base.data, **colour), phases=phases, run=run)


def test_pairs(base: DiffRIRConfig, folder: Path, count: int) -> list[dict[str, Any]]:
    """Held-out pairs that suffer colour errors whatever an arm was trained with; the same for all arms and seeds."""
    settings = PairSettings.of(base.data, PhaseConfig("joint", 1), base.model.scale)
    return held_out_pairs(list_pictures(SourceConfig(folder))[:count], settings)


def measure_none(pairs: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Figures of the degraded pictures themselves, enlarged where the scale says so."""
    batch = collate(list(pairs))
    size = batch["ground_truth"].shape[-2:]
    return as_arrays([measure(batch, torch.nn.functional.interpolate(batch["low_quality"], size, mode="nearest"))])


@torch.no_grad()
def measure_arm(folder: Path, pairs: Sequence[dict[str, Any]]) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """Figures of every picture, and the first few restored ones with known pixels pasted back."""
    model = load_restorer(folder, phase="diffusion")
    found, pictures = [], []
    for batch, images in restore_pairs(model, pairs, 32):
        found.append(measure(batch, images))
        pictures += list(compose(images, batch["ground_truth"], batch["edit_mask"]))
    return as_arrays(found), pictures[:GRID_ROWS]


def as_arrays(found: Sequence[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """One number per picture under each name of `FIGURES`; the seam without its sign."""
    joined = {name: torch.cat([part[name] for part in found]).numpy() for name in found[0]}
    return {name: joined[name] for name in FIGURES if name in joined} | {"seam_error": np.abs(joined["seam"])}


# ---------------------------------------------------------------- numbers


def summarise(figures: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Every arm's means, and the steps between arms; pictures where any arm has no value are left out."""
    metrics, comparisons = [], []
    for name in FIGURES:
        values = {arm: np.stack([run[name] for run in runs]) for arm, runs in figures.items()}
        known = np.isfinite(np.concatenate(list(values.values()))).all(axis=0)
        values = {arm: each[:, known] for arm, each in values.items()}
        for arm, each in values.items():
            interval = bootstrap_runs(each, np.zeros_like(each))
            metrics.append({"arm": arm, "name": name, "per_seed": each.mean(axis=1).tolist(), **as_facts(interval)})
        for after, before in ((a, b) for a, b in STEPS if {a, b} <= values.keys()):
            interval = bootstrap_runs(values[after], values[before])
            per_seed = (values[after] - values[before]).mean(axis=1).tolist()
            comparisons.append({"a": after, "b": before, "name": name, "per_seed": per_seed, **as_facts(interval)})
    return {"metrics": metrics, "comparisons": [{**each, "verdict": verdict(each)} for each in comparisons]}


def as_facts(interval: Interval) -> dict[str, Any]:
    """An interval as it stands in result.json."""
    return {
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n": interval.n,
        "ci_method": interval.method,
    }


def verdict(comparison: dict[str, Any]) -> str:
    """Whether a step helps: the interval excludes 0 on the right side, on the wrong one, or not at all."""
    more_is_better = FIGURES[comparison["name"]][1]
    low, high = comparison["ci_low"], comparison["ci_high"]
    if not more_is_better:
        low, high = -high, -low
    return "supported" if low > 0 else "contradicted" if high < 0 else "inconclusive"


def show_means(found: dict[str, np.ndarray]) -> str:
    """One arm and seed in a line."""
    return ", ".join(f"{name} {np.nanmean(values):.4f}" for name, values in found.items())


def table(result: dict[str, Any]) -> str:
    """A Markdown table: arms down, figures across."""
    found = {(metric["arm"], metric["name"]): metric for metric in result["metrics"]}
    arms = list(dict.fromkeys(metric["arm"] for metric in result["metrics"]))
    lines = ["| arm | " + " | ".join(words for words, _ in FIGURES.values()) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for arm in arms:
        cells = [
            f"{m['value']:.4f} ({m['ci_low']:.4f} to {m['ci_high']:.4f})" for m in (found[arm, n] for n in FIGURES)
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sentence(comparison: dict[str, Any]) -> str:
    """A comparison for people."""
    seeds = ", ".join(f"{value:+.4f}" for value in comparison["per_seed"])
    return (
        f"{comparison['a']} against {comparison['b']}, {FIGURES[comparison['name']][0]}: {comparison['value']:+.4f} "
        f"({comparison['ci_low']:+.4f} to {comparison['ci_high']:+.4f}; seeds {seeds}): {comparison['verdict']}"
    )


# ---------------------------------------------------------------- files


def grid(pairs: Sequence[dict[str, Any]], images: dict[str, list[torch.Tensor]]) -> Image.Image:
    """Truth, known pixels, then every arm with known pixels pasted back; one row per picture."""
    rows = []
    for index, pair in enumerate(pairs[:GRID_ROWS]):
        truth, mask = pair["ground_truth"][None], pair["edit_mask"][None]
        shown = [truth, truth * (1 - mask)]
        for pictures in images.values():
            picture = torch.nn.functional.interpolate(pictures[index][None], truth.shape[-2:], mode="nearest")
            shown.append(compose(picture, truth, mask))
        rows.append(torch.cat([torch.nn.functional.pad(each, (1, 1, 1, 1), value=1.0) for each in shown], dim=3))
    return Image.fromarray(to_uint8(torch.cat(rows, dim=2))[0].permute(1, 2, 0).numpy())


def write(
    out: Path,
    result: dict[str, Any],
    figures: dict[str, list[dict[str, np.ndarray]]],
    picture: Image.Image,
    pairs: Sequence[dict[str, Any]],
) -> None:
    """Write result.json, items.jsonl, grid.png and index.html."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "result.json", json.dumps(result, indent=1) + "\n")
    lines = [
        {"id": pair["sample_ids"], "arm": arm, "seed": seed, **{name: float(run[name][index]) for name in FIGURES}}
        for arm, runs in figures.items()
        for seed, run in enumerate(runs)
        for index, pair in enumerate(pairs)
    ]
    atomic_write(out / "items.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    picture.save(out / "grid.png")
    columns = ", ".join(["truth", "known", *figures])
    sentences = "".join(f"<li>{html.escape(sentence(each))}</li>" for each in result["comparisons"])
    cells = [line.strip("| ").split(" | ") for line in table(result).splitlines()]
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in [cells[0], *cells[2:]])
    large = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
    page = _PAGE.format(columns=html.escape(columns), table=body, sentences=sentences, grid=data_url(large))
    atomic_write(out / "index.html", page)


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Restoration, arm by arm</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
  table {{ border-collapse: collapse; }} td {{ border-bottom: 1px solid #8886; padding: .3rem .8rem .3rem 0; }}
  img {{ max-width: 100%; image-rendering: pixelated; }}
</style>
<h1>Restoration, arm by arm</h1>
<table>{table}</table>
<ul>{sentences}</ul>
<p>From left to right: {columns}. Known pixels are pasted back.</p>
<img src="{grid}" alt="restored pictures of every arm">
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
