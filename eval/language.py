"""What did the MLLM learn? Tags, prompts, kept facts and answers on held-out scenes, the base beside the tuned model.

    make eval                                                        # what `make stage1` made, else the shipped model
    python eval/language.py --model runs/stage1_toy/final            # a model of yours
    python eval/language.py --phrasing held_out                      # instructions that training never saw

Writes result.json (every number with its interval and protocol), items.jsonl (every reply) and index.html (to look at).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmga.cli import SHIPPED_MODELS, newest_model
from llmga.config import EXIT_BAD_INPUT, EXIT_OK
from llmga.files import atomic_write
from llmga.images import open_picture, picture_path
from llmga.machine import machine_in_words
from llmga.metrics.intervals import Interval, bootstrap_difference, bootstrap_ratio
from llmga.provenance import made_with
from llmga.records import Record, open_manifest
from llmga.stage1.conversation import Turn
from llmga.stage1.instructions import Phrasing
from llmga.stage1.tasks import Example, TaskSettings, build_example
from llmga.tokens import CLIP_WINDOW, clip_length, parse_reply
from llmga.toyworld.edits import KINDS as EDIT_KINDS
from llmga.toyworld.edits import Edit
from llmga.toyworld.questions import KINDS as QUESTION_KINDS
from llmga.toyworld.scene import Scene
from llmga.toyworld.scores import PromptScore, score_description, score_edit, score_refinement
from llmga.toyworld.visibility import hidden_cells

DRAWN_PX = 64  # the side of the toy world's pictures
TASKS = ("similar_image", "inpainting", "outpainting", "prompt_refinement", "editing", "vqa", "qa")


@dataclass(frozen=True)
class Item:
    """One question: what is asked, what a right reply would be, and what is needed to score it."""

    id: str
    record: Record
    example: Example
    turns: list[Turn]
    expected: str

    @property
    def task(self) -> str:
        """The record's task; what a picture with a drawn mask asks for, its mask says."""
        if self.record.task == "inpainting" and self.example.mask is not None and self.example.mask.is_outpaint:
            return "outpainting"
        return self.record.task

    @property
    def asks_for_picture(self) -> bool:
        """True for generation requests: the reply must carry tags."""
        return self.example.kind == "generation"

    @property
    def detail(self) -> str | None:
        """The kind of edit or of question, where the record tells."""
        meta = self.record.meta or {}
        if self.task == "editing":
            return str(meta["edit"]["kind"])
        kinds = meta.get("questions", [])
        number = sum(turn.role == "assistant" for turn in self.turns)
        return kinds[number] if self.task == "vqa" and number < len(kinds) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and write the result folder; returns the exit code."""
    args = parse_arguments(arguments)
    try:
        rows_of = dict.fromkeys(args.tasks, args.rows) | ({"vqa": args.vqa_rows} if "vqa" in args.tasks else {})
        records = choose_records(args.data, rows_of)
        settings = task_settings(args.model, args.picture_size, args.phrasing)
        items = list(build_items(records, args.data.parent, settings, args.seed))
        systems = {"tuned": args.model} | ({"base": args.base} if args.base else {})
        rows: list[dict[str, Any]] = []
        timing = {}
        for name, path in systems.items():
            started = time.monotonic()
            replies = reply(path, items, settings, args.max_new_tokens, args.batch_size)
            timing[name] = round(time.monotonic() - started, 1)
            rows += [score_item(name, item, text) for item, text in zip(items, replies, strict=True)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    result = {
        "schema_version": 1,
        "machine": machine_in_words("torch", "transformers"),
        "environment": made_with(),
        "protocol": {
            "data": str(args.data),
            "records": len(records),
            "rows": args.rows,
            "vqa_rows": args.vqa_rows,
            "phrasing": args.phrasing,
            "picture_size": settings.picture_size,
            "decoding": "greedy",
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed,
            "interval": "95 %, bootstrap over records",
        },
        "systems": {name: os.path.relpath(path) for name, path in systems.items()},
        "seconds": timing,
        "metrics": summarise(rows),
        "comparisons": compare(rows),
    }
    write_result(args.out, result, rows, items)
    if args.publish:
        atomic_write(args.publish, json_text(result))
    print(f"tuned: {args.model}, base: {args.base}")
    print(table(result["metrics"]))
    for comparison in result["comparisons"]:
        print(show_comparison(comparison))
    print(f"{args.out / 'index.html'}")
    return EXIT_OK


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=newest_model(), help="folder of the tuned MLLM")
    parser.add_argument("--base", type=Path, default=SHIPPED_MODELS / "base/mllm", help="folder of the base MLLM")
    parser.add_argument("--no-base", dest="base", action="store_const", const=None, help="leave the base out")
    parser.add_argument("--data", type=Path, default=Path("data/toy/test.jsonl"), help="manifest of held-out scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/eval_language"))
    parser.add_argument("--publish", type=Path, help="write result.json here too, without the replies")
    parser.add_argument("--rows", type=int, default=500, help="records per task")
    parser.add_argument("--vqa-rows", type=int, default=600, help="records of VQA, each with one to eight questions")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--phrasing", choices=("train", "held_out"), default="train")
    parser.add_argument("--picture-size", type=int, help="pixels a side; else as the tuned MLLM was trained")
    parser.add_argument("--max-new-tokens", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


# ---------------------------------------------------------------- what is asked


def choose_records(path: Path, rows: Mapping[str, int]) -> list[Record]:
    """The first records of each task, as many as `rows` says, or all where there are fewer.

    Raises:
        ValueError: the manifest is missing, or holds none of a task.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such manifest; build one with: python data_tools/build_world.py --out {path.parent}"
        )
    chosen: dict[str, list[Record]] = {task: [] for task in rows}
    for record in open_manifest(path):
        if len(chosen.get(record.task, ())) < rows.get(record.task, 0):
            chosen[record.task].append(record)
    empty = [task for task, found in chosen.items() if not found]
    if empty:
        raise ValueError(f"{path} holds no record of task {', '.join(empty)}; name others with --tasks")
    return [record for found in chosen.values() for record in found]


