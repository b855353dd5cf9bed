"""What a check finds in a whole set, what it writes, and that training heeds it.

Hazards: a leak into the reference set that is not seen, an original that is changed, a report that depends on where
the check was interrupted, a quarantine that hits other rows than were meant.

python -m pytest tests/integration/test_check.py
"""

import json
import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw, ImageEnhance
from typer.testing import CliRunner

from llmga.check.archives import disk_problem, read_archive_list
from llmga.check.kinds import KINDS, SEVERITIES
from llmga.check.picture_check import PictureFacts, check_picture
from llmga.check.pool import Pool
from llmga.check.row_check import RowResults, joined, main_script
from llmga.check.row_file import index_rows
from llmga.check.run import _check_row_jobs, _halves, _RowJob, _rows_crashed, run_check
from llmga.check.sets import find_sets
from llmga.check.settings import CheckError, CheckSettings
from llmga.check.store import Store
from llmga.cli import app
from llmga.problem import Problem
from llmga.quarantine import QuarantineError, read_quarantine, write_quarantine
from llmga.records import Record, open_manifest
from llmga.stage1.config import SourceConfig
from llmga.stage1.sources import Source
from tests.check_data import check, data_set, photo, row

MINI = Path(__file__).parents[1] / "fixtures" / "llmga-datasetv2-mini"
DOCS = Path(__file__).parents[2] / "docs" / "data.md"


# ---------------------------------------------------------------- the whole published layout


def test_the_published_layout_is_found_and_clean(tmp_path: Path) -> None:
    result = check(MINI, tmp_path / "out")
    assert not result.failed and result.report["severities"]["error"] == 0
    formats = {entry["name"]: entry["format"] for entry in result.report["sets"]}
    assert formats == {
        "jsons/llava_v1_5_mix665k.json": "llava",
        "jsons/llmga-data/Edit/train.json": "llmga_edit",
        "jsons/llmga-data/SG/train.json": "llmga_sg",
        "jsons/llmga-data/T2I/train.json": "llmga_t2i",
        "jsons/llmga-data/inpainting/train.json": "llmga_inpainting",
        "jsons/text-data/alpaca_gpt4_sharegpt_en_clean2.json": "sharegpt",
        "jsons/text-data/lima.json": "sharegpt",
        "jsons/text-data/oasst2.json": "sharegpt",
    }
    assert result.report["counts"]["rows"] == result.report["counts"]["usable_rows"] == 42
    assert result.report["counts"]["pictures"] == 12  # each opened once, however many rows use it
    assert {"rotated", "cmyk", "grey"} <= set(result.codes())
    [incomplete] = result.of("folder_incomplete")
    assert incomplete["detail"].endswith("holds 4 pictures, published were 118,287")


# ---------------------------------------------------------------- duplicates, leaks, orphans


def test_what_repeats_is_found(tmp_path: Path) -> None:
    pictures = {"a.png": photo(1), "b.png": photo(2), "same.png": photo(1), "brighter.png": photo(3), "c.png": photo(3)}
    pictures["brighter.png"] = ImageEnhance.Brightness(photo(3)).enhance(1.03)
    rows = [
        row("a.png"),
        row("b.png", id="a.png"),
        row("a.png", id="3"),
        row("same.png", id="4", caption="a picture called a.png"),
        row("brighter.png"),
        row("c.png"),
    ]
    result = check(data_set(tmp_path, *rows, pictures=pictures), tmp_path / "out")
    assert [(f["row"], f["detail"]) for f in result.of("duplicate_id")] == [(1, "row 0 has its id")]
    assert [(f["row"], f["detail"]) for f in result.of("duplicate_row")] == [(2, "row 0 says the same")]
    assert [f["row"] for f in result.of("duplicate_text")] == [3]
    [equal], [near] = result.of("duplicate_picture"), result.of("near_duplicate")
    assert equal["picture"].endswith("same.png") and equal["detail"] == "equals a.png"
    assert near["picture"].endswith("/c.png") and near["detail"] == "looks like brighter.png"
    assert not check(tmp_path / "rows.jsonl", tmp_path / "out", near=0).of("near_duplicate")


