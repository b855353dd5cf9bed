"""All parts together: the manifest with prompts, the list of rows without, and what the prompts are like."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmga.files import atomic_write
from llmga.prompt_chunks import PromptStatistics, prompt_statistics
from llmga.quarantine import write_quarantine
from llmga.records import Record, write_manifest
from llmga.stage1.record.config import RecordConfig
from llmga.stage1.record.parts import PartsError, parts_folder, read_lines
from llmga.stage1.record.questions import is_asked
from llmga.stage1.sources import Source


@dataclass(frozen=True)
class Merged:
    """What recording made.

    Attributes:
        out: the manifest of rows with prompts.
        rejected: reason -> number of rows without one; they are in `quarantine`.
        quarantine: the list, None when every row has a prompt.
        statistics: of the prompts.
    """

    out: Path
    num_prompts: int
    rejected: dict[str, int]
    quarantine: Path | None
    statistics: PromptStatistics

    def __str__(self) -> str:
        """Three lines for the end of a run."""
        lines = [f"{self.num_prompts:,} prompts in {self.out}", str(self.statistics)]
        if self.quarantine is not None:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.rejected.items()))
            lines.append(f"{sum(self.rejected.values()):,} rows without a prompt in {self.quarantine}: {reasons}")
        return "\n".join(lines)


def merge_parts(cfg: RecordConfig, source: Source) -> Merged:
    """Write the manifest with the `prompt` of every row that has one, aside and then renamed.

    Any number of processes may do so at once; all write the same.

    Raises:
        PartsError: rows are missing, or none has a prompt.
    """
    folder = parts_folder(cfg.out)
    lines = {line["row"]: line for line in read_lines(folder)}
    asked = [row for row in range(len(source)) if is_asked(source[row], cfg)]
    if missing := [row for row in asked if source.manifest_row(row) not in lines]:
        raise PartsError(
            f"{len(missing):,} of {len(asked):,} rows are not recorded yet, the first is {source.place(missing[0])}; "
            "run the same command again without --merge"
        )
    kept = [row for row in asked if "prompt" in lines[source.manifest_row(row)]]
    rejected = [line for line in lines.values() if "rejected" in line]
    reasons = Counter(str(line["rejected"]) for line in rejected)
    if not kept:
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no row asks for a picture"
        raise PartsError(f"not one row of {source.path} has a prompt ({found}); replies are kept in {folder}")
    prompts = [lines[source.manifest_row(row)]["prompt"] for row in kept]
    statistics = prompt_statistics(prompts, cfg.max_chunks)
    write_manifest(cfg.out, _with_prompts(source, kept, lines))
    quarantine = None
    if rejected:
        quarantine = cfg.out.with_name(f"{cfg.out.stem}.quarantine.jsonl")
        codes = sorted((line["row"], [str(line["rejected"])]) for line in rejected)
        write_quarantine(quarantine, source.path, codes)
    merged = Merged(cfg.out, len(kept), dict(reasons), quarantine, statistics)
    atomic_write(cfg.out.with_name(f"{cfg.out.stem}.report.json"), json.dumps(_report(merged, folder), indent=1) + "\n")
    return merged


def _with_prompts(source: Source, rows: list[int], lines: dict[int, dict[str, Any]]) -> Iterator[Record]:
    for row in rows:
        record, line = source[row], lines[source.manifest_row(row)]
        if record.id != line["id"]:
            raise PartsError(f"{source.place(row)} is {record.id!r}, and was {line['id']!r} when it was recorded")
        yield replace(record, prompt=line["prompt"], meta={**record.meta, "recorded": line["recorded"]})


def _report(merged: Merged, folder: Path) -> dict[str, Any]:
    statistics = merged.statistics
    return {
        "prompts": merged.num_prompts,
        "rejected": merged.rejected,
        "tokens": {
            "mean": round(statistics.mean_tokens, 2),
            "median": statistics.median_tokens,
            "max": statistics.max_tokens,
        },
        "chunks": {str(chunks): count for chunks, count in statistics.chunks.items()},
        "prompts_that_lose_words": len(statistics.lost_words),
        "settings": json.loads((folder / "settings.json").read_text(encoding="utf-8")),
    }
