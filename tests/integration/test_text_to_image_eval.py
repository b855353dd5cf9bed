"""The 2 x 2 of prompts and weights, on folders of toy pictures whose order is known, and what is refused.

Run: pytest tests/integration/test_text_to_image_eval.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from llmga.config import ConfigError, load_config
from llmga.evaluation.meters import feature_meter
from llmga.evaluation.table_configs import TextToImageConfig
from llmga.evaluation.text_to_image import evaluate_text_to_image
from llmga.metrics.features import MetricError
from llmga.metrics.result import ResultError, read_result
from llmga.metrics.seeded_conv import SeededConv
from llmga.metrics.weights import MissingWeights
from llmga.records import Record, open_manifest, write_manifest
from llmga.runtime import Ranks
from tests.toy_evaluation import (
    RANDOM_NETWORK,
    anything,
    first_window,
    perfect,
    refinement_rows,
    settings_file,
    write_pictures,
)

COUNT = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and two systems: the base reads one window of what it is given, the tuned one everything."""
    folder = tmp_path_factory.mktemp("table1")
    rows = refinement_rows(folder, COUNT)
    painters = {"base/short": anything, "base/refined": first_window, "tuned/short": anything, "tuned/refined": perfect}
    for name, paint in painters.items():
        write_pictures(folder / name, rows, paint)
    return folder


def config_for(folder: Path, out: Path, *overrides: str, **changes: Any) -> TextToImageConfig:
    systems = [{"name": name, "pictures": str(folder / name)} for name in ("base", "tuned")]
    settings: dict[str, Any] = {
        "out": str(out),
        "rows": {"path": str(folder / "rows.jsonl")},
        "systems": systems,
        "metrics": ["frechet", "kernel", "inception_score", "world"],
        "measure": {"features": RANDOM_NETWORK, "tests": {"bootstrap": 500, "permutations": 99, "halves": 20}},
        "preset": {"name": "toy", "notes": ["The paper does not say how many pictures."]},
        **changes,
    }
    out.mkdir(parents=True, exist_ok=True)
    return load_config(TextToImageConfig, settings_file(out / "settings.yaml", **settings), overrides)


@pytest.fixture(scope="module")
def table(folder: Path) -> str:
    text = evaluate_text_to_image(config_for(folder, folder / "out", sanity=["oracle"]), Ranks())
    assert text is not None
    return text


