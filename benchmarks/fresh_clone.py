"""What a newcomer sees: the two commands that README opens with, in a fresh clone of the last commit.

    python benchmarks/fresh_clone.py             # make stage1
    python benchmarks/fresh_clone.py --test      # then make unit and make test too
    python benchmarks/fresh_clone.py --only tests    # these alone, in a clone of their own; the rest stays as it is

Installing is timed by itself, since it depends on the network. Memory is the proportional share of all processes of
the command together, looked at every second. The result goes to benchmarks/results/fresh_clone.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmga.machine import machine_in_words

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "fresh_clone.json"


@dataclass
class Ended:
    """A command that has ended well.

    Attributes:
        seconds: from start to end.
        peak_gb: the most memory that all its processes held together.
        lines: what it printed to both streams.
    """

    seconds: float
    peak_gb: float
    lines: list[str]

    def said(self, word: str) -> str:
        """The last line with a word in it."""
        return next(line for line in reversed(self.lines) if word in line)


def run(*command: str, folder: Path) -> Ended:
    """Run a command in a folder, passing on what it prints.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    begin, peak, lines = time.monotonic(), 0.0, []
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, _memory_gb(process.pid))
            time.sleep(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(line.rstrip())
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    watcher.join()
    return Ended(round(time.monotonic() - begin, 1), round(peak, 2), lines)


def _memory_gb(pid: int) -> float:
    """Memory of a process and all below it, in 10**9 bytes; pages that several share count once."""
    total = 0
    try:
        for process in [parent := psutil.Process(pid), *parent.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.NoSuchProcess:  # ended while we looked
        pass
    return total / 1e9


def stage1(clone: Path, installed: Ended) -> dict[str, object]:
    """Data and training."""
    trained = run("make", "stage1", folder=clone)
    steps = [line for line in trained.lines if line.startswith("step ")]
    first = trained.lines.index(next(line for line in trained.lines if line.endswith("are frozen")))
    return {
        "install_s": installed.seconds,
        "data_and_training_s": trained.seconds,
        "peak_gb": trained.peak_gb,
        "printed": [
            next(line for line in installed.lines if line.startswith("setup:")),
            trained.said("data/toy built in"),
            *trained.lines[first - 1 : first + 2],
            *steps[-2:],
            trained.lines[-1],
        ],
    }


def tests(clone: Path) -> dict[str, object]:
    """The unit tests, then the whole suite."""
    results = {}
    for target in ("unit", "test"):
        ended = run("make", target, "ARGS=--durations=40", folder=clone)
        results[target] = {"seconds": ended.seconds, "printed": ended.lines[-1]}
    return results


def main() -> None:
    """Clone, run, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="run the tests too")
    parser.add_argument("--only", choices=("stage1", "tests"), help="measure this; the rest stays as it is")
    parser.add_argument("--note", default="quiet", help="what else a reader should know of the machine")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fresh-clone-") as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        result = json.loads(options.out.read_text(encoding="utf-8")) if options.only else {}
        result["command"] = "python benchmarks/fresh_clone.py --test"
        result["machine"] = machine_in_words(note=options.note)
        installed = run("make", "install", folder=Path(folder))
        if options.only != "tests":
            result["stage1"] = stage1(Path(folder), installed)
        if options.test or options.only == "tests":
            result["tests"] = tests(Path(folder))
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
