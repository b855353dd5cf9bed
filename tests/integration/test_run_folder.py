"""A run folder knows what it goes on from, never loses a result, and says when a resume does not fit."""

import errno
import json
import resource
import shutil
from pathlib import Path

import pytest
import yaml
from pydantic.dataclasses import dataclass

from llmga import run_inputs
from llmga.checkpoint import checkpoint_path, is_complete, mark_complete
from llmga.config import RunConfig, load_config
from llmga.run_folder import ResumeError, RunFolder, check_fits, explaining_full_disk, hashes, way_on
from llmga.run_inputs import fingerprints
from llmga.runtime import RunFailed
from llmga.stage1.config import Stage1Config


@dataclass
class Config:
    run: RunConfig


def config(path: Path, **run: object) -> Config:
    return Config(RunConfig(output_dir=path, **run))


def add_checkpoint(path: Path, step: int, complete: bool = True) -> Path:
    folder = checkpoint_path(path, step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if complete:
        mark_complete(folder, examples_per_step=8, engine="zero2", world_size=2)
    return folder


def test_a_start_goes_on_from_the_last_whole_checkpoint_and_cuts_the_logs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.start(config(run.path), resume=True) is None
    kept, broken = add_checkpoint(run.path, 2), add_checkpoint(run.path, 4, complete=False)
    for step in (1, 2, 3, 4):
        run.metrics.write(step, loss=1.0)
    assert run.start(config(run.path), resume=True) == kept
    assert not broken.exists()
    assert [line["step"] for line in run.metrics.read()] == [1, 2]
    assert len(json.loads((run.path / "environment.json").read_text())["starts"]) == 2
    assert yaml.safe_load((run.path / "config.yaml").read_text())["run"]["batch_size"] == 4


def test_changed_settings_are_told_and_harmless_ones_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path / "run")
    run.start(config(run.path, batch_size=1), resume=True)
    add_checkpoint(run.path, 2)
    run.start(config(run.path, batch_size=2, num_workers=7, threads=3), resume=True)
    said = ["run.batch_size was 1 when this run began and is 2 now"]
    assert [record.getMessage() for record in caplog.records] == said


def test_without_resume_everything_is_kept_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for number in (1, 2):
        run.start(config(run.path), resume=True)
        add_checkpoint(run.path, 2)
        run.final.mkdir()
        assert run.is_finished
        assert run.start(config(run.path), resume=False) is None
        assert not run.is_finished
        assert is_complete(run.path / f"previous-{number}" / "checkpoint-2")
    assert (run.path / "previous-1").is_dir()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"examples_per_step": 16}, r"8 examples per step, this run has 16; keep run\.batch_size"),
        ({"engine": "zero3"}, r"written by zero2, this run uses zero3; set run\.deepspeed"),
        ({"world_size": 4}, "optimizer of 2 processes, this run has 4"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, wanted: dict[str, object], message: str) -> None:
    fits = {"examples_per_step": 8, "engine": "zero2", "world_size": 2}
    folder = add_checkpoint(tmp_path, 2)
    check_fits(folder, **fits)
    with pytest.raises(ResumeError, match=message):
        check_fits(folder, **{**fits, **wanted})


def test_a_full_disk_is_one_sentence_and_frees_what_was_half_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    add_checkpoint(tmp_path, 2)
    broken = add_checkpoint(tmp_path, 4, complete=False)
    said = r"could not write .*No space left.*checkpoint-2 is complete"
    with pytest.raises(RunFailed, match=said), explaining_full_disk(run):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not broken.exists()
    with pytest.raises(RuntimeError, match="shape"), explaining_full_disk(run):
        raise RuntimeError("shape mismatch")
    assert "starts again" in way_on(RunFolder(tmp_path / "new"))


