"""Toy data is what its manifest says: every record trains its task, every truth in it holds, and no split leaks.

Run: pytest tests/integration/test_world_build.py
"""

import io
import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from llmga.record_check import check_record
from llmga.records import Record, open_manifest
from llmga.tokens import TAG_LITERALS, clip_length, clip_positions
from llmga.toyworld import build, describe, render, sample_scene
from llmga.toyworld.build import Report, WorldError, _settings, build_world
from llmga.toyworld.corpus import CORPORA, PARTS
from llmga.toyworld.edits import KINDS, Edit, all_facts
from llmga.toyworld.grammar import parse_caption, says
from llmga.toyworld.png import encode_png
from llmga.toyworld.scene import SPLITS, Scene, facts_from_list, split_of
from llmga.toyworld.sheet import segments

BUILD_WORLD = Path(__file__).parents[2] / "data_tools" / "build_world.py"
SPLIT_ROWS = {"train": 160, "validation": 40, "test": 40, "composition": 6}


@pytest.fixture(scope="module", params=["stage1", "base"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A small folder of each kind."""
    out = tmp_path_factory.mktemp("world") / request.param
    return build_world(out, kind=request.param, splits=SPLIT_ROWS)


def records_of(world: Report) -> list[Record]:
    return [record for split in SPLIT_ROWS for record in open_manifest(world.folder / f"{split}.jsonl")]


def scene_of(record: Record) -> Scene:
    return Scene.from_dict(record.meta["scene"])


# ---------------------------------------------------------------- records


def test_every_record_can_train_its_task(world: Report) -> None:
    records = records_of(world)
    assert [problem for record in records for problem in check_record(record)] == []
    assert len({record.id for record in records}) == len(records)
    assert Counter(record.split for record in records) == SPLIT_ROWS
    for split, tasks in world.tasks.items():
        assert Counter(record.task for record in records if record.split == split) == tasks
    assert {record.meta["part"] for record in records} == set(CORPORA[world.folder.name])
    assert all(record.task == PARTS[record.meta["part"]][0] for record in records)


def test_pictures_show_the_scenes_of_their_records(world: Report) -> None:
    for record in records_of(world):
        assert (record.image is None) == (record.task in ("qa", "prompt_refinement"))
        if record.image:
            with Image.open(world.folder / record.image) as picture:
                assert picture.size == (64, 64) and picture.mode == "RGB"
                assert np.array_equal(np.asarray(picture), render(scene_of(record)))
    found = sum(1 for _ in world.folder.glob("pictures/*/*.png"))
    assert found == sum(world.pictures.values()) == sum(record.image is not None for record in records_of(world))


def test_no_scene_is_in_two_splits(world: Report) -> None:
    scenes: dict[str, set[str]] = {split: set() for split in SPLIT_ROWS}
    for record in records_of(world):
        if record.image:
            assert split_of(int(Path(record.image).stem)) == record.split
        if "scene" in record.meta:
            assert scene_of(record).has_held_out() == (record.split == "composition")
            scenes[record.split or ""].add(json.dumps(record.meta["scene"]))
    assert not scenes["train"] & (scenes["validation"] | scenes["test"])


def test_captions_describe_their_scene_and_leave_the_window(world: Report) -> None:
    for record in records_of(world):
        if record.caption:
            assert says(parse_caption(record.caption), scene_of(record))
            assert clip_length(record.caption) > 75
        if record.short_caption:
            parsed = parse_caption(record.short_caption)
            facts = facts_from_list(record.meta["short_facts"])
            scene = scene_of(record)
            assert facts.pop(("count", None)) == str(len(scene.objects)) == str(parsed.count)
            assert facts.items() <= scene.facts().items()
            assert sorted(kind for kind, _ in facts) == ["background", "colour", "shape"]
            assert parsed.mentions == [{kind: value for (kind, cell), value in facts.items() if cell is not None}]


def test_edits_lead_to_their_target(world: Report) -> None:
    for record in records_of(world):
        if record.task == "editing":
            edit = Edit.from_dict(record.meta["edit"])
            assert record.instruction == edit.instruction
            assert says(parse_caption(record.target_caption or ""), edit.target)
            assert edit.requested | edit.preserved == all_facts(edit.target)
            assert edit.kind in KINDS


def test_a_base_model_has_seen_neither_tags_nor_long_captions(world: Report) -> None:
    records = records_of(world)
    text = json.dumps([record.messages for record in records])
    assert not any(tag in text for tag in (*TAG_LITERALS, "<image>"))
    if world.folder.name == "base":
        assert {record.task for record in records} == {"vqa", "qa"}
        answers = [message["content"] for record in records for message in record.messages or ()]
        assert max(map(clip_length, answers)) <= 75
    questions = [record for record in records if record.meta["part"] == "questions"]
    assert {len(record.messages or ()) for record in questions} >= {2, 4, 6}
    assert all(2 * len(record.meta["questions"]) == len(record.messages or ()) for record in questions)


# ---------------------------------------------------------------- the folder


def test_equal_settings_build_equal_bytes_and_other_seeds_other_scenes(tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file()}

    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        build_world(tmp_path / name, splits={"train": 12}, seed=seed, sheet=False)
    assert content(tmp_path / "one") == content(tmp_path / "same")
    pictures = [{p.name for p in (tmp_path / name).glob("pictures/train/*")} for name in ("one", "other")]
    assert not pictures[0] & pictures[1]


def test_a_longer_corpus_starts_with_the_shorter_one(tmp_path: Path) -> None:
    for rows in (8, 16):
        build_world(tmp_path / str(rows), splits={"train": rows}, sheet=False)
    short, long = ((tmp_path / str(rows) / "train.jsonl").read_text().splitlines() for rows in (8, 16))
    assert long[:8] == short


def test_rows_decide_the_held_out_splits(tmp_path: Path) -> None:
    report = build_world(tmp_path / "toy", rows=4, sheet=False, weights={"chat": 1})
    assert {split: sum(tasks.values()) for split, tasks in report.tasks.items()} == {
        "train": 4, "validation": 64, "test": 64,
    }  # fmt: skip
    assert report.pictures == {"train": 0, "validation": 0, "test": 0}


def test_the_same_data_is_not_built_again_and_other_data_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "toy"
    out.mkdir()  # empty: nothing to lose
    first = build_world(out, splits={"train": 5}, sheet=False)
    (out / "train.jsonl").touch()
    again = build_world(out, splits={"train": 5}, sheet=False)
    assert (first.built, again.built) == (True, False)
    assert (again.tasks, again.pictures) == (first.tasks, first.pictures)
    with pytest.raises(WorldError, match=r"toy exists and differs in seed \(0 there, 1 asked\); choose another folder"):
        build_world(out, splits={"train": 5}, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("llmga.toyworld.wording.CLOSINGS", ("The end",))
        with pytest.raises(WorldError, match=r"differs in generator \(\w{16} there, \w{16} asked\)"):
            build_world(out, splits={"train": 5})
    with monkeypatch.context() as patch:
        patch.setattr("llmga.toyworld.build.render", lambda scene: render(scene) ^ 1)  # a renderer of other pixels
        with pytest.raises(WorldError, match=r"differs in generator"):
            build_world(out, splits={"train": 5})
    (out / "world.json").write_text("[]")
    with pytest.raises(WorldError, match="toy exists and is not a folder of toy data; choose another folder"):
        build_world(out, splits={"train": 5})
    assert len(open_manifest(out / "train.jsonl")) == 5


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmga.toyworld.build.write_sheet", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_world(tmp_path / "toy", splits={"train": 5})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".toy.partial" / "pictures").mkdir(parents=True)  # what a killed build leaves
    assert build_world(tmp_path / "toy", splits={"train": 5}, sheet=False).built
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_two_builders_of_a_folder_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, may_go_on = Event(), Event()

    def drawn_slowly(scene: Scene) -> np.ndarray:
        drawing.set()
        assert may_go_on.wait(30)
        return render(scene)

    settings = _settings(20, 0, "learnable", "stage1", None, {"train": 8})
    monkeypatch.setattr(build, "_settings", lambda *_: settings)
    monkeypatch.setattr(build, "render", drawn_slowly)
    with ThreadPoolExecutor(2) as builders:
        first = builders.submit(build_world, tmp_path / "toy", sheet=False)
        assert drawing.wait(30)
        second = builders.submit(build_world, tmp_path / "toy", sheet=False)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)  # it waits, and has not torn down what the first has written
        may_go_on.set()
        reports = first.result(), second.result()
    assert [report.built for report in reports] == [True, False]
    assert reports[0].tasks == reports[1].tasks
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


@pytest.mark.parametrize("place", ["a_file/toy", "a_file", "/proc/llmga/toy"])
def test_a_folder_that_cannot_be_made_is_a_sentence(
    place: str, tmp_path: Path, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_file").touch()
    assert main(["--out", str(tmp_path / place), "--split", "train=2"]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(r"(cannot be written: .*|exists and is not a folder of toy data); choose another folder", said)
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "stage2"}, "kind 'stage2' is unknown; expected one of base, stage1"),
        ({"preset": "sparse"}, "preset 'sparse' is unknown; expected one of learnable, dense"),
        ({"rows": 0}, "rows is 0 and seed is 0; expected at least 1 row"),
        ({"seed": -1}, "seed is -1; expected at least 1 row and a seed that is not negative"),
        ({"weights": {"captions": 1}}, "weights name the unknown part 'captions'; expected some of brief, medium"),
        ({"weights": {"brief": -1}}, "the weight of 'brief' is -1; expected a number that is not negative"),
        ({"weights": {"brief": float("nan")}}, "the weight of 'brief' is nan"),
        ({"weights": {"brief": 0}}, "all weights are 0"),
        ({"splits": {}}, "splits is empty; expected some of train, validation, test, composition"),
        ({"splits": {"dev": 5}}, "split 'dev' is unknown; expected some of train, validation, test, composition"),
        ({"splits": {"test": 2_000_000}}, "split 'test' shall hold 2000000 records; expected 1 to 1000000"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(WorldError, match=re.escape(message)):
        build_world(tmp_path / "toy", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "toy").exists()


# ---------------------------------------------------------------- pictures and page


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (7, 300)])
def test_png_files_hold_every_pixel(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(picture))) as found:
        found.load()
        assert np.array_equal(np.asarray(found), picture)


def test_scenes_are_small_files() -> None:
    sizes = [len(encode_png(render(sample_scene(seed)))) for seed in range(100)]
    assert np.mean(sizes) < 700


@pytest.mark.parametrize("style", ["long", "medium", "brief"])
def test_the_sheet_marks_facts_and_chunks_where_they_are(style: str) -> None:
    for seed in range(30):
        caption = describe(sample_scene(seed), np.random.default_rng(seed), style)  # type: ignore[arg-type]
        parts = segments(caption.text)
        assert "".join(part.text for part in parts) == caption.text
        marked = [part.text for part in parts if part.slot and part.slot != "place"]
        assert marked == [caption.text[fact.start : fact.end] for fact in caption.facts]
        start = 0
        for part in parts:
            if part.slot:
                (position,) = clip_positions(caption.text, [(start, start + len(part.text))])
                assert (position - 1) // 75 == part.chunk
            start += len(part.text)


def test_the_sheet_greys_what_a_mask_hides() -> None:
    text = "On navy. Top left large plain blue circle. Bottom right large plain red square."
    hidden = [part.text for part in segments(text, {"bottom right"}) if part.is_hidden]
    assert hidden == ["Bottom right", "large", "plain", "red", "square"]
    assert not any(part.is_hidden for part in segments(text))


def test_the_sheet_is_one_file_that_shows_every_part(world: Report) -> None:
    page = (world.folder / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    shown = re.findall(r'<h2 id="(\w+)">', page)
    test_parts = {record.meta["part"] for record in open_manifest(world.folder / "test.jsonl")}
    assert set(shown) == test_parts | {"themes"}
    assert page.count("data:image/png") > 20
    assert ('late hidden"' in page or 'size hidden"' in page) == (world.folder.name == "stage1")
    assert "after" in re.findall(r"<figcaption>(\w+)<", page)
    assert "harbour" in page


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    """The command line of data_tools/build_world.py."""
    return runpy.run_path(str(BUILD_WORLD))["main"]


def test_the_command_builds_says_what_and_builds_once(
    tmp_path: Path, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "toy"), "--split", "train=6", "--split", "test=4", "--kind", "base"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert re.search(r"^train +6 records, \d+ pictures: .*vqa$", said, re.MULTILINE)
    assert re.search(r"toy built in [\d.]+ s \([\d,]+ records/s\)$", said)
    assert (tmp_path / "toy" / "index.html").exists()
    assert main(arguments) == 0
    assert "toy was there already" in capsys.readouterr().out


def test_the_command_refuses_with_a_sentence(
    tmp_path: Path, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "toy"), "--split", "test=many"]) == 2
    assert "--split 'test=many' is not NAME=RECORDS, such as test=1000" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "toy"), "--rows", "0"]) == 2
    assert "expected at least 1 row" in capsys.readouterr().err
    assert set(SPLITS) == {"train", "validation", "test", "composition"}
