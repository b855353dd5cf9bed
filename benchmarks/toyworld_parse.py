"""How often the toy world's image parser is right on harmed pictures, and what it costs.

    python benchmarks/toyworld_parse.py

One thread; scenes of the test split. The table is printed and written to benchmarks/results/toyworld_parse.json. Blank
noise stands beside it: of those pictures, the share of cells that is reported unparseable counts.
"""

import argparse
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from llmga.machine import machine_in_words
from llmga.toyworld.parse import ParsedScene, parse, parse_batch
from llmga.toyworld.readings import KINDS, count_right_read
from llmga.toyworld.render import render
from llmga.toyworld.scene import PRESETS, SPLITS, Scene, sample_scene

RESULT = Path(__file__).parent / "results" / "toyworld_parse.json"
Harm = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def noisy(sd: float) -> Harm:
    """Add Gaussian noise to every channel."""
    return lambda picture, rng: np.clip(picture + rng.normal(0, sd, picture.shape), 0, 255).round().astype(np.uint8)


def soft(radius: float) -> Harm:
    """Gaussian blur."""
    return lambda picture, _: np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def brighter(bias: int) -> Harm:
    """Add a constant."""
    return lambda picture, _: np.clip(picture.astype(int) + bias, 0, 255).astype(np.uint8)


def shifted(both_axes: bool) -> Harm:
    """Move the picture by 2 px in a random direction along one axis or diagonally; the edge repeats."""

    def shift(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        dy, dx = (int(sign) * 2 for sign in rng.choice((-1, 1), 2))
        if not both_axes:
            dy, dx = (dy, 0) if rng.random() < 0.5 else (0, dx)
        return np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="edge")[2 - dy : 66 - dy, 2 - dx : 66 - dx]

    return shift


def jpeg(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Save as JPEG of quality 50 and read back."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))


HARMS: dict[str, Harm] = {
    "clean": lambda picture, _: picture,
    "noise sd 50": noisy(50),
    "blur 1.5 px": soft(1.5),
    "bias +15": brighter(15),
    "JPEG quality 50": jpeg,
    "shift 2 px, one axis": shifted(both_axes=False),
    "shift 2 px, diagonal": shifted(both_axes=True),
}


def score(scenes: list[Scene], parsed: list[ParsedScene]) -> dict[str, object]:
    """Counts over all scenes; a missing object is wrong in all of its attributes."""
    counts = count_right_read(parsed, scenes)
    pairs = list(zip(scenes, parsed, strict=True))
    return {
        "percent_right": {kind: round(100 * counts[kind][0] / counts[kind][1], 3) for kind in KINDS},
        "right_of": {kind: list(counts[kind]) for kind in KINDS},
        "exact_scenes": sum(guess.facts() == scene.facts() for scene, guess in pairs),
        "missing_objects": sum(len(guess.missing(scene)) for scene, guess in pairs),
        "extra_objects": sum(len(guess.extra(scene)) for scene, guess in pairs),
        "unparseable_cells": sum(len(guess.unparseable) for guess in parsed),
    }


def measure(preset: str, num_scenes: int) -> dict[str, object]:
    """The table of one preset."""
    start = time.process_time()
    parse(render(sample_scene(SPLITS["test"][0], preset)), preset)
    first_call = time.process_time() - start
    scenes = [sample_scene(seed, preset) for seed in SPLITS["test"][:num_scenes]]
    clean = [render(scene) for scene in scenes]
    rows: dict[str, object] = {}
    cpu_ms = []
    for number, (name, harm) in enumerate(HARMS.items()):
        rng = np.random.default_rng([num_scenes, number])
        pictures = np.stack([harm(picture, rng) for picture in clean])
        start = time.process_time()
        parsed = parse_batch(pictures, preset)
        cpu_ms.append(1000 * (time.process_time() - start) / num_scenes)
        rows[name] = score(scenes, parsed)
        print_row(preset, name, rows[name])
    start = time.process_time()
    for picture in clean[:50]:
        parse(picture, preset)
    alone_ms = 1000 * (time.process_time() - start) / len(clean[:50])
    blank = np.random.default_rng(num_scenes).integers(0, 256, (50, 64, 64, 3)).astype(np.uint8)
    unparseable = [len(guess.unparseable) / len(guess.residual) for guess in parse_batch(blank, preset)]
    return {
        "scenes": num_scenes,
        "rows": rows,
        "noise_pictures_unparseable_share": float(np.mean(unparseable)),
        "ms_per_picture_in_batches": {"median": round(float(np.median(cpu_ms)), 2), "worst": round(max(cpu_ms), 2)},
        "ms_per_picture_alone": round(alone_ms, 2),
        "first_call_s": round(first_call, 2),
    }


def print_row(preset: str, name: str, row: dict) -> None:
    """One line of the table."""
    shares = "  ".join(f"{kind} {row['percent_right'][kind]:7.3f}" for kind in KINDS)
    print(
        f"{preset:9}  {name:21}  {shares}  missing {row['missing_objects']}  extra {row['extra_objects']}", flush=True
    )


def main() -> None:
    """Measure both presets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # read when NumPy is imported, so start anew
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    presets = {preset: measure(preset, args.scenes) for preset in PRESETS}
    result = {
        "command": f"python benchmarks/toyworld_parse.py --scenes {args.scenes}",
        "machine": machine_in_words("numpy", threads=1, note="processor time is counted"),
        "presets": presets,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for preset, figures in presets.items():
        print(preset, {key: value for key, value in figures.items() if key != "rows"})
    print(f"peak memory {result['peak_memory_mb']} MB; {result['machine']}")


if __name__ == "__main__":
    main()