def test_many_different_pictures_are_not_taken_for_duplicates(tmp_path: Path) -> None:
    pictures = {f"{seed}.png": photo(seed) for seed in range(150)}
    result = check(data_set(tmp_path, *map(row, pictures), pictures=pictures), tmp_path / "out")
    assert result.codes() == []


def test_twenty_resized_copies_name_the_first_one(tmp_path: Path) -> None:
    pictures = {f"{size}.png": photo(7, (size, size)) for size in range(100, 120)}
    result = check(data_set(tmp_path, *map(row, pictures), pictures=pictures), tmp_path / "out")
    assert [f["detail"] for f in result.of("near_duplicate")] == ["looks like 100.png"] * 19


def test_pictures_of_the_reference_set_are_errors(tmp_path: Path) -> None:
    train = data_set(
        tmp_path / "train",
        *map(row, ("a.png", "b.png", "c.png")),
        pictures={"a.png": photo(1), "b.png": photo(2), "c.png": photo(3)},
    )
    held = data_set(
        tmp_path / "held", row("x.png"), row("y.jpg"), pictures={"x.png": photo(1), "y.jpg": photo(2, (120, 100))}
    )
    for reference in (tmp_path / "held", held):
        result = check(train, tmp_path / "out", reference=reference)
        found = {Path(f["picture"]).name: f["detail"] for f in result.of("in_reference")}
        assert found == {"a.png": "equals x.png of it", "b.png": "looks like y.jpg"}
        assert result.failed and result.report["counts"]["usable_rows"] == 1
        assert result.report["counts"]["reference_pictures"] == 2


def test_a_picture_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    rows = [row("a.png", split="train"), row("a.png", id="2", split="test"), row("b.png", split="train")]
    result = check(data_set(tmp_path, *rows, pictures={"a.png": photo(1), "b.png": photo(2)}), tmp_path / "out")
    assert [(f["row"], f["detail"]) for f in result.of("split_leak")] == [
        (0, "a.png is in row 1 of split test as well")
    ]


def test_a_known_set_in_numbered_folders_counts_as_a_whole(tmp_path: Path) -> None:
    root = tmp_path / "llava_pretrain" / "images"
    pictures = {f"0000{number}/{number}.jpg": photo(number) for number in range(3)}
    manifest = data_set(root, *map(row, list(pictures)[:2]), pictures=pictures)
    result = check(manifest, tmp_path / "out")
    [folder] = result.report["folders"]
    counts = {"used": 2, "missing": 0, "on_disk": 3, "orphans": 1, "published": 558_000}
    assert folder == {"folder": str(root), **counts}
    [incomplete] = result.of("folder_incomplete")
    assert incomplete["detail"] == f"{root} holds 3 pictures, published were 558,000"


def test_orphans_are_counted_by_folder(tmp_path: Path) -> None:
    pictures = {"x/a.png": photo(1), "x/b.png": photo(2), "y/c.png": photo(3), ".cache/d.png": photo(4)}
    result = check(data_set(tmp_path, row("x/a.png"), row("./x//b.png"), pictures=pictures), tmp_path / "out")
    assert [f["detail"] for f in result.of("orphan")] == [str(tmp_path / "y/c.png")]
    folders = {
        Path(f["folder"]).name: (f["used"], f["missing"], f["on_disk"], f["orphans"]) for f in result.report["folders"]
    }
    assert folders == {"x": (2, 0, 2, 0), "y": (0, 0, 1, 1)}


# ---------------------------------------------------------------- masks


def mask(box: tuple[int, int, int, int] | None, size: tuple[int, int] = (96, 80), fill: int = 255) -> Image.Image:
    drawn = Image.new("L", size, 0)
    if box:
        ImageDraw.Draw(drawn).rectangle(box, fill=fill)
    return drawn


