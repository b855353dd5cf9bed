"""Records become conversations: one recipe per task, with instruction, mask and order drawn for each example.

Answers that ask for a picture are tagged, all others are not; that difference is what stage 1 teaches. Whatever
chance decides is drawn from the generator given, so an example is a pure function of record, generator and settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from llmga.images import PictureMode, blank_holes, fit_mask, fit_picture
from llmga.masks import STAGE1, Mask, MaskMixture, outpainting_mask, random_mask
from llmga.records import Record, RecordError
from llmga.stage1.config import DataConfig
from llmga.stage1.conversation import Turn
from llmga.stage1.instructions import Phrasing, fill_slots, instruction_list
from llmga.tokens import GEN_IMG, TAG_LITERALS, GenerationTags, neutralise, wrap_generation_prompt

PictureLoader = Callable[[str], Image.Image]


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """How a record becomes an example.

    Attributes:
        phrasing: which instructions are drawn; "held_out" ones are for evaluation and never trained on.
    """

    similar_generate_share: float = DataConfig.similar_generate_share
    refine_generate_share: float = DataConfig.refine_generate_share
    instruction_behind_share: float = DataConfig.instruction_behind_share
    picture_size: int = DataConfig.picture_size
    picture_mode: PictureMode = DataConfig.picture_mode
    language: str = DataConfig.language
    tags: GenerationTags = GEN_IMG
    masks: MaskMixture = STAGE1
    phrasing: Phrasing = "train"

    @classmethod
    def from_config(cls, data: DataConfig, tags: GenerationTags, phrasing: Phrasing = "train") -> "TaskSettings":
        """The settings that a run's configuration asks for."""
        return cls(
            similar_generate_share=data.similar_generate_share,
            refine_generate_share=data.refine_generate_share,
            instruction_behind_share=data.instruction_behind_share,
            picture_size=data.picture_size,
            picture_mode=data.picture_mode,
            language=data.language,
            tags=tags,
            phrasing=phrasing,
        )


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation to train on.

    Attributes:
        messages: user and assistant in turn; the answer to a generation request is already tagged.
        picture: what the one turn with `has_picture` shows, square, its holes already black.
        mask: the holes, for inpainting and outpainting.
        kind: "generation" (tagged answer), "description" (a caption without tags) or "chat" (turns as recorded).
    """

    messages: list[Turn]
    picture: Image.Image | None
    mask: Mask | None
    kind: Literal["generation", "description", "chat"]


def build_example(
    record: Record, rng: np.random.Generator, settings: TaskSettings, load_picture: PictureLoader
) -> Example:
    """Build the conversation of a record.

    Args:
        rng: the only source of chance.
        load_picture: opens what `record.image` or `record.mask` names, as RGB of any size; its errors pass through.
    Raises:
        RecordError: a field that the task needs is missing, or a mask hides nothing; names record and field.
        ValueError: there are no instructions in the language of the settings.
    """
    recipe = RECIPES.get(record.task)
    if recipe is None:
        raise RecordError(f"record {record.id!r} has the task {record.task!r}; expected one of {', '.join(RECIPES)}")
    return recipe(record, rng, settings, load_picture)


# ---------------------------------------------------------------- one recipe per task


def _refine_prompt(
    record: Record, rng: np.random.Generator, settings: TaskSettings, load_picture: PictureLoader
) -> Example:
    """A short caption is drawn (tagged long caption) or expanded (long caption as plain text)."""
    generate = rng.random() < settings.refine_generate_share
    place = "behind" if rng.random() < settings.instruction_behind_share else "before"
    instruction = _draw_instruction(f"{'generate' if generate else 'expand'}_{place}", rng, settings)
    short_caption = _need(record, "short_caption")
    parts = (instruction, short_caption) if place == "before" else (short_caption, instruction)
    return _answer_caption(record, generate, settings, Turn("user", " ".join(parts)))


def _similar_image(
    record: Record, rng: np.random.Generator, settings: TaskSettings, load_picture: PictureLoader
) -> Example:
    """A picture is drawn once more (tagged caption) or described (caption as plain text)."""
    generate = rng.random() < settings.similar_generate_share
    instruction = _draw_instruction("similar_picture" if generate else "describe_picture", rng, settings)
    picture = _load_fitted(record, settings, load_picture)
    return _answer_caption(record, generate, settings, Turn("user", instruction, has_picture=True), picture)


def _fill_picture(
    record: Record, rng: np.random.Generator, settings: TaskSettings, load_picture: PictureLoader
) -> Example:
    """A picture with holes is completed. A drawn mask decides whether that is called inpainting or outpainting."""
    mask = _find_mask(record, rng, settings, load_picture)
    # A record with its own mask says by its task what is to be asked; else only outpainting is sure beforehand.
    is_outpaint = record.task == "outpainting" or (record.mask is None and mask.is_outpaint)
    instruction = _draw_instruction("outpaint" if is_outpaint else "inpaint", rng, settings)
    picture = blank_holes(_load_fitted(record, settings, load_picture), mask)
    return _answer_caption(record, True, settings, Turn("user", instruction, has_picture=True), picture, mask)


def _edit(record: Record, rng: np.random.Generator, settings: TaskSettings, load_picture: PictureLoader) -> Example:
    """An instruction changes a picture, or the caption of one; the answer is the tagged caption of the result."""
    instruction, target = _need(record, "instruction"), _need(record, "target_caption")
    answer = Turn("assistant", wrap_generation_prompt(target, settings.tags))
    if record.image:
        picture = _load_fitted(record, settings, load_picture)
        return Example([Turn("user", instruction, has_picture=True), answer], picture, None, "generation")
    caption = record.caption or record.short_caption
    if not caption:
        raise _missing(record, "image", "or 'caption' in its place")
    template = _draw_instruction("edit_caption", rng, settings)
    return Example([Turn("user", fill_slots(template, caption, instruction)), answer], None, None, "generation")


def _chat(record: Record, rng: np.random.Generator, settings: TaskSettings, load_picture: PictureLoader) -> Example:
    """The recorded turns as they stand, with the picture, if any, in front of the first question."""
    if not record.messages:
        raise _missing(record, "messages")
    turns = [_turn(message["role"], message["content"]) for message in record.messages]
    if record.task == "qa":
        return Example(turns, None, None, "chat")
    first = next((position for position, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise RecordError(f"record {record.id!r}: task 'vqa' needs a question in 'messages'; found none by 'user'")
    turns[first] = Turn("user", turns[first].content, has_picture=True)
    return Example(turns, _load_fitted(record, settings, load_picture), None, "chat")


RECIPES: dict[str, Callable[[Record, np.random.Generator, TaskSettings, PictureLoader], Example]] = {
    "prompt_refinement": _refine_prompt,
    "similar_image": _similar_image,
    "inpainting": _fill_picture,
    "outpainting": _fill_picture,
    "editing": _edit,
    "vqa": _chat,
    "qa": _chat,
}


# ---------------------------------------------------------------- parts of recipes


def _answer_caption(
    record: Record,
    generate: bool,
    settings: TaskSettings,
    question: Turn,
    picture: Image.Image | None = None,
    mask: Mask | None = None,
) -> Example:
    """The question, answered with the record's caption: tagged to generate, plain to describe."""
    caption = _need(record, "caption")
    if generate:
        answer = Turn("assistant", wrap_generation_prompt(caption, settings.tags))
        return Example([question, answer], picture, mask, "generation")
    return Example([question, _turn("assistant", caption)], picture, mask, "description")


