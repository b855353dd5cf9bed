"""The Frechet distance beside the same formula with scipy's matrix square root, in one run on one machine.

    python benchmarks/frechet.py

2,048 features, as Inception gives them: 10,000 pictures in each set, and 1,000, which is fewer than dimensions. Both
ways start where they may: scipy's from means and covariances, whose cost is not counted; ours from the same for 10,000
pictures, and from the features themselves for 1,000. One thread; the processor time of each way is counted, so that
other work on the machine changes the ratios little. The result goes to benchmarks/results/frechet.json.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from scipy.linalg import sqrtm

from llmga.machine import machine_in_words
from llmga.metrics.frechet import FrechetReference, frechet_distance

RESULT = Path(__file__).parent / "results" / "frechet.json"
Gaussian = tuple[np.ndarray, np.ndarray]


def drawn(seed: int, pictures: int, dim: int) -> np.ndarray:
    """Features whose covariance has a spectrum over four orders of magnitude, in a set of its own."""
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(0, 0.01, dim), np.logspace(0, -2, dim), (pictures, dim))


def by_scipy(a: Gaussian, b: Gaussian) -> float:
    """The formula as other tools compute it."""
    step = a[0] - b[0]
    return float(step @ step + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(np.real(sqrtm(a[1] @ b[1]))))


def timed(measure: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Value, and the median processor time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        value = measure()
        seconds.append(time.process_time() - start)
    return value, median(seconds)


def compare(pictures: int, dim: int, repeats: int) -> dict[str, object]:
    """One row of the result."""
    features, reference = drawn(1, pictures, dim), drawn(2, pictures, dim)
    a, b = ((rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (features, reference))
    many = pictures > dim
    scipys, scipy_s = timed(lambda: by_scipy(a, b), 1)
    if many:
        ours, ours_s = timed(lambda: frechet_distance(*b, *a), repeats)
        known = FrechetReference.from_gaussian(*b)
        _, known_s = timed(lambda: known.distance(*a), repeats)
    else:
        ours, ours_s = timed(lambda: FrechetReference.from_features(reference).distance_to(features), repeats)
        known = FrechetReference.from_features(reference)
        _, known_s = timed(lambda: known.distance_to(features), repeats)
    return {
        "pictures": pictures,
        "dimensions": dim,
        "ours_starts_from": "means and covariances" if many else "features",
        "cpu_s": {"scipy": round(scipy_s, 2), "ours": round(ours_s, 2), "ours_reference_known": round(known_s, 2)},
        "times_faster": {"ours": round(scipy_s / ours_s, 1), "ours_reference_known": round(scipy_s / known_s, 1)},
        "value": {"scipy": scipys, "ours": ours},
        "relative_difference": abs(ours - scipys) / abs(scipys),
    }


def main() -> None:
    """Measure both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[10_000, 1_000])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="of ours; scipy's way is timed once")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # read when NumPy is imported, so start anew
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    rows = []
    for pictures in args.pictures:
        rows.append(compare(pictures, args.dim, args.repeats))
        print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/frechet.py",
        "machine": machine_in_words("numpy", "scipy", threads=1, note="processor time is counted"),
        "repeats": args.repeats,
        "sizes": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