def build_items(records: Sequence[Record], image_root: Path, settings: TaskSettings, seed: int) -> Iterator[Item]:
    """Every question of every record, with the true conversation before it.

    What is drawn for a record (wording, mask) depends on `seed` and its id alone, not on which others are asked.
    """

    def load_picture(name: str) -> Image.Image:
        return open_picture(picture_path(image_root, name))

    for record in records:
        own = int.from_bytes(sha256(record.id.encode()).digest()[:8])
        example = build_example(record, np.random.default_rng([seed, own]), settings, load_picture)
        for position, turn in enumerate(example.messages):
            if turn.role == "assistant":
                yield Item(f"{record.id}/{position}", record, example, example.messages[:position], turn.content)


def task_settings(model: Path, picture_size: int | None, phrasing: Phrasing) -> TaskSettings:
    """Pictures as the tuned MLLM was trained with them; where its folder does not say, as the world draws them."""
    from llmga.stage1.model import read_picture_shape

    trained_size, mode = read_picture_shape(model)
    return TaskSettings(picture_size=picture_size or trained_size or DRAWN_PX, picture_mode=mode, phrasing=phrasing)


def reply(path: Path, items: Sequence[Item], settings: TaskSettings, max_new_tokens: int, batch_size: int) -> list[str]:
    """Greedy replies of a model folder to all items."""
    from llmga.stage1.model import load_mllm
    from llmga.stage1.reply import Prompt, generate_replies

    prompts = [Prompt(item.turns, item.example.picture) for item in items]
    return generate_replies(load_mllm(path), prompts, max_new_tokens, batch_size, picture_size=settings.picture_size)


