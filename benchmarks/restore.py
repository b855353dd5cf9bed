"""How much memory restoring takes, from small pictures to 8k: tiles put a bound on it.

    python benchmarks/restore.py

The network has the released width, on which memory depends, and one block a level instead of up to thirteen, on which
only time does. A fifth of each picture is restored, at its right. Each size runs in a process of its own; its peak
memory is counted above what the libraries and the network take. The result goes to benchmarks/results/restore.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmga.diffrir.inputs import RestorationInputs
from llmga.diffrir.network import DiffRIR
from llmga.diffrir.restore import restore_arrays
from llmga.machine import machine_in_words

RESULT = Path(__file__).parent / "results" / "restore.json"
SIZES = ((768, 768), (1920, 1080), (3840, 2160), (7680, 4320))


def measure(width: int, height: int) -> dict[str, Any]:
    """Restore one picture in this process."""
    torch.set_num_threads(1)
    model = DiffRIR(num_blocks=(1, 1, 1, 1), num_refinement_blocks=1).eval()
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    hole = np.zeros((height, width), bool)
    hole[:, width * 4 // 5 :] = True
    small = RestorationInputs(known[:64, :64], known[:64, :64], hole[:64, :64])
    noise = torch.zeros(1, model.prior_width)
    restore_arrays(model, [small], noise)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    [restored] = restore_arrays(model, [RestorationInputs(known, known, hole)], noise)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert np.array_equal(restored[~hole], known[~hole])
    return {
        "size": f"{width} x {height}",
        "megapixels": round(width * height / 1e6, 1),
        "pictures_mb": round((known.nbytes * 2 + hole.nbytes + restored.nbytes) / 1e6),
        "extra_peak_mb": round((peak - before) / 1e3),
        "cpu_s": round(seconds, 1),
    }


def main() -> None:
    """Measure every size and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, type=int, metavar=("WIDTH", "HEIGHT"), help="this size alone, to stdout")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    for size in SIZES:
        words = [sys.executable, __file__, "--one", *map(str, size)]
        rows.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/restore.py",
        "machine": machine_in_words("torch", threads=1),
        "network": "released width, scale 1, one block a level; tiles of 768 with an overlap of 128, float32",
        "sizes": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
