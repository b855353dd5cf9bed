"""A contact sheet of toy data: one page that shows pictures, captions with their facts, edits, masks and questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from llmga.images import blank_holes, data_url
from llmga.masks import BOXES, OUTPAINTING_WIDE, STROKES, MaskMixture, random_mask
from llmga.records import Record
from llmga.tokens import CHUNK_TOKENS, clip_length, clip_words
from llmga.toyworld.edits import NOTHING, Edit
from llmga.toyworld.grammar import match_sentence
from llmga.toyworld.render import render
from llmga.toyworld.scene import BACKGROUNDS, COLOURS, THEMES, Scene
from llmga.toyworld.visibility import hidden_cells
from llmga.toyworld.wording import PLACES, WORDS, value_of

SHOWN_PER_PART = 12
"""Records of each part that are shown; statistics count all."""

MASKS = {"inpainting": MaskMixture(((0.5, STROKES), (0.5, BOXES))), "outpainting": OUTPAINTING_WIDE}
"""What training draws at load time."""
TITLES = {
    "prompt_refinement": ("Prompt refinement", "A few words, and the long caption that they should become."),
    "similar_image": ("Similar image", "A picture, and the prompt that would draw it once more."),
    "inpainting": (
        "Inpainting",
        "A picture with holes, and the prompt for the whole. Masks are drawn when it is loaded.",
    ),
    "outpainting": ("Outpainting", "A picture without its margins, and the prompt for the whole."),
    "editing": ("Editing", "A picture and an instruction, and the prompt for the picture it should become."),
    "questions": ("Questions", "Short answers that are exactly right or wrong."),
    "find": ("Finding", "From a description to its place, and from a place to what is there."),
    "aim": ("Aiming", "Which shape an edit means, answered by its place."),
    "imagine": ("Imagining", "What an edit would lead to, asked place by place."),
    "brief": ("Brief captions", "Background, count and one object."),
    "medium": ("Medium captions", "Some or all facts, in any order."),
    "chat": ("Small talk", "Questions and answers without a picture."),
}


class Segment(NamedTuple):
    """A stretch of a caption: its slot if it is a fact, the CLIP chunk it lies in, and a colour to show it with.

    `is_hidden` says that the fact is of an object that a mask hides.
    """

    text: str
    slot: str
    chunk: int
    colour: str
    is_hidden: bool = False


def write_sheet(path: Path, records: Iterable[Record]) -> None:
    """Write the page: one file, pictures inside.

    Args:
        path: the HTML file.
        records: records as `build_world` writes them.
    """
    shown: dict[str, list[dict[str, Any]]] = {}
    counts: Counter[str] = Counter()
    scenes: list[Scene] = []
    for record in records:
        part = record.meta["part"]
        counts[part] += 1
        if "scene" in record.meta:
            scenes.append(Scene.from_dict(record.meta["scene"]))
        if counts[part] <= SHOWN_PER_PART:
            shown.setdefault(part, []).append(_card(record, np.random.default_rng([len(counts), counts[part]])))
    loader = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = loader.get_template("sheet.html.j2").render(
        parts=[(part, *TITLES[part], counts[part], shown[part]) for part in TITLES if part in shown],
        themes=_themes(scenes),
        num_records=counts.total(),
        num_scenes=len(scenes),
        slots=("count", "background", "place", "size", "texture", "colour", "shape"),
    )
    path.write_text(page, encoding="utf-8")


def segments(text: str, hidden_places: Collection[str] = ()) -> list[Segment]:
    """Cut a caption of any style at its facts and at the borders of CLIP's 75-token chunks.

    Args:
        hidden_places: places whose objects cannot be seen.
    """
    facts = list(_facts(text, hidden_places))
    borders = _chunk_starts(text)
    cuts = sorted({0, len(text), *borders, *(cut for start, end, *_ in facts for cut in (start, end))})
    found = []
    for start, end in pairwise(cuts):
        slot, is_hidden = next(((fact[2], fact[3]) for fact in facts if fact[0] <= start < fact[1]), ("", False))
        chunk = sum(border <= start for border in borders)
        found.append(Segment(text[start:end], slot, chunk, _colour(slot, text[start:end]), is_hidden))
    return found


def _facts(text: str, hidden_places: Collection[str]) -> Iterator[tuple[int, int, str, bool]]:
    """(start, end, slot, whether its object is hidden) of each fact."""
    start = 0
    while (stop := text.find(".", start)) >= 0:
        if match := match_sentence(text, start, stop):
            is_hidden = match.groupdict().get("place", "").lower() in hidden_places
            yield from ((*match.span(slot), slot, is_hidden) for slot in match.groupdict())
        start = stop + 1 + (text[stop + 1 : stop + 2] == " ")


def _chunk_starts(text: str) -> list[int]:
    """Where each CLIP chunk after the first begins."""
    starts: list[int] = []
    for word in clip_words(text):
        if (word.position - 1) // CHUNK_TOKENS > len(starts):
            starts.append(word.start)
    return starts


def _colour(slot: str, word: str) -> str:
    palette = {"colour": COLOURS, "background": BACKGROUNDS}.get(slot)
    return f"rgb{palette[value_of(slot, word.lower())]}" if palette else ""


def _card(record: Record, rng: np.random.Generator) -> dict[str, Any]:
    """What the template shows of a record."""
    card: dict[str, Any] = {"id": record.id, "task": record.task, "turns": [], "instruction": record.instruction}
    if "scene" in record.meta:
        card |= _pictures(record, Scene.from_dict(record.meta["scene"]), rng)
    text = record.target_caption or record.caption
    if text:
        card |= {"caption": segments(text, card.get("hidden", ())), "num_tokens": clip_length(text)}
    if record.short_caption:
        card["brief"] = segments(record.short_caption)
    for question, answer in zip(*[iter(record.messages or ())] * 2, strict=True):
        said = answer["content"]
        is_caption = record.meta["part"] in ("brief", "medium")
        card["turns"].append((question["content"], segments(said) if is_caption else [Segment(said, "", 0, "")]))
    return card


def _pictures(record: Record, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    picture = Image.fromarray(render(scene))
    pictures: dict[str, Any] = {"picture": data_url(picture), "theme": scene.theme}
    if record.task in MASKS:
        mask = random_mask(rng, picture.height, picture.width, MASKS[record.task])
        pictures["masked"] = data_url(blank_holes(picture, mask))
        pictures["mask"] = data_url(Image.fromarray(mask.hole * 255))
        places = PLACES[scene.geometry.grid]
        pictures["hidden"] = {places[cell] for cell in hidden_cells(scene, mask.hole)}
        places = PLACES[scene.geometry.grid]
        pictures["hidden"] = {places[cell] for cell in hidden_cells(scene, mask.hole)}
    if "edit" in record.meta:
        edit = Edit.from_dict(record.meta["edit"])
        after = Image.fromarray(render(edit.target))
        pictures |= {"after": data_url(after), "kind": edit.kind, "requested": _requested(edit)}
    return pictures


def _requested(edit: Edit) -> list[str]:
    """The facts that an edit asks for, in words."""
    places, said = PLACES[edit.target.geometry.grid], []
    for (kind, cell), value in edit.requested.items():
        word = value if value == NOTHING else WORDS[kind][value][0]
        said.append(f"{kind}: {word}" if cell is None else f"{places[cell]}: {word}")
    return said


def _themes(scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """Each theme, how often it was drawn, and how far its scenes keep to it."""
    rows = []
    for theme in THEMES:
        own = [scene for scene in scenes if scene.theme == theme.name]
        objects = [obj for scene in own for obj in scene.objects]
        rows.append(
            {
                "name": theme.name,
                "background": f"rgb{BACKGROUNDS[theme.background]}",
                "background_name": theme.background,
                "palette": [(name, f"rgb{COLOURS[name]}") for name in theme.palette],
                "textures": [WORDS["texture"][texture][0] for texture in theme.textures],
                "pictures": [data_url(Image.fromarray(render(scene))) for scene in own[:3]],
                "count": len(own),
                "kept": {
                    "background": _share([scene.background == theme.background for scene in own]),
                    "colour": _share([obj.colour in theme.palette for obj in objects]),
                    "texture": _share([obj.texture in theme.textures for obj in objects]),
                },
            }
        )
    return rows


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
