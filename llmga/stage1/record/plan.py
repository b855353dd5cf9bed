"""What a recording will do, without asking anybody: rows, what is recorded already, and what will be written."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmga.recipe import plan_page
from llmga.records import RecordError
from llmga.stage1.record.config import RecordConfig
from llmga.stage1.record.parts import done_rows, parts_folder
from llmga.stage1.record.questions import is_asked
from llmga.stage1.sources import Source


@dataclass(frozen=True)
class RecordPlan:
    """Everything that is told.

    Attributes:
        rows: of the manifest that are looked at; None where it is not on this machine.
        asked: for each task, how many rows get a prompt.
        done: those of them that are recorded already, with a prompt or without.
        missing: what is not on this machine.
    """

    cfg: RecordConfig
    rows: int | None
    asked: Mapping[str, int]
    done: int
    missing: Sequence[str]


def make_plan(cfg: RecordConfig) -> RecordPlan:
    """Count what is to be recorded; what is not on this machine is named in `missing`.

    Raises:
        PartsError: a damaged line in what is recorded already.
    """
    missing: list[str] = []
    if cfg.model is not None and not (cfg.model / "config.json").is_file():
        missing.append(f"{cfg.model}, the model")
    try:
        source = Source(cfg.source)
    except (RecordError, OSError) as error:
        missing.append(f"{cfg.source.path} ({error})")
        return RecordPlan(cfg, None, {}, 0, missing)
    asked: Counter[str] = Counter()
    recorded, done = done_rows(parts_folder(cfg.out)), 0
    for row in range(len(source)):
        record = source[row]
        if is_asked(record, cfg):
            asked[cfg.task or record.task] += 1
            done += source.manifest_row(row) in recorded
    return RecordPlan(cfg, len(source), asked, done, missing)


def plan_text(plan: RecordPlan) -> str:
    """A plan as text for a terminal."""
    cfg = plan.cfg
    total = sum(plan.asked.values())
    by = cfg.model if cfg.endpoint is None else f"{cfg.endpoint.model} at {cfg.endpoint.url}"
    rows = [f"{cfg.source.path} is not here, so its rows are unknown"]
    if plan.rows is not None:
        rows = [
            f"{plan.rows:>9,} rows of {cfg.source.path}",
            *(f"{count:>9,} ask for {task}" for task, count in sorted(plan.asked.items())),
            f"{plan.done:>9,} are recorded in {parts_folder(cfg.out)}",
            f"{total - plan.done:>9,} are left: {-(-(total - plan.done) // cfg.batch_size):,} batches of up to "
            f"{cfg.batch_size}, shared by any number of processes",
        ]
    sections = {
        "rows": rows,
        "answers": [
            f"by {by}: up to {cfg.sampling.max_new_tokens} tokens at temperature {cfg.sampling.temperature:g}, "
            f"{cfg.sampling.attempts} attempts"
        ],
        "written": [
            f"{cfg.out}: the rows with their prompts",
            f"{cfg.out.with_name(cfg.out.stem + '.report.json')}: counts, lengths and settings",
            f"{cfg.out.with_name(cfg.out.stem + '.quarantine.jsonl')}: rows without a prompt, if any",
        ],
        "not on this machine": [f"- {note}" for note in plan.missing],
    }
    return plan_page(cfg, sections, "nothing was asked and nothing written")
