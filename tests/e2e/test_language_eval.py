"""eval/language.py from manifest to page: a perfect writer gets full marks, and a random model is measured honestly."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from language import main
from language_items import SHORT_PARTS, TASKS, EvalError, Item, build_items, choose_records
from language_page import mark_facts
from language_scores import COUNTS, compare, score_item, summarise
from language_tables import detail_rows, table, table_rows
from llmga.checkpoint import sha256
from llmga.cli import SHIPPED_MODELS
from llmga.records import Record, write_manifest
from llmga.stage1.tasks import TaskSettings
from llmga.toyworld.build import build_world
from tests.forks import warm_python
from tests.toy import toy_mllm_folder

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "world"
    build_world(folder, rows=64, splits={"test": 300}, sheet=False)
    return folder


@pytest.mark.parametrize("phrasing", ["train", "held_out"])
def test_expected_replies_get_full_marks(world: Path, phrasing: str) -> None:
    records = choose_records(world / "test.jsonl", dict.fromkeys(TASKS, 6))
    settings = TaskSettings(picture_size=64, phrasing=phrasing)  # type: ignore[arg-type]
    items = list(build_items(records, world, settings, seed=0))
    rows = [score_item("tuned", item, item.expected) for item in items]
    found = {(m["task"], m["name"]): m["value"] for m in summarise(rows)}
    assert found.pop(("all", "tags_where_none_belong")) == 0
    for (task, name), value in found.items():
        if name == "clip_tokens":
            assert 100 <= value <= 200, task
        elif name.partition(":")[0] in COUNTS:
            assert 2 <= value <= 15, task
        elif name == "themed":
            assert 0.7 <= value < 1  # as usual as scenes are
        elif name != "tags_where_none_belong":
            assert value == 1, (task, name)
    assert "| editing: joint success | 100.0 %" in table(summarise(rows))


def test_what_a_record_is_asked_does_not_depend_on_the_others(world: Path) -> None:
    settings = TaskSettings(picture_size=64)

    def asked(rows: int) -> dict[str, tuple[object, object]]:
        records = choose_records(world / "test.jsonl", dict.fromkeys(("inpainting", "prompt_refinement"), rows))
        items = build_items(records, world, settings, seed=0)
        return {i.id: (i.turns[-1].content, i.example.picture and i.example.picture.tobytes()) for i in items}

    few, many = asked(4), asked(12)
    assert len(few) == 8 and len(many) == 24
    assert few == {id: many[id] for id in few}
    assert len({picture for _, picture in few.values()}) == 5  # four masks, and refinements without a picture


def test_every_kind_of_edit_and_question_is_measured_by_itself(world: Path) -> None:
    records = choose_records(world / "test.jsonl", {"editing": 40, "vqa": 40})
    records = [record for record in records if record.meta.get("part") not in SHORT_PARTS]
    items = list(build_items(records, world, TaskSettings(picture_size=64), seed=0))
    kinds = {record.id: record.meta["edit"]["kind"] for record in records if record.task == "editing"}

    def said(item: Item) -> str:  # wrong in recolouring and in counting, right elsewhere
        return "?" if item.detail in ("recolour", "count") else item.expected

    metrics = summarise([score_item("tuned", item, said(item)) for item in items])
    joint = {m["name"]: m for m in metrics if m["name"].startswith("joint:")}
    assert {name: m["n"] for name, m in joint.items()} == Counter(f"joint:{kind}" for kind in kinds.values())
    assert {name for name, m in joint.items() if m["value"] < 1} == {"joint:recolour"}
    asked = {m["name"]: m for m in metrics if m["name"].startswith("exact_match:")}
    assert {name for name, m in asked.items() if m["value"] < 1} == {"exact_match:count"}
    assert asked["exact_match:count"]["value"] == 0
    questions = Counter(kind for record in records if record.task == "vqa" for kind in record.meta["questions"])
    assert {name.partition(":")[2] for name in asked} == set(questions)
    words = [row[0] for row in table_rows(metrics, detail_rows(metrics))]
    assert len(words) == len(joint) + len(asked) + 1 + 5  # validity of edits, and their five kinds of attributes
    assert "editing, recolour: joint success" in words and "editing: valid prompt" in words
    assert "editing, colour: right (chance 12 %)" in words
    assert "recolour" not in table(metrics)


def test_an_answer_that_never_changes_is_at_chance(world: Path) -> None:
    records = choose_records(world / "test.jsonl", {"vqa": 60})
    items = list(build_items(records, world, TaskSettings(picture_size=64), seed=0))
    metrics = {m["name"]: m for m in summarise([score_item("tuned", item, "No.") for item in items])}
    yes_no = metrics["exact_match:is_background"]
    assert yes_no["chance"] in (yes_no["value"], 1 - yes_no["value"]) and yes_no["chance"] >= 0.5
    assert metrics["exact_match:colour"]["value"] == 0 and metrics["exact_match:colour"]["beyond_chance"] < 0
    assert "chance" not in metrics["exact_match"]


def test_scenes_are_described_briefly_and_in_note_form(world: Path) -> None:
    records = choose_records(world / "test.jsonl", {"short_description": 20})
    items = list(build_items(records, world, TaskSettings(picture_size=64), seed=0))
    assert Counter(item.detail for item in items) == {"brief": 20, "medium": 20}
    assert all(item.example.picture is not None for item in items)
    others = items[4:] + items[:4]
    rows = [score_item("tuned", item, item.expected) for item in items]
    rows += [score_item("base", item, other.expected) for item, other in zip(items, others, strict=True)]
    found = {(m["system"], m["name"]): m["value"] for m in summarise(rows)}
    for part in ("brief", "medium"):
        assert found["tuned", f"valid:{part}"] == found["tuned", f"all_true:{part}"] == 1
        assert found["base", f"valid:{part}"] == 1 and found["base", f"all_true:{part}"] < 0.2
        assert found["base", f"true_facts:{part}"] < 0.6
    assert f"| described briefly: valid, and every fact true | {100:.1f} %" in table(summarise(rows))


def test_a_record_that_no_reply_could_be_scored_by_is_named_before_any_is_asked(world: Path, tmp_path: Path) -> None:
    [similar, editing] = choose_records(world / "test.jsonl", {"similar_image": 1, "editing": 1})

    def refused(record: Record, meta: dict) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        write_manifest(path, [replace(record, id="theirs", meta=meta)])
        with pytest.raises(EvalError) as caught:
            choose_records(path, {record.task: 1})
        assert str(path) in str(caught.value) and "build_world.py" in str(caught.value)
        return str(caught.value)

    no_kind = {key: value for key, value in editing.meta["edit"].items() if key != "kind"}
    assert "record 'theirs', task similar_image: meta.scene is missing" in refused(similar, {})
    assert "meta.edit is missing" in refused(editing, {"scene": editing.meta["scene"]})
    assert "meta.edit cannot be read (KeyError: 'kind')" in refused(editing, {**editing.meta, "edit": no_kind})
    assert "meta.scene cannot be read (KeyError: 'huge')" in refused(
        similar, {"scene": {**similar.meta["scene"], "preset": "huge"}}
    )


def test_swapped_replies_do_not(world: Path) -> None:
    records = choose_records(world / "test.jsonl", dict.fromkeys(("similar_image", "editing", "vqa"), 12))
    items = list(build_items(records, world, TaskSettings(picture_size=64), seed=0))
    rows = []
    for task in ("similar_image", "editing", "vqa"):
        own = [item for item in items if item.record.task == task]
        rows += [score_item("tuned", item, other.expected) for item, other in zip(own, own[1:] + own[:1], strict=True)]
    found = {(m["task"], m["kind"], m["name"]): m["value"] for m in summarise(rows)}
    assert found["similar_image", "generation", "attributes"] < 0.6
    assert found["editing", "generation", "joint"] < 0.1
    assert found["vqa", "chat", "exact_match"] < 0.5


def test_difference_is_paired_by_question(world: Path) -> None:
    records = choose_records(world / "test.jsonl", {"vqa": 30})
    records = [record for record in records if record.meta["part"] not in SHORT_PARTS]
    items = list(build_items(records, world, TaskSettings(picture_size=64), seed=0))
    rows = [score_item("tuned", item, item.expected) for item in items]
    rows += [score_item("base", item, item.expected if index % 4 else "no idea") for index, item in enumerate(items)]
    comparison, *by_kind = compare(rows)
    wrong = -(-len(items) // 4)
    assert comparison["difference"] == pytest.approx(wrong / len(items))
    assert comparison["questions"] == len(items) == sum(kind["questions"] for kind in by_kind)
    assert {kind["name"] for kind in by_kind} == {f"exact_match:{item.detail}" for item in items}
    assert 0 < comparison["ci_low"] < comparison["difference"] < comparison["ci_high"] < 0.5
    assert compare([row for row in rows if row["system"] == "tuned"]) == []


def test_command_writes_result_items_and_page(world: Path, tmp_path: Path) -> None:
    model, out = toy_mllm_folder(tmp_path / "model"), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "picture_size": 32}))  # as a finished run leaves it
    command = [warm_python(), "eval/language.py", "--model", model, "--base", model, "--data", world / "test.jsonl"]
    command += ["--out", out, "--rows", "2", "--vqa-rows", "2", "--max-new-tokens", "4"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert "well-formed tags on generation requests" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["protocol"]["records"] == 2 * (len(TASKS) + 1)  # both short descriptions of a scene
    assert result["protocol"]["data_sha256"] == sha256(world / "test.jsonl")
    hashes = {path.name: sha256(path) for path in model.glob("*.safetensors")}
    assert hashes and result["weights"] == {"tuned": hashes, "base": hashes}
    methods = {m["ci_method"] for m in result["metrics"] if m["name"] == "tags_well_formed"}
    assert methods == {"Wilson score"}
    assert result["protocol"]["picture_size"] == 32
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert {row["system"] for row in rows} == {"tuned", "base"}
    pairs = [row["scores"]["tags_well_formed"] for row in rows if row["kind"] == "generation"]
    assert all(pair == [0, 1] for pair in pairs)  # a random model writes no tags
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") > 5
    assert "By kind and attribute" in page and ": joint success</td>" in page
    assert 'src="http' not in page


def test_the_shipped_tuned_model_does_what_it_is_shipped_for(world: Path, tmp_path: Path) -> None:
    model = SHIPPED_MODELS / "tuned/mllm"
    arguments = ["--model", model, "--no-base", "--data", world / "test.jsonl", "--out", tmp_path / "out"]
    assert main([str(part) for part in [*arguments, "--rows", 8, "--vqa-rows", 8, "--tasks", *TASKS]]) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    found = {(m["task"], m["kind"], m["name"]): m["value"] for m in result["metrics"]}
    assert found["all", "generation", "tags_well_formed"] == 1
    assert found["all", "other", "tags_where_none_belong"] == 0
    assert found["similar_image", "generation", "attributes"] >= 0.9
    assert found["inpainting", "generation", "attributes"] >= 0.9
    assert found["prompt_refinement", "generation", "past_clip_window"] == 1
    assert found["prompt_refinement", "generation", "constraints"] >= 0.9
    assert found["editing", "generation", "joint"] >= 0.6
    assert found["vqa", "chat", "exact_match"] >= 0.6


@pytest.mark.parametrize(("option", "said"), [("--out", "is a file, expected a folder"), ("--publish", "is a file")])
def test_what_could_not_be_written_is_told_before_any_reply(
    world: Path, tmp_path: Path, option: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_file").touch()
    target = tmp_path / "a_file" / ("result.json" if option == "--publish" else "")
    arguments = ["--model", "/no/where", "--data", world / "test.jsonl", "--out", tmp_path / "out", option, target]
    assert main([str(part) for part in arguments]) == 2
    assert capsys.readouterr().err.startswith(f"{option}: {tmp_path / 'a_file'} {said}")
    assert not (tmp_path / "out").exists()


def test_missing_manifest_names_the_way_out(tmp_path: Path) -> None:
    command = [sys.executable, "eval/language.py", "--data", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "build_world.py" in done.stderr


def test_only_tags_are_marked_where_another_answer_is_as_right() -> None:
    reply = "<gen_img> Top left small plain red circle. </gen_img>"
    assert 'class="right"' not in mark_facts(reply, reply, judge=False)
    assert 'class="wrong"' not in mark_facts(reply, "Top left large plain blue circle.", judge=False)
    assert mark_facts(reply, reply, judge=False).count('class="tag"') == 2
    assert 'class="right">red' in mark_facts(reply, reply)
    assert 'class="wrong">red' in mark_facts(reply, "Top left large plain blue circle.")


def test_what_a_mask_hides_is_neither_right_nor_wrong() -> None:
    truth = "Top left large plain blue circle. Top right large plain red square. On navy."
    reply = "Top left small plain red circle. Top right large plain red square. Bottom left large plain red square."
    shown = mark_facts(reply, truth, hidden=[0, 2])
    assert 'class="wrong"' not in shown
    assert shown.count('class="hidden"') == 8 and shown.count('class="right"') == 4
    assert mark_facts(reply, truth).count('class="wrong"') == 2 + 4  # size and colour, and an object too many


def test_facts_are_marked_on_any_grid() -> None:
    truth = "Middle right large plain blue circle. On navy."
    assert mark_facts(truth, truth, grid=3).count('class="right"') == 5
    assert 'class="wrong">red' in mark_facts("Middle right large plain red circle", truth, grid=3)


def test_rows_tell_what_their_mask_hides(world: Path) -> None:
    records = choose_records(world / "test.jsonl", {"inpainting": 12, "similar_image": 2, "qa": 1})
    items = list(build_items(records, world, TaskSettings(picture_size=64), seed=0))
    rows = [score_item("tuned", item, item.expected) for item in items]
    hidden = {row["task"]: [] for row in rows}
    for row in rows:
        assert row.get("grid") == (None if row["task"] == "qa" else 2)
        hidden[row["task"]].append(row.get("hidden"))
    assert hidden["similar_image"] == [[], []]
    masked = [cells for task in ("inpainting", "outpainting") for cells in hidden.get(task, [])]
    assert len(masked) == 12 and any(masked) and set().union(*masked) <= {0, 1, 2, 3}
