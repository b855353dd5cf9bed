"""What is wrong between processes, each fault in one sentence: where, what was found, what was expected, what to do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmga.nodes.meeting import spans

Facts = dict[str, Any]

_CLOCK_SECONDS = 5.0
_OPEN_FILES = 4096
_FREE_SHARE = 0.9  # of a GPU's memory, before we have taken any
_SHOWN = 3  # settings named in one sentence


@dataclass(frozen=True)
class Finding:
    """A fault.

    Attributes:
        text: one sentence.
        stops: the run would fail or differ between machines; else it would only be slower, or fail later perhaps.
        fatal: nothing can follow, so it stops the run even where `run.preflight` is "warn".
    """

    text: str
    stops: bool = True
    fatal: bool = False


def compare(everybody: Sequence[Facts]) -> list[Finding]:
    """Faults in what the processes know alone, rank 0 first; see `gather_facts`."""
    faults = [Finding(facts["fault"], fatal=True) for facts in everybody if "fault" in facts]
    if faults:
        return faults
    first = everybody[0]
    as_first = f"as rank 0 on {first['host']} has"
    findings = []
    for who, (found, expected) in _differing(everybody, "versions"):
        way_out = "let all share one checkout and one .venv, or install constraints.txt on each machine"
        findings.append(
            Finding(f"{who}: found {_join(found, ' ')}, expected {_join(expected, ' ')} {as_first}; {way_out}")
        )
    for who, (found, expected) in _differing(everybody, "settings"):
        way_out = "start every machine with the same config file and the same overrides"
        findings.append(Finding(f"{who}: found {_join(found)}, expected {_join(expected)} {as_first}; {way_out}"))
    if findings:
        return findings  # other paths or libraries explain whatever else differs
    for who, (found, expected) in _differing(everybody, "inputs"):
        for path, what in found.items():
            way_out = "put the same data at the same path on every machine"
            text = f"{who}: found {path} {what}, expected {expected[path]} {as_first}; {way_out}"
            findings.append(Finding(text))
    return [*findings, *_devices(everybody, as_first), *_room(everybody)]


def _devices(everybody: Sequence[Facts], as_first: str) -> list[Finding]:
    """GPUs that are absent, shared by mistake, taken, or of another kind."""
    first = everybody[0]
    findings = []
    owners: dict[str, Facts] = {}
    for facts in everybody:
        if facts["gpu"] is None:
            continue
        other = owners.setdefault(facts["gpu"]["uuid"], facts)
        if other is not facts:
            text = f"rank {facts['rank']} on {facts['host']} has the GPU {facts['gpu']['uuid']}, which rank "
            text += f"{other['rank']} has too; start one process for each GPU and let every process see all of them"
            findings.append(Finding(text))
    for who, [gpus] in _grouped(everybody, lambda facts: (facts["gpus"],)):
        if gpus != first["gpus"]:
            text = f"{who}: found {gpus} visible GPUs, expected {first['gpus']} {as_first}; "
            text += "see nvidia-smi and CUDA_VISIBLE_DEVICES there, and what the job asked for"
            findings.append(Finding(text, stops=0 in (gpus, first["gpus"])))
    for what, name, way_out in (
        ("GPU", _gpu_name, "the slowest GPU sets the pace of all"),
        ("driver", _driver, "give the machines the same driver"),
    ):
        for who, [found] in _grouped(everybody, lambda facts, name=name: [name(facts)]):  # type: ignore[misc]
            if found and found != name(first):
                text = f"{who}: found the {what} {found}, expected {name(first)} {as_first}; {way_out}"
                findings.append(Finding(text, stops=False))
    for facts in everybody:
        gpu = facts["gpu"]
        if gpu and gpu["free_gb"] < _FREE_SHARE * gpu["total_gb"]:
            text = f"rank {facts['rank']} on {facts['host']} has {gpu['free_gb']:.1f} GB of GPU memory free, expected "
            text += f"nearly {gpu['total_gb']:.1f}; see in nvidia-smi who holds the rest"
            findings.append(Finding(text, stops=False))
    return findings


def _gpu_name(facts: Facts) -> str | None:
    return facts["gpu"]["name"] if facts["gpu"] else None


def _driver(facts: Facts) -> str | None:
    return facts["driver"]


def _room(everybody: Sequence[Facts]) -> list[Finding]:
    """Open files, and disk space for checkpoints."""
    findings = []
    for who, [limit] in _grouped(everybody, lambda facts: (facts["open_files"],)):
        if limit < _OPEN_FILES:
            text = f"{who}: found a limit of {limit} open files, expected {_OPEN_FILES} or more; raise `ulimit -n`"
            findings.append(Finding(text, stops=False))
    disk = everybody[0]["disk"]
    needed = disk["checkpoint"] * disk["more"]
    if disk["free"] < needed:
        findings.append(
            Finding(
                f"rank 0 on {everybody[0]['host']} has {disk['free']:,.1f} GB free at {disk['folder']}, expected "
                f"{needed:,.1f} for {disk['more']} checkpoints of about {disk['checkpoint']:,.1f}"
                f"{'' if disk['measured'] else ' (if all weights learn; see `llmga plan`)'}; make room, lower "
                "run.keep_last, or give another run.output_dir",
                stops=disk["measured"] and disk["free"] < disk["checkpoint"],
            )
        )
    return findings


def folder_findings(folder: str, everybody: Sequence[Facts], seconds: float) -> list[Finding]:
    """Faults in what the processes saw of the run folder and of the time when rank 0 wrote a token there.

    Args:
        folder: as rank 0 names it.
        everybody: by rank: `rank`, `host`, `folder` there, `seen`, `refused` (why it cannot write, or None), `clock`
            (seconds ahead of rank 0).
        seconds: how long they looked.
    """
    host = everybody[0]["host"]
    findings = []
    for who, [seen, there, refused] in _grouped(everybody, lambda f: (f["seen"], f["folder"], f["refused"])):
        if not seen:
            text = f"{who}: found nothing at {there} of what rank 0 on {host} wrote to {folder} {seconds:g} s before; "
            findings.append(Finding(text + "give run.output_dir a folder that all machines share, by its full path"))
        elif refused:
            text = f"{who}: found {there} closed to writing ({refused}), expected it open as for rank 0 on {host}; "
            findings.append(Finding(text + "give the folder the same owner and rights on every machine"))
    for name, ahead in {facts["host"]: facts["clock"] for facts in everybody}.items():
        if abs(ahead) > _CLOCK_SECONDS:
            text = f"the clock of {name} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {host}, "
            text += (
                f"expected less than {_CLOCK_SECONDS:g}; files will seem newer than they are, so start chrony or ntpd"
            )
            findings.append(Finding(text, stops=False))
    return findings


def network_findings(everybody: Sequence[Facts]) -> list[Finding]:
    """Faults of the all-reduce: `rank`, `host`, `fault` (what was found and expected, or None)."""
    return [
        Finding(
            f"{who}: {fault}; test that machine alone (NODES=1), its network (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME or "
            "GLOO_SOCKET_IFNAME) and its GPUs",
            fatal=True,
        )
        for who, [fault] in _grouped(everybody, lambda facts: (facts["fault"],))
        if fault
    ]


def _differing(everybody: Sequence[Facts], key: str) -> list[tuple[str, tuple[dict[str, Any], dict[str, Any]]]]:
    """Who differs from rank 0 in a dictionary of facts, and in what: the values found, and rank 0's."""
    expected = everybody[0][key]
    result = []
    for who, [pairs] in _grouped(everybody, lambda facts: (list(facts[key].items()),)):
        values = dict(pairs)
        names = [name for name in {**expected, **values} if values.get(name) != expected.get(name)]
        if names:
            result.append((who, ({n: values.get(n) for n in names}, {n: expected.get(n) for n in names})))
    return result


def _grouped(everybody: Sequence[Facts], what: Callable[[Facts], Sequence[Any]]) -> list[tuple[str, Sequence[Any]]]:
    """Ranks of one host that share some facts, as `ranks 8-15 on node1`, and these facts."""
    groups: dict[str, tuple[str, Sequence[Any], list[int]]] = {}
    for facts in everybody:
        values = what(facts)
        group = groups.setdefault(f"{facts['host']} {values!r}", (facts["host"], values, []))
        group[2].append(facts["rank"])
    return [(f"{spans(ranks)} on {host}", values) for host, values, ranks in groups.values()]


def _join(values: dict[str, Any], sign: str = "=") -> str:
    parts = [f"{name}{sign}{value}" for name, value in list(values.items())[:_SHOWN]]
    more = len(values) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")
