"""A contact sheet of toy data: one HTML page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmga.records import Record


def write_sheet(path: Path, records: Sequence[Record]) -> None:
    """Write the page."""
    path.write_text("\n".join(record.id for record in records), encoding="utf-8")
