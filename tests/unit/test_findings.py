"""Faults between processes: each told once, with machine, rank, what was found, what was expected, and a way out.

Run: pytest tests/unit/test_findings.py
"""

import copy
from typing import Any

import pytest

from llmga.nodes.findings import compare, folder_findings, network_findings
from llmga.nodes.meeting import spans


def facts_of(rank: int) -> dict[str, Any]:
    """A sound process among four on two machines of two GPUs."""
    gpu = {"name": "H100", "uuid": f"GPU-{rank}", "free_gb": 79.0, "total_gb": 80.0}
    return {
        "rank": rank,
        "host": f"node{rank // 2}",
        "versions": {"Python": "3.12.1", "torch": "2.12.1", "transformers": "5.23.0", "LLMGA": "abc"},
        "settings": {"optim.lr": 1e-5, "run.seed": 0, "run.output_dir": "runs/a"},
        "inputs": {"data/train.jsonl": "a file of 14 bytes (0a)", "models/base": "a folder of 3 files (0b)"},
        "gpus": 2,
        "gpu": gpu,
        "driver": "570.1",
        "open_files": 65536,
        "disk": {"folder": "/runs", "free": 900.0, "checkpoint": 80.0, "measured": True, "more": 3},
    }


@pytest.fixture
def everybody() -> list[dict[str, Any]]:
    return [facts_of(rank) for rank in range(4)]


def test_equal_machines_are_sound(everybody: list[dict[str, Any]]) -> None:
    assert compare(everybody) == compare(everybody[:1]) == []


@pytest.mark.parametrize(
    ("section", "changes", "stops", "sentence"),
    [
        (
            "versions",
            {"transformers": "5.20.0", "LLMGA": "abd"},
            True,
            "ranks 2-3 on node1: found transformers 5.20.0, LLMGA abd, expected transformers 5.23.0, LLMGA abc as rank "
            "0 on node0 has; let all share one checkout and one .venv, or install constraints.txt on each machine",
        ),
        (
            "settings",
            {"optim.lr": 0.1},
            True,
            "ranks 2-3 on node1: found optim.lr=0.1, expected optim.lr=1e-05 as rank 0 on node0 has; start every "
            "machine with the same config file and the same overrides",
        ),
        (
            "inputs",
            {"data/train.jsonl": "missing (No such file or directory)"},
            True,
            "ranks 2-3 on node1: found data/train.jsonl missing (No such file or directory), expected a file of 14 "
            "bytes (0a) as rank 0 on node0 has; put the same data at the same path on every machine",
        ),
        (
            None,
            {"gpus": 0, "gpu": None, "driver": None},
            True,
            "ranks 2-3 on node1: found 0 visible GPUs, expected 2 as rank 0 on node0 has; see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES there, and what the job asked for",
        ),
        (
            None,
            {"gpus": 1},
            False,
            "ranks 2-3 on node1: found 1 visible GPUs, expected 2 as rank 0 on node0 has; see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES there, and what the job asked for",
        ),
        (
            "gpu",
            {"name": "A100"},
            False,
            "ranks 2-3 on node1: found the GPU A100, expected H100 as rank 0 on node0 has; the slowest GPU sets the "
            "pace of all",
        ),
        (
            None,
            {"driver": "550.2"},
            False,
            "ranks 2-3 on node1: found the driver 550.2, expected 570.1 as rank 0 on node0 has; give the machines the "
            "same driver",
        ),
        (
            None,
            {"open_files": 1024},
            False,
            "ranks 2-3 on node1: found a limit of 1024 open files, expected 4096 or more; raise `ulimit -n`",
        ),
    ],
)
def test_one_machine_differs(
    everybody: list[dict[str, Any]], section: str | None, changes: dict[str, Any], stops: bool, sentence: str
) -> None:
    for facts in everybody[2:]:
        (facts if section is None else facts[section]).update(changes)
    assert [(finding.text, finding.stops) for finding in compare(everybody)] == [(sentence, stops)]