def _turn(role: str, content: str) -> Turn:
    """A turn without generation requests: tags in an answer are broken up here, all else by `conversation`."""
    if role == "assistant":
        return Turn("assistant", neutralise(content, TAG_LITERALS))
    return Turn("user", content)


def _find_mask(record: Record, rng: np.random.Generator, settings: TaskSettings, load_picture: PictureLoader) -> Mask:
    """The record's own mask, or one drawn at the size of the fitted picture."""
    size = settings.picture_size
    if record.mask:
        mask = fit_mask(load_picture(record.mask), size, settings.picture_mode, _need(record, "image"))
        if not mask.hole.any():
            raise RecordError(
                f"record {record.id!r}: 'mask' {record.mask!r} hides nothing; expected white where to generate"
            )
        return mask
    if record.task == "outpainting":
        return outpainting_mask(rng, size, size)
    return random_mask(rng, size, size, settings.masks)


def _load_fitted(record: Record, settings: TaskSettings, load_picture: PictureLoader) -> Image.Image:
    """The record's picture as a square of the size and mode of the settings."""
    name = _need(record, "image")
    return fit_picture(load_picture(name), settings.picture_size, settings.picture_mode, name)


def _need(record: Record, name: str) -> str:
    """The text of a field without which the task has no example."""
    value = getattr(record, name)
    if not value or not value.strip():
        raise _missing(record, name)
    return str(value)


def _missing(record: Record, name: str, instead: str = "") -> RecordError:
    """The error of a field that is missing or empty; `instead` names another that would have served."""
    needed = f"{name!r}{instead and ', '}{instead}"
    return RecordError(
        f"record {record.id!r}: task {record.task!r} needs {needed}, found none; fill it in or remove the row"
    )


def _draw_instruction(name: str, rng: np.random.Generator, settings: TaskSettings) -> str:
    """One instruction of a list, in the language and phrasing of the settings."""
    lines = instruction_list(name, settings.language, settings.phrasing)
    return lines[int(rng.integers(len(lines)))]
