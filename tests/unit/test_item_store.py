"""Measured rows survive a killed process, are shared, and are not mistaken for those of another file or protocol.

Run: pytest tests/unit/test_item_store.py
"""

import os
from pathlib import Path

import numpy as np
import pytest

from llmga.metrics.item_store import ItemStore, StoreError, file_states

STATES = {"a": "1", "b": "1", "c/ü": "1"}


def rows(*values: float) -> dict[str, np.ndarray]:
    return {"score": np.array(values), "features": np.array(values, np.float32)[:, None] * np.ones(3, np.float32)}


def test_parts_of_several_processes_are_one_table(tmp_path: Path) -> None:
    first, second = (ItemStore(tmp_path, {"net": "x"}) for _ in range(2))
    assert first.missing(STATES) == ["a", "b", "c/ü"]
    first.add({"b": "1"}, rows(2))
    second.add({"c/ü": "1", "a": "1"}, rows(3, 1))
    assert first.missing(STATES) == []
    found = second.read({id: STATES[id] for id in ("c/ü", "a", "b")})
    assert found["score"].tolist() == [3, 1, 2] and found["features"].dtype == np.float32
    assert found["features"].tolist() == [[3] * 3, [1] * 3, [2] * 3]


def test_a_changed_picture_or_protocol_is_measured_again(tmp_path: Path) -> None:
    store = ItemStore(tmp_path, {"net": "x"})
    store.add(STATES, rows(1, 2, 3))
    assert store.missing({**STATES, "b": "2"}) == ["b"]
    store.add({"b": "2"}, rows(7))
    assert store.read({**STATES, "b": "2"})["score"].tolist() == [1, 7, 3]
    assert store.read(STATES)["score"].tolist() == [1, 2, 3]
    assert ItemStore(tmp_path, {"net": "y"}).missing(STATES) == list(STATES)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    store = ItemStore(tmp_path, {})
    with pytest.raises(StoreError, match="lacks 3 pictures, such as a"):
        store.read(STATES)
    with pytest.raises(StoreError, match="3 pictures"):
        store.add(STATES, {"score": np.zeros(2)})
    store.add(STATES, rows(1, 2, 3))
    [part] = store.folder.glob("part-*.npz")
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(StoreError, match=r"part-.* is damaged .*; delete it"):
        store.missing(STATES)


def test_the_state_of_a_file_tells_it_from_a_later_version(tmp_path: Path) -> None:
    files = {"a": tmp_path / "a", "b": tmp_path / "b"}
    files["a"].write_text("x")
    before = file_states(files)
    assert before["b"] == "absent"
    os.utime(files["a"], ns=(1, 1))
    assert file_states(files)["a"] != before["a"]
