"""Slurm's lists of machines, and where the tasks of a step meet.

Run: pytest tests/unit/test_slurm.py
"""

import pytest

from llmga.slurm import expand_hosts, meeting_place


@pytest.mark.parametrize(
    ("written", "hosts"),
    [
        ("", []),
        ("node7", ["node7"]),
        ("a,b", ["a", "b"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("a[1-2,07],b,c[001-002]-ib", ["a1", "a2", "a07", "b", "c001-ib", "c002-ib"]),
        ("r[1-2]n[3,4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_lists_of_machines(written: str, hosts: list[str]) -> None:
    assert expand_hosts(written) == hosts


def test_a_step_meets_on_its_own_first_machine_at_the_jobs_own_port() -> None:
    job = {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_ID": "4123456"}
    assert meeting_place(job) == {"MASTER_ADDR": "n1", "MASTER_PORT": "27456"}
    assert meeting_place({**job, "SLURM_STEP_NODELIST": "n[3-4]"})["MASTER_ADDR"] == "n3"
    ports = [int(meeting_place({"SLURM_JOB_ID": str(n)})["MASTER_PORT"]) for n in (0, 11_999, 12_000)]
    assert ports == [20_000, 31_999, 20_000]  # Linux gives those from 32768 on to anybody
    assert meeting_place({}) == {}
