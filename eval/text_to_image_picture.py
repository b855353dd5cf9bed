"""Draw what stage 2 learned as one PNG: the same noise, base and tuned, brief and long prompts, and what is read there.

    python eval/text_to_image_picture.py runs/eval_text_to_image_toy data/toy/refined.jsonl OUT.png

Rows are the first ones of the manifest: no hand picking. What the prompt says behind CLIP's window is violet. Below a
picture stands what the parser reads in it: green as the text wants it, red not, grey where the text leaves it open.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from drawing import PADDING, WIDTH, Canvas, Words
from llmga.config import EXIT_BAD_INPUT, EXIT_OK
from llmga.metrics.picture_files import file_name
from llmga.records import Record, open_manifest
from llmga.toyworld.describe import Caption
from llmga.toyworld.grammar import parse_caption
from llmga.toyworld.parse import ParsedScene, parse
from llmga.toyworld.picture_scores import WINDOW_TOKENS, read_text
from llmga.toyworld.wording import PLACES, WORDS

COLUMNS = ("base-short", "tuned-short", "base-refined", "tuned-refined")
NUM_ROWS, THUMBNAIL, GAP = 4, 150, 20
COLUMN_WIDTH = (WIDTH - 2 * PADDING - 3 * GAP) // 4


def main(arguments: list[str]) -> int:
    """Read an evaluation folder and write the picture."""
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return EXIT_BAD_INPUT
    folder, manifest, out = map(Path, arguments)
    canvas = Canvas(height=600 * NUM_ROWS)
    y = PADDING
    for record in islice(open_manifest(manifest), NUM_ROWS):
        y = draw_row(canvas, y, folder, record)
    canvas.save(out, y)
    print(out)
    return EXIT_OK


def draw_row(canvas: Canvas, top: int, folder: Path, record: Record) -> int:
    """Both texts, then four pictures with their readings; the height below."""
    prompt = read_text(record.prompt)
    y = canvas.write(PADDING, top, [("brief:", "soft", 13), *in_colour(record.short_caption, "text")])
    y = canvas.write(PADDING, y + 2, [("long:", "soft", 13), *prompt_words(record.prompt)]) + 10
    bottom = y
    for number, column in enumerate(COLUMNS):
        left = PADDING + number * (COLUMN_WIDTH + GAP)
        path = folder / "pictures" / column / file_name(record.id)
        canvas.paste(path, left, y, THUMBNAIL)
        system, condition = column.split("-")
        asked = requested_by_brief(record.short_caption) if condition == "short" else facts_of(prompt)
        title = f"{system}, {'brief' if condition == 'short' else 'long'}"
        read = parse(np.asarray(Image.open(path).convert("RGB")))
        below = canvas.write(left, y + THUMBNAIL + 6, in_colour(title, "soft"), left + COLUMN_WIDTH)
        for words in reading(read, asked):
            below = canvas.write(left, below, words, left + COLUMN_WIDTH)
        bottom = max(bottom, below)
    canvas.rule(bottom + 10)
    return bottom + PADDING


def facts_of(prompt: Caption) -> dict[tuple[str, int | None], str]:
    """What a long prompt asks for."""
    return {(fact.kind, fact.cell): fact.value for fact in prompt.facts}


def requested_by_brief(text: str) -> dict[tuple[str, int | None], str]:
    """What a brief caption asks for at a place of its own: the background; where its shape stands, it leaves open."""
    background = parse_caption(text).background
    return {} if background is None else {("background", None): background}


def prompt_words(text: str) -> Words:
    """The prompt's words; those behind the window stand out."""
    from llmga.tokens import clip_tokenizer

    ends = [end for _, end in clip_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).offsets]
    border = ends[WINDOW_TOKENS - 1] if len(ends) > WINDOW_TOKENS else len(text)
    cut = text.rfind(" ", 0, border + 1) + 1 if border < len(text) else len(text)
    return [*in_colour(text[:cut], "text"), *in_colour(text[cut:], "tag")]


def reading(scene: ParsedScene, asked: dict[tuple[str, int | None], str]) -> list[Words]:
    """A line for the background and one for each shape."""
    said = scene.facts()
    places = PLACES[2]

    def word(kind: str, cell: int | None) -> tuple[str, str, int]:
        value = said[kind, cell]
        colour = "soft" if (kind, cell) not in asked else "right" if asked[kind, cell] == value else "wrong"
        return WORDS[kind][value][0], colour, 12

    lines = [[word("background", None), ("ground", "soft", 12)]]
    for cell, place in enumerate(places):
        wanted = any(of == cell for _, of in asked)
        if ("shape", cell) in said:
            kinds = ("size", "texture", "colour", "shape")
            lines.append([*((part, "soft", 12) for part in f"{place}:".split()), *(word(kind, cell) for kind in kinds)])
        elif wanted:
            lines.append([*((part, "soft", 12) for part in f"{place}:".split()), ("nothing", "wrong", 12)])
    return lines


def in_colour(text: str, colour: str) -> Words:
    """The words of a text, alike."""
    return [(word, colour, 13) for word in text.split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