def comparisons(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((out / "comparisons.json").read_text())["comparisons"]
    return {(each["claim"], each["metric"]): each for each in found}


def test_each_cell_is_a_document_with_its_protocol(folder: Path, table: str) -> None:
    results = {name: read_result(folder / "out" / name / "result.json") for name in ("base-refined", "tuned-refined")}
    base, tuned = results.values()
    assert base.data == tuned.data and base.data["n"] == COUNT and base.protocol == tuned.protocol
    assert base.protocol["features"]["extractor"] == "seeded-conv" and base.protocol["reference"]["n"] == COUNT
    assert tuned.metric("late").value == 1 and 0 < tuned.metric("late").ci_low < 1
    assert base.metric("early").value == 1 and base.metric("late").value < 0.4 and base.metric("late").n > 60
    assert tuned.metric("frechet").value < 1e-9 < base.metric("frechet").value
    assert "less than 5 for each of 64 dimensions" in base.warnings[0] and "not known" in base.warnings[1]
    assert base.preset.notes == ["The paper does not say how many pictures."]
    items = [json.loads(line) for line in (folder / "out/base-refined/items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == [record.id for record in open_manifest(folder / "rows.jsonl")]
    assert sum(item["late"][0] for item in items) / sum(item["late"][1] for item in items) == pytest.approx(
        base.metric("late").value
    )


def test_comparisons_say_where_the_difference_is(folder: Path, table: str) -> None:
    found = comparisons(folder / "out")
    assert found["tuning, refined", "late"]["verdict"] == "supported"
    assert found["tuning, refined", "early"]["verdict"] == "inconclusive"  # both are right
    assert found["tuning, refined", "early"]["difference"] == 0
    assert found["tuning, short", "late"]["verdict"] == "inconclusive"  # equal pictures
    assert found["refined prompts, base", "early"]["verdict"] == "supported"
    assert found["refined prompts, tuned", "kernel"]["difference"] < 0
    interaction = found["interaction", "late"]
    expected = (
        found["refined prompts, tuned", "late"]["difference"] - found["refined prompts, base", "late"]["difference"]
    )
    assert interaction["difference"] == pytest.approx(expected) and interaction["verdict"] == "supported"
    assert found["interaction", "frechet"]["p"] is None and found["tuning, refined", "frechet"]["p"] <= 0.02
    assert "| tuned-refined | base-refined | late, % |" in table
    assert "- The paper does not say" in table
    assert (folder / "out/table.md").read_text().strip() == table.strip()


def test_a_second_run_measures_nothing_and_writes_the_same(
    folder: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmga.metrics.item_store.ItemStore.add", None)
    again = evaluate_text_to_image(config_for(folder, folder / "out", sanity=["oracle"]), Ranks())
    assert again == table


def test_processes_share_the_work_and_the_last_one_writes(folder: Path, table: str, tmp_path: Path) -> None:
    config = config_for(folder, tmp_path / "out", sanity=["oracle"])
    assert evaluate_text_to_image(config, Ranks(rank=1, world_size=2)) is None
    assert not (config.out / "table.md").exists()
    assert evaluate_text_to_image(config, Ranks(rank=0, world_size=2)) == table


def test_what_cannot_be_measured_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, *overrides: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            evaluate_text_to_image(config_for(folder, tmp_path, *overrides, **changes), Ranks())

    refused(MetricError, "has 50 pictures for 64 dimensions; .* add 14 more", "rows.max_rows=50")
    few = ["rows.max_rows=15", "metrics=[inception_score]"]
    refused(MetricError, "has 15 pictures; at least 20 are needed: add 5 more", *few)
    refused(MissingWeights, "weights of clip-l14 are missing", "metrics=[clip]")
    refused(MetricError, "random network", "measure.features.allow_random=false")
    refused(ValueError, "rows have no prompt.*make record", **{"rows": {"path": str(folder / "world/test.jsonl")}})
    (tmp_path / "one").mkdir()
    refused(MetricError, "holds no pictures", f"reference.folder={tmp_path / 'one'}")
    refused(MetricError, "sets differ in size", f"reference.folder={folder / 'base/short'}", "reference.pictures=70")
    refused(MetricError, "base-short: .*short is not a folder", f"systems.0.pictures={tmp_path / 'one'}")
    refused(ConfigError, "expected one of the two", f"systems.0.pipeline={tmp_path / 'one'}")


def test_a_reference_that_was_trained_on_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    first = open_manifest(folder / "rows.jsonl")[0]
    trained = tmp_path / "train.jsonl"
    write_manifest(trained, [Record("x", "similar_image", image=f"COCO_val2014_{first.id}.jpg", caption="a")])
    match = f"system tuned: 1 of {COUNT} reference pictures were trained on: {first.id};"
    overrides = [f"systems.1.trained_on=[{trained}]", "metrics=[kernel]"]
    with pytest.raises(MetricError, match=match):
        evaluate_text_to_image(config_for(folder, tmp_path, *overrides), Ranks())
    forced = config_for(folder, tmp_path, *overrides, "reference.allow_overlap=true")
    assert evaluate_text_to_image(forced, Ranks()) is not None
    assert read_result(tmp_path / "tuned-short/result.json").system["training_overlap"] == 1
    assert read_result(tmp_path / "base-short/result.json").system["training_overlap"] == 0


def test_pictures_of_other_sizes_and_formats_do_not_compare(folder: Path, tmp_path: Path) -> None:
    def given(condition: str, suffix: str, side: int, odd: int = 64) -> TextToImageConfig:
        (tmp_path / "given" / condition).mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(sorted((folder / "tuned" / condition).iterdir())[:10]):
            picture = Image.open(path).resize((odd if number == 3 else side,) * 2)
            picture.save(tmp_path / f"given/{condition}/{path.stem}{suffix}")
        systems = [{"name": "tuned", "pictures": str(folder / "tuned")}]
        systems.append({"name": "given", "pictures": str(tmp_path / "given")})
        rows = {"path": str(folder / "rows.jsonl"), "max_rows": 10}
        return config_for(
            folder, tmp_path / "out", "metrics=[world]", f"conditions=[{condition}]", systems=systems, rows=rows
        )

    with pytest.raises(MetricError, match=r"given-short has pictures of 2 sizes: .* is 64 x 64, the first 32 x 32"):
        evaluate_text_to_image(given("short", ".png", 32), Ranks())
    with pytest.raises(ResultError, match=r"do not compare: protocol\.pictures\.width is 64 and 32"):
        evaluate_text_to_image(given("short", ".png", 32, odd=32), Ranks())
    with pytest.raises(ResultError, match=r'protocol\.pictures\.format is "png" and "jpg"'):
        evaluate_text_to_image(given("refined", ".jpg", 64), Ranks())


def test_names_and_networks_that_measure_nothing_are_refused(folder: Path, tmp_path: Path) -> None:
    for override in ("measure.tests.compared=[fid]", "measure.tests.smallest_effects={lat: 0.1}"):
        with pytest.raises(MetricError, match=r"tests\.\w+: \w+ is not measured; expected some of theme"):
            evaluate_text_to_image(config_for(folder, tmp_path, "metrics=[world]", override), Ranks())

    class Broken(SeededConv):
        def features(self, images: Tensor) -> Tensor:
            return super().features(images).where(images.float().mean(dim=(1, 2, 3))[:, None] > 0, torch.nan)

    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    with pytest.raises(MetricError, match=r"black\.png: its features by seeded-conv are not finite"):
        feature_meter(Broken()).measure({name: tmp_path / f"{name}.png" for name in ("white", "black")})