def test_a_disk_that_is_full_from_the_start_is_one_sentence_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # no file may grow past 100 bytes
    try:
        with pytest.raises(RunFailed, match=r"could not write to .*run: .*; there is no checkpoint yet") as failed:
            run.start(config(run.path), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(failed.value).count("could not write") == 1 and not any(run.path.iterdir())
    with pytest.raises(RunFailed, match=str(failed.value)[:40]) as again, explaining_full_disk(run):
        raise failed.value
    assert again.value is failed.value


def test_hashes_name_every_input(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("")
    found = {
        Path(entry["path"]).name: (entry["bytes"], entry["sha256"][:8]) for entry in hashes(sorted(tmp_path.iterdir()))
    }
    assert found == {"config.json": (2, "44136fa3"), "train.jsonl": (0, "e3b0c442")}


# ---------------------------------------------------------------- going on with what the checkpoint was trained on


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two manifests and two model folders."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"id": "{name}"}}\n')
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    return tmp_path


def stage1(inputs: Path, *overrides: str) -> Stage1Config:
    base = [f"model.path={inputs}/one", f"data.sources=[{{path: {inputs}/one.jsonl}}]", f"run.output_dir={inputs}/run"]
    return load_config(Stage1Config, None, [*base, *overrides])


def resume(inputs: Path, *overrides: str) -> Path | None:
    settings = stage1(inputs, *overrides)
    return RunFolder(settings.run.output_dir).start(settings, resume=True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.seed=7"], "run.seed was 0 and is 7 now"),
        (["data.sources.0.weight=2"], r"data.sources.0.weight was not set and is 2.0 now"),
        (["data.sources.0.tasks=[vqa]"], r"data.sources.0.tasks.0 was not set and is vqa now"),
        (["data.similar_generate_share=0.5"], r"data.similar_generate_share was 0.7 and is 0.5 now"),
        (["data.sources.0.path={inputs}/two.jsonl"], r"sources.0.path was .*/one.jsonl \(14 bytes.*two.jsonl \(14 byt"),
        (
            ["data.sources=[{{path: {inputs}/one.jsonl}},{{path: {inputs}/two.jsonl}}]"],
            r"data.sources.1.path was not set and is .*/two.jsonl now",
        ),
        (["model.path={inputs}/two"], r"model.path was .*/one \(5 bytes, sha256 \w{12}\) and is .*/two \(5 bytes, sha"),
        (["model.lora.rank=8"], r"model.lora.rank was not set and is 8 now"),
        (["model.tag_name=gen_image"], r"model.tag_name was not set and is gen_image now"),
    ],
)
def test_another_run_does_not_go_on_from_a_checkpoint(inputs: Path, overrides: list[str], said: str) -> None:
    resume(inputs)
    kept = add_checkpoint(inputs / "run", 2)
    changed = [override.format(inputs=inputs) for override in overrides]
    ways_out = r"give another run\.output_dir, or go on all the same with run\.resume_anyway=true"
    for _ in range(2):  # a refusal leaves the folder as it was
        with pytest.raises(ResumeError, match=rf"checkpoint-2 was trained otherwise: .*{said}.*{ways_out}"):
            resume(inputs, *changed)
    assert resume(inputs) == kept
    assert resume(inputs, *changed, "run.resume_anyway=true") == kept
    assert resume(inputs, *changed) == kept  # from now on that is what the run is
    with pytest.raises(ResumeError):
        resume(inputs)


@pytest.mark.parametrize("name", ["one.jsonl", "one/model.safetensors", "one/config.json"])
def test_files_that_hold_something_else_now_are_noticed(inputs: Path, name: str) -> None:
    resume(inputs)
    kept = add_checkpoint(inputs / "run", 2)
    before = (inputs / name).read_bytes()
    (inputs / name).write_bytes(before.swapcase() if before != b"{}" else b"[]")  # as many bytes as before
    key = "data.sources.0.path" if name == "one.jsonl" else "model.path"
    with pytest.raises(ResumeError, match=rf"{key} was .*sha256 .* and is .*sha256 .* now"):
        resume(inputs)
    (inputs / name).write_bytes(before)
    assert resume(inputs) == kept


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.max_steps=9", "optim.lr=1"],
        ["run.batch_size=2", "run.accumulation_steps=2"],
        ["data.validation=[{{path: {inputs}/two.jsonl}}]"],
        ["data.packing=true", "model.cross_entropy=full", "data.sources.0.name=other"],
        ["data.sources.0.path={inputs}/moved.jsonl", "model.path={inputs}/moved"],
    ],
)
def test_what_does_not_make_it_another_run_is_only_told(
    inputs: Path, overrides: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    resume(inputs)
    kept = add_checkpoint(inputs / "run", 2)
    shutil.copy(inputs / "one.jsonl", inputs / "moved.jsonl")
    shutil.copytree(inputs / "one", inputs / "moved")
    (inputs / "moved" / "README.md").write_text("a model\n")
    assert resume(inputs, *(override.format(inputs=inputs) for override in overrides)) == kept
    assert caplog.messages and all("when this run began" in message for message in caplog.messages)


def test_without_a_checkpoint_there_is_nothing_to_fit(inputs: Path) -> None:
    resume(inputs)
    assert resume(inputs, "run.seed=7") is None


def test_settings_that_an_older_run_did_not_know_are_no_difference(inputs: Path) -> None:
    resume(inputs)
    kept = add_checkpoint(inputs / "run", 2)
    path = inputs / "run" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["data"]["language"], settings["model"]["tags"]
    path.write_text(yaml.safe_dump(settings))
    (inputs / "run" / "environment.json").write_text('{"starts": [{}]}')  # nor did it keep fingerprints
    assert resume(inputs) == kept


def test_a_file_that_cannot_be_read_is_left_to_its_reader(inputs: Path) -> None:
    assert fingerprints(stage1(inputs, "data.sources.0.path=/proc/self/mem")).keys() == {"model.path"}


def test_huge_files_are_sampled_from_end_to_end(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_inputs, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(run_inputs, "_SAMPLE_BYTES", 1 << 10)
    weights = inputs / "one" / "model.safetensors"
    content, found = bytearray(3 << 20), set()
    for place in (None, 0, len(content) // 2 // (len(content) // 63) * (len(content) // 63), len(content) - 1):
        if place is not None:
            content[place] ^= 1
        weights.write_bytes(content)
        found.add(fingerprints(stage1(inputs))["model.path"]["sha256"])
    assert len(found) == 4