# ---------------------------------------------------------------- how right it is


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
        whole = "joint" if task == "editing" else "exact_match"
        score.pairs[f"{whole}:{item.detail}"] = score.pairs[whole]
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


def _sight(item: Item) -> dict[str, Any]:
    """The grid of the scene, and the cells that its mask hides: what marks facts on the page."""
    scene = (item.record.meta or {}).get("scene")
    if scene is None:
        return {}
    found, mask = Scene.from_dict(scene), item.example.mask
    return {"grid": found.geometry.grid, "hidden": hidden_cells(found, None if mask is None else mask.hole)}


def _score_prompt(task: str, item: Item, prompt: str) -> PromptScore:
    meta = item.record.meta or {}
    scene = Scene.from_dict(meta["scene"])
    if task == "editing":
        return score_edit(prompt, Edit.from_dict(meta["edit"]))
    if task == "prompt_refinement":
        return score_refinement(prompt, item.record.short_caption or "", scene.geometry.grid)
    hole = item.example.mask.hole if item.example.mask is not None else None
    return score_description(prompt, scene, hole)


def normal(text: str) -> str:
    """Case, outer space and the last full stop do not make an answer wrong."""
    return " ".join(text.lower().split()).rstrip(".")


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per system, task, kind and score, with its 95 % interval; and the tag scores over all tasks."""
    groups: dict[tuple[str, str, str, str], list[tuple[str, tuple[int, int]]]] = {}
    for row in rows:
        for name, pair in row["scores"].items():
            if pair[1]:
                groups.setdefault((row["system"], row["task"], row["kind"], name), []).append((row["record"], pair))
            if name.startswith("tags_"):
                kind = "generation" if name == "tags_well_formed" else "other"
                groups.setdefault((row["system"], "all", kind, name), []).append((row["record"], pair))
    metrics = []
    for (system, task, kind, name), pairs in groups.items():
        right = np.array([pair[0] for _, pair in pairs], float)
        total = np.array([pair[1] for _, pair in pairs], float)
        interval: Interval = bootstrap_ratio(right, total, clusters=[record for record, _ in pairs])
        metrics.append(
            {
                "system": system,
                "task": task,
                "kind": kind,
                "name": name,
                "value": interval.value,
                "ci_low": interval.low,
                "ci_high": interval.high,
                "n": len({record for record, _ in pairs}),
            }
        )
    return metrics


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tuned minus base where both answer the same questions and neither needs tags: paired, with 95 % intervals."""
    comparisons = []
    for task in ("vqa", "qa"):
        right: dict[str, dict[str, int]] = {}
        record_of: dict[str, str] = {}
        for row in rows:
            if row["task"] == task:
                right.setdefault(row["system"], {})[row["id"]] = row["scores"]["exact_match"][0]
                record_of[row["id"]] = row["record"]
        if not {"tuned", "base"} <= right.keys():
            continue
        ids = list(right["tuned"])
        tuned, base = ([right[system][id] for id in ids] for system in ("tuned", "base"))
        found = bootstrap_difference(tuned, base, clusters=[record_of[id] for id in ids])
        comparisons.append(
            {
                "task": task,
                "name": "exact_match",
                "a": "tuned",
                "b": "base",
                "difference": found.value,
                "ci_low": found.low,
                "ci_high": found.high,
                "ci_method": found.method,
                "questions": len(ids),
                "n": found.n,
            }
        )
    return comparisons


# ---------------------------------------------------------------- what is written

