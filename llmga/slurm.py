"""What Slurm tells a job about its machines. Standard library only: launchers read it before anything is installed."""

import re
from collections.abc import Mapping

_LIST = re.compile(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*")  # commas inside brackets do not end an entry
_FIRST_PORT, _PORTS = 20_000, 12_000  # below 32768, from where on Linux gives ports to anybody


def expand_hosts(node_list: str) -> list[str]:
    """Host names of a list as Slurm writes it: `a[1-2,07],b` becomes a1, a2, a07, b. Leading zeros are kept."""
    return [host for entry in _LIST.findall(node_list) if entry for host in _expand(entry)]


def _expand(entry: str) -> list[str]:
    before, bracket, rest = entry.partition("[")
    if not bracket:
        return [before]
    inside, _, behind = rest.partition("]")
    numbers: list[str] = []
    for part in inside.split(","):
        first, _, last = part.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return [before + number + tail for number in numbers for tail in _expand(behind)]


def meeting_place(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for the tasks of a job step: its first machine, and a port that is the job's own.

    Returns:
        Those of the two that can be told; empty outside Slurm. What is set already is the caller's to keep.
    """
    place = {}
    if hosts := expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")):
        place["MASTER_ADDR"] = hosts[0]
    if (job := environment.get("SLURM_JOB_ID", "")).isdecimal():
        place["MASTER_PORT"] = str(_FIRST_PORT + int(job) % _PORTS)
    return place
