"""The manifest. Hazards: a stale or half-written row index, and rows that read differently from how they were written.

python -m pytest tests/unit/test_records.py
"""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmga import row_index
from llmga.record_check import check_record
from llmga.records import Manifest, Record, RecordError, open_manifest, write_manifest

TURNS = ({"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A kite."})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMGA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(path: Path, *lines: str | dict[str, Any], newline: str = "\n") -> Path:
    """A JSON Lines file of the given lines; objects get an id and a task."""
    rows = [
        line if isinstance(line, str) else json.dumps({"id": f"r{n}", "task": "qa", **line})
        for n, line in enumerate(lines)
    ]
    path.write_bytes(newline.join(rows).encode())
    return path


def settled(path: Path) -> Path:
    """The file with a modification time in the past, as files have that nobody writes any more."""
    os.utime(path, ns=(1_000_000_000_000, 1_000_000_000_000))
    return path


# ---------------------------------------------------------------- what is written reads back

TEXT = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.just("long " * 3000) | st.just("a\r\n\u2028b")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
OPTIONAL = st.none() | TEXT
RECORDS = st.builds(
    Record,
    id=TEXT.filter(bool),
    task=st.sampled_from(["qa", "vqa", "editing", "outpainting"]),
    image=OPTIONAL,
    short_caption=OPTIONAL,
    caption=OPTIONAL,
    instruction=OPTIONAL,
    prompt=OPTIONAL,
    licence=OPTIONAL,
    messages=st.none()
    | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}), max_size=4),
    meta=st.dictionaries(TEXT, JSON, max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(RECORDS, max_size=5))
