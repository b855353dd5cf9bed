"""The page that eval/language.py writes: the tables, then examples of every task with right and wrong facts marked."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from llmga.images import data_url
from llmga.tokens import TAG_LITERALS
from llmga.toyworld.grammar import parse_caption
from llmga.toyworld.scene import ATTRIBUTES
from llmga.toyworld.wording import WORDS

EXAMPLES_PER_TASK = 6
FREE = ("prompt_refinement", "short_description")  # other facts than the expected ones may be as right


def render_page(
    result: Mapping[str, Any],
    tables: Mapping[str, Sequence[tuple[str, str, str, int]]],
    rows: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Image.Image | None],
) -> str:
    """Self-contained HTML: opens offline, holds its pictures.

    Args:
        tables: title -> rows of (words, tuned, base, n); a table without rows is left out.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("language.html.j2").render(
        result=result, tables=tables, tasks=examples_by_task(rows, pictures)
    )


def examples_by_task(
    rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, Image.Image | None]
) -> dict[str, list[dict[str, Any]]]:
    """The first examples of each task, and among them up to two that the tuned model got wrong."""
    by_item: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_item.setdefault(row["id"], {})[row["system"]] = row
    tasks: dict[str, list[dict[str, Any]]] = {}
    for wrong_first in (True, False):  # wrong ones are looked for first, so that a page never hides them
        for item, systems in by_item.items():
            tuned = systems["tuned"]
            chosen = tasks.setdefault(tuned["task"], [])
            limit = 2 if wrong_first else EXAMPLES_PER_TASK
            if len(chosen) < limit and wrong_first == _is_wrong(tuned) and item not in {e["id"] for e in chosen}:
                chosen.append(_example(item, systems, pictures[item]))
    return tasks


def _is_wrong(row: Mapping[str, Any]) -> bool:
    names = ("tags_well_formed", "valid", "attributes", "constraints", "joint", "exact_match", "all_true")
    return any(right < total for name, (right, total) in row["scores"].items() if name in names)


def _example(item: str, systems: Mapping[str, Mapping[str, Any]], picture: Image.Image | None) -> dict[str, Any]:
    tuned = systems["tuned"]
    return {
        "id": item,
        "question": tuned["question"],
        "picture": data_url(picture) if picture is not None else None,
        "expected": tuned["expected"],
        "wrong": _is_wrong(tuned),
        "replies": {
            name: mark_facts(
                row["reply"],
                row["expected"],
                judge=tuned["task"] not in FREE,
                grid=row.get("grid", 2),
                hidden=row.get("hidden", ()),
            )
            for name, row in systems.items()
        },
    }


def mark_facts(reply: str, expected: str, judge: bool = True, grid: int = 2, hidden: Collection[int] = ()) -> str:
    """The reply as HTML, tags and facts marked.

    Args:
        reply: what the model wrote.
        expected: the right answer, whose facts decide between right and wrong.
        judge: False where another answer may be as right: then only the tags are marked.
        grid: grid width of the scene.
        hidden: cells that a mask hides; what is said of them is neither right nor wrong.
    """
    truth = parse_caption(_untagged(expected), grid)
    parts = []
    for sentence in reply.split(". "):
        parsed = parse_caption(_untagged(sentence).strip(" ."), grid)
        said = {value: "right" for value in parsed.facts().values()} if judge else {}
        for (kind, cell), value in parsed.facts().items() if judge else ():
            if cell in hidden:
                said[value] = "hidden"
            elif truth.facts().get((kind, cell)) not in (None, value) or (
                cell is not None and cell not in truth.objects and truth.objects
            ):
                said[value] = "wrong"
        parts.append(" ".join(_mark(word, said) for word in sentence.split(" ")))
    return ". ".join(parts)


def _untagged(text: str) -> str:
    for tag in TAG_LITERALS:
        text = text.replace(tag, "")
    return text.strip()


def _mark(word: str, said: Mapping[str, str]) -> str:
    bare, text = word.strip(".,;:").lower(), html.escape(word)
    if word in TAG_LITERALS:
        return f'<b class="tag">{text}</b>'
    values = {value for slot in (*ATTRIBUTES, "background") for value, words in WORDS[slot].items() if bare in words}
    found = {said[value] for value in values & said.keys()}
    return f'<b class="{found.pop()}">{text}</b>' if found else text