def half_grey() -> Image.Image:
    drawn = mask((0, 0, 40, 40))
    ImageDraw.Draw(drawn).rectangle((50, 50, 90, 70), fill=100)
    return drawn


@pytest.mark.parametrize(
    ("drawn", "task", "codes"),
    [
        (mask((20, 20, 60, 60)), "inpainting", set()),
        (mask((0, 0, 95, 30)), "outpainting", set()),
        (mask((0, 0, 95, 30), fill=1), "outpainting", set()),  # files of 0 and 1 count as black and white
        (mask((20, 20, 60, 60)), "outpainting", {"mask_not_border"}),
        (mask(None), "inpainting", {"mask_empty"}),
        (mask((0, 0, 2, 2)), "inpainting", {"mask_area"}),
        (mask((0, 0, 95, 79)), "inpainting", {"mask_area"}),
        (mask((0, 0, 60, 60), (80, 80)), "inpainting", {"mask_aspect"}),
        (mask((0, 0, 60, 60), (192, 160)), "inpainting", {"mask_size"}),
        (half_grey(), "inpainting", {"mask_grey"}),
    ],
)
def test_masks_are_looked_at_as_masks(drawn: Image.Image, task: str, codes: set[str], tmp_path: Path) -> None:
    record = row("a.png", task=task, mask="masks/a.png")
    manifest = data_set(tmp_path, record, pictures={"a.png": photo(), "masks/a.png": drawn})
    result = check(manifest, tmp_path / "out")
    assert set(result.codes()) == codes
    assert result.report["counts"]["masks"] == 1


def test_a_missing_mask_spoils_its_row(tmp_path: Path) -> None:
    record = row("a.png", task="inpainting", mask="masks/a.png")
    result = check(data_set(tmp_path, record, pictures={"a.png": photo()}), tmp_path / "out")
    [missing] = result.of("picture_missing")
    assert missing["role"] == "mask" and result.report["counts"]["usable_rows"] == 0


# ---------------------------------------------------------------- archives


