"""Words and pictures on a canvas, for the pictures that stand in the README."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llmga.files import written_aside

SCALE = 2
"""Pixels of the file for each pixel of the layout, so that words are sharp on every screen."""
WIDTH, PADDING = 1180, 20
COLOURS = {
    "text": "#1f2328",
    "soft": "#656d76",
    "right": "#1a7f37",
    "wrong": "#cf222e",
    "tag": "#8250df",
    "hidden": "#8c959f",
}

Words = list[tuple[str, str, int]]
"""Word, name of its colour, size in pixels of the layout."""


class Canvas:
    """A sheet of `WIDTH` that is cut to its contents; all places are in pixels of the layout."""

    def __init__(self, height: int) -> None:
        self.sheet = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.sheet)

    def write(self, left: int, y: int, words: Words, right: int = WIDTH - PADDING) -> int:
        """Write words as a paragraph between two margins and return the height below it."""
        x, line = float(left), 0
        for word, colour, size in words:
            font = ImageFont.load_default(size * SCALE)
            width = self.pen.textlength(word + " ", font) / SCALE
            if x + width > right and x > left:
                x, y = left, y + line
            self.pen.text((x * SCALE, y * SCALE), word, COLOURS[colour], font)
            x, line = x + width, round(size * 1.45)
        return y + line

    def paste(self, path: Path, left: int, y: int, side: int) -> None:
        """Put a picture there, every pixel of it sharp."""
        picture = Image.open(path).convert("RGB")
        self.sheet.paste(
            picture.resize((side * SCALE, side * SCALE), Image.Resampling.NEAREST), (left * SCALE, y * SCALE)
        )

    def rule(self, y: int) -> None:
        """A line from margin to margin."""
        self.pen.line([(PADDING * SCALE, y * SCALE), ((WIDTH - PADDING) * SCALE, y * SCALE)], "#d0d7de", SCALE)

    def save(self, out: Path, height: int) -> None:
        """Cut at a height and write a PNG."""
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(out) as aside:
            self.sheet.crop((0, 0, WIDTH * SCALE, height * SCALE)).save(aside, "PNG", optimize=True)
