"""Draw what was learned as one PNG: a picture, what was asked, and what base and tuned model reply.

python eval/language_picture.py runs/eval_language docs/pictures/stage1_learned.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from llmga.config import EXIT_BAD_INPUT, EXIT_OK
from llmga.files import written_aside

SHOWN = ("similar_image", "outpainting", "editing", "prompt_refinement", "vqa")
SCALE = 2
WIDTH, PADDING, THUMBNAIL = 1180, 20, 168
COLOURS = {
    "text": "#1f2328",
    "soft": "#656d76",
    "right": "#1a7f37",
    "wrong": "#cf222e",
    "tag": "#8250df",
    "hidden": "#8c959f",
}


def main(arguments: list[str]) -> int:
    """Read an evaluation folder and write the picture."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return EXIT_BAD_INPUT
    folder, out = map(Path, arguments)
    examples = list(choose_examples(folder))
    picture = draw(examples, folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as aside:
        picture.save(aside, "PNG", optimize=True)
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


def draw(examples: list[dict[str, dict[str, Any]]], folder: Path) -> Image.Image:
    """Lay the examples out from top to bottom."""
    canvas = Image.new("RGB", (WIDTH * SCALE, 2400 * SCALE), "white")
    pen, y = ImageDraw.Draw(canvas), PADDING
    for systems in examples:
        tuned = systems["tuned"]
        name = folder / "pictures" / f"{tuned['id'].replace('/', '_')}.png"
        top, left = y, PADDING
        if name.is_file():
            thumbnail = Image.open(name).resize((THUMBNAIL * SCALE, THUMBNAIL * SCALE), Image.Resampling.NEAREST)
            canvas.paste(thumbnail, (left * SCALE, y * SCALE))
        left += THUMBNAIL + PADDING
        y = write(pen, left, y, [(tuned["task"].replace("_", " "), "soft", 13)])
        y = write(pen, left, y, [(word, "text", 17) for word in tuned["question"].split()]) + 4
        for system, row in sorted(systems.items()):
            words = [(f"{system}:", "soft", 14), *coloured(row)]
            y = write(pen, left, y, words) + 6
        y = max(y, top + (THUMBNAIL if name.is_file() else 0)) + PADDING
        pen.line([(PADDING * SCALE, (y - 10) * SCALE), ((WIDTH - PADDING) * SCALE, (y - 10) * SCALE)], "#d0d7de", SCALE)
    return canvas.crop((0, 0, WIDTH * SCALE, y * SCALE))


def coloured(row: dict[str, Any]) -> list[tuple[str, str, int]]:
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


def write(pen: ImageDraw.ImageDraw, left: int, y: int, words: list[tuple[str, str, int]]) -> int:
    """Write words as a paragraph and return the height below it."""
    x, line = left, 0
    for word, colour, size in words:
        font = ImageFont.load_default(size * SCALE)
        width = pen.textlength(word + " ", font) / SCALE
        if x + width > WIDTH - PADDING and x > left:
            x, y = left, y + line
        pen.text((x * SCALE, y * SCALE), word, COLOURS[colour], font)
        x, line = x + width, round(size * 1.45)
    return y + line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
