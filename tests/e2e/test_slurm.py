"""The sbatch templates, run as Slurm would on two machines: told to make room, they save, requeue, go on and finish.

Slurm's programs are played by the small script below: two machines are two loopback addresses, a job's signal goes to
the processes of all tasks, a task that fails takes the others down, and a requeue is noted down. What it plays is
Slurm's manual; no Slurm runs here.
Run: pytest tests/e2e/test_slurm.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmga.checkpoint import latest_checkpoint
from llmga.config import load_config
from llmga.stage1.config import Stage1Config
from llmga.stage1.train import train
from tests.e2e.stage1_run import PATIENCE, ROOT, SCRIPT, assert_trained_alike, make_inputs, slow_script, wait_for
from tests.forks import warm_python

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TEMPLATES = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))
SLURM = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys, time

name, arguments, state = os.path.basename(sys.argv[0]), sys.argv[1:], pathlib.Path(os.environ["SHIM"])
with open(state / "calls", "a") as calls:
    calls.write(" ".join([name, *arguments]) + "\\n")
if name == "srun":
    (state / "caches").write_text(os.environ["LLMGA_CACHE_DIR"])
    options = []
    while arguments[0].startswith("-"):
        options.append(arguments.pop(0))
    tasks = []
    for number in range(2):
        task = dict(os.environ, SLURM_PROCID=str(number), SLURM_NODEID=str(number), SLURM_LOCALID="0")
        task.update(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="127.0.0.[1-2]")
        tasks.append(subprocess.Popen(arguments, env=task, start_new_session=True))
        (state / f"task-{{tasks[-1].pid}}").touch()
    while None in (codes := [task.poll() for task in tasks]):
        if any(codes) and "--kill-on-bad-exit=1" in options:
            for task in tasks:
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGKILL)
        time.sleep(0.05)
    for task in tasks:
        (state / f"task-{{task.pid}}").unlink()
    sys.exit(max(codes, key=abs) % 256)
if name == "scancel":
    for task in state.glob("task-*"):
        os.killpg(int(task.name.removeprefix("task-")), signal.SIGTERM)
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def alone(settings: Path) -> Path:
    """The run folder of one process, whose batches of 2 are the two tasks' batches of 1."""
    return train(load_config(Stage1Config, settings, ())).parent


@pytest.fixture
def submitted_from(tmp_path: Path) -> Path:
    """A clone as far as a job needs one, with slow steps, and Slurm's programs in `bin`."""
    clone = tmp_path / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    python = clone / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {warm_python()} "$@"\n')
    python.chmod(0o755)
    shutil.copytree(ROOT / "scripts" / "slurm", clone / "scripts" / "slurm")
    slow_script(clone).rename(clone / "scripts" / "train_stage1.py")
    (clone / "bin").mkdir()
    for name in ("srun", "scancel", "scontrol"):
        program = clone / "bin" / name
        program.write_text(SLURM)
        program.chmod(0o755)
    return clone


@pytest.fixture
def jobs() -> Iterator[list[subprocess.Popen[str]]]:
    """Started batch scripts, each with all that it started; nothing outlives the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def submit(clone: Path, jobs: list[subprocess.Popen[str]], template: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a batch script as slurmd does on the job's first machine."""
    number = str(time.monotonic_ns() // 1_000_000)  # of which llmga makes the port
    variables = {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(clone), "NPROC": "1"}
    variables |= {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", "SHIM": str(clone), "PYTHONPATH": str(ROOT)}
    variables |= {"SLURM_TMPDIR": str(clone / "fast_disk"), "USER": "somebody"}
    log = (clone / "log").open("a")
    jobs.append(
        subprocess.Popen(
            ["bash", str(clone / "scripts" / "slurm" / template.name), *arguments],
            env={**os.environ, **variables},
            cwd="/",  # a batch script may start anywhere
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    )
    return jobs[-1]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_told_to_make_room_a_job_saves_requeues_goes_on_and_finishes(
    template: Path, settings: Path, alone: Path, submitted_from: Path, jobs: list[subprocess.Popen[str]]
) -> None:
    folder = submitted_from / "run"
    arguments = (str(settings), f"run.output_dir={folder}", "run.batch_size=1")
    log = submitted_from / "log"
    first = submit(submitted_from, jobs, template, *arguments)
    wait_for(folder / "metrics.jsonl")
    first.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@600 sends: to the script alone
    assert first.wait(PATIENCE) == 0, log.read_text()
    job = next(line for line in log.read_text().splitlines() if "back into the queue" in line).split()[-1]
    calls = (submitted_from / "calls").read_text().splitlines()
    assert calls[0].startswith("srun --kill-on-bad-exit=1")
    assert calls[1:] == [f"scancel --signal=TERM {job}", f"scontrol requeue {job}"]
    saved = latest_checkpoint(folder)
    assert saved is not None and not (folder / "final").exists(), log.read_text()

    second = submit(submitted_from, jobs, template, *arguments)
    assert second.wait(PATIENCE) == 0, log.read_text()
    assert f"going on from {saved}" in log.read_text()
    assert_trained_alike(folder, alone, 5e-6)
    assert "scontrol" not in (submitted_from / "calls").read_text().splitlines()[-1]
    assert (submitted_from / "caches").read_text() == str(submitted_from / "fast_disk" / "llmga-somebody" / "llmga")


@pytest.mark.parametrize(
    ("number", "tasks", "code", "calls"),
    [
        (signal.SIGUSR1, "trap 'exit 7' TERM; sleep 3 >/dev/null & wait", 0, ["scancel", "scontrol requeue 5"]),
        (signal.SIGUSR1, "trap 'exit 0' TERM; sleep 3 >/dev/null & wait", 0, ["scancel"]),  # it had just finished
        (
            signal.SIGTERM,
            "trap 'exit 7' TERM; sleep 3 >/dev/null & wait",
            7,
            ["scancel"],
        ),  # cancelled: stays away
        (None, "exit 3", 3, []),  # failed
    ],
)
def test_only_a_job_that_was_told_to_make_room_comes_back(
    number: signal.Signals | None, tasks: str, code: int, calls: list[str], tmp_path: Path
) -> None:
    """scripts/slurm/job.sh alone, around a step of one task."""
    script = f"""
        SLURM_JOB_ID=5
        scancel() {{ echo scancel; kill -TERM "$step"; }}
        scontrol() {{ echo "scontrol $*"; }}
        source {ROOT}/scripts/slurm/job.sh
        run_until_signal bash -c "touch {tmp_path}/started; {tasks}"
    """
    job = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)
    wait_for(tmp_path / "started")
    if number is not None:
        time.sleep(0.2)  # until the trap is set
        job.send_signal(number)
    said = job.communicate(timeout=PATIENCE)[0].splitlines()
    assert (job.returncode, [line for line in said if line.startswith("sc")]) == (code, calls)


@pytest.mark.parametrize("script", [*TEMPLATES, TEMPLATES[0].with_name("job.sh")], ids=lambda path: path.name)
def test_templates_are_sound_shell_and_leave_nothing_to_expand_to_slurm(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
    options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert not any("$" in line or "~" in line for line in options)
    if script.suffix == ".sbatch":
        given = " ".join(options)
        for option in ("--nodes=2", "--signal=B:USR1@", "--requeue", "--open-mode=append", "--time="):
            assert option in given
        assert SCRIPT.name in script.read_text()
