"""The report for people: one HTML file with everything in it, pictures included, that opens without a network."""

import warnings
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageFile

from llmga.files import written_aside
from llmga.images import MAX_PIXELS, data_url

_THUMBNAIL_PX = 144
_MAX_BARS = 40


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the page of a report."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    lengths = report["lengths"]
    charts = []
    if clip := lengths["clip"]:
        limits = [(77 - 2, "one window"), (75 * clip["max_chunks"], f"{clip['max_chunks']} windows")]
        charts.append(_chart("CLIP tokens per prompt", clip["histogram"], limits))
    if llm := lengths["llm"]:
        charts.append(_chart("LLM tokens per row", llm["histogram"], [(llm["max_length"], "max length")]))
    if sides := report["pictures"]["short_sides"]:
        charts.append(_chart("Short side of pictures, px", sides, [], report["pictures"]["short_sides_bin"]))
    page = environment.get_template("page.html.j2").render(
        report=report,
        charts=charts,
        worst=[{**picture, "thumbnail": thumbnail(Path(picture["picture"]))} for picture in report["worst"]],
    )
    with written_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")


def thumbnail(path: Path) -> str | None:
    """A small copy as the text of an `src` attribute; of a damaged picture what can be read; None for nothing."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    return None
                picture.draft("RGB", (2 * _THUMBNAIL_PX, 2 * _THUMBNAIL_PX))
                small = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
            return data_url(small)
    except Exception:  # it is among the worst for a reason, and Pillow's decoders raise anything
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _chart(
    title: str, bins: list[list[int]], limits: list[tuple[int, str]], width: int | None = None
) -> dict[str, Any]:
    """Bars of a histogram in shares of the plot; bins are joined until there are few, the tail in the last bar."""
    width = width or (bins[1][0] - bins[0][0] if len(bins) > 1 else max(1, 2 * bins[0][0] or 1))
    last = bins[-1][0] // width
    joined = -(-(last + 1) // _MAX_BARS)
    counts = [0] * (last // joined + 1)
    for start, count in bins:
        counts[start // width // joined] += count
    step, tallest = width * joined, max(counts)
    end = step * len(counts)
    return {
        "title": title,
        "tallest": tallest,
        "bars": [
            {
                "x": number / len(counts),
                "width": 1 / len(counts),
                "height": count / tallest,
                "title": f"{number * step:,} to {(number + 1) * step - 1:,}: {count:,}",
            }
            for number, count in enumerate(counts)
        ],
        "ticks": [(share, f"{round(share * end):,}") for share in (0, 0.25, 0.5, 0.75, 1)],
        "limits": [(limit / end, name) for limit, name in limits if limit <= end],
    }
