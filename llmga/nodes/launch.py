"""The line that starts a run, on one device or on many machines: printed, so that it can be copied, then executed.

    python -m llmga.nodes.launch --nodes=2 --nproc=8 --master-addr=node0 scripts/train_stage1.py configs/my.yaml a.b=c
    python -m llmga.nodes.launch --nproc=8 --dry-run -m llmga preflight configs/my.yaml

`make` calls it with NODES, NPROC, LAUNCHER, MASTER_ADDR, MASTER_PORT, NODE_RANK, HOSTFILE and LAUNCH_ARGS. Standard
library only, so that a line can be asked for before anything is installed.
"""

import argparse
import base64
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmga.slurm import meeting_place

EXIT_BAD_INPUT = 2  # as in llmga.config, which needs installed packages
LAUNCHERS = ("torchrun", "deepspeed", "slurm", "python")
DEFAULT_PORT = 29500
# torchrun kills what has not ended so long after a signal; its own 30 s are too few for a large model.
SHUTDOWN_SECONDS = 900


class LaunchError(ValueError):
    """Processes that cannot be started as asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many processes start where, and by whom.

    Attributes:
        launcher: one of `LAUNCHERS`; None takes torchrun for several processes and plain python for one.
        nodes: machines.
        nproc: processes on each; one for every GPU.
        master_addr: name or address of the first machine, the same on all of them.
        node_rank: number of this machine, from 0; without it torchrun gives the numbers.
        hostfile: deepspeed's list of machines, which it then starts by ssh.
        extra: further options of the launcher.
        inside_job: within a Slurm allocation, whose GPUs srun shares out by itself.
        shutdown_seconds: what torchrun waits after a signal before it kills.
    """

    launcher: str | None = None
    nodes: int = 1
    nproc: int = 1
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    node_rank: int | None = None
    hostfile: Path | None = None
    extra: tuple[str, ...] = ()
    inside_job: bool = False
    shutdown_seconds: int = SHUTDOWN_SECONDS

    def command(self, python: str, target: Sequence[str], is_module: bool = False) -> list[str]:
        """The line that starts `target` here.

        Args:
            python: the interpreter.
            target: a script, or with `is_module` the name of a module, and its arguments.
        Raises:
            LaunchError: numbers that do not fit together, or a meeting place that is not known.
        """
        self._check()
        launcher = self.launcher or ("python" if self.nodes * self.nproc == 1 else "torchrun")
        run = ["-m", *target] if is_module else list(target)
        if launcher == "python":
            if self.nodes * self.nproc > 1:
                raise LaunchError(
                    f"LAUNCHER=python starts one process, found NODES={self.nodes} NPROC={self.nproc}; "
                    "leave LAUNCHER away (torchrun) or set it to deepspeed or slurm"
                )
            return [python, *self.extra, *run]
        if launcher == "torchrun":
            return [python, "-m", "torch.distributed.run", *self._torchrun(), *self.extra, *run]
        if launcher == "slurm":
            return ["srun", *self._srun(), *self.extra, python, *run]
        module = ["--module"] if is_module else []  # deepspeed's own -m does not exist
        return [*self._deepspeed(python), "--no_local_rank", *self.extra, *module, *target]

    def _check(self) -> None:
        if self.node_rank is not None and not 0 <= self.node_rank < self.nodes:
            raise LaunchError(
                f"NODE_RANK={self.node_rank} is not one of the NODES={self.nodes} machines; "
                f"number them from 0 to {self.nodes - 1}"
            )

    def _torchrun(self) -> list[str]:
        """Alone; or several machines that meet at MASTER_ADDR, numbered by NODE_RANK or, without it, as they come."""
        size = [f"--nproc_per_node={self.nproc}", f"--shutdown_timeout={self.shutdown_seconds}"]
        if self.nodes == 1:
            return ["--standalone", *size]
        address = self._address()
        if self.node_rank is None:
            meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint={address}:{self.master_port}", "--rdzv_id=llmga"]
        else:
            meeting = [f"--node_rank={self.node_rank}", f"--master_addr={address}", f"--master_port={self.master_port}"]
        return [f"--nnodes={self.nodes}", *size, *meeting]

    def _srun(self) -> list[str]:
        """One task for each process; they take their numbers and their meeting place from Slurm's variables."""
        gpus = [] if self.inside_job else [f"--gpus-per-node={self.nproc}"]
        return [f"--nodes={self.nodes}", f"--ntasks-per-node={self.nproc}", *gpus, "--kill-on-bad-exit=1"]

    def _deepspeed(self, python: str) -> list[str]:
        """With a hostfile, deepspeed reaches all machines by ssh from here; without one, this machine's part."""
        if self.hostfile is not None:
            self._check_hostfile(self.hostfile)
            address = [f"--master_addr={self.master_addr}"] if self.master_addr else []
            size = [f"--hostfile={self.hostfile}", f"--num_nodes={self.nodes}", f"--num_gpus={self.nproc}"]
            # With one machine in the list deepspeed would leave the list aside and stay here.
            remote = ["--force_multi"] if self.nodes == 1 else []
            return [
                str(Path(python).with_name("deepspeed")),
                *size,
                *remote,
                *address,
                f"--master_port={self.master_port}",
            ]
        # The command `deepspeed` starts this module and, when a signal ends it, leaves the module and the run behind.
        machines = {f"node{n}": list(range(self.nproc)) for n in range(self.nodes)}
        world = base64.urlsafe_b64encode(json.dumps(machines).encode()).decode()
        place = [f"--master_addr={self._address()}" if self.nodes > 1 else "--master_addr=127.0.0.1"]
        if self.nodes > 1 and self.node_rank is None:
            raise LaunchError(
                f"LAUNCHER=deepspeed with NODES={self.nodes} needs HOSTFILE, to start all machines from here by ssh, "
                "or NODE_RANK (0 on the first machine), to be called on each of them"
            )
        numbers = [f"--node_rank={self.node_rank or 0}", *place, f"--master_port={self.master_port}"]
        return [python, "-m", "deepspeed.launcher.launch", f"--world_info={world}", *numbers]

    def _address(self) -> str:
        if not self.master_addr:
            raise LaunchError(
                f"NODES={self.nodes} needs MASTER_ADDR, the name or address of one of the machines, "
                "the same on all of them (the first one, where NODE_RANK is given)"
            )
        return self.master_addr

    def _check_hostfile(self, path: Path) -> None:
        if not path.is_file():
            raise LaunchError(f"HOSTFILE={path} does not exist; write one line a machine, such as: node0 slots=8")
        lines = [line.split("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
        hosts = [line for line in lines if line]
        for line in hosts:
            if len(line) != 2 or not line[1].removeprefix("slots=").isdecimal():
                raise LaunchError(f"HOSTFILE={path}: found {' '.join(line)!r}, expected a line such as: node0 slots=8")
        if len(hosts) < self.nodes:
            raise LaunchError(f"HOSTFILE={path} lists {len(hosts)} machines, NODES={self.nodes} needs as many")


def read_options(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Launch, argparse.Namespace]:
    """The launch that options ask for, completed from Slurm's variables; an option given as `--x=` counts as absent.

    Raises:
        LaunchError: an option that is not a number where one is needed, or a launcher that is not known.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name in ("nodes", "nproc", "launcher", "master-addr", "master-port", "node-rank", "hostfile", "launch-args"):
        parser.add_argument(f"--{name}", default="", metavar=name.upper().replace("-", "_"))
    parser.add_argument("--python", default=_interpreter(), help="what runs the target")
    parser.add_argument("--dry-run", action="store_true", help="print the line and stop")
    parser.add_argument("-m", "--module", action="store_true", help="the target is a module")
    parser.add_argument("target", nargs=argparse.REMAINDER, help="what each process runs, with its arguments")
    options = parser.parse_args(arguments)
    if not options.target:
        parser.error("name a script, or -m and a module")
    if options.launcher not in ("", *LAUNCHERS):
        raise LaunchError(f"LAUNCHER={options.launcher} is not known; choose one of {', '.join(LAUNCHERS)}")
    nodes = _number("NODES", options.nodes, 1)
    in_slurm = meeting_place(environment) if nodes > 1 else {}
    port = options.master_port or in_slurm.get("MASTER_PORT", "")
    rank = options.node_rank or (environment.get("SLURM_NODEID", "") if nodes > 1 else "")
    launch = Launch(
        launcher=options.launcher or None,
        nodes=nodes,
        nproc=_number("NPROC", options.nproc, 1),
        master_addr=options.master_addr or in_slurm.get("MASTER_ADDR"),
        master_port=_number("MASTER_PORT", port, 1, DEFAULT_PORT),
        node_rank=_number("NODE_RANK", rank, 0) if rank else None,
        hostfile=Path(options.hostfile) if options.hostfile else None,
        extra=tuple(shlex.split(options.launch_args)),
        inside_job="SLURM_JOB_ID" in environment,
        shutdown_seconds=_number(
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
            environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", ""),
            1,
            SHUTDOWN_SECONDS,
        ),
    )
    return launch, options


def _number(name: str, text: str, least: int, default: int = 1) -> int:
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise LaunchError(f"{name}={text} is not a number; expected {least} or more")
    return int(text)


def _interpreter() -> str:
    """This interpreter, as a person in this folder would type it."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


def main(arguments: Sequence[str]) -> int:
    """Print the line and become it; returns only when there is nothing to become."""
    try:
        launch, options = read_options(arguments, os.environ)
        line = launch.command(options.python, options.target, options.module)
    except LaunchError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return EXIT_BAD_INPUT
    if os.environ.get("SLURM_NODEID", "0") == "0":  # the tasks of all machines write into one log
        print(shlex.join(line), flush=True)  # noqa: T201
    if options.dry_run:
        return 0
    if shutil.which(line[0]) is None:
        print(f"{line[0]} is not installed here; LAUNCHER=torchrun needs nothing", file=sys.stderr)  # noqa: T201
        return EXIT_BAD_INPUT
    os.execvp(line[0], line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
