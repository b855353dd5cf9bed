"""Which wandb run a run folder is, and what the environment may say about it."""

import os
from pathlib import Path

import pytest

from llmga.runtime import RuntimeSetupError
from llmga.trackers import export_wandb_run, tracker_names, wandb_run

VARIABLES = ("WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def test_a_missing_tracker_is_named_with_the_way_out() -> None:
    assert tracker_names([]) == []
    with pytest.raises(RuntimeSetupError, match=r"run\.trackers: 'no_such_tracker' .* `pip install"):
        tracker_names(["no_such_tracker"])


def test_every_folder_is_a_run_of_its_own_which_goes_on(tmp_path: Path) -> None:
    first, second = wandb_run(tmp_path / "first"), wandb_run(tmp_path / "second")
    assert first["id"] and first["id"] != second["id"]
    assert first == wandb_run(tmp_path / "first")
    assert (first["project"], first["dir"], first["resume"]) == ("llmga", str(tmp_path / "first"), "allow")


def test_the_environment_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    run = wandb_run(tmp_path)
    assert (run["project"], run["id"], run["dir"]) == ("mine", "abc", str(tmp_path))


def test_the_environment_carries_it_to_the_trainer(tmp_path: Path) -> None:
    export_wandb_run(tmp_path)
    assert [os.environ[name] for name in VARIABLES] == list(wandb_run(tmp_path).values())
    assert os.environ["WANDB_DIR"] == str(tmp_path)
