"""What a folder was made from: `provenance.json`, the same in every folder that we write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmga.environment import environment

FILE = "provenance.json"


def made_with() -> dict[str, Any]:
    """The commit and the versions that something is made with."""
    return {key: value for key, value in environment().items() if key in ("commit", "versions")}


def write_provenance(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts into a folder that is being made; paths and the like become text."""
    text = json.dumps(dict(facts), indent=2, ensure_ascii=False, default=str)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a folder says; nothing where it says nothing."""
    path = folder / FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