def test_archives_are_compared_with_their_sums(tmp_path: Path) -> None:
    contents = {"good.zip": b"good", "changed.zip": b"changed", "begun.tar": b"", "gone.tar": b""}
    sums = "".join(f"{sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    (tmp_path / "SHA256SUMS").write_text("# published\n" + sums)
    (tmp_path / "good.zip").write_bytes(b"good")
    (tmp_path / "changed.zip").write_bytes(b"another")
    (tmp_path / "begun.tar.part").write_bytes(bytes(10))
    manifest = data_set(tmp_path / "set", row(), pictures={"a.jpg": photo()})
    result = check(manifest, tmp_path / "out", archives=tmp_path / "SHA256SUMS")
    assert [f["detail"].split("/")[-1].split(" ")[0] for f in result.of("archive_missing")] == ["begun.tar", "gone.tar"]
    assert "begun.tar.part is a download of 10 bytes to go on with" in result.of("archive_missing")[0]["detail"]
    [differs] = result.of("archive_differs")
    assert f"(7 bytes) has SHA-256 {sha256(b'another').hexdigest()}" in differs["detail"]
    (tmp_path / "SHA256SUMS").write_text("good.zip abc\n")
    with pytest.raises(CheckError, match=r"SHA256SUMS:1: found 'good.zip abc', expected a SHA-256 sum"):
        check(manifest, tmp_path / "out", archives=tmp_path / "SHA256SUMS")


def test_a_disk_without_room_for_what_the_archives_hold_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.bin", bytes(3_000_000))
        packed.writestr("folder/b.bin", bytes(2_000_000))
    (tmp_path / "plain.tar").write_bytes(bytes(10_240))
    (tmp_path / "damaged.zip").write_bytes(b"PK" + bytes(998))
    names = ("packed.zip", "plain.tar", "damaged.zip", "gone.zip")
    (tmp_path / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))
    archives = read_archive_list(tmp_path / "SHA256SUMS")
    needed = 3_000_000 + 2_000_000 + 10_240 + 1_000
    assert (tmp_path / "packed.zip").stat().st_size < 10_000
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    assert disk_problem(archives, tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    assert disk_problem(archives, tmp_path) is not None
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    manifest = data_set(tmp_path / "set", row(), pictures={"a.jpg": photo()})
    [little] = check(manifest, tmp_path / "out", archives=tmp_path / "SHA256SUMS").of("little_disk")
    assert little["severity"] == "warning"
    assert little["detail"] == f"0.0 GB free in {tmp_path}, the archives take 0.0 GB unpacked"


# ---------------------------------------------------------------- cleaned manifest and quarantine


def test_fix_writes_what_can_be_trained_on_and_touches_no_original(tmp_path: Path) -> None:
    rows = [
        row("a.png"),
        row("missing.png"),
        row("b.png", id="3"),
        row("b.png", id="4", caption=None),
        row("b.png", id="5"),
    ]
    manifest = data_set(tmp_path / "set", *rows, pictures={"a.png": photo(1), "b.png": photo(2)})
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "set").iterdir() if path.is_file()
    }
    cleaned = tmp_path / "cleaned.jsonl"
    result = check(manifest, tmp_path / "out", fix=cleaned)
    root = tmp_path / "set"
    assert list(open_manifest(cleaned, root)) == [rows[0], rows[2], rows[4]]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert result.report["counts"]["usable_rows"] == 3
    check(manifest, tmp_path / "out", fix=cleaned, drop=("duplicate_row",))
    assert [record.id for record in open_manifest(cleaned, root)] == ["a.png", "3"]
    check(manifest, tmp_path / "out", fix=cleaned, ignore=("picture_missing",))
    assert [record.id for record in open_manifest(cleaned, root)] == ["a.png", "missing.png", "3", "5"]
    with pytest.raises(CheckError, match="originals are never changed"):
        check(manifest, tmp_path / "out", fix=manifest)
    with pytest.raises(CheckError, match=r"a manifest ends in \.jsonl or \.parquet"):
        check(manifest, tmp_path / "out", fix=tmp_path / "cleaned.csv")
    assert check(cleaned, tmp_path / "again", image_root=root, orphans=False).report["counts"]["usable_rows"] == 3


def test_the_cleaned_bad_fixtures_are_clean(tmp_path: Path) -> None:
    check(MINI / "bad", tmp_path / "out", fix=tmp_path / "clean")
    for name, rows in (("SG/train.jsonl", 4), ("vqa.jsonl", 1), ("T2I/train.jsonl", 0), ("latin1.jsonl", 0)):
        cleaned = tmp_path / "clean" / name
        assert len(open_manifest(cleaned)) == rows
        if rows:
            again = check(cleaned, tmp_path / "again", image_root=MINI / "bad" / "imgs", orphans=False)
            assert not again.failed and again.report["counts"]["usable_rows"] == rows


def ids(source: Source) -> list[str]:
    return [source[index].id for index in range(len(source))]


def test_training_leaves_out_what_is_in_quarantine(tmp_path: Path) -> None:
    rows = [row("a.png"), row("missing.png"), row("b.png"), row("a.png", id="4")]
    manifest = data_set(tmp_path, *rows, pictures={"a.png": photo(1), "b.png": photo(2)})
    with open(manifest, "ab") as file:
        file.write(b'{"id": "5", "task":\n')  # training would stop here
    check(manifest, tmp_path / "out")
    quarantine = tmp_path / "out" / "quarantine.jsonl"
    config = {"path": manifest, "quarantine": quarantine}
    assert ids(Source(SourceConfig(**config))) == ["a.png", "b.png", "4"]
    assert ids(Source(SourceConfig(**config, max_rows=2))) == ["a.png", "b.png"]
    assert ids(Source(SourceConfig(**config, tasks=["similar_image"]))) == ["a.png", "b.png", "4"]
    assert len(Source(SourceConfig(path=manifest))) == 5
    source = Source(SourceConfig(**config))
    assert [source.manifest_row(index) for index in range(3)] == [0, 2, 3]
    with open(manifest, "ab") as file:
        file.write(b"\n")
    with pytest.raises(QuarantineError, match=r"made for another state of rows.jsonl than .*; run `llmga check"):
        Source(SourceConfig(**config))


