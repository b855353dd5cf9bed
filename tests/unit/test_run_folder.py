"""A run folder knows what it goes on from, never loses a result, and says when a resume does not fit."""

import errno
import json
from pathlib import Path

import pytest
import yaml
from pydantic.dataclasses import dataclass

from llmga.checkpoint import checkpoint_path, is_complete, mark_complete
from llmga.config import RunConfig
from llmga.run_folder import ResumeError, RunFolder, check_fits, explaining_full_disk, hashes, way_on
from llmga.runtime import RunFailed


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
    run.start(config(run.path, seed=1), resume=True)
    run.start(config(run.path, seed=2, num_workers=7, threads=3), resume=True)
    assert [record.getMessage() for record in caplog.records] == ["run.seed was 1 when this run began and is 2 now"]


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


def test_hashes_name_every_input(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("")
    found = {
        Path(entry["path"]).name: (entry["bytes"], entry["sha256"][:8]) for entry in hashes(sorted(tmp_path.iterdir()))
    }
    assert found == {"config.json": (2, "44136fa3"), "train.jsonl": (0, "e3b0c442")}
