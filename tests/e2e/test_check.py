"""A real `llmga check` that is killed: the same command goes on, and its report is that of an unbroken check.

Hazards: workers that outlive their parent, a half-written state, a range counted twice.

python -m pytest tests/e2e/test_check.py
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmga.records import Record, write_manifest

PICTURES = 2000  # small ones, and yet so many that a signal arrives long before the end: in 16 ranges


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        path = folder / f"{number:04d}.jpg"
        if number < 30:
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            small.resize((240, 200), Image.Resampling.BICUBIC).save(path, quality=92)
        elif number % 100 == 37:
            data = (folder / f"{number % 30:04d}.jpg").read_bytes()
            path.write_bytes(data[: len(data) // 2])
        else:
            os.link(folder / f"{number % 30:04d}.jpg", path)
    write_manifest(
        folder / "rows.jsonl",
        (Record(f"{n}", "similar_image", f"{n:04d}.jpg", caption=f"picture {n}") for n in range(PICTURES + 5)),
    )
    return folder / "rows.jsonl"


def start(manifest: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "llmga", "check", str(manifest), "--out", str(out), "--workers", "2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )


def pictures_done(out: Path) -> int:
    """Ranges of pictures that are on the disk."""
    try:
        with sqlite3.connect(f"file:{out / 'unfinished' / 'state.sqlite'}?mode=ro", uri=True) as db:
            return int(db.execute("SELECT count(*) FROM done WHERE phase = 'pictures'").fetchone()[0])
    except sqlite3.Error:
        return 0


def session_of(process: int) -> list[int]:
    """Processes that were started in the session of `process`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == process and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    process = start(manifest, out)
    shown, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "picture_damaged" in shown and "2,005 rows, 1,980 usable; 2,005 pictures" in shown
    return written(out)


@pytest.mark.parametrize(("with_signal", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_check_goes_on_and_ends_in_the_same_report(
    manifest: Path, unbroken: dict[str, bytes], tmp_path: Path, with_signal: signal.Signals, exit_code: int
) -> None:
    process = start(manifest, tmp_path / "out")
    while pictures_done(tmp_path / "out") < 2 and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, with_signal)
    said = process.communicate(timeout=60)
    assert process.returncode == exit_code, said
    assert 2 <= pictures_done(tmp_path / "out") < 14
    deadline = time.monotonic() + 30
    while session_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert session_of(process.pid) == []  # no worker is left behind

    again = start(manifest, tmp_path / "out")
    _, errors = again.communicate()
    assert again.returncode == 1 and "going on with the unfinished check" in errors
    assert written(tmp_path / "out") == unbroken
