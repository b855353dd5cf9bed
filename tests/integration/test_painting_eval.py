"""Holes of several kinds: seeded masks, raw outputs told from composites, hidden shapes read by the parser.

Run: pytest tests/integration/test_painting_eval.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmga.config import load_config
from llmga.evaluation.holes import square
from llmga.evaluation.painting import evaluate_painting
from llmga.evaluation.rows import RowsError
from llmga.evaluation.table_configs import PaintingConfig
from llmga.metrics.features import MetricError
from llmga.metrics.lpips import missing_for_lpips
from llmga.metrics.picture_files import picture_files
from llmga.metrics.result import Result, read_result
from llmga.records import open_manifest, write_manifest
from llmga.runtime import Ranks
from llmga.stage2.recipe import read_recipe
from llmga.toyworld.build import build_world
from tests.toy_diffusion import toy_sd_pipeline
from tests.toy_evaluation import RANDOM_NETWORK, settings_file

COUNT = 40
KINDS = ["in_wide", "out_wide"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table3")
    build_world(folder / "world", splits={"test": COUNT}, weights={"inpainting": 1.0}, sheet=False)
    return folder


def config_for(folder: Path, out: Path, *overrides: str, **changes: Any) -> PaintingConfig:
    settings: dict[str, Any] = {
        "out": str(out),
        "rows": {"path": str(folder / "world/test.jsonl")},
        "side": 64,
        "systems": [{"name": name, "pictures": str(folder / name)} for name in ("plain", "good")],
        "kinds": KINDS,
        "conditions": ["inferred"],
        "metrics": ["kernel", "pixels", "world"],
        "sanity": ["oracle"],
        "measure": {"features": RANDOM_NETWORK, "tests": {"bootstrap": 500, "permutations": 99, "halves": 20}},
        **changes,
    }
    out.mkdir(parents=True, exist_ok=True)
    return load_config(PaintingConfig, settings_file(out / "settings.yaml", **settings), overrides)


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    """Prepared, painted elsewhere and evaluated: `plain` fills holes with grey and keeps the rest bit for bit, `good`
    paints what was there, and darkens everything a little, inside and out."""
    out = folder / "out"
    for name in ("plain", "good"):
        (folder / name).mkdir()
    with pytest.raises(RowsError, match=r"in_wide are not recorded; .*source\.path=.*inputs/in_wide\.jsonl"):
        evaluate_painting(config_for(folder, out), Ranks())
    for kind in KINDS:
        rows = list(open_manifest(out / f"inputs/{kind}.jsonl"))
        write_manifest(out / f"inputs/{kind}_recorded.jsonl", [replace(row, prompt=row.caption) for row in rows])
        for row in rows:
            truth = np.asarray(Image.open(out / "inputs" / str(row.image)))
            hole = np.asarray(Image.open(out / "inputs" / str(row.mask)))[..., None] > 0
            painted = {"plain": np.where(hole, 128, truth), "good": truth * 0.9}
            for name, picture in painted.items():
                path = folder / name / f"{kind}-inferred" / f"{row.id}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(picture.astype(np.uint8)).save(path)
    assert evaluate_painting(config_for(folder, out), Ranks()) is not None
    return out


def result(out: Path, kind: str, name: str) -> Result:
    return read_result(out / kind / name / "result.json")


def value(found: Result, name: str) -> float:
    return found.metric(name).value


def test_raw_output_and_composite_are_told_apart(out: Path) -> None:
    plain, good, oracle = (result(out, "in_wide", name) for name in ("plain-inferred", "good-inferred", "oracle"))
    assert value(plain, "preserved_psnr") == 100 > value(good, "preserved_psnr") > 25
    assert value(good, "hole_psnr") > value(plain, "hole_psnr") + 5
    assert value(good, "kernel") < value(plain, "kernel") and value(good, "kernel") < value(good, "kernel_raw")
    assert value(plain, "kernel") == pytest.approx(value(plain, "kernel_raw"))
    assert value(oracle, "hidden") == 1 and value(oracle, "seam") == value(oracle, "bias_error") == 0
    assert value(good, "gain_error") == pytest.approx(0.1, abs=0.01) and value(good, "seam") < value(plain, "seam")


def test_hidden_shapes_are_read_where_the_hole_was(out: Path) -> None:
    for kind in KINDS:
        plain, good = (result(out, kind, f"{name}-inferred") for name in ("plain", "good"))
        assert value(good, "hidden") > 0.9 and value(plain, "hidden") < 0.35
        assert good.data["hole"] == kind and good.metric("hidden").n < COUNT  # some holes hide no shape
        verdicts = {
            each["metric"]: each["verdict"]
            for each in json.loads((out / kind / "comparisons.json").read_text())["comparisons"]
        }
        assert verdicts["hidden"] == verdicts["hole_psnr"] == "supported"


def test_holes_depend_on_seed_and_id_alone(folder: Path, out: Path, tmp_path: Path) -> None:
    def masks(where: Path, *overrides: str, ranks: Ranks) -> dict[str, bytes]:
        with pytest.raises(RowsError):
            evaluate_painting(config_for(folder, where, *overrides), ranks)
        return {id: path.read_bytes() for id, path in picture_files(where / "inputs/in_wide", "masks").items()}

    there = {id: path.read_bytes() for id, path in picture_files(out / "inputs/in_wide", "masks").items()}
    half = masks(tmp_path / "half", "rows.max_rows=20", ranks=Ranks(1, 0, 2))
    assert len(half) == 10 and half == {id: there[id] for id in half}
    other = masks(tmp_path / "other", "hole_seed=1", ranks=Ranks())
    assert sum(there[id] == other[id] for id in there) < 3
    coverage = {
        kind: np.mean(
            [np.asarray(Image.open(p)).mean() / 255 for p in picture_files(out / "inputs" / kind, "").values()]
        )
        for kind in KINDS
    }
    assert 0.15 < coverage["in_wide"] < 0.4 < coverage["out_wide"] < 0.8


def test_squares_are_cut_at_a_seeded_place_of_the_long_side() -> None:
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")
    cut = [np.asarray(square(wide, 50, np.random.default_rng(seed)))[0, :, 0] for seed in range(8)]
    assert {len(row) for row in cut} == {50} and len({row[0] for row in cut}) > 4
    assert all(abs(int(row[-1]) - int(row[0]) - 98) <= 3 for row in cut)  # half of the long side


def test_pipelines_paint_the_holes(folder: Path, tmp_path: Path) -> None:
    toy_sd_pipeline("StableDiffusionInpaintPipeline", in_channels=9).save_pretrained(tmp_path / "pipeline")
    config = config_for(
        folder,
        tmp_path / "out",
        rows={"path": str(folder / "world/test.jsonl"), "max_rows": 8},
        systems=[{"name": "ours", "pipeline": str(tmp_path / "pipeline")}],
        side=16,
        kinds=["out_narrow"],
        conditions=["empty", "true"],
        metrics=["kernel", "pixels"],
        sanity=["autoencoder"],
        paint={"steps": 1},
    )
    table = evaluate_painting(config, Ranks())
    assert table is not None and "## out_narrow" in table and "| autoencoder | 8 |" in table
    rows = list(open_manifest(folder / "world/test.jsonl"))[:8]
    for condition, prompts in (("empty", [""] * 8), ("true", [row.caption for row in rows])):
        recipes = [
            read_recipe(tmp_path / f"out/pictures/out_narrow-ours-{condition}" / f"{row.id}.png") for row in rows
        ]
        assert [recipe.prompt for recipe in recipes] == prompts
        assert all(recipe.task == "inpainting" and recipe.width == 16 for recipe in recipes)


def test_what_is_missing_is_told_first(folder: Path, out: Path, tmp_path: Path) -> None:
    if missing_for_lpips():
        with pytest.raises(ValueError, match="LPIPS needs the weights"):
            evaluate_painting(config_for(folder, tmp_path, "metrics=[lpips]"), Ranks())
    with pytest.raises(MetricError, match="has 40 pictures for 64 dimensions"):
        evaluate_painting(config_for(folder, tmp_path, "metrics=[frechet]"), Ranks())
    lines = (out / "inputs/in_wide_recorded.jsonl").read_text().splitlines()
    (tmp_path / "inputs").mkdir(exist_ok=True)
    (tmp_path / "inputs/in_wide_recorded.jsonl").write_text("\n".join(lines[2:]) + "\n")
    with pytest.raises(RowsError, match="lacks the prompts of 2 of 40 rows: test-0000000, test-0000001"):
        evaluate_painting(config_for(folder, tmp_path), Ranks())