def test_quarantine_of_a_published_file_counts_its_own_rows(tmp_path: Path) -> None:
    """The reader skips rows, so row 8 of the file is not record 8 of what is trained on."""
    check(MINI / "bad" / "SG" / "train.json", tmp_path / "out", image_root=MINI / "bad" / "imgs")
    quarantine = tmp_path / "out" / "quarantine.jsonl"
    config = {"path": MINI / "bad/SG/train.json", "format": "llmga_sg", "image_root": MINI / "bad/imgs"}
    source = Source(SourceConfig(**config, quarantine=quarantine))
    assert ids(source) == [f"llmga_sg-{number:07d}" for number in (5, 6, 7, 8)]
    assert source.place(0).endswith("train.json[5]")
    assert len(Source(SourceConfig(**config))) == 8


def test_a_quarantine_list_is_checked_when_it_is_read(tmp_path: Path) -> None:
    source, path = tmp_path / "rows.jsonl", tmp_path / "q.jsonl"
    source.write_text("x\n" * 100_000)
    assert write_quarantine(path, source, [(3, ["orphan"]), (99_999, ["orphan"])]) == 2
    assert read_quarantine(path, source) == [3, 99_999]
    lines = path.read_text().splitlines()
    for text, message in [
        ("", "is not a quarantine list"),
        ("{}", "is not a quarantine list"),
        (lines[0] + "\nnonsense", "is not a quarantine list"),
        (lines[0].replace('"quarantine": 1', '"quarantine": 9'), "of version 9, expected 1"),
    ]:
        path.write_text(text)
        with pytest.raises(QuarantineError, match=message):
            read_quarantine(path, source)
    with pytest.raises(QuarantineError, match=r"does not exist.*expected a quarantine list"):
        read_quarantine(tmp_path / "none.jsonl", source)


# ---------------------------------------------------------------- interrupted, and in parallel


def interrupted_set(folder: Path) -> Path:
    pictures = {f"{number}.png": photo(number, (64, 64)) for number in range(300)}
    rows = [row(f"{number % 301}.png", id=str(number)) for number in range(4500)]
    return data_set(folder, *rows, pictures=pictures)


def what_was_written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_interrupted_check_ends_in_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = interrupted_set(tmp_path / "set")
    check(manifest, tmp_path / "out")
    unbroken = what_was_written(tmp_path / "out")
    assert set(unbroken) == {"report.json", "findings.jsonl", "index.html", "quarantine.jsonl"}
    assert len(unbroken["findings.jsonl"].splitlines()) > 1000

    done: list[tuple[str, int]] = []
    for method in ("add_rows", "add_pictures"):
        original = getattr(Store, method)

        def stop_now_and_then(self: Store, *args: object, _add: object = original, _name: str = method) -> None:
            if len(done) in (2, 4):
                done.append(("stopped", 0))
                raise KeyboardInterrupt
            _add(self, *args)  # type: ignore[operator]
            done.append((_name, args[1] if _name == "add_rows" else args[0]))  # type: ignore[arg-type]

        monkeypatch.setattr(Store, method, stop_now_and_then)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_check(CheckSettings(manifest, out=tmp_path / "out", workers=1))
    check(manifest, tmp_path / "out")
    assert what_was_written(tmp_path / "out") == unbroken
    assert [name for name in done if name[0] != "stopped"] == [
        *(("add_rows", start) for start in (0, 2000, 4000)),  # none of them twice
        *(("add_pictures", start) for start in (1, 129, 257)),
    ]
    assert not (tmp_path / "out" / "unfinished").exists()


def test_several_processes_give_the_same_report(tmp_path: Path) -> None:
    manifest = interrupted_set(tmp_path / "set")
    reports = []
    for workers in (1, 2):
        check(manifest, tmp_path / "out", workers=workers)
        reports.append(what_was_written(tmp_path / "out"))
    assert reports[0] == reports[1]


