"""`llmga check` on real photographs at 640 px: pictures per second, and memory as the set grows.

    python benchmarks/check.py

The photographs of tests/fixtures are cropped, mirrored and brightened at random into thousands of different JPEG files
whose long side is 640 px. They are checked as a user would, by the command, with everything on: full decoding, hashes,
duplicates, orphans, both reports. Rates count from the command's start to its end. The best of several runs counts, as
other work on the machine can only slow it down; all are in benchmarks/results/check.json. Decoding alone, by Pillow in
one process, stands beside it. How memory grows is looked at with more pictures than that, of noise and 64 px wide.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from llmga.machine import machine_in_words
from llmga.records import Record, write_manifest

RESULT = Path(__file__).parent / "results" / "check.json"
PHOTOGRAPHS = Path(__file__).parents[1] / "tests/fixtures/llmga-datasetv2-mini/llmga-imgs"
LONG_SIDE_PX, QUALITY = 640, 90
MEMORY_AT = (5_000, 20_000, 80_000)
CAPTION = "a wide photograph of an old harbour with red boats, wet stones and low clouds, taken from the pier, number"


def make_pictures(folder: Path, count: int) -> float:
    """Write the pictures and their manifest; returns their mean size in kB."""
    photographs = [Image.open(path).convert("RGB") for path in sorted(PHOTOGRAPHS.rglob("*.jpg"))]
    rng = np.random.default_rng(0)
    records, total = [], 0
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width, height = photograph.size
        share = rng.uniform(0.5, 1.0)
        left, top = rng.uniform(0, 1 - share, 2)
        box = (int(left * width), int(top * height), int((left + share) * width), int((top + share) * height))
        scale = LONG_SIDE_PX / max(box[2] - box[0], box[3] - box[1])
        size = (round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale))
        picture = photograph.resize(size, Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / f"{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        ImageEnhance.Brightness(picture).enhance(rng.uniform(0.7, 1.2)).save(path, quality=QUALITY)
        total += path.stat().st_size
        name = path.relative_to(folder).as_posix()
        records.append(Record(f"row-{number}", "similar_image", name, caption=f"{CAPTION} {number}", split="train"))
    write_manifest(folder / "rows.jsonl", records)
    return total / count / 1000


def make_small_pictures(folder: Path, count: int) -> None:
    """Write pictures of noise that are quickly made, all different, and their manifest."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / f"{number % 100}" / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        noise.resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=60)
        name = path.relative_to(folder).as_posix()
        records.append(Record(f"row-{number}", "similar_image", name, caption=f"{CAPTION} {number}", split="train"))
    write_manifest(folder / "rows.jsonl", records)


def decode_alone(folder: Path, count: int) -> float:
    """Pictures per second of processor time that Pillow decodes, nothing else done, in one process."""
    paths = sorted(folder.rglob("*.jpg"))[:count]
    start = time.process_time()
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
    return round(len(paths) / (time.process_time() - start))


def run_check(folder: Path, out: Path, workers: int, count: int) -> dict[str, float]:
    """One run of the command: its rate, processor time, and the most memory that all its processes had together."""
    command = [sys.executable, "-m", "llmga", "check", str(folder / "rows.jsonl"), "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    peak, ticks = [0.0], dict[int, int]()
    watch = threading.Thread(target=_watch, args=(process, peak, ticks))
    watch.start()
    output, errors = process.communicate()
    seconds = time.perf_counter() - start
    watch.join()
    report = json.loads((out / "report.json").read_text())
    if process.returncode not in (0, 1) or report["counts"]["pictures"] != count:
        raise SystemExit(f"the check failed: {errors.decode()}{output.decode()}")
    cpu = sum(ticks.values()) / os.sysconf("SC_CLK_TCK")
    return {
        "pictures": count,
        "seconds": round(seconds, 2),
        "pictures_per_s": round(count / seconds),
        "cpu_seconds": round(cpu, 2),
        "pictures_per_cpu_s": round(count / cpu),
        "peak_memory_mb": round(peak[0]),
        "errors": report["severities"]["error"],
        "near_duplicates": sum(kind["count"] for kind in report["kinds"] if kind["code"] == "near_duplicate"),
    }


def _watch(process: "subprocess.Popen[bytes]", peak: list[float], ticks: dict[int, int]) -> None:
    """Keep the largest sum of memory of a process and its descendants (shared pages counted once), and their times."""
    while process.poll() is None:
        family = _family(process.pid)
        peak[0] = max(peak[0], sum(map(_memory_mb, family)))
        for member in family:
            with contextlib.suppress(OSError):  # it has ended; its last known time stays
                fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
                ticks[member] = int(fields[11]) + int(fields[12])
        time.sleep(0.1)


def _family(ancestor: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:  # it has ended
                continue
    family = [ancestor]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def _memory_mb(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def measure_speed(work: Path, pictures: int, workers: int, runs: int) -> dict[str, Any]:
    """Photographs at full size, several times."""
    folder = work / "photographs"
    folder.mkdir()
    mean_kb = make_pictures(folder, pictures)
    found = [run_check(folder, work / "out", workers, pictures) for _ in range(runs)]
    return {
        "machine": machine_in_words("pillow", note="files in the page cache"),
        "long_side_px": LONG_SIDE_PX,
        "mean_file_kb": round(mean_kb, 1),
        "workers": workers,
        "best": max(found, key=lambda run: run["pictures_per_s"]),
        "runs": found,
        "decoding_alone_pictures_per_cpu_s": decode_alone(folder, pictures // 4),
    }


def measure_memory(work: Path, workers: int) -> dict[str, Any]:
    """The most memory that all processes had together, by the number of pictures."""
    memory = {}
    for count in MEMORY_AT:
        folder = work / f"small-{count}"
        folder.mkdir()
        make_small_pictures(folder, count)
        memory[str(count)] = run_check(folder, work / "out", workers, count)["peak_memory_mb"]
    return {"peak_memory_mb_by_small_pictures": memory}


def main() -> None:
    """Make the pictures, check them, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("speed", "memory"), help="measure this; the rest stays as it is")
    parser.add_argument("--work", type=Path, help="folder for temporary files, about 90 kB a picture")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    result["command"] = "python benchmarks/check.py"
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        if args.only != "memory":
            result |= measure_speed(Path(work), args.pictures, args.workers, args.runs)
        if args.only != "speed":
            result |= measure_memory(Path(work), args.workers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
