"""Published formats. Hazards: a row lost in silence, a placeholder that stays in the text, a truncated download.

python -m pytest tests/unit/test_published.py
"""

import importlib.util
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmga.json_stream import StreamError
from llmga.published import FORMATS, BadRow, PublishedError, Report, convert_published, manifest_of, read_published
from llmga.published_rows import guess_formats
from llmga.record_check import check_record
from llmga.records import Record, RecordError, open_manifest, write_manifest

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests" / "fixtures" / "llmga-datasetv2-mini"
JSONS, BAD = MINI / "jsons", MINI / "bad"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMGA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(tmp_path: Path, format: str, *rows: Any) -> tuple[list[Record], Report]:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    report = Report(path, format)
    return list(read_published(path, format, report)), report


def chat(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {**fields, "conversations": [{"from": who, "value": text} for who, text in turns]}


# ---------------------------------------------------------------- good rows

LEGACY = "llmga_edit_legacy_drop_last_char"
SETS = {
    "llmga_t2i": (JSONS / "llmga-data/T2I/train.json", 8, "prompt_refinement"),
    "llmga_sg": (JSONS / "llmga-data/SG/train.json", 8, "similar_image"),
    "llmga_inpainting": (JSONS / "llmga-data/inpainting/train.json", 8, "inpainting"),
    "llmga_edit": (JSONS / "llmga-data/Edit/train.json", 8, "editing"),
    "llava": (JSONS / "llava_v1_5_mix665k.json", 5, None),
    "sharegpt": (JSONS / "text-data/lima.json", 2, "qa"),
}


@pytest.mark.parametrize("format", SETS)
def test_every_row_of_a_published_set_becomes_a_record_that_can_train(format: str) -> None:
    path, count, task = SETS[format]
    report = Report(path, format)
    records = list(read_published(path, format, report))
    assert (report.rows, report.records, report.bad) == (count, count, [])
    assert [problem for record in records for problem in check_record(record)] == []
    assert len({record.id for record in records}) == count
    assert task is None or {record.task for record in records} == {task}


def test_fields_go_where_they_belong() -> None:
    def first(format: str) -> tuple[Record, dict[str, Any]]:
        path = SETS[format][0]
        return next(iter(read_published(path, format))), json.loads(path.read_text())[0]

    record, row = first("llmga_t2i")
    assert (record.short_caption, record.caption, record.image) == (row["ori_caption"], row["caption"], row["image"])
    assert (record.id, record.source, record.split) == ("llmga_t2i-0000000", "llmga_t2i/COCO", "train")
    record, row = first("llmga_sg")
    assert (record.caption, record.image) == (row["caption"], "COCO/train2017/000000000001.jpg")
    record, row = first("llmga_edit")
    assert (record.caption, record.target_caption) == (row["ori_caption"], row["new_caption"])
    assert record.instruction == "Change the orange suit to a white suit."  # the published row ends in a line break
    record, row = first("llava")
    assert (record.task, record.source, record.meta) == ("vqa", "llava/coco", {"id": "000000000000"})
    assert record.messages is not None
    assert record.messages[0] == {"role": "user", "content": "What is the main thing in this picture?"}
    assert [message["role"] for message in record.messages] == ["user", "assistant", "user", "assistant"]
    record, _ = first("sharegpt")
    assert (record.task, record.image, record.meta) == ("qa", None, {"id": "lima_0"})


def test_text_only_rows_of_llava_are_questions_and_answers() -> None:
    tasks = [record.task for record in read_published(SETS["llava"][0], "llava")]
    assert tasks == ["vqa", "vqa", "vqa", "vqa", "qa"]


def test_extra_fields_are_let_through(tmp_path: Path) -> None:
    rows = {"image": "a.jpg", "caption": "a kite", "width": 640, "aesthetic": 6.1, "url": None}
    (record,), report = read(tmp_path, "llmga_sg", rows)
    assert record == Record(
        "llmga_sg-0000000", "similar_image", "a.jpg", caption="a kite", source="llmga_sg", split="train"
    )
    assert report.bad == []


@pytest.mark.parametrize(
    ("instruction", "kept", "note"),
    [
        ("Make it blue, ", "Make it blue", "instruction: trailing comma removed"),
        ("Make it blue,,", "Make it blue,", "instruction: trailing comma removed"),
        ("Make it blue.\n", "Make it blue.", None),
        ("<image>\nMake it blue", "Make it blue", None),
    ],
)
def test_an_instruction_loses_one_trailing_comma_and_its_placeholder(
    tmp_path: Path, instruction: str, kept: str, note: str | None
) -> None:
    (record,), report = read(tmp_path, "llmga_edit", {"image": "a.jpg", "instruction": instruction, "new_caption": "b"})
    assert record.instruction == kept
    expected = {} if "<image>" in instruction else {"picture without placeholder": 1}
    assert report.notes == {**expected, **({note: 1} if note else {})}


@pytest.mark.parametrize("instruction", ["Make it blue,", "Make it blue.", "Make it blue\n", "<image>\nMake it blue!"])
def test_an_instruction_loses_whatever_comes_last_where_the_published_code_is_followed(
    tmp_path: Path, instruction: str
) -> None:
    (record,), report = read(tmp_path, LEGACY, {"image": "a.jpg", "instruction": instruction, "new_caption": "b"})
    assert record.instruction == "Make it blue"
    assert report.notes["instruction: last character removed"] == 1


def test_editing_takes_the_caption_where_there_is_no_picture(tmp_path: Path) -> None:
    row = {"ori_caption": "a red kite", "instruction": "Make it blue", "new_caption": "a blue kite"}
    (record,), _ = read(tmp_path, "llmga_edit", row)
    assert (record.image, record.caption) == (None, "a red kite")
    assert check_record(record) == []


@pytest.mark.parametrize(
    ("turns", "contents", "note"),
    [
        ([("human", "<image>\nWhat?"), ("gpt", "A kite.")], ["What?", "A kite."], None),
        ([("human", "What?\n<image>"), ("gpt", "A kite.")], ["What?", "A kite."], None),
        ([("human", "What?"), ("gpt", "A kite.")], ["What?", "A kite."], "picture without placeholder"),
        (
            [("human", "Hello"), ("gpt", "Hi"), ("human", "<image>\nWhat?"), ("gpt", "A kite.")],
            ["Hello", "Hi", "What?", "A kite."],
            "picture moved to the first question",
        ),
        (
            [("human", "<image>\nWhat?"), ("gpt", "A kite."), ("human", "<image> And?"), ("gpt", "Sky.")],
            ["What?", "A kite.", "And?", "Sky."],
            "several placeholders for one picture",
        ),
        (
            [("gpt", "Hi"), ("human", "<image>\nWhat?"), ("gpt", "A kite.")],
            ["What?", "A kite."],
            "first turn dropped: an answer without a question",
        ),
        (
            [("human", "<image>\nWhat?"), ("gpt", "A kite."), ("human", "And?")],
            ["What?", "A kite."],
            "last turn dropped: a question without an answer",
        ),
        (
            [("human", "<image>\nWhat?"), ("gpt", " "), ("human", "And?"), ("gpt", "Sky.")],
            ["And?", "Sky."],
            "empty turn dropped with its partner",
        ),
        ([("human", "<image>"), ("gpt", "A kite.")], ["", "A kite."], None),
        (
            [("human", "<image>"), ("gpt", "A kite."), ("human", ""), ("gpt", "Sky.")],
            ["", "A kite."],
            "empty turn dropped with its partner",
        ),
        (
            [("system", "Be brief."), ("human", "<image>\nWhat?"), ("gpt", "A kite.")],
            ["What?", "A kite."],
            "system turn dropped",
        ),
    ],
)
def test_a_conversation_is_made_whole_and_the_change_is_counted(
    tmp_path: Path, turns: list[tuple[str, str]], contents: list[str], note: str | None
) -> None:
    (record,), report = read(tmp_path, "llava", chat(*turns, image="a.jpg"))
    assert record.messages is not None
    assert [message["content"] for message in record.messages] == contents
    assert check_record(record) == []
    assert report.notes == ({note: 1} if note else {})


def test_a_placeholder_in_a_text_set_is_just_text(tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, "sharegpt", chat(("human", "What is <image> in SVG?"), ("gpt", "An element.")))
    assert record.messages is not None
    assert record.messages[0]["content"] == "What is <image> in SVG?"


# ---------------------------------------------------------------- bad rows and files


def test_bad_rows_of_the_picture_set_are_all_named() -> None:
    report = Report(BAD / "SG/train.json", "llmga_sg")
    records = list(read_published(report.path, "llmga_sg", report))
    assert [(bad.row, bad.reason) for bad in report.bad] == [
        (4, "'image' is '../../outside.jpg': it leaves the picture folder"),
        (9, "'caption' is empty"),
        (10, "'caption' is missing"),
        (11, "'image' is missing"),
        (12, "'caption' must be text, found list"),
        (13, "'caption' holds the control text '<gen_image>'"),
        (14, "'caption' holds the control text '<image>'"),
    ]
    assert (report.rows, report.records, len(records)) == (15, 8, 8)
    text = report.path.read_text()
    assert text[report.bad[0].offset :].lstrip("{\n ").startswith('"image": "../../outside.jpg"')


def test_bad_conversations_are_all_named() -> None:
    report = Report(BAD / "vqa.json", "llava")
    (record,) = read_published(report.path, "llava", report)
    assert record.meta == {"id": "1"}
    assert [(bad.row, bad.reason) for bad in report.bad] == [
        (1, "conversations[0] has the placeholder '<image>', but the row has no picture"),
        (2, "the conversation has an answer and no question"),
        (3, "the conversation is empty"),
        (4, "the conversation has a question and no answer"),
    ]
    assert report.notes == {"picture without placeholder": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "a row must be an object, found int"),
        ({"image": "a.jpg"}, "'conversations' is missing"),
        ({"conversations": {}}, "'conversations' must be a list of turns"),
        ({"conversations": ["x"]}, "conversations[0] must be an object with the texts 'from' and 'value'"),
        (chat(("function", "x")), "conversations[0].from is 'function', expected 'human' or 'gpt'"),
        (chat(("human", "a"), ("human", "b"), ("gpt", "c")), "turns do not alternate: 'user' comes where 'assistant'"),
        (chat(("human", ""), ("gpt", "c")), "every turn of the conversation is empty"),
        (chat(("human", "a"), ("gpt", "\ud800")), "conversations[1] holds half of a surrogate pair"),
        (chat(("human", "a"), ("gpt", "b"), image=["a.jpg", "b.jpg"]), "'image' must be text, found list"),
        (chat(("human", "a"), ("gpt", "b"), image=""), "'image' is empty"),
        (chat(("human", "a"), ("gpt", "b"), image="/data/a.jpg"), "expected a path relative to the picture folder"),
    ],
)
def test_a_row_that_cannot_train_is_skipped_with_its_reason(tmp_path: Path, row: Any, reason: str) -> None:
    fine = chat(("human", "a"), ("gpt", "b"))
    records, report = read(tmp_path, "llava", fine, row, fine)
    assert [record.id for record in records] == ["llava-0000000", "llava-0000002"]
    assert [bad.row for bad in report.bad] == [1]
    assert reason in report.bad[0].reason
    assert list(report.name_bad()) == [f"{report.path}[1]: {report.bad[0].reason}"]


