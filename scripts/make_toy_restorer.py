"""Make the shipped toy restorer: the phases of configs/diffrir/toy.yaml, for longer. `make toy-restorer` runs it.

    python scripts/make_toy_restorer.py                    # toy data, training, shipped into the package
    python scripts/make_toy_restorer.py run.num_workers=0  # overrides of the settings

An interrupted run goes on where it was.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from llmga.checkpoint import write_folder_atomically
from llmga.config import load_config_or_exit
from llmga.diffrir.config import DiffRIRConfig
from llmga.diffrir.network import WEIGHTS_NAME

CONFIG = Path("configs/diffrir/toy.yaml")
RUN = "run.output_dir=runs/toy_restorer"
LONGER = (
    "phases.0.steps=6000",
    "phases.0.milestones=[4000, 5200]",
    "phases.1.steps=800",
    "phases.1.milestones=[600]",
    "phases.2.steps=3000",
    "phases.2.milestones=[1800, 2500]",
)
SHIPPED = Path("llmga/toyworld/checkpoints/tuned/restorer")


def main(overrides: list[str]) -> None:
    """Run the steps in order."""
    from llmga.toyworld.build import build_world

    build_world(Path("data/toy"))
    config = load_config_or_exit(DiffRIRConfig, CONFIG, [RUN, *LONGER, *overrides])
    from llmga.diffrir.train import train

    ship(train(config), SHIPPED)


def ship(trained: Path, shipped: Path) -> None:
    """Store a restorer in half precision where the package looks for it."""
    if shipped.is_dir():
        shutil.rmtree(shipped)
    with write_folder_atomically(shipped) as folder:
        weights = {name: value.half() for name, value in load_file(trained / WEIGHTS_NAME).items()}
        save_file(weights, folder / WEIGHTS_NAME)
        for name in ("config.json", "provenance.json"):
            shutil.copy(trained / name, folder / name)


if __name__ == "__main__":
    main(sys.argv[1:])
