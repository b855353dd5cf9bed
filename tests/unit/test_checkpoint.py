"""A checkpoint counts only when it is whole, and what is whole survives whatever happens to the next one."""

import errno
import json
from pathlib import Path

import pytest

from llmga.checkpoint import (
    MARKER,
    checkpoint_path,
    checkpoint_step,
    is_complete,
    is_disk_full,
    keep_last,
    latest_checkpoint,
    mark_complete,
    read_marker,
    remove_incomplete,
    write_folder_atomically,
)
from llmga.files import atomic_write


def make_checkpoint(output_dir: Path, step: int, complete: bool = True) -> Path:
    folder = checkpoint_path(output_dir, step)
    (folder / "shards").mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"global_step": step}))
    (folder / "shards" / "rank0.pt").write_bytes(bytes(2_000_000))
    if complete:
        mark_complete(folder, world_size=2)
    return folder


def test_the_latest_complete_checkpoint_is_found_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (90, 100):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 1000, complete=False)
    (tmp_path / "checkpoint-latest").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert latest_checkpoint(tmp_path / "missing") is None


def test_marker_lists_every_file_and_the_facts(tmp_path: Path) -> None:
    marker = read_marker(make_checkpoint(tmp_path, 3))
    assert (marker["step"], marker["world_size"]) == (3, 2)
    assert {name: entry["bytes"] for name, entry in marker["files"].items()} == {
        "state.json": 18,
        "shards/rank0.pt": 2_000_000,
    }
    assert "sha256" in marker["files"]["state.json"]


@pytest.mark.parametrize("damage", ["cut", "missing", "changed", "half_marker", "renamed"])
def test_a_damaged_checkpoint_is_incomplete(tmp_path: Path, damage: str) -> None:
    folder = make_checkpoint(tmp_path, 3)
    assert is_complete(folder)
    if damage == "cut":
        (folder / "shards" / "rank0.pt").write_bytes(bytes(1_999_999))
    elif damage == "missing":
        (folder / "shards" / "rank0.pt").unlink()
    elif damage == "changed":  # same size, other content
        (folder / "state.json").write_text(json.dumps({"global_step": 4}))
    elif damage == "half_marker":
        (folder / MARKER).write_text((folder / MARKER).read_text()[:40])
    else:
        folder = folder.rename(tmp_path / "checkpoint-4")
    assert not is_complete(folder)
    assert latest_checkpoint(tmp_path) is None
    assert remove_incomplete(tmp_path) == [folder]
    assert not folder.exists()


def test_keep_last_deletes_the_oldest_complete_ones_only(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 12, complete=False)
    assert [checkpoint_step(path) for path in keep_last(tmp_path, 2)] == [8, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]


def test_atomic_write_keeps_the_old_content_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    atomic_write(path, "first")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "half\ud800")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with pytest.raises(OSError, match="No space"), write_folder_atomically(final) as aside:
        (aside / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with write_folder_atomically(final) as aside:
        (aside / "model.safetensors").write_bytes(b"whole")
        assert not final.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    with pytest.raises(FileExistsError, match="exists already"), write_folder_atomically(final):
        pass


def test_a_full_disk_is_recognised_behind_the_errors_of_libraries() -> None:
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_disk_full(wrapped)
    assert is_disk_full(OSError(errno.EFBIG, "File too large"))
    assert is_disk_full(RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(RuntimeError("shape mismatch"))


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="final is not a checkpoint"):
        checkpoint_step(tmp_path / "final")


def test_files_of_a_finished_folder_are_as_open_as_the_umask_says(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with write_folder_atomically(final) as aside:
        (aside / "weights.safetensors").touch(mode=0o600)
    assert (final / "weights.safetensors").stat().st_mode & 0o777 == final.stat().st_mode & 0o666


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_durable_folder_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    waited: list[int] = []
    monkeypatch.setattr("os.fsync", waited.append)
    with write_folder_atomically(tmp_path / "world", durable=durable) as aside:
        for number in range(5):
            (aside / f"{number}.png").write_bytes(b"picture")
    assert len(list((tmp_path / "world").iterdir())) == 5
    assert len(waited) == (6 if durable else 0)  # the files and the folder they appear in