def test_windows_paths_get_forward_slashes(tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, "llmga_sg", {"image": ".\\COCO\\a.jpg", "caption": "a kite"})
    assert record.image == "COCO/a.jpg"


def test_without_a_report_skipped_rows_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert len(list(read_published(BAD / "vqa.json", "llava"))) == 1
    assert "vqa.json[3] skipped: the conversation is empty" in caplog.text
    assert "as llava: 1 of 5 rows became records, 4 skipped" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("T2I/train.json", r"T2I/train\.json\[0\] \(byte 1\): the file ends at byte 50 in the middle of this row"),
        ("latin1.json", r"latin1\.json\[0\] or soon after: byte 0xe9 at position 32 is not UTF-8 .*; save the file as"),
    ],
)
def test_a_file_that_is_not_whole_gives_no_manifest(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        convert_published(BAD / name, "llmga_t2i", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_wrong_format_is_found_out_and_the_right_one_offered(tmp_path: Path) -> None:
    with pytest.raises(PublishedError, match=r"'caption' is missing\); it looks like format 'llava'"):
        list(read_published(SETS["llava"][0], "llmga_sg"))
    with pytest.raises(PublishedError, match="it looks like format 'llmga_sg' or 'llmga_inpainting'"):
        list(read_published(SETS["llmga_sg"][0], "sharegpt"))
    write_manifest(tmp_path / "m.jsonl", [Record(id="a", task="qa")])
    with pytest.raises(PublishedError, match="it looks like format 'manifest'"):
        list(read_published(tmp_path / "m.jsonl", "llava"))
    with pytest.raises(PublishedError, match=r"none of the first 1000 rows .* can be read as 'llava'"):
        read(tmp_path, "llava", *[{"image": "a.jpg", "caption": "a kite"}] * 1500)
    with pytest.raises(PublishedError, match=r"unknown format 'lava' .*; did you mean 'llava'\?"):
        read_published(SETS["llava"][0], "lava")
    for format in set(FORMATS) - {"llmga_inpainting", LEGACY}:
        assert guess_formats(json.loads(SETS[format][0].read_text())[0])[0] == format


# ---------------------------------------------------------------- converted once


def test_a_converted_set_is_kept_until_its_file_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train.json"
    path.write_bytes((BAD / "SG/train.json").read_bytes())
    os.utime(path, ns=(10**18, 10**18))
    caplog.set_level(logging.WARNING)
    first = manifest_of(path, "llmga_sg", tmp_path / "converted", MINI / "llmga-imgs")
    assert (len(first), first[7].id, first.image_root) == (8, "llmga_sg-0000008", MINI / "llmga-imgs")
    assert "8 of 15 rows became records, 7 skipped" in caplog.text
    report = Report.load(next((tmp_path / "converted").glob("*.report.json")))
    assert (report.path, report.rows, report.bad[1]) == (
        path,
        15,
        BadRow(9, report.bad[1].offset, "'caption' is empty"),
    )
    again = manifest_of(path, "llmga_sg", tmp_path / "converted")
    assert (again.path, again.path.stat().st_mtime_ns) == (first.path, first.path.stat().st_mtime_ns)
    assert again.image_root == tmp_path
    assert manifest_of(path, "llmga_inpainting", tmp_path / "converted")[0].task == "inpainting"
    path.write_text('[{"image": "a.jpg", "caption": "a kite"}]')
    assert len(manifest_of(path, "llmga_sg", tmp_path / "converted")) == 1
    assert first[0].caption == "x"  # whoever reads the old one still does


def test_rows_of_a_converted_set_are_named_by_their_published_place(tmp_path: Path) -> None:
    manifest = manifest_of(BAD / "SG/train.json", "llmga_sg", tmp_path)
    for again in (manifest, pickle.loads(pickle.dumps(manifest))):
        assert [again.where(index) for index in (0, 4, 7)] == [f"{BAD}/SG/train.json[{row}]" for row in (0, 5, 8)]
        assert list(again) == list(manifest)
    with pytest.raises(RecordError, match=r"image_root .*nowhere is not a folder"):
        manifest_of(BAD / "SG/train.json", "llmga_sg", tmp_path, tmp_path / "nowhere")


def test_a_manifest_is_opened_as_it_is(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", [Record(id="a", task="qa")])
    assert manifest_of(tmp_path / "m.jsonl").path == tmp_path / "m.jsonl"
    with pytest.raises(PublishedError, match=r"m\.json does not exist; did you mean .*m\.jsonl\?"):
        manifest_of(tmp_path / "m.json", "llava")
    with pytest.raises(RecordError, match="is one JSON array"):
        manifest_of(SETS["llava"][0])


def test_the_photos_config_names_files_and_pictures_that_exist(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/stage1/photos.yaml").read_text())
    formats, pictures = set(), {"sources": set[str](), "validation": set[str]()}
    for part, source in [(name, entry) for name in pictures for entry in config["data"][name]]:
        root = ROOT / source["image_root"] if "image_root" in source else None
        manifest = manifest_of(ROOT / source["path"], source["format"], tmp_path, root)
        formats.add(source["format"])
        assert len(manifest) > 0
        for record in manifest[: source.get("max_rows")]:
            assert record.image is None or (manifest.image_root / record.image).is_file()
            pictures[part].add(Path(record.image or "").name)
    assert formats == set(FORMATS) - {LEGACY}
    assert len(pictures["validation"]) == 3 and pictures["validation"].isdisjoint(pictures["sources"])


# ---------------------------------------------------------------- the command


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: exit code, what it printed, what it complained."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "data_tools" / "convert.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = module.main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return run


def test_convert_names_what_it_skipped_and_writes_a_report(tmp_path: Path) -> None:
    out = tmp_path / "sg.parquet"
    command = [sys.executable, "data_tools/convert.py", BAD / "SG/train.json", "--format", "llmga_sg", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"skipped {BAD}/SG/train.json[11]: 'image' is missing\n" in done.stdout
    assert done.stdout.endswith(f"as llmga_sg: 8 of 15 rows became records, 7 skipped; wrote {out}\n")
    assert len(open_manifest(out)) == 8
    report = json.loads((tmp_path / "sg.parquet.report.json").read_text())
    assert [bad["row"] for bad in report["bad"]] == [4, 9, 10, 11, 12, 13, 14]


def test_convert_fails_on_skipped_rows_when_asked(tmp_path: Path, convert: Callable[..., tuple[int, str, str]]) -> None:
    arguments = (BAD / "vqa.json", "--format", "llava", "--out", tmp_path / "out.jsonl")
    assert convert(*arguments)[0] == 0
    assert convert(*arguments, "--strict")[0] == 2


def test_convert_turns_our_own_rows_from_one_form_into_another(
    tmp_path: Path, convert: Callable[..., tuple[int, str, str]]
) -> None:
    array = tmp_path / "rows.json"
    array.write_text('[{"id": "a", "task": "qa"}, {"id": "b", "task": "vqa", "meta": {"n": 1}}]')
    assert convert(array, "--format", "manifest", "--out", tmp_path / "m.parquet")[0] == 0
    assert convert(tmp_path / "m.parquet", "--format", "manifest", "--out", tmp_path / "m.jsonl")[0] == 0
    assert list(open_manifest(tmp_path / "m.jsonl")) == [Record("a", "qa"), Record("b", "vqa", meta={"n": 1})]


@pytest.mark.parametrize(
    ("path", "format", "message"),
    [
        (BAD / "T2I/train.json", "llmga_t2i", "the file ends at byte 50 in the middle of this row; fetch it again\n"),
        (BAD / "nothing.json", "llava", "nothing.json does not exist"),
        (JSONS / "text-data/lima.json", "manifest", "lima.json[0] (byte 3): unknown field 'conversations'"),
    ],
)
def test_convert_says_in_one_line_why_it_cannot(
    tmp_path: Path, convert: Callable[..., tuple[int, str, str]], path: Path, format: str, message: str
) -> None:
    code, out, complaint = convert(path, "--format", format, "--out", tmp_path / "out.jsonl")
    assert (code, out, complaint.count("\n")) == (2, "", 1)
    assert message in complaint
    assert list(tmp_path.iterdir()) == []
