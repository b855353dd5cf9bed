"""Documents are read back whole, strange fields are refused, and unequal protocols do not compare.

Run: pytest tests/unit/test_result.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmga.metrics.intervals import wilson
from llmga.metrics.result import (
    Metric,
    Result,
    ResultError,
    read_result,
    require_comparable,
    with_interval,
    write_document,
)


@pytest.fixture
def result() -> Result:
    return Result(
        name="base-short",
        task="text_to_image",
        system={"name": "base", "weights": "aa"},
        data={"set": "coco", "n": 5000, "list_sha256": "ff"},
        generation={"steps": 50, "prompts": "short"},
        protocol={"features": {"extractor": "inception-tf", "preprocessing": "clean-299"}},
        metrics=[Metric("frechet", 24, 5000), with_interval("late", wilson(3, 4), "share", True)],
    )


def test_a_document_comes_back_as_it_was(result: Result, tmp_path: Path) -> None:
    write_document(tmp_path / "a/result.json", result)
    assert read_result(tmp_path / "a/result.json") == result
    assert result.metric("late").ci_low == pytest.approx(0.3006, abs=1e-4) and result.metric("early") is None


def test_unknown_fields_and_other_versions_are_refused_by_name(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_document(path, result)
    content = json.loads(path.read_text())

    def said(change: dict) -> str:
        path.write_text(json.dumps(content | change))
        with pytest.raises(ResultError) as error:
            read_result(path)
        return str(error.value)

    assert "fid: Unexpected keyword argument" in said({"fid": 3})
    assert "metrics.0.sd: Unexpected" in said({"metrics": [{"name": "a", "value": 1, "n": 2, "sd": 1}]})
    assert "schema_version 9, expected 1" in said({"schema_version": 9})
    assert "metrics.0.value" in said({"metrics": [{"name": "a", "value": None, "n": 2}]})
    path.write_text("{")
    with pytest.raises(ResultError, match=r"result\.json is no document"):
        read_result(path)
    with pytest.raises(ResultError, match="does not exist"):
        read_result(tmp_path / "resutl.json")


def test_not_a_number_is_never_written(result: Result, tmp_path: Path) -> None:
    result.metrics[0].value = float("nan")
    with pytest.raises(ResultError, match=r"finite number"):
        write_document(tmp_path / "result.json", result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "value", "named"),
    [
        ("data", {"set": "coco", "n": 4000, "list_sha256": "ff"}, r"data\.n is 5000 and 4000"),
        (
            "protocol",
            {"features": {"extractor": "inception-tf", "preprocessing": "tf1-299"}},
            r"features\.preprocessing",
        ),
        ("protocol", {}, r'extractor is "inception-tf" and null'),
        ("generation", {"steps": 20, "prompts": "refined"}, r"generation\.steps is 50 and 20"),
        ("task", "editing", r'task is "text_to_image" and "editing"'),
    ],
)
def test_unequal_protocols_do_not_compare(result: Result, section: str, value: object, named: str) -> None:
    with pytest.raises(ResultError, match=named):
        require_comparable(result, replace(result, name="other", **{section: value}), ["prompts"])


def test_what_is_compared_may_differ_and_what_is_not_known_cannot(result: Result) -> None:
    refined = replace(result, generation={"steps": 50, "prompts": "refined"}, system={"name": "tuned"})
    require_comparable(result, refined, ["prompts"])
    with pytest.raises(ResultError, match=r"generation\.prompts"):
        require_comparable(result, refined)
    require_comparable(result, replace(result, generation={}))  # a folder from elsewhere
