"""Edits against their targets: doing nothing, doing what was asked, and doing too much are told apart.

Run: pytest tests/integration/test_editing_eval.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmga.config import ConfigError, load_config
from llmga.evaluation.editing import evaluate_editing
from llmga.evaluation.edits import edited_cells
from llmga.evaluation.rows import RowsError
from llmga.evaluation.table_configs import EditingConfig
from llmga.metrics.features import MetricError
from llmga.metrics.result import Result, read_result
from llmga.metrics.weights import MissingWeights
from llmga.records import Record, open_manifest, write_manifest
from llmga.runtime import Ranks
from llmga.toyworld.build import build_world
from llmga.toyworld.edits import Edit
from llmga.toyworld.render import render
from llmga.toyworld.scene import BACKGROUNDS
from tests.toy_evaluation import RANDOM_NETWORK, scene_of, settings_file, toy_clip_folder, write_pictures

COUNT = 30
LOCAL_KINDS = ("recolour", "retexture")


def obedient(record: Record, rng: np.random.Generator) -> np.ndarray:
    """The target, redrawn one pixel aside, as a generative editor does."""
    return np.roll(render(Edit.from_dict(record.meta["edit"]).target), (1, 1), axis=(0, 1))


def careless(record: Record, rng: np.random.Generator) -> np.ndarray:
    """What was asked, on another background."""
    target = Edit.from_dict(record.meta["edit"]).target
    others = [name for name in BACKGROUNDS if name not in (target.background, scene_of(record).background)]
    return render(replace(target, background=others[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table2")
    build_world(folder / "world", splits={"test": 5 * COUNT}, weights={"editing": 1.0}, sheet=False)
    local = [r for r in open_manifest(folder / "world/test.jsonl") if r.meta["edit"]["kind"] in LOCAL_KINDS][:COUNT]
    write_manifest(folder / "world/local.jsonl", local)
    for name, paint in (("obedient", obedient), ("careless", careless)):
        write_pictures(folder / name, folder / "world/local.jsonl", paint)
    toy_clip_folder(folder / "clip")
    return folder


def measured_with(folder: Path) -> dict[str, Any]:
    return {
        "features": RANDOM_NETWORK,
        "clip": {"name": str(folder / "clip")},
        "tests": {"bootstrap": 500, "permutations": 99},
    }


def config_for(folder: Path, out: Path, *overrides: str, **changes: Any) -> EditingConfig:
    settings: dict[str, Any] = {
        "out": str(out),
        "rows": {"path": str(folder / "world/local.jsonl")},
        "systems": [{"name": name, "pictures": str(folder / name)} for name in ("obedient", "careless")],
        "metrics": ["pixels", "clip", "dino", "world"],
        "measure": measured_with(folder),
        **changes,
    }
    out.mkdir(parents=True, exist_ok=True)
    return load_config(EditingConfig, settings_file(out / "settings.yaml", **settings), overrides)


@pytest.fixture(scope="module")
def table(folder: Path) -> str:
    config = config_for(folder, folder / "out")
    assert evaluate_editing(config, Ranks(0, 0, 2)) is None
    text = evaluate_editing(config, Ranks(1, 0, 2))
    assert text is not None
    return text


def results(out: Path) -> dict[str, Result]:
    return {path.parent.name: read_result(path) for path in out.glob("*/result.json")}


def test_joint_success_tells_what_pixel_errors_do_not(folder: Path, table: str) -> None:
    found = results(folder / "out")
    assert set(found) == {"obedient", "careless", "copy", "oracle"}
    share = {name: [found[name].metric(m).value for m in ("requested", "locality", "joint")] for name in found}
    assert share["obedient"] == [1, 1, 1] and share["oracle"] == [1, 1, 1]
    assert share["careless"] == [1, 0, 0] and share["copy"] == [0, 1, 0]
    error = {name: found[name].metric("l1").value for name in found}
    assert error["oracle"] == 0 < error["copy"] < error["obedient"]  # what pixel errors reward
    assert found["copy"].metric("l1_outside").value == 0 < found["copy"].metric("l1_inside").value
    assert found["oracle"].metric("clip_i").value == pytest.approx(1) == found["oracle"].metric("dino").value
    assert found["copy"].metric("preserved").value == 1 and found["copy"].metric("clip_t_target") is not None
    assert "| careless | copy | joint success, % | +0 [+0, +0] |" in table


def test_comparisons_are_with_the_first_system_and_with_doing_nothing(folder: Path, table: str) -> None:
    found = json.loads((folder / "out/comparisons.json").read_text())["comparisons"]
    said = {(each["a"], each["b"], each["metric"]): each["verdict"] for each in found}
    assert said["obedient", "careless", "joint"] == said["obedient", "copy", "joint"] == "supported"
    assert said["obedient", "copy", "l1"] == "contradicted"
    assert said["careless", "copy", "locality"] == "contradicted"
    assert not any("oracle" in (a, b) for a, b, _ in said)


def test_edited_cells_are_where_the_pictures_differ(folder: Path) -> None:
    for record in open_manifest(folder / "world/test.jsonl"):
        edit = Edit.from_dict(record.meta["edit"])
        differs = (render(edit.target) != render(scene_of(record))).any(axis=2)
        mask = edited_cells(edit) > 0
        assert not (differs & ~mask).any() and mask.all() == (edit.kind == "background")


@pytest.fixture(scope="module")
def magicbrush(folder: Path) -> Path:
    """A split as MagicBrush ships it, of two sessions with two turns and one, and a system's results."""
    root = folder / "magicbrush"
    sessions: dict[str, list[dict[str, str]]] = {"139": [], "30": []}
    captions: dict[str, dict[str, str]] = {"139": {}, "30": {}}

    def save(path: Path, grey: int, size: tuple[int, int] = (48, 32)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (grey,) * 3).save(path)

    for session, turn in (("139", 1), ("139", 2), ("30", 1)):
        images = root / "test/images" / session
        before = f"{session}-input.png" if turn == 1 else f"{session}-output{turn - 1}.png"
        target = f"{session}-output{turn}.png"
        sessions[session].append({"input": before, "output": target, "instruction": "Brighter, please."})
        captions[session][target] = f"a grey wall, {turn}"
        save(images / f"{session}-input.png", 0)
        save(images / target, 100 * turn)
    hole = np.full((32, 48, 4), 255, np.uint8)
    hole[:, :24, 3] = 0  # what may change is transparent
    Image.fromarray(hole).save(root / "test/images/30/30-mask1.png")
    save(root / "ours/139/139_1.png", 100, (24, 16))
    save(root / "ours/139/139_inde_2.png", 190)
    save(root / "ours/139/139_iter_2.jpg", 150)
    save(root / "ours/30/30_1.png", 50)
    (root / "test/edit_sessions.json").write_text(json.dumps(sessions))
    (root / "local.json").write_text(json.dumps(captions))
    return root


