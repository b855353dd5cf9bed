"""Small data sets for the tests of `llmga check`, and one call that checks them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmga.check.command import check_and_report
from llmga.check.settings import CheckSettings
from llmga.records import Record, write_manifest


def photo(seed: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture with large coloured shapes and some noise: unlike others, and not plain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def row(name: str = "a.jpg", **fields: Any) -> Record:
    """A similar-image row whose id and caption come from its picture's name."""
    given = {"id": name, "task": "similar_image", "image": name, "caption": f"a picture called {name}", **fields}
    return Record(**given)


def data_set(folder: Path, *rows: Record, pictures: dict[str, Image.Image] | None = None) -> Path:
    """Write pictures and `rows.jsonl` into a folder; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (pictures or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    write_manifest(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


class Result:
    """What a check wrote."""

    def __init__(self, folder: Path, lines: list[str], failed: bool) -> None:
        self.folder, self.lines, self.failed = folder, lines, failed
        self.report = json.loads((folder / "report.json").read_text())
        self.findings = [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]

    def codes(self, wanted: Callable[[dict[str, Any]], bool] = lambda finding: True) -> list[str]:
        """The codes of findings, in the order of the report."""
        return [finding["code"] for finding in self.findings if wanted(finding)]

    def of(self, code: str) -> list[dict[str, Any]]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding["code"] == code]


def check(path: Path, out: Path, **options: Any) -> Result:
    """Check in this process unless `workers` says otherwise."""
    settings = CheckSettings(path, out=out, **{"workers": 1, **options})
    lines, failed = check_and_report(settings)
    return Result(out, lines, failed)
