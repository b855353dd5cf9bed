"""Make the tuned toy MLLM from the shipped base: stage 1 for longer than `make stage1`. `make toy-tuned` runs it.

    python scripts/make_toy_tuned.py                 # corpus, training, shipped into the package
    python scripts/make_toy_tuned.py optim.lr=5e-4   # overrides of configs/stage1/toy_tuned.yaml

An interrupted run goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from make_toy_base import SHIPPED as BASE
from make_toy_base import ship

from llmga.config import load_config_or_exit

CORPUS = Path("runs/toy_tuned/data")
CORPUS_ROWS = {"train": 80_000, "validation": 1_000}
SHIPPED = Path("llmga/toyworld/checkpoints/tuned/mllm")


def main(overrides: list[str]) -> None:
    """Run the steps in order."""
    from llmga.stage1.config import Stage1Config
    from llmga.toyworld.build import build_world

    build_world(CORPUS, splits=CORPUS_ROWS, seed=1, kind="stage1")
    config = load_config_or_exit(Stage1Config, Path("configs/stage1/toy_tuned.yaml"), overrides)
    from llmga.stage1.train import train

    ship(train(config), SHIPPED, BASE)


if __name__ == "__main__":
    main(sys.argv[1:])
