"""The launch line: what stands in it, what it is taken from, and what cannot be started.

Run: pytest tests/unit/test_launch.py
"""

import ast
import base64
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmga.nodes.launch import Launch, LaunchError, main, read_options

REPOSITORY = Path(__file__).parents[2]
RUN = ["train.py", "my.yaml", "a.b=[1, 2]"]
TORCHRUN = ["py", "-m", "torch.distributed.run"]
SIZE = ["--nproc_per_node=8", "--shutdown_timeout=900"]


def launch(*options: str, environment: dict[str, str] | None = None) -> list[str]:
    """The line for options as `make` gives them."""
    found, parsed = read_options([*options, *RUN], environment or {})
    return found.command("py", parsed.target, parsed.module)


def test_one_process_needs_no_launcher_and_several_get_torchrun() -> None:
    assert launch() == launch("--nodes=", "--nproc=1", "--launcher=", "--node-rank=") == ["py", *RUN]
    assert launch("--nproc=8") == [*TORCHRUN, "--standalone", *SIZE, *RUN]
    assert launch("--launcher=torchrun")[:4] == [*TORCHRUN, "--standalone"]


def test_machines_meet_in_the_order_of_their_numbers_or_in_any() -> None:
    two = ("--nodes=2", "--nproc=8", "--master-addr=first", "--master-port=")
    static = ["--node_rank=1", "--master_addr=first", "--master_port=29500"]
    assert launch(*two, "--node-rank=1") == [*TORCHRUN, "--nnodes=2", *SIZE, *static, *RUN]
    as_they_come = ["--rdzv_backend=c10d", "--rdzv_endpoint=first:29500", "--rdzv_id=llmga"]
    assert launch(*two, "--node-rank=") == [*TORCHRUN, "--nnodes=2", *SIZE, *as_they_come, *RUN]


def test_a_slurm_task_finds_number_and_meeting_place_by_itself() -> None:
    task = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_NODEID": "1"}
    line = launch("--nodes=2", "--nproc=8", environment=task)
    assert line[6:9] == ["--node_rank=1", "--master_addr=gpu3", "--master_port=20077"]
    own = launch("--nodes=2", "--node-rank=0", "--master-addr=a", "--master-port=5", environment=task)
    assert own[6:9] == ["--node_rank=0", "--master_addr=a", "--master_port=5"]
    assert launch(environment=task) == ["py", *RUN]  # one machine of an allocation


def test_srun_starts_a_task_for_each_process() -> None:
    four = ("--launcher=slurm", "--nodes=2", "--nproc=4", "--launch-args=--partition=gpu --time='1 0'")
    start = ["srun", "--nodes=2", "--ntasks-per-node=4"]
    rest = ["--kill-on-bad-exit=1", "--partition=gpu", "--time=1 0", "py", *RUN]
    assert launch(*four) == [*start, "--gpus-per-node=4", *rest]
    assert launch(*four, environment={"SLURM_JOB_ID": "5"}) == [*start, *rest]  # the allocation has them already


def test_deepspeed_by_ssh_or_by_hand(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nnode0 slots=4\n\nnode1 slots=4\n")
    by_ssh = launch("--launcher=deepspeed", "--nodes=2", "--nproc=4", f"--hostfile={hosts}", "--master-addr=node0")
    assert by_ssh == [
        *("deepspeed", f"--hostfile={hosts}", "--num_nodes=2", "--num_gpus=4"),
        *("--master_addr=node0", "--master_port=29500", "--no_local_rank", *RUN),
    ]
    two = ("--launcher=deepspeed", "--nodes=2", "--nproc=4", "--master-addr=node0")
    by_hand = launch(*two, "--node-rank=1")
    assert by_hand[:3] == ["py", "-m", "deepspeed.launcher.launch"]
    world = json.loads(base64.urlsafe_b64decode(by_hand[3].removeprefix("--world_info=")))
    assert world == {"node0": [0, 1, 2, 3], "node1": [0, 1, 2, 3]}
    assert by_hand[4:7] == ["--node_rank=1", "--master_addr=node0", "--master_port=29500"]
    with pytest.raises(LaunchError, match=r"LAUNCHER=deepspeed with NODES=2 needs HOSTFILE, .* or NODE_RANK"):
        launch(*two)


def test_modules_are_started_too() -> None:
    module = ["-m", "llmga", "preflight", "my.yaml"]
    for launcher, expected in (("torchrun", module), ("python", module), ("deepspeed", ["--module", *module[1:]])):
        found, parsed = read_options([f"--launcher={launcher}", *module], {})
        assert found.command("py", parsed.target, parsed.module)[-len(expected) :] == expected


def test_torchrun_waits_as_long_as_the_environment_says() -> None:
    line = launch("--nproc=2", environment={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1800"})
    assert "--shutdown_timeout=1800" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes=2"], r"NODES=2 needs MASTER_ADDR, the name or address of one of the machines"),
        (["--nodes=two"], r"NODES=two is not a number; expected 1 or more"),
        (["--nproc=0"], r"NPROC=0 is not a number; expected 1 or more"),
        (["--nodes=2", "--master-addr=a", "--node-rank=2"], r"NODE_RANK=2 is not one of the NODES=2 .* from 0 to 1"),
        (["--launcher=mpirun"], r"LAUNCHER=mpirun is not known; choose one of torchrun, deepspeed, slurm, python"),
        (["--launcher=python", "--nproc=2"], r"LAUNCHER=python starts one process, found NODES=1 NPROC=2; leave"),
        (["--launcher=deepspeed", "--hostfile=no"], r"HOSTFILE=no does not exist; write one line a machine, such as"),
    ],
)
def test_what_cannot_be_started_is_one_sentence(options: list[str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        launch(*options)


def test_a_list_of_machines_must_be_one_and_long_enough(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    asked = ("--launcher=deepspeed", "--nodes=2", f"--hostfile={hosts}")
    hosts.write_text("node0 slots=8\n")
    with pytest.raises(LaunchError, match=r"hosts lists 1 machines, NODES=2 needs as many"):
        launch(*asked)
    hosts.write_text("node0\nnode1\n")
    with pytest.raises(LaunchError, match=r"hosts: found 'node0', expected a line such as: node0 slots=8"):
        launch(*asked)


def test_the_line_is_printed_as_a_shell_takes_it_and_then_executed(tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.getppid())")
    start = [sys.executable, "-m", "llmga.nodes.launch", str(script), "a b", "c=[1, 2]"]
    done = subprocess.run(start, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    printed, said = done.stdout.splitlines()
    assert shlex.split(printed)[1:] == [str(script), "a b", "c=[1, 2]"]
    assert said.startswith("['a b', 'c=[1, 2]']")


def test_a_dry_run_only_prints_and_a_mistake_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nproc=2", "--python=py", "--dry-run", *RUN]) == 0
    assert capsys.readouterr().out == f"{shlex.join([*TORCHRUN, '--standalone', SIZE[0][:-1] + '2', SIZE[1], *RUN])}\n"
    assert main(["--nodes=2", *RUN]) == 2
    assert "needs MASTER_ADDR" in capsys.readouterr().err


def test_nothing_has_to_be_installed() -> None:
    for name in ("nodes/launch.py", "slurm.py"):
        tree = ast.parse((REPOSITORY / "llmga" / name).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
        roots = {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
        roots |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        assert {root.split(".")[0] for root in roots} - set(sys.stdlib_module_names) <= {"llmga"}
        assert {root for root in roots if root.startswith("llmga")} <= {"llmga.slurm"}


def test_shapes_without_options_are_one_process() -> None:
    assert Launch().command("py", RUN) == ["py", *RUN]
