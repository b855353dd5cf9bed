"""What the MLLM is asked for a row, and what counts as an answer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

from llmga.records import GENERATION_TASKS, Record
from llmga.stage1.conversation import Prompt
from llmga.stage1.record.config import RecordConfig
from llmga.stage1.tasks import TaskSettings, build_example
from llmga.tokens import parse_reply

_ANSWER = "."  # recipes want the answer that training would show; here it is what we ask for


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for one row.

    Attributes:
        row: its number in the manifest, from 0.
        id: of its record.
        prompt: conversation and picture, as the model was trained to see them.
        asked: what a reader needs to ask it again: task, instruction, and the hole's kind and coverage.
    """

    row: int
    id: str
    prompt: Prompt
    asked: dict[str, Any]


def is_asked(record: Record, cfg: RecordConfig) -> bool:
    """Whether a row gets a prompt: chats ask for no picture."""
    return cfg.task is not None or record.task in GENERATION_TASKS


def build_question(row: int, record: Record, cfg: RecordConfig, load_picture: Callable[[str], Image.Image]) -> Question:
    """The request of a row, built by the recipe that training uses; the same in every process and at every attempt.

    Raises:
        RecordError: the row lacks what its task needs.
        PictureError: its picture cannot be used.
    """
    task = cfg.task or record.task
    settings = TaskSettings(
        similar_generate_share=1.0,
        refine_generate_share=1.0,
        picture_size=cfg.picture_size,
        picture_mode=cfg.picture_mode,
        language=cfg.language,
        phrasing=cfg.phrasing,
    )
    caption = record.caption if task == "editing" else _ANSWER
    asked = replace(record, task=task, caption=caption, target_caption=_ANSWER)
    rng = np.random.default_rng([cfg.seed, crc32(record.id.encode("utf-8", "surrogatepass"))])
    example = build_example(asked, rng, settings, load_picture)
    turns = example.messages[:-1]
    facts: dict[str, Any] = {"task": task, "instruction": turns[-1].content}
    if example.mask is not None:
        facts["mask"] = {"kind": example.mask.kind, "coverage": round(example.mask.coverage, 4)}
    return Question(row, record.id, Prompt(turns, example.picture), facts)


def read_reply(reply: str, cfg: RecordConfig) -> tuple[str | None, str]:
    """The prompt in a reply, and why there is none: a word for a table, empty when there is one."""
    if cfg.reply == "plain":
        text = reply.strip()
        return (text, "") if text else (None, "empty_reply")
    if not reply.strip():
        return None, "empty_reply"
    parsed = parse_reply(reply)
    if not parsed.prompts:
        return None, "no_prompt" if parsed.well_formed else "unbalanced_tags"
    if not parsed.well_formed:
        return None, "unbalanced_tags"
    if len(parsed.prompts) > 1:
        return None, "several_prompts"
    return parsed.prompts[0], ""
