"""Before several processes train together: they meet, compare what they have, and try the folder and the network.

What keeps them from it is told in one sentence for each fault, and the run ends with exit code 2 before a model is
loaded. docs/cluster.md lists what is looked at.
"""

import contextlib
import logging
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmga.config import EXIT_BAD_INPUT, RunConfig
from llmga.nodes.facts import gather_facts
from llmga.nodes.findings import Facts, Finding, compare, folder_findings, network_findings
from llmga.nodes.meeting import Meeting, MeetingError, spans
from llmga.runtime import Ranks, init_distributed, ranks_from_environment, setup_logging

logger = logging.getLogger(__name__)

_SHARED_SECONDS = 90.0  # network file systems may show a new file to other machines that late
_ALL_REDUCE_VALUES = {"cuda": 1 << 24, "cpu": 1 << 20}  # fp32
_ROUNDS = 3


def start_together(cfg: Any, *, with_deepspeed: bool) -> Ranks:
    """Join the other processes of the run once it is known that they can work together; alone, just start.

    Args:
        cfg: checked settings with a `run: RunConfig`; `run.preflight` says what a fault does.
        with_deepspeed: as `init_distributed` takes it.
    Raises:
        MeetingError: somebody did not come, or a fault was found; all who came raise it with the same text.
        RuntimeSetupError: see `init_distributed`.
    """
    ranks = ranks_from_environment()
    setup_logging(ranks)
    if ranks.world_size == 1 or dist.is_initialized():
        return init_distributed(with_deepspeed)
    report = preflight(cfg, ranks, with_deepspeed)
    if report:
        logger.info("%s", report[-1])
    return ranks


def preflight(cfg: Any, ranks: Ranks, with_deepspeed: bool = False) -> list[str]:
    """Meet, compare, try folder and network; the processes are joined when it returns.

    Returns:
        On rank 0 one line for each machine and one for all; nothing elsewhere, or where `run.preflight` is "skip".
    Raises:
        MeetingError: as for `start_together`.
    """
    begin = time.monotonic()
    if ranks.world_size == 1:
        init_distributed(with_deepspeed)
        mine = gather_facts(cfg, ranks)
        _judge(None, compare([mine]), cfg.run.preflight)
        return [*_machines([mine]), "1 process, nobody to agree with"]
    meeting = Meeting(ranks, cfg.run.join_timeout_s)
    meeting.roll_call()
    if cfg.run.preflight == "skip":
        init_distributed(with_deepspeed, meeting.store_for_group)
        return []
    everybody = meeting.collect("facts", _facts_or_fault(cfg, ranks))
    _judge(meeting, compare(everybody) if everybody else [], cfg.run.preflight)
    _judge(meeting, _try_folder(cfg.run.output_dir, meeting), cfg.run.preflight)
    init_distributed(with_deepspeed, meeting.store_for_group)
    tried = meeting.collect("all-reduce", _who(ranks) | _all_reduce_in_time(ranks, meeting.seconds))
    _judge(meeting, network_findings(tried) if tried else [], cfg.run.preflight)
    if not everybody or not tried:
        return []
    slowest = min((facts["gb_per_s"] for facts in tried if facts["gb_per_s"]), default=0.0)
    hosts = dict.fromkeys(facts["host"] for facts in everybody)
    seconds = time.monotonic() - begin
    return [
        *_machines(everybody),
        f"{ranks.world_size} processes on {', '.join(hosts)} agree on packages, settings, data and run folder; "
        f"all-reduce {slowest:.2f} GB/s; {everybody[0]['disk']['free']:,.0f} GB free; checked in {seconds:.1f} s",
    ]


