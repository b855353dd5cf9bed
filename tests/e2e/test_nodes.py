"""Two machines, simulated on one: they meet, agree, stop together, go on, and say in one sentence why they cannot.

Each machine is a torchrun agent of its own on loopback, started by the line that `make` prints.
Run: pytest tests/e2e/test_nodes.py
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llmga.checkpoint import latest_checkpoint
from llmga.config import EXIT_BAD_INPUT, load_config
from llmga.stage1.config import Stage1Config
from llmga.stage1.train import train
from tests.e2e.stage1_run import (
    PATIENCE,
    ROOT,
    SCRIPT,
    assert_trained_alike,
    free_port,
    make_inputs,
    slow_script,
    start,
    succeed,
    wait_for,
)
from tests.forks import warm_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

BRIEF = ("run.join_timeout_s=8", "run.batch_size=1")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="module")
def alone(settings: Path) -> Path:
    """The run folder of one process, whose batches of 2 are the two machines' batches of 1."""
    return train(load_config(Stage1Config, settings, ())).parent


@pytest.fixture
def machines() -> Iterator[list[subprocess.Popen[str]]]:
    """Where a test puts what it starts; nothing outlives the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for machine in started:
        machine.kill()
        machine.wait()


def start_machines(
    machines: list[subprocess.Popen[str]], script: Path, *arguments: str, numbered: bool
) -> list[subprocess.Popen[str]]:
    """One launcher on each of two machines, as `make stage1 NODES=2 MASTER_ADDR=...` starts it there."""
    port = free_port()
    launch = [warm_python(), "-m", "llmga.nodes.launch", "--nodes=2", "--nproc=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number in range(2):
        meeting = ["--master-addr=127.0.0.1", f"--master-port={port}"]
        meeting += [f"--node-rank={number}"] if numbered else []
        line = [*launch, *meeting, str(script), *arguments]
        machines.append(subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    return machines[-2:]


def ended(machines: list[subprocess.Popen[str]]) -> list[str]:
    """What each machine wrote to its error stream, when all have ended."""
    return [machine.communicate(timeout=PATIENCE)[1] for machine in machines]


def test_two_machines_stop_when_one_is_told_to_and_go_on_together_or_alone(
    settings: Path, alone: Path, machines: list[subprocess.Popen[str]]
) -> None:
    folder = settings.parent / "two"
    overrides = (str(settings), f"run.output_dir={folder}", "run.batch_size=1")
    pair = start_machines(machines, slow_script(settings.parent), *overrides, numbered=True)
    wait_for(folder / "metrics.jsonl")
    pair[1].send_signal(signal.SIGTERM)
    said = ended(pair)
    saved = latest_checkpoint(folder)
    assert saved is not None, said
    assert "stopped by a signal to another rank" in said[0] and not (folder / "final").exists()
    assert "2 processes on" in said[0] and "agree on packages, settings, data and run folder" in said[0]
    on_one = shutil.copytree(folder, settings.parent / "two_on_one")

    pair = start_machines(machines, SCRIPT, *overrides, numbered=False)  # the numbers are given as they come
    said = ended(pair)
    assert [machine.returncode for machine in pair] == [0, 0], said
    assert f"going on from {saved}" in "".join(said)
    assert_trained_alike(folder, alone, 5e-6)
    succeed(settings, f"run.output_dir={on_one}")
    assert_trained_alike(on_one, alone, 5e-6)


def each_lives_elsewhere(folder: Path) -> None:
    """A working folder for each rank, as on machines whose home is their own."""
    home = folder / f"home{os.environ['RANK']}"
    home.mkdir()
    os.chdir(home)


def rank_1_has_another_transformers(folder: Path) -> None:
    """What pip leaves of a package that importlib reads: its name and version."""
    if os.environ["RANK"] == "1":
        package = folder / "old" / "transformers-5.0.1.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.1\n")
        sys.path.insert(0, str(package.parent))


def rank_1_dies(folder: Path) -> None:
    if os.environ["RANK"] == "1":
        os._exit(1)


def rank_1_adds_wrongly(folder: Path) -> None:
    """A machine that computes wrong sums."""
    if os.environ["RANK"] == "1":
        all_reduce = dist.all_reduce

        def wrong(tensor: torch.Tensor) -> None:
            all_reduce(tensor)
            tensor[5] += 1

        dist.all_reduce = wrong


def all_is_well(folder: Path) -> None:
    pass


def rank_1_hangs_in_the_network(folder: Path) -> None:
    if os.environ["RANK"] == "1":
        dist.all_reduce = lambda tensor: time.sleep(60)


FAULTS = {
    "settings": (
        all_is_well,
        {1: "optim.lr=0.5"},
        r"rank 1 on \S+: found optim\.lr=0\.5, expected optim\.lr=0\.01 as rank 0 on \S+ has; start every machine",
    ),
    "versions": (
        rank_1_has_another_transformers,
        {},
        r"rank 1 on \S+: found transformers 5\.0\.1, expected transformers 5\.[\d.]+ as rank 0 on \S+ has; let all",
    ),
    "wrong sum": (
        rank_1_adds_wrongly,
        {},
        r"rank 1 on \S+: the all-reduce gave 16 at 5, expected 15 \(1 wrong\); test that machine alone",
    ),
    "hanging network": (
        rank_1_hangs_in_the_network,
        {},
        r"ranks 0-1 on \S+: the all-reduce did not end within 8 s; test that machine alone",
    ),
    "dead rank": (
        rank_1_dies,
        {},
        r"rank 1 of 2 did not arrive at the roll call at 127\.0\.0\.1:\d+ within 8 s \(rank 0 came, rank 0 on \S+\); "
        r"start what is missing or see its machine's log for why it ended",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_exit_code_2(settings: Path, fault: str, tmp_path: Path) -> None:
    sabotage, of_rank, sentence = FAULTS[fault]
    folder = tmp_path / "run"
    how = {"processes": 2, "sabotage": partial(sabotage, tmp_path), "of_rank": of_rank}
    run = start(settings, f"run.output_dir={folder}", *BRIEF, **how)
    codes = run.wait()
    said = run.said()
    assert codes[0] == EXIT_BAD_INPUT and codes[1] in (EXIT_BAD_INPUT, 1), said
    ours = [line for line in said.splitlines() if re.search(sentence, line)]
    assert len(ours) == 1, said
    assert "Traceback" not in said
    assert not (folder / "config.yaml").exists()  # no run was begun


def test_a_run_folder_that_only_rank_0_has(settings: Path, tmp_path: Path) -> None:
    run = start(settings, "run.output_dir=mine", *BRIEF, processes=2, sabotage=partial(each_lives_elsewhere, tmp_path))
    assert run.wait() == [EXIT_BAD_INPUT, EXIT_BAD_INPUT], run.said()
    sentence = (
        r"rank 1 on \S+: found nothing at \S+home1/mine of what rank 0 on \S+ wrote to \S+home0/mine 4 s before; "
        r"give run\.output_dir a folder that all machines share, by its full path"
    )
    assert re.search(sentence, run.said()), run.said()
    assert list((tmp_path / "home0" / "mine").iterdir()) == []  # the token is gone


def test_data_that_one_machine_lacks_is_told_on_the_others_too(settings: Path) -> None:
    lacking = {1: f"data.sources.0.path={settings.parent / 'absent.jsonl'}"}
    run = start(settings, f"run.output_dir={settings.parent / 'lack'}", *BRIEF, processes=2, of_rank=lacking)
    assert run.wait() == [EXIT_BAD_INPUT, EXIT_BAD_INPUT], run.said()
    assert re.search(r"rank 1 on \S+: data\.sources\.0\.path.*absent\.jsonl does not exist", run.said()), run.said()


@pytest.mark.parametrize("mode", ["warn", "skip"])
def test_the_preflight_may_only_warn_or_be_left_out(settings: Path, alone: Path, mode: str) -> None:
    folder = settings.parent / mode
    overrides = (f"run.output_dir={folder}", "run.batch_size=1", f"run.preflight={mode}")
    said = succeed(settings, *overrides, processes=2, of_rank={1: "run.num_workers=1"})
    warning = ": found run.num_workers=1, expected run.num_workers=0 as rank 0 on"
    assert (warning in said, "agree on" in said) == (mode == "warn", mode == "warn")
    assert_trained_alike(folder, alone, 5e-6)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_preflight_is_a_command_of_its_own(settings: Path, launcher: str) -> None:
    python = sys.executable if launcher == "torchrun" else warm_python()
    launch = [python, "-m", "llmga.nodes.launch", "--nproc=2", f"--launcher={launcher}"]
    launch += [f"--master-port={free_port()}", "-m", "llmga", "preflight", str(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith(f"llmga preflight {settings}")
    assert re.search(r"^\S+: ranks 0-1; .*; Python \S+ torch \S+( CUDA \S+ NCCL \S+)?$", done.stdout, re.MULTILINE)
    verdict = r"^2 processes on \S+ agree on .*; all-reduce \d+\.\d\d GB/s; [\d,]+ GB free; checked in \d+\.\d s$"
    assert re.search(verdict, done.stdout, re.MULTILINE)
