"""Draw what was learned as one PNG: a picture, what was asked, and what base and tuned model reply.

python eval/language_picture.py runs/eval_language docs/pictures/stage1_learned.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drawing import PADDING, Canvas, Words
from llmga.config import EXIT_BAD_INPUT, EXIT_OK

SHOWN = ("similar_image", "outpainting", "editing", "prompt_refinement", "vqa")
THUMBNAIL = 168


def main(arguments: list[str]) -> int:
    """Read an evaluation folder and write the picture."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return EXIT_BAD_INPUT
    folder, out = map(Path, arguments)
    canvas = Canvas(height=2400)
    canvas.save(out, draw(canvas, list(choose_examples(folder)), folder))
    print(out)
    return EXIT_OK


def choose_examples(folder: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """For each shown task the first item with a picture, or the first item: no hand picking."""
    by_item: dict[str, dict[str, dict[str, Any]]] = {}
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    for row in map(json.loads, lines):  # replies may hold other line breaks, as U+2028
        if row["task"] != "vqa" and row["kind"] != "generation":
            continue
        by_item.setdefault(row["id"], {})[row["system"]] = row
    for task in SHOWN:
        yield next(systems for systems in by_item.values() if systems["tuned"]["task"] == task)


def draw(canvas: Canvas, examples: list[dict[str, dict[str, Any]]], folder: Path) -> int:
    """Lay the examples out from top to bottom; the height below them."""
    y = PADDING
    for systems in examples:
        tuned = systems["tuned"]
        name = folder / "pictures" / f"{tuned['id'].replace('/', '_')}.png"
        top, left = y, PADDING
        if name.is_file():
            canvas.paste(name, left, y, THUMBNAIL)
        left += THUMBNAIL + PADDING
        y = canvas.write(left, y, [(tuned["task"].replace("_", " "), "soft", 13)])
        y = canvas.write(left, y, [(word, "text", 17) for word in tuned["question"].split()]) + 4
        for system, row in sorted(systems.items()):
            y = canvas.write(left, y, [(f"{system}:", "soft", 14), *coloured(row)]) + 6
        y = max(y, top + (THUMBNAIL if name.is_file() else 0)) + PADDING
        canvas.rule(y - 10)
    return y


def coloured(row: dict[str, Any]) -> Words:
    """The reply's words, each with the colour that `mark_facts` gives it."""
    import html
    import re

    from language_page import mark_facts

    words = []
    judge = row["task"] not in ("prompt_refinement", "vqa")
    marked = mark_facts(row["reply"], row["expected"], judge, row.get("grid", 2), row.get("hidden", ()))
    for match in re.finditer(r'<b class="(\w+)">(.*?)</b>|([^<\s]+)', marked):
        colour = match[1] or "text"
        words.append((html.unescape(match[2] or match[3]), colour, 14))
    return words


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
