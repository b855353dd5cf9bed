"""What people say when they ask for a picture or a text: the lists of instructions.yaml."""

import re
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

INSTRUCTIONS_PATH = Path(__file__).with_name("instructions.yaml")

Phrasing = Literal["train", "held_out"]


def instruction_list(name: str, language: str = "en", phrasing: Phrasing = "train") -> tuple[str, ...]:
    """The instructions of one list, in the order of the file.

    Args:
        name: a list of instructions.yaml, such as "similar_picture".
        phrasing: "train" or "held_out"; no instruction is in both.
    Raises:
        ValueError: unknown language, list or phrasing.
    """
    lists = _read_instructions()
    for key, known in ((language, lists), (name, lists.get(language, {}))):
        if key not in known:
            raise ValueError(f"no instructions for {key!r} in {INSTRUCTIONS_PATH}; it has {', '.join(known)}")
    if phrasing not in lists[language][name]:
        raise ValueError(f"instructions come in the phrasings {', '.join(lists[language][name])}; found {phrasing!r}")
    return lists[language][name][phrasing]


def languages() -> list[str]:
    """What `data.language` can name."""
    return sorted(_read_instructions())


@cache
def _read_instructions() -> dict[str, dict[str, dict[str, tuple[str, ...]]]]:
    """Language -> list -> phrasing -> instructions."""
    with open(INSTRUCTIONS_PATH, encoding="utf-8") as file:
        raw = yaml.safe_load(file)
    return {
        language: {
            name: {phrasing: tuple(lines) for phrasing, lines in phrasings.items()} for name, phrasings in lists.items()
        }
        for language, lists in raw.items()
    }


def fill_slots(template: str, caption: str, instruction: str) -> str:
    """Put caption and instruction into a template of `edit_caption`; braces inside either of them stay text."""
    slots = {"{caption}": caption, "{instruction}": instruction}
    return re.sub(r"\{caption\}|\{instruction\}", lambda slot: slots[slot[0]], template)
