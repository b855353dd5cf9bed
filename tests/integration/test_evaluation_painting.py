"""Evaluations that paint: each picture once, with its own noise, whatever stops them and however many processes work.

Run: pytest tests/integration/test_evaluation_painting.py
"""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmga.config import load_config
from llmga.evaluation.paint import PaintError, seed_of
from llmga.evaluation.table_configs import TextToImageConfig
from llmga.evaluation.text_to_image import evaluate_text_to_image
from llmga.metrics.picture_files import picture_files
from llmga.metrics.result import read_result
from llmga.runtime import Interrupted, Ranks
from llmga.stage2.recipe import read_recipe
from llmga.stage2.sample import Painted, Sampler
from tests.toy_diffusion import toy_sd_pipeline
from tests.toy_evaluation import RANDOM_NETWORK, refinement_rows, settings_file

COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painted")
    refinement_rows(folder, COUNT)
    toy_sd_pipeline().save_pretrained(folder / "pipeline")
    return folder


def config_for(folder: Path, out: Path, *overrides: str) -> TextToImageConfig:
    settings: dict[str, Any] = {
        "out": str(out),
        "rows": {"path": str(folder / "rows.jsonl")},
        "systems": [
            {"name": "cut", "pipeline": str(folder / "pipeline"), "max_chunks": 1},
            {"name": "whole", "pipeline": str(folder / "pipeline")},
        ],
        "metrics": ["kernel", "world"],
        "sanity": ["oracle", "autoencoder", "another_seed"],
        "reference": {"side": 16},
        "paint": {"steps": 1, "batch_size": 1},
        "measure": {
            "batch_size": 4,
            "features": RANDOM_NETWORK,
            "tests": {"bootstrap": 50, "permutations": 9, "halves": 4},
        },
    }
    return load_config(TextToImageConfig, settings_file(folder / "settings.yaml", **settings), overrides)


@pytest.fixture(scope="module")
def table(folder: Path) -> str:
    text = evaluate_text_to_image(config_for(folder, folder / "out"), Ranks())
    assert text is not None
    return text


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {id: np.asarray(Image.open(path)) for id, path in picture_files(folder, "ours").items()}


def test_every_picture_is_painted_from_its_prompt_with_its_own_noise(folder: Path, table: str) -> None:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        recipe = read_recipe(folder / "out/pictures/whole-refined" / f"{row['id']}.png")
        assert (recipe.prompt, recipe.seed, recipe.steps) == (row["prompt"], seed_of(0, row["id"]), 1)
        assert read_recipe(folder / "out/pictures/whole-short" / f"{row['id']}.png").prompt == row["short_caption"]
        assert read_recipe(folder / "out/pictures/cut-refined" / f"{row['id']}.png").max_chunks == 1
    assert len({seed_of(0, row["id"]) for row in rows}) == COUNT
    cut, whole, again = (
        pixels(folder / "out/pictures" / name) for name in ("cut-refined", "whole-refined", "whole-refined-again")
    )
    assert all((cut[id] != whole[id]).any() and (again[id] != whole[id]).any() for id in whole)


def test_rows_that_stand_beside_are_measured_too(folder: Path, table: str) -> None:
    oracle, ceiling, again = (
        read_result(folder / "out" / name / "result.json") for name in ("oracle", "autoencoder", "whole-refined-again")
    )
    assert oracle.metric("exact").value == 1 and ceiling.metric("exact").value < 1
    assert oracle.metric("kernel").value < again.metric("kernel").value
    assert again.generation["seed"] == 1 and "| autoencoder | 10 |" in table
    compared = json.loads((folder / "out/comparisons.json").read_text())["comparisons"]
    assert {each["a"] for each in compared} == {
        "whole-short",
        "whole-refined",
        "cut-refined",
        "gain of whole by prompts",
    }


def test_processes_paint_the_pictures_of_one(folder: Path, table: str, tmp_path: Path) -> None:
    config = config_for(folder, tmp_path)
    assert evaluate_text_to_image(config, Ranks(rank=1, world_size=2)) is None
    assert len(picture_files(tmp_path / "pictures/whole-refined", "half")) == COUNT // 2
    assert evaluate_text_to_image(config, Ranks(rank=0, world_size=2)) == table
    for id, picture in pixels(tmp_path / "pictures/whole-refined").items():
        assert (picture == np.asarray(Image.open(folder / "out/pictures/whole-refined" / f"{id}.png"))).all()


def test_what_was_stopped_goes_on(folder: Path, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint, painted = Sampler.text_to_image, []

    def counted(self: Sampler, prompts: Sequence[str], *others: Any) -> list[Painted]:
        painted.append(len(prompts))
        if len(painted) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return paint(self, prompts, *others)

    monkeypatch.setattr(Sampler, "text_to_image", counted)
    config = config_for(folder, tmp_path)
    with pytest.raises(Interrupted, match=r"stopped while painting cut-refined, 8 of 10 done; the same command"):
        evaluate_text_to_image(config, Ranks())
    assert evaluate_text_to_image(config, Ranks()) == table
    assert sum(painted) == 5 * COUNT


def test_a_folder_painted_otherwise_is_refused(folder: Path, table: str) -> None:
    match = r"cut-short holds pictures painted with other settings: steps \(1 there, 2 now\); choose another out"
    with pytest.raises(PaintError, match=match):
        evaluate_text_to_image(config_for(folder, folder / "out", "paint.steps=2"), Ranks())


def test_a_picture_that_changed_is_measured_again(folder: Path, table: str, tmp_path: Path) -> None:
    for condition in ("short", "refined"):
        target = tmp_path / "given" / condition
        target.mkdir(parents=True)
        for id, path in picture_files(folder / "out/pictures/own", "own").items():
            Image.open(path).save(target / f"{id}.png")
    given = f"systems=[{{name: given, pictures: {tmp_path / 'given'}}}]"
    config = config_for(folder, tmp_path, given, "sanity=[]")
    assert "| given-refined | 10 | " in str(evaluate_text_to_image(config, Ranks()))
    before = read_result(tmp_path / "given-refined/result.json").metric("exact")
    changed = next(iter((tmp_path / "given/refined").iterdir()))
    Image.new("RGB", (64, 64)).save(changed)
    evaluate_text_to_image(config, Ranks())
    after = read_result(tmp_path / "given-refined/result.json").metric("exact")
    assert (before.value, after.value) == (1.0, 1 - 1 / COUNT)
