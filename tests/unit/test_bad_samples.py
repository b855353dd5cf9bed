"""Hazards: a healthy run stopped by bad luck, a wrong path trained on for hours, a resumed run that decides anew."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmga.bad_samples import BAD_SAMPLES_FILE, BadSampleBudget, TooManyBadSamples

SHARE = 0.001


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / BAD_SAMPLES_FILE


def write_bad(path: Path, indices: list[int], kind: str = "picture", name: str = "train") -> None:
    with open(path, "a") as file:
        for index in indices:
            entry = {"set": name, "index": index, "kind": kind, "path": "m.jsonl", "row": 7, "id": "x"}
            file.write(json.dumps({**entry, "picture": f"{index}.png", "reason": "the file is empty"}) + "\n")


def decisions(budget: BadSampleBudget, total: int, every: int = 320) -> list[str]:
    """What each look at the file says, "" for nothing, up to the end of the run."""
    said = []
    for seen in range(every, total + 1, every):
        try:
            budget.check(seen)
            said.append("")
        except TooManyBadSamples as problem:
            said.append(str(problem))
    return said


# ---------------------------------------------------------------- when a run ends


def test_a_run_may_replace_the_allowed_share_of_its_examples_and_not_one_more(path: Path) -> None:
    budget = BadSampleBudget(path, max_share=0.01, total=300)
    budget.check(seen=10)  # no file yet
    write_bad(path, [3, 40, 41, 250])
    budget.check(seen=42)  # the three that the whole run may have, early by chance
    budget.check(seen=250)
    with pytest.raises(
        TooManyBadSamples,
        match=r"4 of the first 251 .* data.max_bad_share = 0.01 allows 3 in the whole run; .*bad_samples.jsonl names "
        r"them all, the first is 3.png \(m.jsonl row 7\): the file is empty. Mend",
    ):
        budget.check(seen=251)


def test_one_bad_picture_is_free_in_the_shortest_run(path: Path) -> None:
    write_bad(path, [0, 5])
    budget = BadSampleBudget(path, SHARE, total=10)
    budget.check(seen=5)
    with pytest.raises(TooManyBadSamples):
        budget.check(seen=6)


def test_none_is_free_at_a_share_of_0(path: Path) -> None:
    write_bad(path, [5])
    budget = BadSampleBudget(path, max_share=0.0, total=1_000_000)
    budget.check(seen=5)
    with pytest.raises(TooManyBadSamples, match=r"1 of the first 6 .* data.max_bad_share = 0 allows 0 in the whole"):
        budget.check(seen=6)


def test_bad_luck_at_the_start_stops_nobody(path: Path) -> None:
    write_bad(path, [4, 9])
    BadSampleBudget(path, SHARE, total=100_000).check(seen=32)


@pytest.mark.parametrize(("bad_share", "soon"), [(0.9, 32), (0.2, 64), (0.02, 1280)])
def test_a_wrong_path_is_found_out_within_a_few_steps(path: Path, bad_share: float, soon: int) -> None:
    bad = np.random.default_rng(0).random(5000) < bad_share
    write_bad(path, np.flatnonzero(bad).tolist())
    with pytest.raises(TooManyBadSamples, match=r"at data.max_bad_share = 0.001 that is no accident"):
        BadSampleBudget(path, SHARE, total=1_000_000).check(seen=soon)


def test_runs_with_just_the_allowed_share_are_not_stopped_early(path: Path) -> None:
    total, stopped = 40_000, 0
    for seed in range(60):
        bad = np.flatnonzero(np.random.default_rng(seed).random(total) < SHARE)
        write_bad(path, bad[: int(SHARE * total)].tolist())  # no more than it may, however early they come
        stopped += any(decisions(BadSampleBudget(path, SHARE, total), total))
        path.unlink()
    assert stopped == 0


# ---------------------------------------------------------------- what counts


def test_neither_long_examples_nor_held_out_ones_end_a_run(path: Path) -> None:
    write_bad(path, [0, 1, 2], kind="too_long")
    write_bad(path, [0, 1, 2], name="validation toy")
    budget = BadSampleBudget(path, max_share=0.0, total=10)
    budget.check(seen=10)
    assert budget.counts(10) == {"too_long": 3}


def test_an_example_counts_once_and_only_when_it_was_seen(path: Path) -> None:
    budget = BadSampleBudget(path, SHARE, total=100)
    write_bad(path, [3, 3, 50])  # two attempts for one example; one loaded ahead by a worker
    write_bad(path, [3], kind="too_long")
    assert budget.counts(10) == {"picture": 1}
    assert budget.counts(51) == {"picture": 2}


def test_a_line_that_is_half_written_is_waited_for(path: Path) -> None:
    write_bad(path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    budget = BadSampleBudget(path, max_share=0.0, total=10)
    assert budget.counts(10) == {"picture": 1}
    path.write_bytes(whole)
    assert budget.counts(10) == {"picture": 2}


# ---------------------------------------------------------------- resumed


def test_a_resumed_run_decides_as_an_unbroken_one(path: Path) -> None:
    total, bad = 20_000, [17, 900, 901, 902, 903, 4000, *range(9000, 9030)]
    write_bad(path, bad)
    unbroken = decisions(BadSampleBudget(path, SHARE, total), total)
    assert unbroken[0] == "" and unbroken[-1] != ""
    for killed_at in (320, 1280, 9280):
        path.unlink()
        loaded_ahead = [index for index in bad if index < killed_at + 700]
        write_bad(path, loaded_ahead[::-1])  # workers are in no order
        budget = BadSampleBudget(path, SHARE, total)
        budget.forget_after(killed_at)
        write_bad(path, [index for index in bad if index >= killed_at])
        assert decisions(budget, total) == unbroken


def test_pictures_mended_before_the_resume_count_no_more(path: Path) -> None:
    write_bad(path, [3])
    write_bad(path, [40, 41, 42], kind="picture")
    write_bad(path, [99], name="validation toy")
    budget = BadSampleBudget(path, max_share=0.01, total=100)
    with pytest.raises(TooManyBadSamples):
        budget.check(seen=64)
    budget.forget_after(32)
    budget.check(seen=64)
    assert budget.counts(64) == {"picture": 1}
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [3, 99]