def test_both_forms_give_back_the_very_records(records: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("m.jsonl", "m.parquet"):
            path = Path(folder) / name
            assert write_manifest(path, iter(records)) == len(records)
            assert list(open_manifest(path)) == records


def test_parquet_keeps_order_over_many_batches(tmp_path: Path) -> None:
    records = [Record(id=str(n), task="qa", meta={"n": n} if n % 3 else {}) for n in range(10_000)]
    write_manifest(tmp_path / "m.parquet", records)
    manifest = open_manifest(tmp_path / "m.parquet")
    assert [manifest[n].meta for n in (9_999, 4_096, 4_095, 0)] == [{}, {"n": 4096}, {}, {}]
    assert list(manifest) == records


def test_standard_readers_agree_with_ours(tmp_path: Path) -> None:
    import pyarrow.json
    import pyarrow.parquet

    records = [Record("a", "vqa", image="x/é.jpg", messages=TURNS), Record("b", "qa", caption="line\nbreak")]
    for name, read in (("m.jsonl", pyarrow.json.read_json), ("m.parquet", pyarrow.parquet.read_table)):
        write_manifest(tmp_path / name, records)
        table = read(tmp_path / name).to_pylist()
        assert [row["id"] for row in table] == ["a", "b"]
        assert table[0]["messages"] == list(TURNS)
        assert (table[0]["image"], table[1]["caption"]) == ("x/é.jpg", "line\nbreak")


def test_reading_is_a_sequence(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", (Record(id=str(n), task="qa") for n in range(7)))
    manifest = open_manifest(tmp_path / "m.jsonl")
    assert len(manifest) == 7
    assert [r.id for r in manifest] == list("0123456")
    assert (manifest[-1].id, manifest[-7].id) == ("6", "0")
    assert [r.id for r in manifest[5:1:-2]] == ["5", "3"]
    for index in (7, -8):
        with pytest.raises(IndexError, match=r"m\.jsonl, which has 7 rows"):
            manifest[index]


def test_an_empty_manifest_has_no_rows(tmp_path: Path) -> None:
    for name in ("m.jsonl", "m.parquet"):
        write_manifest(tmp_path / name, [])
        assert list(open_manifest(tmp_path / name)) == []


def test_image_root_is_the_manifests_folder_unless_given(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", {"image": "a/b.jpg"})
    (tmp_path / "pictures").mkdir()
    assert open_manifest(path).image_root == tmp_path
    assert open_manifest(path, tmp_path / "pictures").image_root == tmp_path / "pictures"
    assert open_manifest(path)[0].image == "a/b.jpg"
    with pytest.raises(RecordError, match=r"image_root .*nowhere is not a folder"):
        open_manifest(path, tmp_path / "nowhere")


# ---------------------------------------------------------------- where rows start


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \t\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n   "])
def test_blank_lines_line_ends_and_marks_are_no_rows(tmp_path: Path, newline: str, start: str, end: str) -> None:
    lines = ['{"id": "a", "task": "qa"}', "", "  \t ", '  {"id": "b", "task": "qa"}  ', "", '{"id": "c", "task": "qa"}']
    path = tmp_path / "m.jsonl"
    path.write_bytes((start + "\n".join(lines) + end).replace("\n", newline).encode())
    assert [record.id for record in open_manifest(path)] == ["a", "b", "c"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["{}", " {} ", "", " ", "\t\r", "é", "x" * 9]), max_size=9), st.integers(1, 12))
def test_scan_does_not_depend_on_where_blocks_end(lines: list[str], scan_bytes: int) -> None:
    data = "\n".join(lines).encode()
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        offsets = row_index.scan_rows(file.fileno(), scan_bytes).tolist()
    rows = [data[start:end].strip() for start, end in pairwise(offsets)]
    assert rows == [line.strip() for line in data.split(b"\n") if line.strip()]
    assert offsets[-1] == len(data)


def test_the_index_is_built_once_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = []
    scan = row_index.scan_rows
    monkeypatch.setattr(row_index, "scan_rows", lambda handle: scans.append(1) or scan(handle))
    path = settled(written(tmp_path / "m.jsonl", {"caption": "one"}, {"caption": "two"}))
    for _ in range(3):
        assert len(open_manifest(path)) == 2
    assert len(scans) == 1
    same_size = path.read_bytes().replace(b'"one"}\n', b'"o"  }\n')
    path.write_bytes(same_size)  # same size, other time
    assert [r.caption for r in open_manifest(path)] == ["o", "two"]
    with open(path, "ab") as file:
        file.write(b'\n{"id": "z", "task": "qa"}')
    assert open_manifest(path)[-1].id == "z"


def test_a_file_written_twice_within_a_clock_tick_is_read_anew(tmp_path: Path) -> None:
    first = written(tmp_path / "m.jsonl", '{"id": "a", "task": "qa"}', '{"id": "bbb", "task": "qa"}')
    time_ns = first.stat().st_mtime_ns
    assert [r.id for r in open_manifest(first)] == ["a", "bbb"]
    written(first, '{"id": "aaa", "task": "qa"}', '{"id": "b", "task": "qa"}')
    os.utime(first, ns=(time_ns, time_ns))  # what a coarse clock does
    assert [r.id for r in open_manifest(first)] == ["aaa", "b"]


@pytest.mark.parametrize("damage", [b"", b"LLMGAIX1", b"\0" * 200, b"LLMGAIX1" + b"\xff" * 120])
def test_a_damaged_index_is_replaced(tmp_path: Path, damage: bytes) -> None:
    path = settled(written(tmp_path / "m.jsonl", {}, {}, {}))
    index = tmp_path / ".m.jsonl.index"
    open_manifest(path)
    whole = index.read_bytes()
    index.write_bytes(damage)
    assert len(open_manifest(path)) == 3
    assert index.read_bytes()[-32:] == whole[-32:]


def test_an_index_that_cannot_lie_beside_goes_to_the_cache_folder(tmp_path: Path, own_cache: Path) -> None:
    path = settled(written(tmp_path / "m.jsonl", {}, {}))
    (tmp_path / ".m.jsonl.index").mkdir()  # stops even root from writing there
    assert len(open_manifest(path)) == len(open_manifest(path)) == 2
    assert len(list((own_cache / "index").iterdir())) == 1


def test_an_index_that_can_be_kept_nowhere_stays_in_memory(tmp_path: Path, own_cache: Path) -> None:
    path = written(tmp_path / "m.jsonl", {}, {})
    (tmp_path / ".m.jsonl.index").mkdir()
    own_cache.write_text("a file where the folder should be")
    assert [r.id for r in open_manifest(path)] == ["r0", "r1"]


def _read_all(path: Path, gate: Any, found: Any) -> None:
    gate.wait()
    found.put([record.id for record in open_manifest(path)])


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_many_processes_may_open_a_new_manifest_at_once(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path / name, (Record(id=str(n), task="qa") for n in range(500)))
    context = multiprocessing.get_context("fork")
    gate, found = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_read_all, args=(tmp_path / name, gate, found)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [found.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert answers == [[str(n) for n in range(500)]] * 4
    assert not list(tmp_path.rglob("*.tmp"))


# ---------------------------------------------------------------- workers and changing files


def test_a_manifest_travels_to_workers_as_its_path(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", (Record(id=str(n), task="qa") for n in range(2000)))
    (tmp_path / "pictures").mkdir()
    packed = pickle.dumps(open_manifest(tmp_path / "m.jsonl", tmp_path / "pictures"))
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert isinstance(again, Manifest)
    assert (again[1234].id, again.image_root) == ("1234", tmp_path / "pictures")
    write_manifest(tmp_path / "m.jsonl", [Record(id="new", task="qa")])
    with pytest.raises(RecordError, match=r"m\.jsonl changed after it was opened"):
        pickle.loads(packed)


def test_a_replaced_file_does_not_disturb_who_reads_the_old_one(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", [Record(id="old", task="qa")])
    manifest = open_manifest(tmp_path / "m.jsonl")
    write_manifest(tmp_path / "m.jsonl", [Record(id="new and longer", task="qa")])
    assert manifest[0].id == "old"


@pytest.mark.parametrize("now", [b"", b"x" * 500])
def test_a_file_changed_in_place_is_named(tmp_path: Path, now: bytes) -> None:
    path = written(tmp_path / "m.jsonl", {}, {})
    manifest = open_manifest(path)
    path.write_bytes(now)
    with pytest.raises(RecordError, match=r"m\.jsonl changed after it was opened; open it again"):
        manifest[1]


# ---------------------------------------------------------------- bad rows are named with file, line and column


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a" "task": "qa"}', r"m\.jsonl:4: not valid JSON at column 12 \(Expecting ',' delimiter\), near "),
        (
            '{"id": "a", "task": "q',
            r"m\.jsonl:4: not valid JSON at column 21 \(Unterminated string .*one complete JSON object per line",
        ),
        ('{"id": "a", "task": "qa"} {}', r"m\.jsonl:4: not valid JSON at column 27 \(Extra data\)"),
        ('["a"]', r"m\.jsonl:4: a row must be a JSON object, found a list"),
        ('{"id": "a", "task": "qa", "capton": "x"}', r":4: unknown field 'capton'; did you mean 'caption'\? .*'meta'"),
        ('{"id": "a", "task": "qa", "zzz": "x"}', r":4: unknown field 'zzz'; known are id, task, .* goes into 'meta'"),
        ('{"id": "a", "task": "qa", "caption": 3}', r":4: field 'caption' must be text, found a number"),
        ('{"id": 7, "task": "qa"}', r":4: field 'id' must be text, found a number"),
        ('{"task": "qa"}', r":4: field 'id' is missing or empty"),
        ('{"id": "a"}', r":4: field 'task' is missing; expected one of prompt_refinement, "),
        ('{"id": "a", "task": "inpaint"}', r":4: unknown task 'inpaint'; did you mean 'inpainting'\?"),
        ('{"id": "a", "task": "qa", "meta": []}', r":4: field 'meta' must be a JSON object, found a list"),
        ('{"id": "a", "task": "qa", "messages": {}}', r":4: field 'messages' must be a list of turns, found an object"),
        ('{"id": "a", "task": "qa", "messages": [1]}', r":4: messages\[0\] must hold exactly 'role' and 'content'"),
        (
            '{"id": "a", "task": "qa", "messages": [{"from": "human", "value": "x"}]}',
            r":4: messages\[0\] must hold exactly 'role' and 'content', found the keys \['from', 'value'\]",
        ),
        (
            '{"id": "a", "task": "qa", "messages": [{"role": "gpt", "content": "x"}]}',
            r":4: messages\[0\]\.role is 'gpt', expected 'user' or 'assistant'",
        ),
        (
            '{"id": "a", "task": "qa", "messages": [{"role": "user", "content": null}]}',
            r":4: messages\[0\]\.content must be text, found null",
        ),
        ('{"id": "a", "task": "qa", "meta": {"x": NaN}}', r":4: NaN is not a JSON number"),
        (r'{"id": "a", "task": "qa", "caption": "\ud83d"}', r":4: a text holds .*half of a surrogate pair"),
        ('{"id": "a", "task": "qa", "meta": ' + "[" * 100_000, r":4: values nested too deep"),
    ],
)
def test_a_bad_row_is_named_and_the_others_stay_readable(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path / "m.jsonl", {"caption": "fine"}, "", "  ", line, {"caption": "also fine"})
    manifest = open_manifest(path)
    assert (manifest[0].caption, manifest[2].caption) == ("fine", "also fine")
    with pytest.raises(RecordError, match=message):
        manifest[1]


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(
        b'{"id": "a", "task": "qa"}\n' + '{"id": "b", "task": "qa", "caption": "caf\u00e9"}'.encode("latin-1")
    )
    with pytest.raises(RecordError, match=r":2: byte 0xe9 at position 67 of the file \(column 42\) is not UTF-8"):
        open_manifest(path)[1]


def test_escaped_pairs_are_one_character(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", r'{"id": "a", "task": "qa", "caption": "\ud83d\ude00 \u00e9"}')
    assert open_manifest(path)[0].caption == "\U0001f600 é"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b'\n [{"image": "a"}]', r"is one JSON array.*`format`.*python data_tools/convert\.py .* --format"),
        ("m.jsonl", b"\x1f\x8b\x08\0", "is gzip-compressed: unpack it first"),
        ("m.jsonl", b"PAR1abc", r"is a Parquet file: give it the suffix \.parquet"),
        ("m.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("m.jsonl", b"<!doctype html>", "is a web page or XML"),
        ("m.jsonl", "{}".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ("m.jsonl", b"id,task\n", r"m\.jsonl:1 starts with b'id,task"),
        ("m.parquet", b'{"id": "a", "task": "qa"}', "is not a whole Parquet file"),
    ],
)
def test_what_is_no_manifest_is_said_to_be_what_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        open_manifest(tmp_path / name)


def test_a_missing_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", {})
    with pytest.raises(RecordError, match=r"trian\.jsonl does not exist; did you mean .*/train\.jsonl\?"):
        open_manifest(tmp_path / "trian.jsonl")
    written(tmp_path / ".cache.jsonl", {})
    with pytest.raises(RecordError, match=r"is a folder, expected a file; it holds train\.jsonl$"):
        open_manifest(tmp_path)
    with pytest.raises(RecordError, match="does not exist, and neither does its folder"):
        open_manifest(tmp_path / "nowhere" / "train.jsonl")


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "m.parquet"
    for table, message in (
        ({"id": ["a"], "capton": ["x"]}, r"m\.parquet has the unknown column 'capton'; did you mean 'caption'\?"),
        ({"id": ["a", "b"], "task": ["qa", "vqq"]}, r"m\.parquet\[1\]: unknown task 'vqq'; did you mean 'vqa'\?"),
        (
            {"id": ["a"], "task": ["qa"], "image": [b"bytes"]},
            r"m\.parquet\[0\]: field 'image' must be text, found bytes",
        ),
        ({"id": ["a"], "task": ["qa"], "meta": ["{"]}, r"m\.parquet\[0\]: 'meta' must be JSON text"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        with pytest.raises(RecordError, match=message):
            open_manifest(path)
    write_manifest(path, (Record(id=str(n), task="qa") for n in range(50)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(RecordError, match=r"m\.parquet is not a whole Parquet file, fetch or write it again"):
        open_manifest(path)
    assert not [entry for entry in tmp_path.iterdir() if "jsonl" in entry.name]


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Record(id="x", task="qq"), r"record 1 \(id 'x'\) for .*: unknown task 'qq'"),
        (Record(id="", task="qa"), r"record 1 \(id ''\) for .*: field 'id' is missing"),
        (Record(id="x", task="qa", meta={"a": {1, 2}}), "a value is not JSON: .*set"),
        (Record(id="x", task="qa", meta={"a": float("inf")}), "a value is not JSON"),
        (Record(id="x", task="qa", caption="\ud800"), "half of a surrogate pair"),
    ],
)
def test_a_record_that_cannot_be_written_leaves_everything_as_it_was(
    tmp_path: Path, name: str, bad: Record, message: str
) -> None:
    write_manifest(tmp_path / name, [Record(id="before", task="qa")])
    with pytest.raises(RecordError, match=message):
        write_manifest(tmp_path / name, [Record(id="fine", task="qa"), bad])
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert open_manifest(tmp_path / name)[0].id == "before"


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"ends in \.jsonl or \.parquet, found 'm\.csv'"):
        write_manifest(tmp_path / "m.csv", [])


# ---------------------------------------------------------------- what a task needs

GOOD = {
    "prompt_refinement": {"short_caption": "a kite", "caption": "a red kite over a beach"},
    "similar_image": {"image": "a.jpg", "caption": "a kite"},
    "inpainting": {"image": "a.jpg", "caption": "a kite"},
    "outpainting": {"image": "a.jpg", "caption": "a kite", "mask": "m/a.png"},
    "editing": {"image": "a.jpg", "instruction": "make it blue", "target_caption": "a blue kite"},
    "vqa": {"image": "a.jpg", "messages": TURNS},
    "qa": {"messages": TURNS},
}


@pytest.mark.parametrize("task", GOOD)
def test_a_whole_record_has_no_problem_and_each_lack_is_one(task: str) -> None:
    assert check_record(Record(id="a", task=task, **GOOD[task])) == []
    for name in set(GOOD[task]) - {"mask"}:
        lacking = check_record(Record(id="a", task=task, **{**GOOD[task], name: None}))
        assert len(lacking) == 1
        assert repr(name) in lacking[0]


@pytest.mark.parametrize(
    ("task", "change", "problem"),
    [
        ("editing", {"image": None, "caption": "a kite"}, None),  # the caption stands in for the picture
        ("similar_image", {"caption": " \n"}, "'caption' holds nothing but white space"),
        ("similar_image", {"caption": ""}, "needs 'caption', which is empty"),
        ("similar_image", {"caption": "a </gen_image> b"}, "'caption' is a training target .*'</gen_image>'"),
        ("editing", {"target_caption": "<image> of a kite"}, "'target_caption' .* control text '<image>'"),
        ("editing", {"instruction": "what is <image>?"}, None),  # a person may say anything; it is neutralised
        ("similar_image", {"image": "/a.jpg"}, "'image' is '/a.jpg': expected a path relative to the picture folder"),
        ("similar_image", {"image": "C:\\a.jpg"}, "relative to the picture folder"),
        ("similar_image", {"image": "https://x/a.jpg"}, "relative to the picture folder"),
        ("similar_image", {"image": "a\\b.jpg"}, "expected forward slashes"),
        ("outpainting", {"mask": "../m.png"}, "'mask' is '../m.png': it leaves the picture folder"),
        ("similar_image", {"image": "a/..b/c...jpg"}, None),
        ("qa", {"image": "a.jpg"}, "'qa' is text only, yet 'image' is given"),
        ("qa", {"messages": TURNS[1:]}, r"messages\[0\] is from 'assistant', expected 'user'"),
        ("qa", {"messages": TURNS[:1]}, "the last question has no answer"),
        ("qa", {"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, r"messages\[1\] is empty"),
        ("qa", {"messages": [{"role": "user", "content": ""}, TURNS[1]]}, r"messages\[0\] is empty"),
        ("vqa", {"messages": [{"role": "user", "content": ""}, TURNS[1]]}, None),  # the picture is the question
        ("vqa", {"messages": [*TURNS, {"role": "user", "content": ""}, TURNS[1]]}, r"messages\[2\] is empty"),
    ],
)
def test_problems_are_told_one_by_one(task: str, change: dict[str, Any], problem: str | None) -> None:
    found = check_record(Record(id="a", task=task, **{**GOOD[task], **change}))
    if problem is None:
        assert found == []
    else:
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError(*found)
        assert len(found) == 1


def test_reading_needs_no_deep_learning_library() -> None:
    code = "import sys, llmga.published; print({'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def test_reading_by_position_keeps_no_rows(tmp_path: Path) -> None:
    import tracemalloc

    write_manifest(tmp_path / "m.jsonl", (Record(id=str(n), task="qa", caption="word " * 400) for n in range(2000)))
    manifest = open_manifest(tmp_path / "m.jsonl")
    tracemalloc.start()
    for _ in islice(manifest, 2000):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000  # the file has 4 MB
