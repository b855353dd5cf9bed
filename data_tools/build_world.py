"""Build toy data: pictures and manifests with exact truth, and a page to look at them.

    python data_tools/build_world.py --out data/toy                       # what `make stage1` trains on
    python data_tools/build_world.py --out data/base --kind base --rows 36000
    python data_tools/build_world.py --out data/dense --preset dense --seed 1

Writes train.jsonl, validation.jsonl, test.jsonl, pictures/, world.json and index.html. A folder that holds exactly
this data already is left as it is; exit code 2 when it holds anything else.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llmga.config import EXIT_BAD_INPUT, EXIT_OK
from llmga.toyworld.build import Report, WorldError, build_world
from llmga.toyworld.corpus import CORPORA
from llmga.toyworld.scene import PRESETS, SPLITS


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--rows", type=int, default=20_000, help="training records; validation and test come on top")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes and words")
    parser.add_argument("--preset", choices=PRESETS, default="learnable", help="2x2 or 3x3 grid")
    parser.add_argument("--kind", choices=CORPORA, default="stage1", help="what a base model has seen, or stage 1")
    parser.add_argument(
        "--split", action="append", metavar="NAME=RECORDS", help=f"instead of --rows: {', '.join(SPLITS)}"
    )
    parser.add_argument("--sheet", action=argparse.BooleanOptionalAction, default=True, help="write index.html")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        splits = dict(map(_split, args.split)) if args.split else None
        report = build_world(args.out, args.rows, args.seed, args.preset, args.kind, splits=splits, sheet=args.sheet)
    except WorldError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    print("\n".join(_lines(report, time.perf_counter() - start)))
    return EXIT_OK


def _split(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not count.isdecimal():
        raise WorldError(f"--split {text!r} is not NAME=RECORDS, such as test=1000")
    return name, int(count)


def _lines(report: Report, seconds: float) -> list[str]:
    lines = []
    for split, tasks in report.tasks.items():
        named = ", ".join(f"{count:,} {task}" for task, count in tasks.items())
        lines.append(f"{split:<12}{sum(tasks.values()):>8,} records, {report.pictures[split]:,} pictures: {named}")
    records = sum(map(sum, (tasks.values() for tasks in report.tasks.values())))
    done = f"built in {seconds:.1f} s ({records / seconds:,.0f} records/s)" if report.built else "was there already"
    return [*lines, f"{report.folder} {done}"]


if __name__ == "__main__":
    sys.exit(main())
