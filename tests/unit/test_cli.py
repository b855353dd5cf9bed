"""`llmga --help` must be instant, and a user's mistake must be one message and exit code 2.

Run: pytest tests/unit/test_cli.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llmga.cli import app
from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, load_config
from llmga.stage1.config import Stage1Config

REPOSITORY = Path(__file__).parents[2]
TOY = str(REPOSITORY / "configs/stage1/toy.yaml")


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, prog_name="llmga")
    return result.exit_code, result.stdout, result.stderr


def test_help_answers_in_half_a_second() -> None:
    seconds = []
    for _ in range(3):  # processor time, the least of three: other work on the machine must not fail this
        before = os.times()
        finished = subprocess.run([sys.executable, "-m", "llmga", "--help"], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert "stage1" in finished.stdout and "preview" in finished.stdout
    assert "..." not in finished.stdout.partition("Commands:")[2]  # whole sentences on 80 columns
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "command",
    [
        "stage1",
        "plan",
        "preflight",
        "preview",
        "config",
        "check",
        "world",
        "ask",
        "merge",
        "restore",
        "release",
        "pull",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == EXIT_OK and "Usage: llmga " + command in out


def test_config_prints_what_loads_again_as_the_same(tmp_path: Path) -> None:
    code, out, _ = run("config", TOY, "run.max_steps=7", "optim.lr=3e-4")
    assert code == EXIT_OK
    shown = yaml.safe_load(out)
    assert (shown["run"]["max_steps"], shown["run"]["epochs"], shown["optim"]["lr"]) == (7, None, 3e-4)
    saved = tmp_path / "shown.yaml"
    saved.write_text(out)
    overrides = ["run.max_steps=7", "optim.lr=3e-4"]
    again = load_config(Stage1Config, saved, check_machine=False)
    assert again == load_config(Stage1Config, Path(TOY), overrides, check_machine=False)


@pytest.mark.parametrize("command", ["stage1", "plan", "preflight", "preview", "config"])
def test_bad_settings_are_one_report_and_exit_code_2(command: str) -> None:
    code, out, err = run(command, TOY, "run.max_stps=7", "optim.lr=fast")
    assert (code, out) == (EXIT_BAD_INPUT, "")
    assert "did you mean run.max_steps?" in err and 'optim.lr (command line): found "fast", expected a number' in err
    assert "Traceback" not in err


def test_a_picture_that_cannot_be_read_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for picture in (broken, tmp_path / "missing.png"):
        code, out, err = run("ask", str(picture), "What is this?")
        assert (code, out) == (EXIT_BAD_INPUT, "")
        assert str(picture) in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "error", "code"),
    [
        ("llmga.records", "RecordError", EXIT_BAD_INPUT),
        ("llmga.runtime", "Interrupted", EXIT_INTERRUPTED),
        ("llmga.runtime", "RunFailed", EXIT_FAILED),
        ("builtins", "KeyboardInterrupt", EXIT_INTERRUPTED),
        ("builtins", "ValueError", EXIT_FAILED),  # not ours: a defect, told with its traceback
    ],
)
def test_exit_codes(module: str, error: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(__import__(module, fromlist=[error]), error)

    def fail(*_: object, **__: object) -> None:
        raise kind("what happened")

    monkeypatch.setattr("llmga.config.load_config", fail)
    found, _, err = run("config", TOY)
    assert found == code
    if module.startswith("llmga."):
        assert err == "what happened\n"
