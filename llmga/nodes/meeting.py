"""Where the processes of a run meet before they do anything together, and who did not come.

A meeting is a small key-value store at MASTER_ADDR, torch's own. It works between processes that could not yet compute
together, so what keeps them from it can be told in words instead of a collective that hangs.
"""

import datetime
import json
import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from llmga.runtime import Ranks, RuntimeSetupError
from llmga.slurm import expand_hosts

_END = "end"
_GRACE_SECONDS = 5.0  # rank 0 waits so long for the others to hear why the run ends; they wait as much longer for it


class MeetingError(RuntimeSetupError):
    """Processes that did not find each other; the message names those that are missing."""


class Meeting:
    """The processes of a run around one store.

    Args:
        ranks: this process among the others; more than one.
        seconds: how long the processes wait for each other, each time they are asked for something.
    Raises:
        MeetingError: nobody is at MASTER_ADDR, or its port is taken.
    """

    def __init__(self, ranks: Ranks, seconds: float) -> None:
        self.ranks, self.seconds = ranks, seconds
        self.hosts: dict[int, str] = {}  # filled by the roll call, on rank 0
        self._agreed = 0
        self.place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its processes
        self._store = dist.PrefixStore(f"llmga/{attempt}", self._connect())
        self.store_for_group = dist.PrefixStore("group", self._store)

    def roll_call(self) -> None:
        """Wait until everybody is here.

        Raises:
            MeetingError: on all who came, with the names of those who did not.
        """
        for rank, host in enumerate(self.collect("roll call", platform.node()) or ()):
            self.hosts[rank] = host

    def collect(self, topic: str, mine: Any) -> list[Any] | None:
        """Give something to rank 0.

        Args:
            topic: what it is about, in words; each only once.
            mine: plain values.
        Returns:
            What all ranks gave, by rank, on rank 0; None on the others.
        Raises:
            MeetingError: some rank gave nothing in time. All ranks that wait for rank 0 are told.
        """
        keys = [f"{topic}/{rank}" for rank in range(self.ranks.world_size)]
        self._call(topic, self._store.set, keys[self.ranks.rank], json.dumps(mine))
        if not self.ranks.is_main:
            return None
        missing = self._wait(keys)
        if missing:
            raise MeetingError(self.end(self._missing(topic, missing), missing))
        return [json.loads(value) for value in self._store.multi_get(keys)]

    def tell(self, topic: str, value: Any = None) -> Any:
        """Rank 0's value on every rank; each topic only once.

        Raises:
            MeetingError: rank 0 has said instead that the run ends, and why, or says nothing.
        """
        if self.ranks.is_main:
            self._store.set(topic, json.dumps(value))
            return value
        deadline = time.monotonic() + self.seconds + _GRACE_SECONDS
        pause = 0.002
        while time.monotonic() < deadline:
            for key in (_END, topic):
                if self._call(topic, self._store.check, [key]):
                    answer = json.loads(self._store.get(key))
                    if key == topic:
                        return answer
                    self._store.set(f"heard/{self.ranks.rank}", b"")
                    raise MeetingError(answer)
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        raise MeetingError(self._lost(topic, f"it said nothing within {self.seconds:g} s"))

    def agree(self) -> None:
        """Wait until rank 0 says that nothing is wrong so far.

        Raises:
            MeetingError: rank 0 says that something is.
        """
        self._agreed += 1
        self.tell(f"agreement {self._agreed}", True)

    def end(self, reason: str, missing: Sequence[int] = ()) -> str:
        """On rank 0: tell the others why the run ends, and give all but the missing ones the time to hear it."""
        self._store.set(_END, json.dumps(reason))
        present = [rank for rank in range(1, self.ranks.world_size) if rank not in missing]
        if present:
            self._wait([f"heard/{rank}" for rank in present], _GRACE_SECONDS)
        return reason

    def _connect(self) -> dist.Store:
        """The store that torchrun holds already, or that rank 0 opens now."""
        host, _, port = self.place.rpartition(":")
        opens = self.ranks.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        seconds = datetime.timedelta(seconds=self.seconds)
        try:
            return dist.TCPStore(
                host, int(port), self.ranks.world_size, opens, seconds, wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:  # torch's own errors derive from it
            if opens:
                what = f"cannot open port {port} ({_first_line(error)}); set MASTER_PORT to one that is free"
            else:
                what = (
                    f"did not reach rank 0 at {self.place} within {self.seconds:g} s; see whether it was started and "
                    "still runs, whether MASTER_ADDR is its machine, and whether a firewall closes the port"
                )
            raise MeetingError(f"rank {self.ranks.rank} on {platform.node()} {what}") from error

    def _wait(self, keys: list[str], seconds: float | None = None) -> list[int]:
        """Wait for the keys of ranks, and return the positions of those that did not come."""
        try:
            self._store.wait(keys, datetime.timedelta(seconds=self.seconds if seconds is None else seconds))
        except RuntimeError:
            return [number for number, key in enumerate(keys) if not self._store.check([key])]
        return []

    def _call(self, topic: str, function: Any, *arguments: Any) -> Any:
        """Use the store, which goes when rank 0 does."""
        try:
            return function(*arguments)
        except RuntimeError as error:
            raise MeetingError(self._lost(topic, "the store of rank 0 is gone")) from error

    def _lost(self, topic: str, what: str) -> str:
        return (
            f"rank {self.ranks.rank} on {platform.node()} lost rank 0 at {self.place} during the {topic}: {what}; "
            "the log of rank 0 says why it ended"
        )

    def _missing(self, topic: str, missing: list[int]) -> str:
        """One sentence about ranks that gave nothing."""
        came = [rank for rank in range(self.ranks.world_size) if rank not in missing]
        known = {rank: host for rank in missing if (host := self.hosts.get(rank) or _planned_host(rank))}
        names = [f"{spans(missing)} of {self.ranks.world_size}"]
        if known:
            names.append(f"on {', '.join(dict.fromkeys(known.values()))}")
        here = f"{spans(came)} came, rank 0 on {platform.node()}"
        return (
            f"{' '.join(names)} did not arrive at the {topic} at {self.place} within {self.seconds:g} s ({here}); "
            "start what is missing or see its machine's log for why it ended, or let run.join_timeout_s be longer"
        )


def spans(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-7, 9` of sorted numbers."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _planned_host(rank: int) -> str | None:
    """Where Slurm, or a launcher that starts equally many everywhere, has put a rank; None when nobody says."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if not local.isdecimal() or int(local) == 0:
        return None
    machine = rank // int(local)
    hosts = expand_hosts(os.environ.get("SLURM_STEP_NODELIST", ""))
    return hosts[machine] if machine < len(hosts) else f"machine {machine} (NODE_RANK={machine})"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