def brush_config(folder: Path, root: Path, out: Path, *overrides: str) -> EditingConfig:
    return config_for(
        folder,
        out,
        *overrides,
        rows=None,
        magicbrush={"folder": str(root / "test"), "captions": {"local": str(root / "local.json")}},
        systems=[{"name": "ours", "pictures": str(root / "ours")}],
        metrics=["pixels", "clip"],
    )


def test_single_turns_and_last_turns_are_those_of_magicbrush(folder: Path, magicbrush: Path, tmp_path: Path) -> None:
    evaluate_editing(brush_config(folder, magicbrush, tmp_path / "single"), Ranks())
    single = results(tmp_path / "single")
    assert single["ours"].metric("l1").value == pytest.approx((0 + 10 + 50) / 255 / 3)
    assert single["ours"].metric("l2").value == pytest.approx((10**2 + 50**2) / 255**2 / 3)
    assert single["copy"].metric("l1").value == pytest.approx((100 + 100 + 100) / 255 / 3)
    assert (single["ours"].data["n"], single["ours"].metric("l1").n) == (3, 2)  # edits, and sessions
    assert single["ours"].metric("l1_inside").n == 1  # one has a mask
    evaluate_editing(brush_config(folder, magicbrush, tmp_path / "multi", "magicbrush.turns=multi"), Ranks())
    multi = results(tmp_path / "multi")
    assert multi["ours"].metric("l1").value == pytest.approx((50 + 50) / 255 / 2, abs=1e-3)  # a JPEG
    assert multi["copy"].metric("l1").value == pytest.approx((200 + 100) / 255 / 2)
    assert multi["ours"].metric("clip_t_local").n == 2 and "session" not in multi["ours"].data


def test_what_is_missing_is_named(folder: Path, magicbrush: Path, tmp_path: Path) -> None:
    (magicbrush / "ours/30/30_1.png").rename(tmp_path / "30_1.png")
    with pytest.raises(MetricError, match=r"system ours: 1 of 3 pictures are missing: .*30_1\.png"):
        evaluate_editing(brush_config(folder, magicbrush, tmp_path), Ranks())
    (tmp_path / "30_1.png").rename(magicbrush / "ours/30/30_1.png")
    (tmp_path / "none.json").write_text("{}")
    none = f"magicbrush.captions={{local: {tmp_path / 'none.json'}}}"
    with pytest.raises(RowsError, match="lacks the captions of 3 of 3 targets: 139-1, 139-2, 30-1"):
        evaluate_editing(brush_config(folder, magicbrush, tmp_path, none), Ranks())
    with pytest.raises(ConfigError, match="MagicBrush's folder, or rows"):
        config_for(folder, tmp_path, rows=None)
    with pytest.raises(MissingWeights, match="weights of dino-s16 are missing"):
        evaluate_editing(config_for(folder, tmp_path, measure={"clip": {"name": str(folder / "clip")}}), Ranks())
