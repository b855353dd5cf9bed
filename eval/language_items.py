"""What eval/language.py asks: records of a manifest, and the questions that they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmga.images import open_picture, picture_path
from llmga.records import Record, open_manifest
from llmga.stage1.conversation import Turn
from llmga.stage1.tasks import Example, TaskSettings, build_example
from llmga.toyworld.corpus import draw_record
from llmga.toyworld.edits import Edit
from llmga.toyworld.scene import Scene

SHORT = "short_description"
"""The task that no record need have: any scene with a picture can be described briefly and in note form."""
SHORT_PARTS = ("brief", "medium")
TASKS = ("similar_image", "inpainting", "outpainting", "prompt_refinement", "editing", "vqa", "qa", SHORT)
SCORED_BY: dict[str, tuple[str, ...]] = {task: ("scene",) for task in TASKS[:4]} | {"editing": ("scene", "edit")}
"""Task -> what the `meta` of its records must hold, so that a reply can be scored."""
READERS: dict[str, Callable[[Any], Any]] = {
    "scene": lambda data: Scene.from_dict(data).geometry,
    "edit": lambda data: Edit.from_dict(data).target.geometry,
}


class EvalError(ValueError):
    """An evaluation that cannot be made as asked."""


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
        return SHORT if self.record.meta.get("part") in SHORT_PARTS else self.record.task

    @property
    def asks_for_picture(self) -> bool:
        """True for generation requests: the reply must carry tags."""
        return self.example.kind == "generation"

    @property
    def detail(self) -> str | None:
        """The kind of edit, of question or of description, where the record tells."""
        meta = self.record.meta
        if self.task == "editing":
            return str(meta["edit"]["kind"])
        if self.task == SHORT:
            return str(meta["part"])
        kinds = meta.get("questions")
        number = sum(turn.role == "assistant" for turn in self.turns)
        return str(kinds[number]) if self.task == "vqa" and isinstance(kinds, list) and number < len(kinds) else None


def choose_records(path: Path, rows: Mapping[str, int]) -> list[Record]:
    """The first records of each task, as many as `rows` says, or all where there are fewer.

    Raises:
        EvalError: the manifest is missing, holds none of a task, or a record that no reply could be scored by.
    """
    if not path.is_file():
        raise EvalError(
            f"{path}: no such manifest; build one with: python data_tools/build_world.py --out {path.parent}"
        )
    chosen: dict[str, list[Record]] = {task: [] for task in rows}
    for record in open_manifest(path):
        if len(chosen.get(record.task, ())) < rows.get(record.task, 0):
            _check(path, record)
            chosen[record.task].append(record)
        if (
            len(chosen.get(SHORT, ())) < len(SHORT_PARTS) * rows.get(SHORT, 0)
            and record.image
            and "scene" in record.meta
        ):
            _check(path, record)
            chosen[SHORT] += _short_descriptions(record)
    empty = [task for task, found in chosen.items() if not found]
    if empty:
        raise EvalError(f"{path} holds no record of task {', '.join(empty)}; name others with --tasks")
    return [record for found in chosen.values() for record in found]


def build_items(records: Sequence[Record], image_root: Path, settings: TaskSettings, seed: int) -> Iterator[Item]:
    """Every question of every record, with the true conversation before it.

    What is drawn for a record (wording, mask) depends on `seed` and its id alone, not on which others are asked.
    """

    def load_picture(name: str) -> Image.Image:
        return open_picture(picture_path(image_root, name))

    for record in records:
        rng = np.random.default_rng([seed, _number(record.id)])
        example = build_example(record, rng, settings, load_picture)
        for position, turn in enumerate(example.messages):
            if turn.role == "assistant":
                yield Item(f"{record.id}/{position}", record, example, example.messages[:position], turn.content)


def _check(path: Path, record: Record) -> None:
    for key in {*SCORED_BY.get(record.task, ()), *READERS.keys() & record.meta}:
        try:
            READERS[key](record.meta[key])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"cannot be read ({type(error).__name__}: {error})" if key in record.meta else "is missing"
            raise EvalError(
                f"{path}: record {record.id!r}, task {record.task}: meta.{key} {problem}; replies are scored by what a "
                "toy scene holds. Build a manifest with data_tools/build_world.py, or keep to --tasks vqa qa and "
                "leave that key out"
            ) from None


def _short_descriptions(record: Record) -> Iterator[Record]:
    """The picture of a record, to be described briefly and in note form."""
    assert record.image is not None
    scene = Scene.from_dict(record.meta["scene"])
    for part in SHORT_PARTS:
        id = f"{record.id}-{part}"
        yield draw_record(part, id, record.split or "test", record.image, scene, np.random.default_rng(_number(id)))


def _number(id: str) -> int:
    return int.from_bytes(sha256(id.encode()).digest()[:8])
