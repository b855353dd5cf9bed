"""The tables of eval/language.py: which scores are shown, in what order and words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from language_items import SHORT, TASKS
from language_scores import COUNTS

Wanted = tuple[str, str, str, str]
"""Task, kind, score, words."""

TABLE_ROWS: tuple[Wanted, ...] = (
    ("all", "generation", "tags_well_formed", "well-formed tags on generation requests"),
    ("all", "other", "tags_where_none_belong", "tags where none belong, in the tasks of stage 1"),
    (SHORT, "chat", "tags_where_none_belong", "tags where a short description is asked for"),
    ("similar_image", "generation", "attributes", "similar image: attributes right"),
    ("similar_image", "generation", "exact", "similar image: whole scene right"),
    ("similar_image", "generation", "valid", "similar image: valid prompt"),
    ("inpainting", "generation", "attributes", "inpainting: visible attributes right"),
    ("outpainting", "generation", "attributes", "outpainting: visible attributes right"),
    ("prompt_refinement", "generation", "constraints", "refinement: constraints kept"),
    ("prompt_refinement", "generation", "themed", "refinement: imagined details usual for the theme"),
    ("prompt_refinement", "generation", "valid", "refinement: valid prompt"),
    ("prompt_refinement", "generation", "past_clip_window", "refinement: prompts past 77 CLIP tokens"),
    ("prompt_refinement", "generation", "clip_tokens", "refinement: CLIP tokens per prompt"),
    ("editing", "generation", "requested", "editing: requested change made"),
    ("editing", "generation", "preserved", "editing: other facts preserved"),
    ("editing", "generation", "joint", "editing: joint success"),
    ("vqa", "chat", "exact_match", "VQA: exact match"),
    ("qa", "chat", "exact_match", "plain QA: exact match"),
    (SHORT, "chat", "all_true:brief", "described briefly: valid, and every fact true"),
    (SHORT, "chat", "all_true:medium", "described in note form: valid, and every fact true"),
)
"""What the table shows, in order."""

DETAILS = {
    "valid": "valid prompt",
    "no_extra": "no shape where there is none",
    "attribute": "right",
    "joint": "joint success",
    "exact_match": "exact match",
    "facts_said": "facts said",
    "true_facts": "facts true",
    "all_true": "valid, and every fact true",
}
"""Score -> its words, of what is shown on the page only: the scores above by kind, and what explains them."""
TASK_WORDS = {"prompt_refinement": "refinement", "vqa": "VQA", "qa": "plain QA"}


def detail_rows(metrics: Sequence[dict[str, Any]]) -> list[Wanted]:
    """Rows for what was measured besides `TABLE_ROWS`, task by task."""
    shown = {wanted[:3] for wanted in TABLE_ROWS}
    found = {(m["task"], m["kind"], m["name"]) for m in metrics if m["task"] in TASKS} - shown
    rows = []
    for task, kind, name in sorted(found, key=lambda key: (TASKS.index(key[0]), *key)):
        score, _, detail = name.partition(":")
        if score in DETAILS:
            what = TASK_WORDS.get(task, task.replace("_", " ")) + (" without tags" if kind == "description" else "")
            rows.append((task, kind, name, f"{what}{', ' if detail else ''}{detail}: {DETAILS[score]}"))
    return rows


def show(metric: dict[str, Any]) -> str:
    """A value with its interval, in per cent or as a number per reply."""
    if metric["name"].partition(":")[0] in COUNTS:
        return f"{metric['value']:.0f} [{metric['ci_low']:.0f}, {metric['ci_high']:.0f}]"
    return f"{100 * metric['value']:.1f} % [{100 * metric['ci_low']:.1f}, {100 * metric['ci_high']:.1f}]"


def show_comparisons(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """The paired differences over all questions, in words."""
    shown = []
    for comparison in comparisons:
        if comparison["name"] == "exact_match":
            value, low, high = (100 * comparison[key] for key in ("difference", "ci_low", "ci_high"))
            shown.append(
                f"{comparison['task'].upper()} exact match, tuned minus base: {value:+.1f} points "
                f"[{low:+.1f}, {high:+.1f}], paired, {comparison['questions']} questions"
            )
    return shown


def table_rows(metrics: Sequence[dict[str, Any]], wanted: Sequence[Wanted]) -> list[tuple[str, str, str, int]]:
    """(words, tuned, base, n) for each row that was measured."""
    found = {(m["system"], m["task"], m["kind"], m["name"]): m for m in metrics}
    rows = []
    for task, kind, name, words in wanted:
        tuned, base = (found.get((system, task, kind, name)) for system in ("tuned", "base"))
        if tuned is not None:
            words += f" (chance {100 * tuned['chance']:.0f} %)" if "chance" in tuned else ""
            rows.append((words, show(tuned), show(base) if base else "-", tuned["n"]))
    return rows


def table(metrics: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| what | tuned | base | n |", "|---|---|---|---|"]
    rows = table_rows(metrics, TABLE_ROWS)
    return "\n".join([*lines, *(f"| {words} | {tuned} | {base} | {n} |" for words, tuned, base, n in rows)])
