"""Bad input, one named answer each: the fixture folder `bad/`, and everything else that data sets have thrown at us.

What the check calls an error must keep the row out of training, and what it calls fine must train; so each picture is
also opened as training opens it.

python -m pytest tests/integration/test_check_bad_input.py
"""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmga.check.kinds import KINDS
from llmga.images import PictureError, open_picture
from llmga.json_stream import StreamError
from llmga.published import manifest_of, read_published
from tests.check_data import Result, check, data_set, photo, row

MINI = Path(__file__).parents[1] / "fixtures" / "llmga-datasetv2-mini"
BAD = MINI / "bad"


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return check(BAD, tmp_path_factory.mktemp("bad") / "out")


# ---------------------------------------------------------------- the fixture folder

BAD_SG_ROWS = {
    4: ("picture_outside", "'image' is '../../outside.jpg': it leaves the picture folder"),
    9: ("empty_text", "'caption' is empty"),
    10: ("missing_field", "'caption' is missing"),
    11: ("missing_field", "'image' is missing"),
    12: ("wrong_type", "'caption' must be text, found list"),
    13: ("unbalanced_tags", "'caption' holds the control text '<gen_image>'"),
    14: ("placeholder_in_target", "'caption' holds the control text '<image>'"),
}
BAD_VQA_ROWS = {
    0: ("picture_without_placeholder", "picture without placeholder"),
    1: ("placeholder_without_picture", "conversations[0] has the placeholder '<image>', but the row has no picture"),
    2: ("broken_turns", "the conversation has an answer and no question"),
    3: ("empty_text", "the conversation is empty"),
    4: ("broken_turns", "the conversation has a question and no answer"),
}
BAD_PICTURES = {
    "truncated.jpg": {"picture_damaged"},
    "empty.jpg": {"picture_empty"},
    "text.jpg": {"not_a_picture"},
    "missing.jpg": {"picture_missing"},
    "really_a_gif.jpg": {"wrong_suffix", "palette", "small_picture", "blank_picture"},
    "extreme_ratio.png": {"extreme_ratio", "small_picture", "blank_picture"},
    "transparent.png": {"alpha", "blank_picture"},
    "sixteen_bit.png": {"deep", "blank_picture"},
}


@pytest.mark.parametrize(("name", "expected"), [("SG/train.json", BAD_SG_ROWS), ("vqa.json", BAD_VQA_ROWS)])
def test_every_bad_row_of_the_fixtures_has_its_name(
    bad: Result, name: str, expected: dict[int, tuple[str, str]]
) -> None:
    found = {
        finding["row"]: (finding["code"], finding["detail"])
        for finding in bad.findings
        if finding.get("set") == name and "row" in finding and finding["code"] != "duplicate_text"
    }
    assert found == expected
    places = {finding["place"] for finding in bad.findings if finding.get("set") == name and "row" in finding}
    assert f"{BAD / name}[{max(expected)}]" in places


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_every_bad_picture_of_the_fixtures_has_its_names(bad: Result, name: str) -> None:
    found = [finding for finding in bad.findings if finding.get("picture", "").endswith("/" + name)]
    assert {finding["code"] for finding in found} == BAD_PICTURES[name]
    errors = [finding for finding in found if finding["severity"] == "error"]
    if errors:
        with pytest.raises(PictureError) as raised:
            open_picture(BAD / "imgs" / name)
        assert (raised.value.code, raised.value.reason) == (errors[0]["code"], errors[0]["detail"])
        assert errors[0]["rows"] == [f"SG/train.json[{list(BAD_PICTURES).index(name)}]"]
    else:
        assert open_picture(BAD / "imgs" / name).mode == "RGB"


def test_broken_files_of_the_fixtures_are_named_with_the_byte(bad: Result) -> None:
    [cut], [latin] = bad.of("cut_short"), bad.of("not_utf8")
    assert cut["detail"].endswith("[0] (byte 1): the file ends at byte 50 in the middle of this row; fetch it again")
    assert "byte 0xe9 at position 32 is not UTF-8" in latin["detail"]
    for finding, path, format in [(cut, BAD / "T2I/train.json", "llmga_t2i"), (latin, BAD / "latin1.json", "llmga_sg")]:
        with pytest.raises(StreamError) as raised:
            list(read_published(path, format))
        assert str(raised.value) == finding["detail"]


def test_the_fixtures_are_counted(bad: Result) -> None:
    assert bad.failed
    assert bad.report["counts"]["rows"] == 20 and bad.report["counts"]["usable_rows"] == 5
    assert {name["name"]: name["usable_rows"] for name in bad.report["sets"]}["SG/train.json"] == 4


