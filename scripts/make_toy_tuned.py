"""Make the tuned toy MLLM from the shipped base: stage 1 for longer than `make stage1`. `make toy-tuned` runs it.

    python scripts/make_toy_tuned.py                 # corpus, training, shipped into the package
    python scripts/make_toy_tuned.py optim.lr=5e-4   # overrides of configs/stage1/toy_tuned.yaml

An interrupted run goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from make_toy_base import SHIPPED as BASE
from make_toy_base import Lesson, changes, run, ship

from llmga.config import load_config_or_exit
from llmga.recipe import exit_code_of
from llmga.stage1.config import Stage1Config

CONFIG = Path("configs/stage1/toy_tuned.yaml")
WORK = Path("runs/toy_tuned")
ROWS = {"train": 50_000, "validation": 1_000}
MIXTURE = {
    "prompt_refinement": 0.08,
    "similar_image": 0.07,
    "inpainting": 0.08,
    "outpainting": 0.04,
    "editing": 0.22,
    "plain_editing": 0.18,
    "aim": 0.06,
    "questions": 0.14,
    "chat": 0.07,
    "brief": 0.02,
    "medium": 0.04,
}
"""All tasks, as `make stage1` has them, but more of what takes longest: edits. The last two keep the base's short
descriptions alive: a model that meets pictures with long prompts alone answers every one with a long prompt."""
SHIPPED = Path("llmga/toyworld/checkpoints/tuned/mllm")
EDITING = Lesson(
    "editing",
    {"plain_editing": 0.5, "editing": 0.1, "similar_image": 0.12, "aim": 0.12, "imagine": 0.06, "questions": 0.1},
    30_000,
    ("run.max_steps=1500", "optim.schedule=constant"),
)
"""A first run mainly on edits, the hardest task, in captions of one wording: there every word that is hard to guess
says what the edit leads to, where otherwise most of them tell one way to put it from another."""
REFINING = Lesson(
    "refining",
    {
        "prompt_refinement": 0.3,
        "similar_image": 0.06,
        "inpainting": 0.06,
        "outpainting": 0.03,
        "editing": 0.14,
        "plain_editing": 0.08,
        "aim": 0.03,
        "questions": 0.12,
        "chat": 0.12,
        "brief": 0.02,
        "medium": 0.04,
    },
    10_000,
    ("run.max_steps=400", "optim.lr=8e-4", "optim.matrix_lr=1e-3"),
)
"""A short run at the end with more of what pictures crowd out: to keep to what a sentence asks for, and to chat."""


def main(overrides: list[str]) -> int:
    """Check the settings, then run the steps; returns the exit code."""
    load_config_or_exit(Stage1Config, CONFIG, overrides, check_machine=False)
    return exit_code_of(lambda: make(overrides))


def make(overrides: list[str]) -> None:
    """Run the steps in order."""
    from llmga.toyworld.build import build_world

    for seed, lesson in ((3, EDITING), (4, REFINING)):
        splits = {"train": lesson.rows, "validation": 1_000}
        build_world(WORK / lesson.name / "data", splits=splits, seed=seed, kind="stage1", weights=lesson.parts)
    build_world(WORK / "data", splits=ROWS, seed=1, kind="stage1", weights=MIXTURE)
    run(CONFIG, [*EDITING.overrides, *overrides, *changes(BASE, WORK / EDITING.name)])
    everything = run(CONFIG, overrides)
    refined = run(CONFIG, [*REFINING.overrides, *overrides, *changes(everything, WORK / REFINING.name)])
    ship(refined, SHIPPED, BASE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
