"""The first minute on a new machine: what `make` starts, and what it says when Python or the disk will not do.

Run: pytest tests/unit/test_make.py
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DATA_STEP = "data_tools/build_world.py --out data/toy"


def dry_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would run."""
    return make("-n", *arguments)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make without the settings of a make that may be running this test."""
    settings = (
        "MAKE",
        "MFLAGS",
        "MASTER_",
        "NODE",
        "NPROC",
        "SLURM_",
        "ARGS",
        "CONFIG",
        "LAUNCH",
        "HOSTFILE",
        "TORCH_",
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    return subprocess.run(["make", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "launch"),
    [
        ([], ".venv/bin/python scripts/train_stage1.py configs/stage1/toy.yaml"),
        (
            ["NPROC=8", "ARGS=optim.lr=1e-5 run.seed=1"],
            ".venv/bin/python -m torch.distributed.run --standalone --nproc_per_node=8 --shutdown_timeout=900 "
            "scripts/train_stage1.py configs/stage1/toy.yaml optim.lr=1e-5 run.seed=1",
        ),
        (
            ["CONFIG=configs/stage1/x.yaml", "NPROC=8", "NODES=2", "MASTER_ADDR=first", "NODE_RANK=1"],
            ".venv/bin/python -m torch.distributed.run --nnodes=2 --nproc_per_node=8 --shutdown_timeout=900 "
            "--node_rank=1 --master_addr=first --master_port=29500 scripts/train_stage1.py configs/stage1/x.yaml",
        ),
        (
            ["NPROC=4", "NODES=2", "LAUNCHER=slurm", "LAUNCH_ARGS=--partition=gpu --time=8:00:00"],
            "srun --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --kill-on-bad-exit=1 --partition=gpu --time=8:00:00 "
            ".venv/bin/python scripts/train_stage1.py configs/stage1/toy.yaml",
        ),
    ],
)
def test_the_launch_line_can_be_asked_for_and_is_what_stage1_starts(arguments: list[str], launch: str) -> None:
    printed = make("launch-line", *arguments)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == launch + "\n"
    asked = dry_make("launch-line", *arguments).stdout.strip().splitlines()[-1]
    started = dry_make("stage1", *arguments).stdout.strip().splitlines()[-1]
    assert asked.partition(" ")[2].replace("--dry-run ", "") == started.partition(" ")[2]


def test_several_machines_must_be_told_where_to_meet() -> None:
    refused = make("launch-line", "NODES=2")
    assert refused.returncode != 0
    assert "NODES=2 needs MASTER_ADDR" in refused.stderr


def test_diffrir_has_a_toy_config_of_its_own_and_takes_any_other() -> None:
    alone = dry_make("diffrir").stdout.strip().splitlines()[-1]
    assert alone.strip().endswith("scripts/train_diffrir.py configs/diffrir/toy.yaml")
    other = dry_make("diffrir", "CONFIG=configs/diffrir/x4.yaml", "NPROC=8", "ARGS=run.seed=1").stdout
    assert "--nproc=8" in other and "scripts/train_diffrir.py configs/diffrir/x4.yaml run.seed=1" in other
    assert DATA_STEP not in other


def test_toy_data_is_built_only_for_a_config_that_reads_it(tmp_path: Path) -> None:
    assert DATA_STEP in dry_make("stage1").stdout
    other = tmp_path / "photos.yaml"
    other.write_text("data: {sources: [{path: photos.jsonl}]}\n")
    assert DATA_STEP not in dry_make("stage1", f"CONFIG={other}").stdout


def test_recording_starts_with_its_own_settings_and_the_toy_one_with_what_stage1_made() -> None:
    toy = dry_make("record").stdout.strip().splitlines()[-1]
    assert "scripts/record_prompts.py configs/record/toy.yaml" in toy
    assert ("model=runs/stage1_toy/final" in toy) == (REPOSITORY / "runs/stage1_toy/final").is_dir()
    other = dry_make("record", "CONFIG=configs/record/photos_7b.yaml", "NPROC=8").stdout
    assert "--nproc=8" in other and "configs/record/photos_7b.yaml" in other
    assert DATA_STEP not in other and "stage1_toy" not in other


def test_stage2_records_the_toy_prompts_only_where_they_are_read_and_not_there_yet() -> None:
    there = (REPOSITORY / "data/toy/recorded.jsonl").is_file()
    for config in ("toy", "toy_inpainting"):
        lines = dry_make("stage2", f"CONFIG=configs/stage2/{config}.yaml").stdout.strip().splitlines()
        scripts = [
            word for line in lines for word in line.split() if word.startswith("scripts/") and word.endswith(".py")
        ]
        recording = [] if there else ["scripts/record_prompts.py"]
        assert scripts == [*recording, "scripts/cache_stage2.py", "scripts/train_stage2.py"]
    other = dry_make("stage2", "CONFIG=configs/stage2/sd15_text_to_image.yaml").stdout
    assert "record_prompts" not in other and DATA_STEP not in other


def test_make_alone_lists_the_commands() -> None:
    listed = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    commands = (
        "stage1 record stage2 cache diffrir test unit check toy-base toy-tuned toy-sd toy-restorer preview eval clean "
        "preflight launch-line"
    )
    for command in commands.split():
        assert f"make {command} " in listed


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what setup_env.sh reads, and a `bin` of stand-ins for the machine's own programs."""
    for name in ("constraints.txt", "setup.py", "scripts/setup_env.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "head", "awk", "flock", "rm", "env"):
        if found := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def stand_in(clone: Path, name: str, script: str) -> Path:
    program = clone / "bin" / name
    program.parent.mkdir(exist_ok=True, parents=True)
    program.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    program.chmod(0o755)
    return program


def python_stand_in(clone: Path, name: str, version: str, can_make_environments: bool = True) -> None:
    answers = f'case "$*" in *version_info*) echo {version} ;; *ensurepip*) exit {int(not can_make_environments)} ;;'
    stand_in(clone, name, f'{answers} --version) echo "Python {version}" ;; *) echo "$0 $*" >> calls; exit 7 ;; esac')


def set_up(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(clone / "bin/bash"), "scripts/setup_env.sh"]
    return subprocess.run(
        command, cwd=clone, env={"PATH": str(clone / "bin"), **environment}, capture_output=True, text=True
    )


def disk(clone: Path, free_gb: int) -> None:
    stand_in(clone, "df", f"echo head; echo disk 1 1 {free_gb * 1024 * 1024} 1% /")


def test_setup_says_that_python_is_missing_or_too_old(clone: Path) -> None:
    assert "Python 3.11 or newer is needed, found none; install it" in set_up(clone).stderr
    python_stand_in(clone, "python3", "3.9")
    refused = set_up(clone)
    assert refused.returncode == 1
    assert "Python 3.11 or newer is needed, found 3.9; install it" in refused.stderr


def test_setup_says_that_the_venv_module_is_missing(clone: Path) -> None:
    python_stand_in(clone, "python3", "3.13", can_make_environments=False)
    refused = set_up(clone)
    assert refused.returncode == 1
    assert "Python 3.13 cannot make virtual environments; install python3.13-venv" in refused.stderr


def test_setup_says_that_the_disk_is_too_small(clone: Path) -> None:
    python_stand_in(clone, "python3", "3.12")
    disk(clone, free_gb=5)
    refused = set_up(clone)
    assert refused.returncode == 1
    assert f"the disk of {clone} has 5 GB free, the packages need 8 GB" in refused.stderr
    assert not (clone / "calls").exists()


def test_setup_takes_the_first_python_that_can(clone: Path) -> None:
    disk(clone, free_gb=50)
    python_stand_in(clone, "python3.13", "3.13", can_make_environments=False)
    python_stand_in(clone, "python3.12", "3.12")
    python_stand_in(clone, "python3.11", "3.11")
    set_up(clone)
    assert (clone / "calls").read_text() == f"{clone}/bin/python3.12 -m venv --clear .venv\n"
    (clone / "calls").unlink()
    set_up(clone, PYTHON="python3.11")
    assert (clone / "calls").read_text() == f"{clone}/bin/python3.11 -m venv --clear .venv\n"


def test_setup_installs_once_and_again_when_the_pinned_packages_change(clone: Path) -> None:
    disk(clone, free_gb=50)
    stand_in(clone, "../.venv/bin/python", 'case "$*" in *install*) echo "$*" >> calls; echo Successfully ;; esac')
    assert "setup: ready" in set_up(clone).stdout
    assert (clone / "calls").read_text().splitlines() == [
        "-m pip install --disable-pip-version-check -c constraints.txt -e .[test]"
    ]
    second = set_up(clone)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    with open(clone / "constraints.txt", "a") as constraints:
        constraints.write("more==1\n")
    set_up(clone)
    assert len((clone / "calls").read_text().splitlines()) == 2


def test_setup_that_failed_is_not_taken_for_done(clone: Path) -> None:
    disk(clone, free_gb=50)
    stand_in(clone, "../.venv/bin/python", 'case "$*" in *install*) echo no such package >&2; exit 1 ;; esac')
    for _ in range(2):
        failed = set_up(clone)
        assert failed.returncode == 1
        assert "no such package" in failed.stderr and "pip could not install the packages" in failed.stderr


def test_the_lines_in_the_docs_are_those_that_are_printed() -> None:
    shown = (REPOSITORY / "docs" / "cluster.md").read_text().splitlines()
    lines = [(shlex.split(line)[2:], shown[i + 1]) for i, line in enumerate(shown) if line.startswith("$ make launch")]
    assert len(lines) >= 6
    for arguments, printed in lines:
        assert make(*arguments).stdout == printed + "\n"
    submitted = [line.split()[2] for line in shown if line.startswith("$ sbatch")]
    assert submitted and all((REPOSITORY / script).is_file() for script in submitted)
