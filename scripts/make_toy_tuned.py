"""Make the tuned toy MLLM from the shipped base: stage 1 for longer than `make stage1`. `make toy-tuned` runs it.

    python scripts/make_toy_tuned.py                 # corpus, training, shipped into the package
    python scripts/make_toy_tuned.py optim.lr=5e-4   # overrides of configs/stage1/toy_tuned.yaml

An interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llmga.config import EXIT_BAD_INPUT, EXIT_OK, ConfigError, load_config

CORPUS = Path("runs/toy_tuned/data")
CORPUS_ROWS = 60_000
BASE = Path("llmga/toyworld/checkpoints/base/mllm")
SHIPPED = Path("llmga/toyworld/checkpoints/tuned/mllm")


def main(overrides: list[str]) -> int:
    """Run the steps in order and return the exit code."""
    from llmga.stage1.config import Stage1Config

    if not CORPUS.exists():
        from llmga.toyworld.build import build_world

        build_world(CORPUS, rows=CORPUS_ROWS, seed=1, kind="stage1")
    try:
        config = load_config(Stage1Config, Path("configs/stage1/toy_tuned.yaml"), overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    from llmga.stage1.train import train

    ship(train(config), SHIPPED)
    return EXIT_OK


def ship(final: Path, destination: Path) -> None:
    """Put the finished model into the package, in float16; the frozen vision tower stays the base's own file."""
    import torch

    from llmga.stage1.model import VISION_SHARD, load_mllm, save_mllm

    provenance = json.loads((final / "provenance.json").read_text(encoding="utf-8"))
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_mllm(load_mllm(final), None, destination, provenance, dtype=torch.float16, split_vision=True)
    shared, own = BASE / VISION_SHARD, destination / VISION_SHARD
    if shared.read_bytes() == own.read_bytes():
        own.unlink()
        own.symlink_to(os.path.relpath(shared, destination))
    size = sum(file.stat().st_size for file in destination.iterdir() if not file.is_symlink())
    print(f"shipped {destination} ({size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
