"""Streaming JSON. Hazards: a value that spans two reads, and a truncated download that passes for a shorter file.

python -m pytest tests/unit/test_json_stream.py
"""

import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmga.json_stream import StreamError, stream_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["é漢😀" * 5, 'a\\"b\n'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS, ascii_only=st.booleans(), indent=st.sampled_from([None, 1, 70]), mark=st.booleans(), lines=st.booleans()
)
@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
def test_rows_are_those_of_json_load(
    read_bytes: int, rows: list[object], ascii_only: bool, indent: int | None, mark: bool, lines: bool
) -> None:
    if lines and rows:  # one value after another
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    data = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_bytes(data)
        streamed = list(stream_rows(path, read_bytes))
    assert [row.value for row in streamed] == rows
    assert [row.row for row in streamed] == list(range(len(rows)))
    for row in streamed:  # each offset is where the row's own text starts
        assert json.JSONDecoder().raw_decode(data[row.offset :].decode())[0] == row.value


@pytest.mark.parametrize("read_bytes", [5, 1 << 20])
def test_every_truncation_is_named_with_its_position(tmp_path: Path, read_bytes: int) -> None:
    rows = [{"a": "x\u00e9y", "b": [1, -2.5e3, None, True]}, {"c": {"d": "\U0001f600"}}, {"e": 17}]
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=2)):
        whole = text.encode()
        for size in range(1, len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(StreamError, match=r"rows\.json\[\d\] .*(the file ends|is not UTF-8)") as error:
                list(stream_rows(path, read_bytes))
            if "middle" in str(error.value):
                assert f"ends at byte {size} in the middle of this row; fetch it again" in str(error.value)


@pytest.mark.parametrize("read_bytes", [3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"a": 1}, {"a" 2}, {"a": "' + "x" * 200 + '"}]',
            r"rows\.json\[1\] \(byte 11\): not valid JSON at byte 16 \(Expecting ':' delimiter\), near",
        ),
        ('[{"é": 1}\n{"a": 2}]', r"\[1\] \(byte 11\): expected ',' or '\]' after a row"),
        ('[{"a": 1}] []', r"\[1\] \(byte 11\): the file goes on after its array"),
        ('[{"a": 1},]', r"\[1\] \(byte 10\): not valid JSON at byte 10"),
        ('[{"a": NaN}]', r"\[0\] \(byte 1\): NaN is not a JSON number"),
        ("[" * 100_000, r"\[0\] .*nested too deep"),
        ("3", r"\[0\] \(byte 0\): expected a JSON array of objects"),
        (" \n", r"expected a JSON array of objects; the file is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer and not the data itself"),
        ("<html>", "is a web page or XML"),
    ],
)
def test_what_is_wrong_is_named_with_row_and_byte(tmp_path: Path, content: str, message: str, read_bytes: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(StreamError, match=message):
        list(stream_rows(path, read_bytes))


@pytest.mark.parametrize("read_bytes", [4, 1 << 20])
def test_a_byte_that_is_not_utf8_is_named(tmp_path: Path, read_bytes: int) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "\xc3\xa9"}, {"a": "caf\xe9"}]')
    with pytest.raises(StreamError, match="byte 0xe9 at position 24 is not UTF-8"):
        list(stream_rows(path, read_bytes))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"rows\.json does not exist"):
        list(stream_rows(tmp_path / "rows.json"))


@pytest.mark.parametrize("start", ["[", "[oops, "])
def test_memory_does_not_grow_with_the_file_nor_with_an_error(tmp_path: Path, start: str) -> None:
    path = tmp_path / "rows.json"
    row = json.dumps({"image": "a.jpg", "caption": "word é " * 200})
    path.write_text(start + ",".join([row] * 3000) + "]")
    tracemalloc.start()
    if start == "[":
        assert sum(1 for _ in stream_rows(path, 1 << 16)) == 3000
    else:
        with pytest.raises(StreamError, match=r"\[0\] \(byte 1\): not valid JSON"):
            list(stream_rows(path, 1 << 16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000 < path.stat().st_size / 4
