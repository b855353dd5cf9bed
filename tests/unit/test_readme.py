"""Numbers in README.md are those of the committed result files."""

import json
import re
from pathlib import Path

import pytest

from language_tables import show_comparisons, table

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
    assert all(sentence in said for sentence in show_comparisons(result["comparisons"]))
    assert result["machine"].partition(",")[0] in said


def test_questions_named_as_at_chance_are_those_where_neither_model_is_surely_above_it(result: dict) -> None:
    rows = [m for m in result["metrics"] if m["task"] == "vqa" and "chance" in m]
    above = {m["name"].partition(":")[2] for m in rows if m["ci_low"] > m["chance"]}
    at_chance = [m for m in rows if m["name"].partition(":")[2] not in above]
    [named] = re.findall(
        r"Base and tuned alike are no better than chance on (.*?): between (\d+) and (\d+) %", " ".join(README.split())
    )
    assert set(re.findall(r"`(\w+)`", named[0])) == {m["name"].partition(":")[2] for m in at_chance}
    values = [100 * m["value"] for m in at_chance]
    assert (int(named[1]), int(named[2])) == (round(min(values)), round(max(values)))


def test_what_a_newcomer_is_told_was_printed_by_a_fresh_clone() -> None:
    seen = json.loads((ROOT / "benchmarks/results/fresh_clone.json").read_text(encoding="utf-8"))
    [block] = re.findall(r"```\n(setup: .*?)```", README, flags=re.DOTALL)
    assert [line for line in block.splitlines() if line != "..."] == seen["stage1"]["printed"]
    minutes, peak_gb = seen["stage1"]["data_and_training_s"] / 60, seen["stage1"]["peak_gb"]
    assert f"{minutes:.1f} minutes and {peak_gb:.1f} GB of memory" in " ".join(README.split())
    assert minutes < 10 and peak_gb < 4
    assert f"{seen['tests']['test']['seconds'] / 60:.0f} minutes" in README
    assert seen["tests"]["test"]["seconds"] < 600 and seen["tests"]["unit"]["seconds"] < 60


def test_every_link_leads_to_a_file() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_measured_memory_is_that_of_the_result_file() -> None:
    page = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    cases = json.loads((ROOT / "benchmarks/results/plan_memory.json").read_text(encoding="utf-8"))["cases"]
    for name, case in cases.items():
        predicted, measured, ratio = (case[key] for key in ("predicted_mb", "measured_mb", "predicted_over_measured"))
        assert f"| {name} | {predicted:.0f} | {measured:.0f} | {ratio:.2f} |" in page
    assert sum(abs(case["predicted_over_measured"] - 1) <= 0.15 for case in cases.values()) >= 3


def test_no_page_waits_to_be_filled_in() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"@[A-Z0-9]{3,}@|^<{7} |^>{7} ", text, flags=re.MULTILINE), page.name


@pytest.mark.parametrize("name", ["stage2_text_to_image", "stage2_windows", "stage2_inpainting/in_wide"])
def test_tables_of_stage2_are_those_of_the_result_files(name: str) -> None:
    published = (ROOT / "docs/results" / name / "table.md").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert len(published) > 3 and [line for line in published if line not in README.splitlines()] == []


def test_how_well_base_paints_is_that_of_the_result_file() -> None:
    found = json.loads((ROOT / "docs/results/toy_sd.json").read_text(encoding="utf-8"))
    assert min(found["ceiling"].values()) > 0.97
    said = " ".join(README.split())
    assert f"still reads {100 * found['ceiling']['mean']:.1f} % of a scene" in said
    assert f"base shows {100 * found['unet']['mean']:.1f} %" in said


def test_what_stage2_is_said_to_have_gained_is_in_the_result_files() -> None:
    found = {}
    for name in ("stage2_text_to_image", "stage2_windows", "stage2_inpainting/in_wide"):
        document = json.loads((ROOT / "docs/results" / name / "comparisons.json").read_text(encoding="utf-8"))
        found |= {(each["a"], each["b"], each["metric"]): each for each in document["comparisons"]}
    late = found["tuned-refined", "base-refined", "late"]
    windows = found["all_windows-refined", "first_window-refined", "late"]
    early = found["all_windows-refined", "first_window-refined", "early"]
    assert late["ci_low"] > 0.2 and windows["ci_low"] > 0.3 and abs(early["difference"]) < 0.03
    hidden = found["tuned-true", "base-true", "hidden"]
    assert found["tuned-refined", "base-refined", "early"]["ci_low"] > 0 and hidden["ci_low"] > 0
    said = " ".join(README.split())
    for each in (late, windows, early, hidden):
        low, high = 100 * each["ci_low"], 100 * each["ci_high"]
        assert f"{100 * each['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]" in said
