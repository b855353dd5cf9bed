"""Numbers in README.md are those of the committed result files."""

import json
import re
from pathlib import Path

import pytest

from eval.language import show_comparison, table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads((ROOT / "docs/results/stage1_language.json").read_text(encoding="utf-8"))


def test_the_table_of_what_was_learned_is_that_of_the_result_file(result: dict) -> None:
    lines = table(result["metrics"]).splitlines()
    assert len(lines) > 12
    assert [line for line in lines if line not in README.splitlines()] == []


def test_comparisons_and_machine_are_those_of_the_result_file(result: dict) -> None:
    said = " ".join(README.split())
    for comparison in result["comparisons"]:
        assert show_comparison(comparison) in said
    assert result["machine"].partition(",")[0] in said


def test_every_link_leads_to_a_file() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