# ---------------------------------------------------------------- pictures


def png(width: int, height: int, bits: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG file by hand: for headers that Pillow would not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photo(), "JPEG", exif=exif)


def with_broken_exif() -> bytes:
    return saved(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))


FRAMES = [photo(seed) for seed in range(3)]
PICTURES: dict[str, tuple[bytes, set[str]]] = {
    "fine.jpg": (saved(photo(), "JPEG"), set()),
    "bomb.png": (png(60_000, 60_000), {"picture_too_large"}),
    "large.png": (png(9_500, 9_500), {"picture_too_large"}),
    "rotated.jpg": (rotated(), {"rotated"}),
    "broken_exif.jpg": (with_broken_exif(), set()),
    "cmyk.jpg": (saved(photo().convert("CMYK"), "JPEG"), {"cmyk"}),
    "palette.png": (saved(photo().convert("P"), "PNG"), {"palette"}),
    "palette_alpha.png": (saved(photo().convert("P"), "PNG", transparency=0), {"palette", "alpha"}),
    "grey.png": (saved(photo().convert("L"), "PNG"), {"grey"}),
    "grey_alpha.png": (saved(photo().convert("LA"), "PNG"), {"grey", "alpha"}),
    "two_colours.png": (saved(photo().convert("1"), "PNG"), {"grey"}),
    "deep.png": (saved(Image.fromarray(np.arange(96 * 80, dtype=np.uint16).reshape(80, 96)), "PNG"), {"deep"}),
    "float.tif": (saved(Image.fromarray(np.ones((80, 96), np.float32)), "TIFF"), {"picture_values"}),
    "alpha.png": (saved(photo().convert("RGBA"), "PNG"), {"alpha"}),
    "webp.jpg": (saved(photo(), "WEBP"), {"wrong_suffix"}),
    "no_suffix": (saved(photo(), "PNG"), {"wrong_suffix"}),
    "UPPER.JPG": (saved(photo(), "JPEG"), set()),
    "animated.gif": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), {"animated", "palette"}),
    "animated.webp": (saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), {"animated"}),
    "animated.png": (saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), {"animated"}),
    "cut.png": (saved(photo(), "PNG")[:-200], {"picture_damaged"}),
    "crc.png": (saved(photo(), "PNG")[:60] + b"\0\0\0\0" + saved(photo(), "PNG")[64:], {"picture_damaged"}),
    "half.jpg": (saved(photo(), "JPEG")[:700], {"picture_damaged"}),
    "head_only.jpg": (b"\xff\xd8\xff\xe0", {"not_a_picture"}),
    "zeros.jpg": (bytes(5000), {"not_a_picture"}),
    "page.png": (b"<!DOCTYPE html><html>404</html>", {"not_a_picture"}),
    "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"not_a_picture"}),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n", {"not_a_picture"}),
    "line.png": (saved(photo(size=(2000, 70)), "PNG"), {"extreme_ratio"}),
    "small.png": (saved(photo(size=(20, 20)), "PNG"), {"small_picture"}),
    "plain.png": (saved(Image.new("RGB", (80, 80), "white"), "PNG"), {"blank_picture"}),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("pictures")
    for name, (content, _) in PICTURES.items():
        (folder / name).write_bytes(content)
    manifest = data_set(folder, *map(row, PICTURES))
    return check(manifest, folder / "out", near=0)


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_has_its_names_and_training_agrees(pictures: Result, name: str) -> None:
    found = [finding for finding in pictures.findings if finding.get("picture", "").endswith("/" + name)]
    codes = {finding["code"] for finding in found} - {"duplicate_picture"}
    assert codes == PICTURES[name][1]
    path = pictures.folder.parent / name
    if any(KINDS[code].severity == "error" for code in codes):
        with pytest.raises(PictureError) as raised:
            open_picture(path)
        assert raised.value.code in codes
    else:
        assert open_picture(path).mode == "RGB"


def test_a_bomb_inside_a_text_chunk_is_refused(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    whole = saved(photo(), "PNG")
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000)))
    (tmp_path / "a.png").write_bytes(whole[:33] + bomb + whole[33:])
    result = check(data_set(tmp_path, row("a.png")), tmp_path / "out")
    assert result.codes() == ["picture_damaged"]