def test_an_unfinished_check_of_other_files_or_settings_starts_anew(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, row(), pictures={"a.jpg": photo()})
    state = tmp_path / "out" / "unfinished" / "state.sqlite"

    def resumed(**options: object) -> bool:
        checked = run_check(CheckSettings(manifest, out=tmp_path / "out", workers=1, **options))  # type: ignore[arg-type]
        checked.store.close()
        return checked.store.resumed

    assert [resumed(), resumed(), resumed(ignore=("orphan",)), resumed(min_side=65), resumed(min_side=65)] == [
        False, True, True, False, True,
    ]  # fmt: skip
    assert not resumed(min_side=65, resume=False)
    os.utime(manifest, (1, 1))
    assert not resumed(min_side=65)
    state.write_bytes(b"no database")
    assert not resumed(min_side=65)


def unfinished(manifest: Path, out: Path, **options: object) -> tuple[bool, list[str]]:
    """Run a check up to its report; whether it went on from another one, and the details of what it found."""
    checked = run_check(CheckSettings(manifest, out=out, workers=1, **options))  # type: ignore[arg-type]
    found = [detail for (detail,) in checked.store.rows("SELECT detail FROM findings ORDER BY detail")]
    checked.store.close()
    return checked.store.resumed, found


def test_an_archive_that_arrived_meanwhile_is_looked_at(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "set", row(), pictures={"a.jpg": photo()})
    sums, archive = tmp_path / "SHA256SUMS", tmp_path / "pictures.zip"
    sums.write_text(f"{sha256(b'whole').hexdigest()}  pictures.zip\n")

    def found() -> tuple[bool, list[str]]:
        return unfinished(manifest, tmp_path / "out", archives=sums)

    missing = [f"{archive} does not exist"]
    assert [found(), found()] == [(False, missing), (True, missing)]
    (tmp_path / "pictures.zip.part").write_bytes(b"who")
    begun = [f"{archive} does not exist; pictures.zip.part is a download of 3 bytes to go on with"]
    assert [found(), found()] == [(False, begun), (True, begun)]
    archive.write_bytes(b"whole")
    assert [found(), found()] == [(False, []), (True, [])]
    sums.write_text(f"{sha256(b'other').hexdigest()}  pictures.zip\n")
    resumed, [differs] = found()
    assert not resumed and "expected " + sha256(b"other").hexdigest() in differs


def test_a_picture_that_joined_the_reference_set_is_compared(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "set", row(), pictures={"a.jpg": photo()})
    reference = tmp_path / "reference"
    reference.mkdir()
    photo(1).save(reference / "other.jpg")

    def resumed() -> bool:
        return unfinished(manifest, tmp_path / "out", reference=reference)[0]

    assert [resumed(), resumed()] == [False, True]
    shutil.copyfile(tmp_path / "set" / "a.jpg", reference / "same.jpg")
    assert not resumed()
    result = check(manifest, tmp_path / "out", reference=reference)
    assert len(result.of("in_reference")) == 1
    assert [resumed(), resumed()] == [False, True]
    photo(2).save(reference / "same.jpg")  # the same name and another picture
    assert not resumed()


def die_at_seven(items: Sequence[int]) -> list[int]:
    for item in items:
        if item == 7:
            os._exit(11)
    return [item * item for item in items]


def die_at_row_7(jobs: Sequence[_RowJob]) -> list[RowResults]:
    if any(job.start <= 7 < job.stop for job in jobs):
        os._exit(11)
    return _check_row_jobs(jobs)


