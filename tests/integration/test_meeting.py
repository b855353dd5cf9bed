"""A meeting of processes, played by threads: who came, who did not, and what all hear.

Run: pytest tests/integration/test_meeting.py
"""

import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llmga.nodes.meeting import Meeting, MeetingError
from llmga.runtime import Ranks


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> str:
    """A free port on this machine, and no launcher's variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    return f"127.0.0.1:{port}"


def all_ranks(work: Callable[[Meeting], Any], size: int = 3, came: int | None = None, seconds: float = 20) -> list[Any]:
    """What `work` returned or raised on each of the first `came` ranks of `size`."""

    meetings = []  # all stay to the end, as processes that go on to train do

    def run(rank: int) -> Any:
        try:
            meeting = Meeting(Ranks(rank, rank, size), seconds)
            meetings.append(meeting)
            return work(meeting)
        except MeetingError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size if came is None else came)))


def test_rank_0_hears_all_and_all_hear_rank_0() -> None:
    def work(meeting: Meeting) -> Any:
        meeting.roll_call()
        heard = meeting.collect("names", {"rank": meeting.ranks.rank})
        meeting.agree()
        meeting.agree()
        return heard, meeting.tell("greeting", "hello" if meeting.ranks.is_main else None)

    first, *others = all_ranks(work)
    assert first == ([{"rank": 0}, {"rank": 1}, {"rank": 2}], "hello")
    assert others == [(None, "hello"), (None, "hello")]


def test_who_did_not_come_is_named_to_all_who_did(place: str) -> None:
    def work(meeting: Meeting) -> None:
        meeting.roll_call()
        meeting.agree()

    errors = all_ranks(work, size=4, came=2, seconds=1)
    sentence = (
        rf"ranks 2-3 of 4 did not arrive at the roll call at {place} within 1 s \(ranks 0-1 came, rank 0 on \S+\); "
        r"start what is missing or see its machine's log for why it ended, or let run\.join_timeout_s be longer"
    )
    assert all(re.fullmatch(sentence, str(error)) for error in errors), errors


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, r"ranks 2-3 of 4 on machine 1 \(NODE_RANK=1\) did not arrive"),
        (
            {"SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "gpu[7-8]"},
            r"ranks 2-3 of 4 on gpu8 did not arrive",
        ),
    ],
)
def test_a_missing_machine_has_a_name(variables: dict[str, str], names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert re.match(names, str(all_ranks(lambda meeting: meeting.roll_call() or meeting.agree(), 4, 2, 0.5)[0]))


def test_who_stays_away_later_is_named_with_its_host() -> None:
    def work(meeting: Meeting) -> None:
        meeting.roll_call()
        if meeting.ranks.rank != 1:
            meeting.collect("all-reduce", 1)
            meeting.agree()

    errors = all_ranks(work, seconds=2)
    assert re.match(r"rank 1 of 3 on \S+ did not arrive at the all-reduce at .* \(ranks 0, 2 came", str(errors[0]))
    assert str(errors[2]) == str(errors[0]) and errors[1] is None


def test_what_ends_the_run_is_heard_by_all() -> None:
    def work(meeting: Meeting) -> None:
        meeting.roll_call()
        if meeting.ranks.is_main:
            raise MeetingError(meeting.end("rank 2 has no disk"))
        meeting.agree()

    assert [str(error) for error in all_ranks(work)] == ["rank 2 has no disk"] * 3


def test_nobody_at_the_meeting_place(place: str) -> None:
    with pytest.raises(MeetingError, match=rf"rank 1 on \S+ did not reach rank 0 at {place} within 1 s; see whether"):
        Meeting(Ranks(1, 0, 2), 1)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASTER_PORT", str(port))
            with pytest.raises(MeetingError, match=rf"rank 0 on \S+ cannot open port {port} .*; set MASTER_PORT"):
                Meeting(Ranks(0, 0, 2), 1)