def test_paths_that_are_no_paths_below_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "set", tmp_path / "secret"
    data_set(inside, row(), pictures={"a.jpg": photo(), "Sub/Case.jpg": photo(1), "folder.jpg/x.png": photo(2)})
    outside.mkdir()
    photo(3).save(outside / "b.jpg")
    (inside / "link.jpg").symlink_to(outside / "b.jpg")
    (inside / "loop.jpg").symlink_to(inside / "loop.jpg")
    names = {
        "../secret/b.jpg": "picture_outside",
        "x/../../secret/b.jpg": "picture_outside",
        "link.jpg": "picture_outside",
        "/etc/passwd": "picture_path",
        "C:/a.jpg": "picture_path",
        "https://example.org/a.jpg": "picture_path",
        "a\\b.jpg": "picture_path",
        "loop.jpg": "picture_path",
        "sub/case.jpg": "picture_case",
        "A.JPG": "picture_case",
        "nowhere.jpg": "picture_missing",
        "folder.jpg": "picture_missing",
        "n" * 300 + ".jpg": "picture_path",
    }
    manifest = data_set(inside, *(row(name, id=str(number)) for number, name in enumerate(names)))
    result = check(manifest, tmp_path / "out", orphans=False)
    assert result.report["counts"]["usable_rows"] == 0
    found = {}
    for finding in result.findings:
        rows = [finding["row"]] if "row" in finding else [int(where.split("[")[1][:-1]) for where in finding["rows"]]
        found.update(dict.fromkeys(rows, finding["code"]))
    long_name = found.pop(len(names) - 1)
    assert long_name in ("picture_path", "picture_unreadable")  # as the file system puts it
    assert list(found[number] for number in sorted(found)) == list(names.values())[:-1]
    [case] = [finding for finding in result.of("picture_case") if "case.jpg" in finding["picture"]]
    assert case["detail"] == "the file is called 'Sub/Case.jpg'"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_picture_that_may_not_be_read(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, row(), pictures={"a.jpg": photo()})
    (tmp_path / "a.jpg").chmod(0)
    assert check(manifest, tmp_path / "out").codes() == ["picture_unreadable"]


# ---------------------------------------------------------------- rows

GOOD = {
    "id": "1",
    "task": "qa",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
}
LINES: list[tuple[bytes, str, str]] = [
    (b'{"id": "1", "task"', "not_json", "not valid JSON at column 19"),
    (b"{'id': '1'}", "not_json", "not valid JSON at column 2"),
    (b'{"id": "\xe9"}', "not_utf8", "byte 0xe9 at position"),
    (b'{"id": "\\ud83d", "task": "qa"}', "not_json", "half of a surrogate pair"),
    (b'{"id": "1", "task": "qa", "meta": {"x": NaN}}', "not_json", "NaN is not a JSON number"),
    (b"[" * 100_000, "not_json", "nested too deep"),
    (b'["a", "b"]', "wrong_type", "a row must be a JSON object, found a list"),
    (b"null", "wrong_type", "found null"),
    (b'{"id": 5, "task": "qa"}', "wrong_type", "field 'id' must be text, found a number"),
    (b'{"id": "1", "task": "qa", "messages": "hello"}', "wrong_type", "must be a list of turns, found text"),
    (b'{"id": "1", "task": "qa", "messages": [{"role": "user"}]}', "wrong_type", "must hold exactly"),
    (b'{"id": "1", "task": "qa", "messages": [{"role": "user", "content": 3}]}', "wrong_type", "must be text"),
    (b'{"id": "1", "task": "qa", "messages": [{"role": "robot", "content": ""}]}', "broken_turns", "'robot'"),
    (b'{"id": "1", "task": "qa", "meta": []}', "wrong_type", "'meta' must be a JSON object"),
    (b'{"id": "1", "task": "qa", "capton": "x"}', "unknown_field", "did you mean 'caption'?"),
    (b'{"id": "1", "task": "paint"}', "unknown_task", "unknown task 'paint'"),
    (b'{"id": "1"}', "missing_field", "field 'task' is missing"),
    (b'{"task": "qa"}', "missing_field", "field 'id' is missing"),
    (b'{"id": "1", "task": "qa"}', "missing_field", "needs 'messages', which is missing"),
    (b'{"id": "1", "task": "qa", "messages": []}', "empty_text", "needs 'messages', which is empty"),
    (b'{"id": "1", "task": "prompt_refinement", "short_caption": " ", "caption": "b"}', "empty_text", "white space"),
    (b'{"id": "1", "task": "editing", "instruction": "a", "target_caption": "b"}', "missing_field", "both are missing"),
    (json.dumps({**GOOD, "task": "vqa"}).encode(), "missing_field", "needs 'image'"),
    (b'{"id": "1", "task": "prompt_refinement", "short_caption": "a", "caption": "x <gen_img> y </gen_img>"}',
     "tag_in_target", "'<gen_img>'"),
    (b'{"id": "1", "task": "prompt_refinement", "short_caption": "a", "caption": "x </gen_image>"}',
     "unbalanced_tags", "'</gen_image>'"),
    (b'{"id": "1", "task": "prompt_refinement", "short_caption": "a", "caption": "<image> x"}',
     "placeholder_in_target", "'<image>'"),
]  # fmt: skip