def test_of_a_piece_whose_reader_died_only_the_row_at_fault_is_lost(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, *(row(id=f"r{i}", caption="a word " * (i % 5 + 1)) for i in range(12)))
    (source,) = find_sets(CheckSettings(manifest))
    job = _RowJob(source, index_rows(source, tmp_path / "work", 0), 0, 12, CheckSettings(manifest))
    ((_, (found,)),) = Pool(die_at_row_7, 2, _rows_crashed, _halves, joined).map([(0, [job])])
    (around,) = _check_row_jobs([replace(job, stop=7)])
    (behind,) = _check_row_jobs([replace(job, start=8)])
    assert [(f.row, f.code, f.detail) for f in found.findings if f.code == "unreadable_file"] == [
        (7, "unreadable_file", "the process that read row 7 died; is there enough memory?")
    ]
    whole = joined(around, behind)
    told = [(each.uses, each.keys, each.counts, each.lengths) for each in (found, whole)]
    assert told[0] == told[1]
    assert found.counts["records"] == 11
    (all_rows,) = _check_row_jobs([job])
    halves = [_check_row_jobs([half])[0] for half in _halves(job)]
    assert joined(*halves) == all_rows


def test_a_decoder_that_takes_its_process_with_it_is_known_by_name() -> None:
    pool: Pool[int, int] = Pool(die_at_seven, 2, lambda item: -item)
    pieces = {start: range(start, start + 2) for start in range(0, 20, 2)}
    found = dict(pool.map(pieces.items()))
    assert found == {start: [-item if item == 7 else item * item for item in piece] for start, piece in pieces.items()}


