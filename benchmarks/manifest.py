"""A manifest of 1.5 million rows, as each rank opens and reads it, beside json.load of the same rows.

    python benchmarks/manifest.py

Each measurement runs in a process of its own, so that memory is what that process needed. Files go to a temporary
folder (about 2.5 GB; --work names another place) and are deleted; the result goes to benchmarks/results/manifest.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from llmga.machine import machine_in_words
from llmga.records import Record, open_manifest, write_manifest

RESULT = Path(__file__).parent / "results" / "manifest.json"
SHUFFLED_READS = 300_000
SENTENCE = (
    "a wide photograph of an old harbour with red boats, wet stones and low clouds, taken from the pier in the soft "
    "light of evening; two people stand near the lamp on the left and look across the water towards the hills"
)


def made_up_records(rows: int) -> Iterator[Record]:
    """Rows with the fields and lengths of similar-image data: captions of about 100 words, all different."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = rng.integers(70, 130, rows)
    starts = rng.integers(0, 1000, rows)
    words = rng.choice(SENTENCE.split(), 2000).tolist()
    for row in range(rows):
        caption = " ".join(words[starts[row] : starts[row] + lengths[row]])
        yield Record(
            id=f"row-{row:07d}",
            task="similar_image",
            image=f"COCO/train2017/{row:012d}.jpg",
            caption=caption,
            source="llmga_sg/COCO",
            split="train",
        )


def memory_mb() -> dict[str, float]:
    """Peak and present resident memory of this process, the latter also without pages shared with other processes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak_mb": "VmHWM", "resident_mb": "VmRSS", "private_mb": "RssAnon"}
    return {name: round(int(status[key].split()[0]) / 1024, 1) for name, key in names.items()}


def measure_empty(path: Path) -> dict[str, float]:
    """What the process needs before it opens anything."""
    return memory_mb()


def measure_open(path: Path) -> dict[str, float]:
    """Open; then read in shuffled order."""
    start = time.perf_counter()
    manifest = open_manifest(path)
    opened = time.perf_counter() - start
    after_open = memory_mb()
    order = random.Random(0).sample(range(len(manifest)), min(SHUFFLED_READS, len(manifest)))
    start, start_cpu = time.perf_counter(), time.process_time()
    for row in order:
        manifest[row]
    read, read_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "rows": len(manifest),
        "open_s": round(opened, 4),
        "open_resident_mb": after_open["resident_mb"],
        "shuffled_rows_per_s": round(len(order) / read),
        "shuffled_rows_per_cpu_s": round(len(order) / read_cpu),
        **memory_mb(),
    }


def measure_json_load(path: Path) -> dict[str, float]:
    """json.load of the same rows as one array."""
    start = time.perf_counter()
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    return {"rows": len(rows), "open_s": round(time.perf_counter() - start, 2), **memory_mb()}


MEASUREMENTS = {"empty": measure_empty, "open": measure_open, "json_load": measure_json_load}


def start_process(name: str, path: Path) -> "subprocess.Popen[str]":
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, "--path", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def result_of(process: "subprocess.Popen[str]") -> dict[str, float]:
    """Wait for a measurement; a failure ends the benchmark."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a measurement failed with exit code {process.returncode}")
    return json.loads(output)


def compare(rows: int, work: Path) -> dict[str, object]:
    """Write the rows, then take every measurement."""
    lines, array = work / "rows.jsonl", work / "rows.json"
    start = time.perf_counter()
    write_manifest(lines, made_up_records(rows))
    wrote = time.perf_counter() - start
    with open(lines, "rb") as source, open(array, "wb") as target:
        for row, line in enumerate(source):
            target.write((b"," if row else b"[") + line.rstrip())
        target.write(b"]")
    empty = result_of(start_process("empty", lines))
    indexing = result_of(start_process("open", lines))
    # The first rank to open builds the index; from then on each rank maps it. Two at once, as two ranks would.
    ranks = [start_process("open", lines) for _ in range(2)]
    first_rank, second_rank = (result_of(process) for process in ranks)
    alone = result_of(start_process("open", lines))
    loaded = result_of(start_process("json_load", array))
    return {
        "command": "python benchmarks/manifest.py",
        "machine": machine_in_words(note="files in the page cache"),
        "rows": rows,
        "file_mb": round(lines.stat().st_size / 2**20),
        "write_rows_per_s": round(rows / wrote),
        "before_opening": empty,
        "first_open_builds_index": indexing,
        "open": alone,
        "open_in_two_processes_at_once": [first_rank, second_rank],
        "json_load": loaded,
        "open_times_faster": round(loaded["open_s"] / alone["open_s"]),
        "memory_times_smaller": round(loaded["peak_mb"] / alone["peak_mb"], 1),
    }


def main() -> None:
    """Run one measurement, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_500_000)
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASUREMENTS[args.measure](args.path)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        result = compare(args.rows, Path(work))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