def test_every_kind_of_bad_row_is_named_with_its_line(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    lines = [line for bad_line, _, _ in LINES for line in (bad_line, b"", good)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    result = check(tmp_path / "rows.jsonl", tmp_path / "out", format="manifest")
    found = [finding for finding in result.findings if finding["severity"] == "error"]
    assert [finding["code"] for finding in found] == [code for _, code, _ in LINES]
    for number, (finding, (_, _, part)) in enumerate(zip(found, LINES, strict=True)):
        assert part in finding["detail"]
        assert finding["place"] == f"{tmp_path / 'rows.jsonl'}:{3 * number + 1}"
    assert result.report["counts"]["usable_rows"] == len(LINES)


def turns(*texts: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts))


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (row(task="vqa", caption=None, messages=turns("a")), "broken_turns"),
        (row(task="vqa", caption=None, messages=turns("a", " ")), "empty_text"),
        (row(task="vqa", caption=None, messages=turns("<image>\nWhat?", "A kite.")), "placeholder_in_text"),
        (row(task="vqa", caption=None, messages=turns("Draw", "<gen_img> a </gen_img>")), "tag_in_conversation"),
        (row(task="qa", caption=None, messages=turns("a", "b")), "picture_not_used"),
        (row(caption="a\ufffdb"), "odd_characters"),
        (row(caption="a cafÃ© in Paris"), "odd_characters"),
        (row(caption="bell \x07"), "odd_characters"),
        (row(caption="kite " * 301), "prompt_cut"),
    ],
)
def test_what_a_sound_row_may_still_hide(tmp_path: Path, record: object, code: str) -> None:
    result = check(data_set(tmp_path, record, pictures={"a.jpg": photo()}), tmp_path / "out", orphans=False)  # type: ignore[arg-type]
    assert code in result.codes()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "content", "code", "part"),
    [
        ("rows.jsonl", b"\x1f\x8b\x08\x00rest", "unreadable_file", "gzip-compressed"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1", "unreadable_file", "Git LFS pointer"),
        ("rows.jsonl", b"", "no_rows", "has no rows"),
        ("rows.jsonl", b'[{"id": "1"}]', "not_json", "one JSON array"),
        ("rows.parquet", b"PAR1 and nothing more", "unreadable_file", "not a whole Parquet file"),
        ("rows.json", b'[{"image": "a.jpg", "caption": "b"},\n{"image": ', "cut_short", "in the middle of this row"),
        ("rows.json", b'[{"image": "a.jpg", "caption": "b"} {}]', "not_json", "expected ',' or ']'"),
        ("rows.json", b'[{"image": "a.jpg", "caption": "b"}', "cut_short", "ends inside the array"),
        ("rows.json", b'[{"image": "a.jpg", "caption": "b"}] x', "not_json", "goes on after its array"),
        ("rows.json", b'[{"a": 1}]', "unknown_format", "no known format"),
    ],
)
def test_files_that_end_early_or_are_something_else(
    tmp_path: Path, name: str, content: bytes, code: str, part: str
) -> None:
    (tmp_path / name).write_bytes(content)
    photo().save(tmp_path / "a.jpg")
    format = "manifest" if name.endswith("l") or name.endswith("parquet") else "auto"
    result = check(tmp_path / name, tmp_path / "out", format=format, orphans=False)
    assert result.codes() == [code] and part in result.findings[0]["detail"] and result.failed
    if content:
        with pytest.raises(ValueError):
            list(manifest_of(tmp_path / name, "manifest" if format == "manifest" else "llmga_sg"))


def test_a_parquet_manifest_is_checked_row_by_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": "1", "task": "similar_image", "image": "a.jpg", "caption": "b"}, {"id": "2", "task": "paint"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[0] | {"id": ""}]), tmp_path / "rows.parquet")
    photo().save(tmp_path / "a.jpg")
    result = check(tmp_path / "rows.parquet", tmp_path / "out", near=0)
    errors = [(f["row"], f["code"], f["place"]) for f in result.findings if f["severity"] == "error"]
    path = tmp_path / "rows.parquet"
    assert errors == [(1, "unknown_task", f"{path}[1]"), (2, "missing_field", f"{path}[2]")]
