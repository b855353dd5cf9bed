"""Turns of a conversation: what surrounds a system's replies is the same for all, and decay is a slope.

Run: pytest tests/integration/test_turns_eval.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmga.config import ConfigError, load_config
from llmga.evaluation.conversations import Conversation, conversations_of, prompt_of
from llmga.evaluation.rows import Rows, RowsError
from llmga.evaluation.table_configs import TurnsConfig
from llmga.evaluation.turns import evaluate_turns
from llmga.metrics.result import read_result
from llmga.records import Record, open_manifest, write_manifest
from llmga.runtime import Ranks
from llmga.stage2.recipe import read_recipe
from llmga.toyworld.build import build_world
from tests.toy import toy_mllm_folder
from tests.toy_diffusion import toy_sd_pipeline
from tests.toy_evaluation import anything, perfect, refinement_rows, settings_file, write_pictures

COUNT, TURNS = 30, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flat` paints the request in every turn; `decaying` for fewer and fewer rows."""
    folder = tmp_path_factory.mktemp("figure5")
    rows = refinement_rows(folder, COUNT)
    build_world(folder / "talk", splits={"test": 40}, weights={"chat": 1.0}, sheet=False)
    for turn in range(1, TURNS + 1):
        write_pictures(folder / f"flat/turn{turn}", rows, perfect)

        def forgetful(record: Record, rng: np.random.Generator, turn: int = turn) -> np.ndarray:
            return (anything if int(record.id[-7:]) % TURNS < turn - 1 else perfect)(record, rng)

        write_pictures(folder / f"decaying/turn{turn}", rows, forgetful)
    return folder


def config_for(folder: Path, out: Path, *overrides: str, **changes: Any) -> TurnsConfig:
    settings: dict[str, Any] = {
        "out": str(out),
        "rows": {"path": str(folder / "rows.jsonl")},
        "talk": {"path": str(folder / "talk/test.jsonl"), "tasks": ["qa"]},
        "systems": [{"name": name, "pictures": str(folder / name)} for name in ("flat", "decaying")],
        "turns": TURNS,
        "metrics": ["world"],
        "measure": {"tests": {"bootstrap": 500, "permutations": 99}},
        **changes,
    }
    out.mkdir(parents=True, exist_ok=True)
    return load_config(TurnsConfig, settings_file(out / "settings.yaml", **settings), overrides)


def test_decay_is_a_slope_and_slopes_compare(folder: Path, tmp_path: Path) -> None:
    table = evaluate_turns(config_for(folder, tmp_path), Ranks())
    assert table is not None and "| decaying-turn3 | 30 |" in table
    kept = [read_result(tmp_path / f"decaying-turn{turn}/result.json").metric("kept").value for turn in (1, 2, 3)]
    assert kept[0] == 1 > kept[1] > kept[2]
    found = {
        (c["claim"], c["metric"]): c for c in json.loads((tmp_path / "comparisons.json").read_text())["comparisons"]
    }
    flat, decaying = (found[f"slope of {name}", "kept"] for name in ("flat", "decaying"))
    assert flat["difference"] == 0 and flat["verdict"] == "inconclusive"
    assert decaying["difference"] == pytest.approx((kept[2] - kept[0]) / 2) and decaying["verdict"] == "contradicted"
    less = found["flat decays less than decaying", "kept"]
    assert less["difference"] == pytest.approx(-decaying["difference"]) and less["verdict"] == "supported"
    assert (less["a"], less["b"]) == ("slope of flat", "slope of decaying")


def test_what_others_say_is_the_same_for_all_systems(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, tmp_path)
    rows, talk = Rows(config.rows), Rows(config.talk)
    found = conversations_of(config, rows, talk)
    few = conversations_of(config, Rows(replace(config.rows, max_rows=3)), talk)
    assert few == {id: found[id] for id in rows.ids[:3]}
    one = found[rows.ids[0]]
    assert rows.records[rows.ids[0]].short_caption in one.request and len(one.talk) == TURNS - 1
    assert len({conversation.talk for conversation in found.values()}) > COUNT / 2
    turns = one.until(["first", "second"])
    assert [turn.role for turn in turns] == ["user", "assistant"] * 4 + ["user"]
    assert [turn.content for turn in turns[::4]] == [one.request] * 3
    assert [turns[1].content, turns[5].content] == ["first", "second"] and turns[2].content == one.talk[0][0]
    assert Conversation("Draw.", ()).until([]) == [turns[0].__class__("user", "Draw.")]


def test_a_reply_that_asks_for_nothing_paints_nothing_of_it() -> None:
    assert prompt_of("Sure: <gen_img> a red circle </gen_img>") == "a red circle"
    for reply in ("a red circle", "<gen_img> a </gen_img> <gen_img> b </gen_img>", "<gen_img> a red circle"):
        assert prompt_of(reply) == ""


def test_a_model_answers_and_its_prompts_are_painted(folder: Path, tmp_path: Path) -> None:
    toy_mllm_folder(tmp_path / "mllm")
    toy_sd_pipeline().save_pretrained(tmp_path / "pipeline")
    config = config_for(
        folder,
        tmp_path / "out",
        rows={"path": str(folder / "rows.jsonl"), "max_rows": 4},
        systems=[{"name": "ours", "mllm": str(tmp_path / "mllm"), "pipeline": str(tmp_path / "pipeline")}],
        turns=2,
        max_new_tokens=4,
        answers_at_once=2,
        precision="fp32",
        paint={"steps": 1},
    )
    assert evaluate_turns(config, Ranks(1, 0, 2)) is None
    assert evaluate_turns(config, Ranks(0, 0, 2)) is not None
    asked = read_result(tmp_path / "out/ours-turn2/result.json").metric("asked")
    assert (asked.value, asked.n) == (0, 4)  # a random model writes no tags
    [first, *_] = open_manifest(folder / "rows.jsonl")
    recipes = [read_recipe(tmp_path / f"out/pictures/ours-turn{turn}/{first.id}.png") for turn in (1, 2)]
    assert recipes[0].prompt == "" and recipes[0].seed == recipes[1].seed
    replies = [part for part in (tmp_path / "out/replies/ours").rglob("part-*.npz")]
    assert len(replies) == 4  # two turns of two processes


def test_what_cannot_be_asked_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RowsError, match=r"has \d questions with answers; expected 11"):
        evaluate_turns(config_for(folder, tmp_path, "turns=12", "talk.max_rows=1"), Ranks())
    with pytest.raises(ConfigError, match="expected an MLLM with a pipeline, or a folder"):
        config_for(folder, tmp_path, f"systems.0.mllm={folder}")
    [first, *others] = open_manifest(folder / "rows.jsonl")
    write_manifest(tmp_path / "rows.jsonl", [replace(first, task="similar_image", image="a.png"), *others])
    with pytest.raises(RowsError, match=r"a\.png: rows of this evaluation ask for pictures in words"):
        evaluate_turns(config_for(folder, tmp_path, f"rows.path={tmp_path / 'rows.jsonl'}"), Ranks())