def test_a_gpu_for_two_and_a_gpu_that_is_taken(everybody: list[dict[str, Any]]) -> None:
    everybody[1]["gpu"]["uuid"] = "GPU-0"
    everybody[3]["gpu"]["free_gb"] = 50.0
    shared, taken = compare(everybody)
    assert shared.stops and shared.text.startswith("rank 1 on node0 has the GPU GPU-0, which rank 0 has too; start one")
    assert not taken.stops
    assert taken.text.startswith("rank 3 on node1 has 50.0 GB of GPU memory free, expected nearly 80.0; see in nvidia-")


@pytest.mark.parametrize(("free", "count", "stops"), [(240.0, 0, None), (239.0, 1, False), (79.0, 1, True)])
def test_room_for_checkpoints(everybody: list[dict[str, Any]], free: float, count: int, stops: bool | None) -> None:
    everybody[0]["disk"]["free"] = free
    found = compare(everybody)
    assert len(found) == count
    if count:
        assert found[0].stops is stops
        assert f"rank 0 on node0 has {free} GB free at /runs, expected 240.0 for 3 checkpoints" in found[0].text


def test_an_estimated_checkpoint_stops_no_run(everybody: list[dict[str, Any]]) -> None:
    """An adapter's checkpoint is a fortieth of what its base's would be."""
    everybody[0]["disk"].update(free=50.0, measured=False)
    (found,) = compare(everybody)
    assert not found.stops and "of about 80.0 (if all weights learn; see `llmga plan`); make room" in found.text


def test_what_a_process_could_not_find_out_stands_alone(everybody: list[dict[str, Any]]) -> None:
    everybody[3] = {"rank": 3, "host": "node1", "fault": "rank 3 on node1 is process 4 of this machine"}
    everybody[2]["settings"]["run.seed"] = 1
    assert [finding.text for finding in compare(everybody)] == ["rank 3 on node1 is process 4 of this machine"]


def test_many_settings_are_named_in_part(everybody: list[dict[str, Any]]) -> None:
    other = copy.deepcopy(everybody)
    other[3]["settings"].update({f"run.k{n}": n for n in range(5)})
    assert (
        "rank 3 on node1: found run.k0=0, run.k1=1, run.k2=2 and 2 more, expected run.k0=None" in compare(other)[0].text
    )


def looked(rank: int, **found: Any) -> dict[str, Any]:
    return {"rank": rank, "host": f"node{rank}", "folder": "/a", "seen": True, "refused": None, "clock": 0.2} | found


def test_folder_rights_and_clocks() -> None:
    assert folder_findings("/a", [looked(0), looked(1)], 90) == []
    unseen, refused, early = folder_findings(
        "/a",
        [
            looked(0),
            looked(1, seen=False, folder="/home/a"),
            looked(2, refused="Permission denied"),
            looked(3, clock=-7),
        ],
        90,
    )
    assert unseen.stops and unseen.text.startswith(
        "rank 1 on node1: found nothing at /home/a of what rank 0 on node0 wrote to /a 90 s before; give run.output_dir"
    )
    assert refused.stops and refused.text.startswith(
        "rank 2 on node2: found /a closed to writing (Permission denied), expected it open as for rank 0 on node0; give"
    )
    assert not early.stops and early.text.startswith(
        "the clock of node3 is 7 s behind that of node0, expected less than 5"
    )


def test_sums_that_are_wrong() -> None:
    fine, wrong = {"rank": 0, "host": "a", "fault": None}, {"rank": 1, "host": "b", "fault": "the all-reduce gave 1"}
    [found] = network_findings([fine, wrong])
    assert found.stops and found.text.startswith("rank 1 on b: the all-reduce gave 1; test that machine alone")


def test_ranks_are_written_in_spans() -> None:
    assert spans([3]) == "rank 3"
    assert spans([0, 1, 2, 5, 8, 9]) == "ranks 0-2, 5, 8-9"
