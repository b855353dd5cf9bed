"""Guards the command that records prompts: killed at any moment it goes on, and processes share the work.

Run: pytest tests/e2e/test_record.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from llmga.records import Record, open_manifest, write_manifest
from llmga.stage1.record.parts import parts_folder, read_lines
from tests.chat_server import ChatServer, asked_text, chat_server
from tests.forks import warm_python

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NUM_ROWS, BATCH = 40, 4


def start(folder: Path, server: ChatServer, *arguments: str, python: str | None = None) -> subprocess.Popen[str]:
    """A process that records."""
    values = {
        "source.path": folder / "rows.jsonl", "out": folder / "out.jsonl", "task": "similar_image",
        "endpoint.url": server.url, "endpoint.model": "llmga", "picture_size": 32, "batch_size": BATCH,
    }  # fmt: skip
    (folder / "c.yaml").write_text("{}\n")
    line = [
        python or warm_python(),
        "scripts/record_prompts.py",
        str(folder / "c.yaml"),
        *(f"{k}={v}" for k, v in values.items()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [*line, *arguments], cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows with pictures."""
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")
    rows = [Record(f"row-{number}", "similar_image", image="a.png") for number in range(NUM_ROWS)]
    write_manifest(tmp_path / "rows.jsonl", rows)
    return tmp_path


def wait_for(condition: object, seconds: float = 300) -> None:
    """Until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_it_goes_on_and_two_processes_share_what_is_left(folder: Path) -> None:
    with chat_server(lambda body, number: f"<gen_img> {asked_text(body)} </gen_img>", delay_s=0.1) as server:
        killed = start(folder, server, python=sys.executable)
        wait_for(lambda: len(server.requests) > 3 * BATCH)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        asked_before = len(server.requests)
        kept = len(list(read_lines(parts_folder(folder / "out.jsonl"))))
        assert asked_before - BATCH <= kept + BATCH and kept % BATCH == 0 and kept >= 2 * BATCH
        both = [start(folder, server, "--rank", str(rank), "--world-size", "2") for rank in (0, 1)]
        told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    records = list(open_manifest(folder / "out.jsonl"))
    assert [record.id for record in records] == [f"row-{number}" for number in range(NUM_ROWS)]
    assert all(record.prompt for record in records)
    assert len(server.requests) - asked_before == NUM_ROWS - kept  # nothing was asked twice
    merges = [out for out, _ in told if out.startswith(f"{NUM_ROWS} prompts in ")]
    assert merges and "rows/s" in told[0][1] + told[1][1]


def test_a_signal_stops_it_behind_its_batch_with_code_130_and_bad_settings_with_code_2(folder: Path) -> None:
    with chat_server(lambda body, number: f"<gen_img> {asked_text(body)} </gen_img>", delay_s=0.1) as server:
        process = start(folder, server)
        wait_for(lambda: len(server.requests) > BATCH)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate()
        kept = len(list(read_lines(parts_folder(folder / "out.jsonl"))))
        assert process.returncode == 130 and f"stopped with {kept} rows recorded; the same command goes on" in told
        assert kept == len(server.requests) < NUM_ROWS
        process = start(folder, server, "sampling.temperature=0.9")
        _, told = process.communicate()
    assert process.returncode == 2 and "recorded with other settings: temperature" in told and "Traceback" not in told
