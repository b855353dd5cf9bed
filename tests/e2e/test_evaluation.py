"""Guards the commands of docs/evaluation.md: processes that share the work, a killed one, exit codes.

Run: pytest tests/e2e/test_evaluation.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmga.metrics.result import read_result
from tests.forks import warm_python
from tests.toy_diffusion import toy_sd_pipeline
from tests.toy_evaluation import RANDOM_NETWORK, perfect, refinement_rows, settings_file, write_pictures

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
COUNT = 40


def start(*arguments: str | Path, python: str | None = None) -> subprocess.Popen[str]:
    """A process that evaluates."""
    line = [python or warm_python(), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, cwd=REPOSITORY, env=environment, text=True, **pipes)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One system that paints and one that painted elsewhere."""
    folder = tmp_path_factory.mktemp("evaluation")
    rows = refinement_rows(folder, COUNT)
    for condition in ("short", "refined"):
        write_pictures(folder / "given" / condition, rows, perfect)
    toy_sd_pipeline().save_pretrained(folder / "pipeline")
    return settings_file(
        folder / "settings.yaml",
        out=str(folder / "out"),
        rows={"path": str(rows)},
        systems=[
            {"name": "ours", "pipeline": str(folder / "pipeline")},
            {"name": "given", "pictures": str(folder / "given")},
        ],
        metrics=["kernel", "world"],
        paint={"steps": 1, "batch_size": 2, "side": 64},
        measure={"features": RANDOM_NETWORK, "tests": {"bootstrap": 100, "permutations": 19, "halves": 4}},
    )


def test_a_killed_process_is_taken_up_by_two_others(settings: Path) -> None:
    painted = settings.parent / "out/pictures/ours-short"
    alone = start("eval/text_to_image.py", settings, python=sys.executable)
    while not (painted.is_dir() and len(list(painted.glob("*.png"))) >= 3):
        assert alone.poll() is None, alone.communicate()[1]
        time.sleep(0.02)
    alone.send_signal(signal.SIGKILL)
    alone.wait()
    before = {path: path.stat().st_mtime_ns for path in painted.glob("[!.]*.png")}
    assert 3 <= len(before) < COUNT and not (settings.parent / "out/table.md").exists()

    published = settings.parent / "published"
    shared = ["--world-size", "2", "--publish", str(published)]
    both = [start("eval/text_to_image.py", settings, "--rank", str(r), *shared) for r in (0, 1)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("others still" in out for out, _ in said) in ([False, True], [False, False])
    assert any("| given-refined | ours-refined | late, % |" in out and "supported" in out for out, _ in said)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in ("ours-short", "ours-refined", "given-short", "given-refined"):
        assert read_result(settings.parent / "out" / name / "result.json").metric("attributes").n == COUNT
        assert read_result(published / name / "result.json").metric("attributes").n == COUNT
    assert sorted(path.name for path in published.rglob("*") if path.is_file()) == [
        *("comparisons.json", *["result.json"] * 4, "table.md")
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval/text_to_image.py", "SETTINGS", "rows.max_rows=7"], "has 7 pictures; at least 8 are needed"),
        (["eval/text_to_image.py", "SETTINGS", "paint.stpes=3"], "paint.steps"),
        (["eval/editing.py", "configs/eval/editing_toy.yaml", "rows.path=none.jsonl"], "none.jsonl does not exist"),
        (["eval/turns.py", "SETTINGS", "--rank", "2"], "--rank and --world-size go together"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(settings: Path, arguments: list[str], said: str) -> None:
    process = start(*(settings if each == "SETTINGS" else each for each in arguments))
    _, errors = process.communicate()
    assert process.returncode == 2 and said in errors and "Traceback" not in errors, errors