TABLE_ROWS = (
    ("all", "generation", "tags_well_formed", "well-formed tags on generation requests"),
    ("all", "other", "tags_where_none_belong", "tags where none belong"),
    ("similar_image", "generation", "attributes", "similar image: attributes right"),
    ("similar_image", "generation", "exact", "similar image: whole scene right"),
    ("similar_image", "generation", "valid", "similar image: valid prompt"),
    ("inpainting", "generation", "attributes", "inpainting: visible attributes right"),
    ("outpainting", "generation", "attributes", "outpainting: visible attributes right"),
    ("prompt_refinement", "generation", "constraints", "refinement: constraints kept"),
    ("prompt_refinement", "generation", "valid", "refinement: valid prompt"),
    ("prompt_refinement", "generation", "past_clip_window", "refinement: prompts past 77 CLIP tokens"),
    ("prompt_refinement", "generation", "clip_tokens", "refinement: CLIP tokens per prompt"),
    ("editing", "generation", "requested", "editing: requested change made"),
    ("editing", "generation", "preserved", "editing: other facts preserved"),
    ("editing", "generation", "joint", "editing: joint success"),
    ("vqa", "chat", "exact_match", "VQA: exact match"),
    ("qa", "chat", "exact_match", "plain QA: exact match"),
)
"""What the table shows, in order: task, kind, score, words."""

DETAIL_ROWS = (
    *(("editing", "generation", f"joint:{kind}", f"editing, {kind}: joint success") for kind in EDIT_KINDS),
    *(("vqa", "chat", f"exact_match:{kind}", f"VQA, {kind}: exact match") for kind in (*QUESTION_KINDS, "aim")),
)
"""The same, by kind of edit and of question: shown on the page only."""


def show(metric: dict[str, Any]) -> str:
    """A value with its interval, in per cent or in tokens."""
    if metric["name"] == "clip_tokens":
        return f"{metric['value']:.0f} [{metric['ci_low']:.0f}, {metric['ci_high']:.0f}]"
    return f"{100 * metric['value']:.1f} % [{100 * metric['ci_low']:.1f}, {100 * metric['ci_high']:.1f}]"


def show_comparison(comparison: dict[str, Any]) -> str:
    """A paired difference in words."""
    points = [100 * comparison[key] for key in ("difference", "ci_low", "ci_high")]
    return (
        f"{comparison['task'].upper()} exact match, tuned minus base: {points[0]:+.1f} points "
        f"[{points[1]:+.1f}, {points[2]:+.1f}], paired, {comparison['questions']} questions"
    )


def table_rows(
    metrics: Sequence[dict[str, Any]], wanted: Sequence[tuple[str, str, str, str]] = TABLE_ROWS
) -> list[tuple[str, str, str, int]]:
    """(words, tuned, base, n) for each row that was measured."""
    found = {(m["system"], m["task"], m["kind"], m["name"]): m for m in metrics}
    rows = []
    for task, kind, name, words in wanted:
        tuned, base = (found.get((system, task, kind, name)) for system in ("tuned", "base"))
        if tuned is not None:
            rows.append((words, show(tuned), show(base) if base else "-", tuned["n"]))
    return rows


def table(metrics: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| what | tuned | base | n |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {words} | {tuned} | {base} | {n} |" for words, tuned, base, n in table_rows(metrics))]
    )


def json_text(result: dict[str, Any]) -> str:
    """A result as a file's text."""
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def write_result(out: Path, result: dict[str, Any], rows: Sequence[dict[str, Any]], items: Sequence[Item]) -> None:
    """Write result.json, items.jsonl and index.html."""
    from language_page import render_page

    out.mkdir(parents=True, exist_ok=True)
    pictures = {item.id: item.example.picture for item in items}
    tables = (("All tasks", TABLE_ROWS), ("By kind of edit and of question", DETAIL_ROWS))
    measured = {title: table_rows(result["metrics"], wanted) for title, wanted in tables}
    texts = {
        "result.json": json_text(result),
        "items.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "index.html": render_page(result, measured, rows, pictures),
    }
    (out / "pictures").mkdir(exist_ok=True)
    for item in items:
        if item.example.picture is not None:
            item.example.picture.save(out / "pictures" / f"{item.id.replace('/', '_')}.png")
    for name, text in texts.items():
        atomic_write(out / name, text)


if __name__ == "__main__":
    sys.exit(main())
