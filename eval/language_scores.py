"""How right the replies of eval/language.py are: scores of each, and rates and differences with their intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from language_items import SHORT, Item
from llmga.metrics.intervals import bootstrap_difference, bootstrap_ratio
from llmga.tokens import CLIP_WINDOW, clip_length, parse_reply
from llmga.toyworld.edits import Edit
from llmga.toyworld.scene import ATTRIBUTES, BACKGROUNDS, Scene
from llmga.toyworld.scores import (
    PromptScore,
    score_description,
    score_edit,
    score_refinement,
    score_short_description,
)
from llmga.toyworld.visibility import hidden_cells

COUNTS = ("clip_tokens", "facts_said")
"""Scores that are numbers per reply; all others are rates."""
BY_DETAIL = {"editing": ("joint",), "vqa": ("exact_match",), SHORT: ("valid", "true_facts", "all_true", "facts_said")}
"""Task -> the scores that are given for each kind of edit, question and description, too."""


def score_item(system: str, item: Item, text: str) -> dict[str, Any]:
    """Score one reply: a JSON-ready row with its (right, total) pairs."""
    answer, task = parse_reply(text), item.task
    prompt = answer.prompts[0] if answer.prompts else ""
    score = PromptScore()
    if item.asks_for_picture:
        score.add("tags_well_formed", answer.well_formed and len(answer.prompts) == 1)
        score.add("clip_tokens", clip_length(prompt))
        score.add("past_clip_window", clip_length(prompt) + 2 > CLIP_WINDOW)
    else:
        score.add("tags_where_none_belong", bool(answer.prompts) or not answer.well_formed)
        prompt = answer.text
    if task in ("vqa", "qa"):
        score.add("exact_match", normal(text) == normal(item.expected))
    else:
        score.pairs |= _score_prompt(task, item, prompt).pairs
    if item.detail is not None:
        score.pairs |= {f"{name}:{item.detail}": score.pairs[name] for name in BY_DETAIL[task]}
    return {
        "system": system,
        "id": item.id,
        "task": task,
        "kind": item.example.kind,
        "record": item.record.id,
        "question": item.turns[-1].content,
        "reply": text,
        "expected": item.expected,
        **_sight(item),
        "scores": score.pairs,
    }


def normal(text: str) -> str:
    """Case, outer space and the last full stop do not make an answer wrong."""
    return " ".join(text.lower().split()).rstrip(".")


def _sight(item: Item) -> dict[str, Any]:
    """The grid of the scene, and the cells that its mask hides: what marks facts on the page."""
    scene = item.record.meta.get("scene")
    if scene is None:
        return {}
    found, mask = Scene.from_dict(scene), item.example.mask
    return {"grid": found.geometry.grid, "hidden": hidden_cells(found, None if mask is None else mask.hole)}


def _score_prompt(task: str, item: Item, prompt: str) -> PromptScore:
    meta = item.record.meta
    scene = Scene.from_dict(meta["scene"])
    if task == "editing":
        return score_edit(prompt, Edit.from_dict(meta["edit"]))
    if task == "prompt_refinement":
        return score_refinement(prompt, item.record.short_caption or "", scene.geometry.grid)
    if task == SHORT:
        return score_short_description(prompt, scene)
    return score_description(prompt, scene, item.example.mask.hole if item.example.mask is not None else None)


# ---------------------------------------------------------------- over all replies


class _Scored(NamedTuple):
    record: str
    expected: str
    pair: tuple[int, int]


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per system, task, kind and score, with its 95 % interval; and the tag scores over all tasks of stage 1.

    Where chance is known, `chance` is what guessing scores and `beyond_chance` is (value - chance) / (1 - chance). It
    guesses an attribute among its values, and the most frequent right answer to every question of a kind.
    """
    groups: dict[tuple[str, str, str, str], list[_Scored]] = {}
    for row in rows:
        for name, pair in row["scores"].items():
            scored = _Scored(row["record"], normal(row["expected"]), pair)
            if pair[1]:
                groups.setdefault((row["system"], row["task"], row["kind"], name), []).append(scored)
            if name.startswith("tags_") and row["task"] != SHORT:  # which stage 1 does not train
                kind = "generation" if name == "tags_well_formed" else "other"
                groups.setdefault((row["system"], "all", kind, name), []).append(scored)
    return [
        {"system": system, "task": task, "kind": kind, "name": name, **_measure(name, group)}
        for (system, task, kind, name), group in groups.items()
    ]


def _measure(name: str, group: Sequence[_Scored]) -> dict[str, Any]:
    right, total = np.array([scored.pair for scored in group], float).T
    records = [scored.record for scored in group]
    found = bootstrap_ratio(right, total, clusters=records, rate=name.partition(":")[0] not in COUNTS)
    measured = {
        "value": found.value,
        "ci_low": found.low,
        "ci_high": found.high,
        "ci_method": found.method,
        "n": len(set(records)),
    }
    chance = _chance(name, group)
    if chance is not None and chance < 1:
        measured |= {"chance": chance, "beyond_chance": (found.value - chance) / (1 - chance)}
    return measured


def _chance(name: str, group: Sequence[_Scored]) -> float | None:
    score, _, detail = name.partition(":")
    if score == "attribute":
        return 1 / len({**ATTRIBUTES, "background": BACKGROUNDS}[detail])
    if score == "exact_match" and detail:
        [(_, most)] = Counter(scored.expected for scored in group).most_common(1)
        return most / len(group)
    return None


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tuned minus base where both answer the same questions and neither needs tags: paired, with 95 % intervals.

    For each task one entry over all questions, then one for each kind of question.
    """
    comparisons = []
    for task in ("vqa", "qa"):
        asked = [row for row in rows if row["task"] == task]
        if not {"tuned", "base"} <= {row["system"] for row in asked}:
            continue
        for name in sorted({name for row in asked for name in row["scores"] if name.startswith("exact_match")}):
            right: dict[str, dict[str, int]] = {"tuned": {}, "base": {}}
            for row in asked:
                if name in row["scores"]:
                    right[row["system"]][row["id"]] = row["scores"][name][0]
            record_of = {row["id"]: row["record"] for row in asked}
            tuned, base = ([right[system][id] for id in right["tuned"]] for system in ("tuned", "base"))
            found = bootstrap_difference(tuned, base, clusters=[record_of[id] for id in right["tuned"]])
            comparisons.append(
                {
                    "task": task,
                    "name": name,
                    "a": "tuned",
                    "b": "base",
                    "difference": found.value,
                    "ci_low": found.low,
                    "ci_high": found.high,
                    "ci_method": found.method,
                    "questions": len(tuned),
                    "n": found.n,
                }
            )
    return comparisons