def test_a_file_without_end_or_beyond_the_memory_costs_its_own_row(tmp_path: Path) -> None:
    """The large file is all holes, so it takes no room on the disk; read whole, it would take 256 MB of memory."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "big.jpg").open("wb") as file:
        file.truncate(256 << 20)
    tracemalloc.start()
    codes = {}
    for name in ("pipe.jpg", "big.jpg"):
        facts = check_picture(str(tmp_path), name, "image", CheckSettings(tmp_path))
        codes[name] = [problem.code for problem in facts.problems]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes == {"pipe.jpg": ["picture_unreadable"], "big.jpg": ["not_a_picture"]}
    assert peak < 16 << 20


@pytest.mark.parametrize("step", ["llmga.images._decode", "llmga.check.picture_check._shape_problems"])
def test_a_picture_too_large_for_the_memory_is_named(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(*arguments: object) -> None:
        raise MemoryError

    photo(0).save(tmp_path / "a.png")
    monkeypatch.setattr(step, without_memory)
    facts = check_picture(str(tmp_path), "a.png", "image", CheckSettings(tmp_path))
    assert [problem.code for problem in facts.problems] == ["picture_crashes"]


def test_facts_travel_between_processes() -> None:
    import pickle

    facts = PictureFacts([Problem("rotated", "EXIF orientation 6")], size=(3, 4))
    again = pickle.loads(pickle.dumps(facts))
    assert again == facts and again.problems[0].code == "rotated"


# ---------------------------------------------------------------- reports


class Page(HTMLParser):
    """Collects addresses that a page would fetch, and its text; complains of tags that do not match."""

    VOID = ("meta", "img", "br", "line", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_opens_offline(tmp_path: Path) -> None:
    result = check(MINI / "bad", tmp_path / "out")
    page = Page()
    page.feed((tmp_path / "out" / "index.html").read_text())
    assert page.open == []
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    for code in result.codes():
        assert code in page.text and KINDS[code].meaning in page.text
    worst = [Path(picture["picture"]).name for picture in result.report["worst"]]
    assert set(worst[:3]) == {"empty.jpg", "text.jpg", "truncated.jpg"}  # a missing one has nothing to show
    assert len(page.addresses) == len(worst) - 2  # neither the empty file nor the text has a thumbnail; the cut one has


def test_text_from_data_is_never_markup(tmp_path: Path) -> None:
    record = row("<script>alert(1)</script>.jpg", caption="<b>\x07")
    check(data_set(tmp_path, record), tmp_path / "out")
    assert "<script>" not in (tmp_path / "out" / "index.html").read_text()


def test_the_worst_fifty_come_first(tmp_path: Path) -> None:
    for number in range(60):
        photo(number, (30, 30)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    names = [f"{number:02d}.png" for number in range(60)]
    result = check(data_set(tmp_path, *map(row, names), row("broken.png")), tmp_path / "out", near=0)
    worst = result.report["worst"]
    assert len(worst) == 50 and worst[0]["picture"].endswith("broken.png") and worst[1]["picture"].endswith("00.png")
    [kind] = [kind for kind in result.report["kinds"] if kind["code"] == "small_picture"]
    assert kind["count"] == 60 and len(kind["examples"]) == 20


def test_scripts_of_texts_are_counted(tmp_path: Path) -> None:
    def said(text: str) -> Record:
        return Record("1", "prompt_refinement", short_caption="1", caption=text)

    texts = {
        "a kite": "latin",
        "一只红色的风筝 kite": "chinese",
        "змей": "cyrillic",
        "たこあげ": "japanese",
        "123": "none",
    }
    assert {text: main_script(said(text)) for text in texts} == texts
    manifest = data_set(tmp_path, *(said(text) for text in texts))
    assert check(manifest, tmp_path / "out").report["sets"][0]["scripts"] == {
        "chinese": 1, "cyrillic": 1, "japanese": 1, "latin": 1, "none": 1,
    }  # fmt: skip


def test_every_kind_is_sound_and_in_the_documentation() -> None:
    documented = DOCS.read_text()
    for code, kind in KINDS.items():
        assert kind.severity in SEVERITIES and kind.meaning[0].isupper() and not kind.meaning.endswith(".")
        assert f"| `{code}` | {kind.severity} | {kind.meaning} | {kind.remedy} |" in documented


# ---------------------------------------------------------------- the command


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check", *arguments], prog_name="llmga")
    return result.exit_code, result.stdout, result.stderr


def test_exit_codes_tell_clean_problems_and_cannot_check_apart(tmp_path: Path) -> None:
    manifest = data_set(tmp_path, row("a.png"), pictures={"a.png": photo(size=(40, 40))})
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert run(str(manifest), *out)[0] == 0  # a warning alone is no failure
    assert run(str(manifest), *out, "--fail-on", "warning")[0] == 1
    assert run(str(manifest), *out, "--fail-on", "warning", "--ignore", "small_picture")[0] == 0
    assert run(str(manifest), *out, "--fail-on", "note", "--min-side", "8")[0] == 0
    code, shown, _ = run(str(MINI / "bad"), *out)
    assert code == 1 and "picture_damaged" in shown and "17 errors, 8 warnings, 7 notes" in shown
    for arguments, message in [
        ([str(tmp_path / "row.jsonl")], "did you mean"),
        ([str(tmp_path / "out")], "holds"),
        ([str(manifest), "--format", "lava"], "did you mean 'llava'?"),
        ([str(manifest), "--ignore", "smal_picture"], "did you mean 'small_picture'?"),
        ([str(manifest), "--fail-on", "disaster"], "is not one of"),
        ([str(manifest), "--image-root", str(tmp_path / "nowhere")], "is not a folder"),
        ([str(manifest), "--near", "99"], "expected 0 (off) to 16"),
        ([str(manifest), "--tokenizer", str(tmp_path / "none")], "neither a folder of a tokenizer"),
        ([str(manifest), "--archives", str(tmp_path / "none")], "no readable list"),
    ]:
        code, shown, errors = run(*arguments, *(out if arguments[0] != str(tmp_path / "out") else []))
        assert code == 2 or arguments[0] == str(tmp_path / "out"), (arguments, errors)
        if code == 2:
            assert message in errors and "Traceback" not in errors


def test_report_is_json_of_the_documented_version(tmp_path: Path) -> None:
    result = check(data_set(tmp_path, row(), pictures={"a.jpg": photo()}), tmp_path / "out")
    assert result.report["report"] == "llmga check" and result.report["version"] == 1
    documented = DOCS.read_text()
    for field in result.report:
        assert f"`{field}`" in documented
    assert json.loads(json.dumps(result.report)) == result.report
