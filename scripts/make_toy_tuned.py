"""Make the tuned toy MLLM from the shipped base: stage 1 for longer than `make stage1`. `make toy-tuned` runs it.

    python scripts/make_toy_tuned.py                 # corpus, training, shipped into the package
    python scripts/make_toy_tuned.py optim.lr=5e-4   # overrides of configs/stage1/toy_tuned.yaml

An interrupted run goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from make_toy_base import SHIPPED as BASE
from make_toy_base import changes, run, ship

CONFIG = Path("configs/stage1/toy_tuned.yaml")
WORK = Path("runs/toy_tuned")
ROWS = {"train": 50_000, "validation": 1_000}
SHIPPED = Path("llmga/toyworld/checkpoints/tuned/mllm")


def main(overrides: list[str]) -> None:
    """Run the steps in order."""
    from llmga.toyworld.build import build_world

    build_world(WORK / "editing/data", splits=ROWS, seed=3, kind="stage1", weights={"editing": 1.0})
    build_world(WORK / "data", splits=ROWS, seed=1, kind="stage1")
    learn_to_edit(BASE, WORK / "editing", overrides)
    ship(run(CONFIG, overrides), SHIPPED, BASE)


def learn_to_edit(start: Path, folder: Path, overrides: list[str]) -> None:
    """A first run on edits alone, the hardest task: what is meant, what becomes of it, and all else as it was."""
    pairs = changes(start, folder)
    run(CONFIG, [*overrides, *pairs, "run.max_steps=1500", "optim.lr=1e-3", "optim.schedule=constant"])


if __name__ == "__main__":
    main(sys.argv[1:])