def give_up(error: MeetingError) -> int:
    """Say why the run cannot start, once on each machine, and return the exit code.

    Does not return once the processes are joined: a collective that hangs in the background would keep the interpreter
    from ending.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{error}\n")
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_BAD_INPUT)
    return EXIT_BAD_INPUT


def excuse(text: str) -> None:
    """In a process that cannot start: let the others hear why, who would wait for it. Alone, does nothing."""
    ranks = ranks_from_environment()
    if ranks.world_size == 1:
        return
    with contextlib.suppress(MeetingError):
        meeting = Meeting(ranks, RunConfig.__dataclass_fields__["join_timeout_s"].default)
        meeting.roll_call()
        everybody = meeting.collect("facts", _who(ranks) | {"fault": f"{_here(ranks)}: {text}"})
        _judge(meeting, compare(everybody) if everybody else [], "stop")


def _judge(meeting: Meeting | None, findings: Sequence[Finding], mode: str) -> None:
    """Rank 0 decides on its findings, and all hear whether the run goes on."""
    stopping = [finding.text for finding in findings if finding.fatal or (finding.stops and mode == "stop")]
    for finding in findings:
        if finding.text not in stopping:
            logger.warning("%s", finding.text)
    if stopping:
        text = "\n".join(stopping)
        raise MeetingError(meeting.end(text) if meeting else text)
    if meeting:
        meeting.agree()


def _facts_or_fault(cfg: Any, ranks: Ranks) -> Facts:
    """The facts of this process; what it cannot find out is told to rank 0, which would wait for it in vain."""
    try:
        return gather_facts(cfg, ranks)
    except Exception as error:
        return _who(ranks) | {"fault": str(error) if isinstance(error, ValueError) else f"{_here(ranks)}: {error!r}"}


def _who(ranks: Ranks) -> Facts:
    return {"rank": ranks.rank, "host": platform.node()}


def _here(ranks: Ranks) -> str:
    return f"rank {ranks.rank} on {platform.node()}"


def _try_folder(folder: Path, meeting: Meeting) -> list[Finding]:
    """Rank 0 writes a token into the run folder and says when; the others look for it, and try to write."""
    ranks, absolute = meeting.ranks, folder.absolute()
    seconds = min(meeting.seconds / 2, _SHARED_SECONDS)  # rank 0 waits for the answer as long as for anything
    name, problem = f".token-{secrets.token_hex(8)}", None
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            problem = f"{_here(ranks)} cannot write to {absolute} ({error.strerror}); give another run.output_dir"
    name, said, problem = meeting.tell("folder", [name, time.time(), problem])
    clock = time.time() - said
    if problem:
        return [Finding(problem)] if ranks.is_main else []
    seen = _appears(folder / name, seconds)
    mine = {"folder": str(absolute), "seen": seen, "refused": _refused(folder) if seen else None, "clock": clock}
    everybody = meeting.collect("search of the run folder", _who(ranks) | mine)
    if everybody is None:
        return []
    (folder / name).unlink()
    return folder_findings(str(absolute), everybody, seconds)


def _appears(path: Path, seconds: float) -> bool:
    """Whether a file shows itself in time; listing its folder makes a network file system look again."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        if path.parent.is_dir():
            os.listdir(path.parent)
    return True


def _refused(folder: Path) -> str | None:
    """Why this process cannot write to a folder, or None."""
    probe = folder / f".token-{secrets.token_hex(8)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or repr(error)
    return None


def _all_reduce_in_time(ranks: Ranks, seconds: float) -> Facts:
    """`try_all_reduce`, in a thread of its own, because neither NCCL nor gloo can be told to give up so soon."""
    result: Facts = {"fault": f"the all-reduce did not end within {seconds:g} s", "gb_per_s": None}
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

    def work() -> None:
        try:
            result.update(try_all_reduce(ranks, device))
        except RuntimeError as error:
            result["fault"] = f"the all-reduce failed: {next(iter(str(error).splitlines()), repr(error))}"

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return dict(result)


def try_all_reduce(ranks: Ranks, device: torch.device) -> Facts:
    """Sum numbers whose sum is known over all ranks, a few times.

    Returns:
        `fault`: None, or what was found and expected; `gb_per_s`: bytes that pass each process's link in a second, in
        the best round, as nccl-tests counts them (bus bandwidth).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    pattern = torch.arange(_ALL_REDUCE_VALUES[device.type], device=device, dtype=torch.float32) % 97
    expected = pattern * (ranks.world_size * (ranks.world_size + 1) // 2)
    best, fault = float("inf"), None
    for _ in range(1 + _ROUNDS):  # the first one also makes the connections
        values = pattern * (ranks.rank + 1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        wrong = values != expected
        if fault is None and bool(wrong.any()):  # the rounds go on: the other ranks wait for this one
            at = int(wrong.nonzero()[0])
            fault = f"the all-reduce gave {values[at]:g} at {at}, expected {expected[at]:g} ({int(wrong.sum())} wrong)"
    if fault is not None:
        return {"fault": fault, "gb_per_s": None}
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * pattern.numel() * pattern.element_size()
    return {"fault": None, "gb_per_s": moved / best / 1e9}


def _machines(everybody: Sequence[Facts]) -> list[str]:
    """One line for each host: its ranks, its devices and what runs there."""
    hosts: dict[str, list[Facts]] = {}
    for facts in everybody:
        hosts.setdefault(facts["host"], []).append(facts)
    lines = []
    for host, group in hosts.items():
        gpus = [facts["gpu"] for facts in group if facts["gpu"]]
        devices = "no GPU"
        if gpus:
            free = min(gpu["free_gb"] for gpu in gpus)
            names = ", ".join(dict.fromkeys(gpu["name"] for gpu in gpus))
            devices = f"{len(gpus)} x {names}, {free:.1f} GB free, driver {group[0]['driver']}"
        versions = group[0]["versions"]
        shown = " ".join(f"{name} {versions[name]}" for name in ("Python", "torch", "CUDA", "NCCL") if name in versions)
        lines.append(f"{host}: {spans([facts['rank'] for facts in group])}; {devices}; {shown}")
    return lines
