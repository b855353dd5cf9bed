"""The report of a check as plain values, written as `report.json`, and every finding as a line of `findings.jsonl`.

docs/data.md describes the fields. `version` is raised when one changes its meaning or goes.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmga.check.kinds import KINDS, SEVERITIES, Severity
from llmga.check.lengths import summarise_clip, summarise_llm
from llmga.check.row_check import merge_lengths
from llmga.check.row_file import RowFile
from llmga.check.run import Checked
from llmga.files import written_aside

REPORT_VERSION = 1
EXAMPLES_PER_KIND = 20
WORST_PICTURES = 50
SCORES = {"error": 100, "warning": 10, "note": 1}
_WORST_SCORE = 10  # a picture with notes alone is not among the worst
_ROWS_NAMED = 3  # of those that use a picture
_SIDE_BIN_PX = 64

# A finding about a picture is one about each row that uses it.
ROW_FINDINGS = """
SELECT set_number, row, code FROM findings WHERE row IS NOT NULL
UNION SELECT u.set_number, u.row, f.code FROM findings f JOIN pictures p ON f.picture = p.number
JOIN uses u ON (u.root, u.name, u.role) = (p.root, p.name, p.role)
"""


def write_report(checked: Checked) -> dict[str, Any]:
    """Write `report.json` and `findings.jsonl` into the check's folder and return the report."""
    folder = checked.settings.folder
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    with written_aside(folder / "findings.jsonl") as aside, open(aside, "w", encoding="utf-8") as file:
        for finding in findings(checked):
            file.write(json.dumps(finding, ensure_ascii=False) + "\n")
            counts[finding["code"]] += 1
            if len(shown := examples.setdefault(finding["code"], [])) < EXAMPLES_PER_KIND:
                shown.append(finding)
    report = _report(checked, counts, examples)
    with written_aside(folder / "report.json") as aside:
        aside.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def findings(checked: Checked) -> Iterator[dict[str, Any]]:
    """Every finding that is not ignored: of files, of rows in their order, of pictures by name, then the rest."""
    store = checked.store
    ignored = set(checked.settings.ignore)

    def entry(code: str, detail: str, **place: Any) -> dict[str, Any]:
        return {"code": code, "severity": KINDS[code].severity, **place, "detail": detail}

    for number, (source, index) in enumerate(zip(checked.sets, checked.indexes, strict=True)):
        whole = "SELECT code, detail FROM findings WHERE set_number = ? AND row IS NULL ORDER BY code, detail"
        for code, detail in store.rows(whole, (number,)):
            if code not in ignored:
                yield entry(code, detail, set=source.name, place=str(source.path))
        query = "FROM findings WHERE set_number = ? AND row IS NOT NULL ORDER BY row, code, detail"
        if not store.value(f"SELECT count(*) {query}", (number,)):
            continue
        file = RowFile(source, index)
        places = file.places(row for (row,) in store.rows(f"SELECT row {query}", (number,)))
        rows = store.rows(f"SELECT row, code, detail {query}", (number,))
        for (row, code, detail), place in zip(rows, places, strict=True):
            if code not in ignored:
                yield entry(code, detail, set=source.name, row=row, place=place)
        file.close()
    pictures = store.rows(
        "SELECT p.number, p.root, p.name, p.role, f.code, f.detail FROM findings f JOIN pictures p "
        "ON f.picture = p.number ORDER BY p.number, f.code, f.detail"
    )
    for _, root, name, role, code, detail in pictures:
        if code not in ignored:
            uses = _uses(checked, root, name, role)
            yield entry(code, detail, picture=f"{root}/{name}", role=role, **uses)
    rest = "SELECT code, detail FROM findings WHERE set_number IS NULL AND picture IS NULL ORDER BY code, detail"
    yield from (entry(code, detail) for code, detail in store.rows(rest) if code not in ignored)


def _uses(checked: Checked, root: str, name: str, role: str) -> dict[str, Any]:
    """How many rows use a picture, and the first of them."""
    where = "FROM uses WHERE root = ? AND name = ? AND role = ?"
    num_rows = checked.store.value(f"SELECT count(*) {where}", (root, name, role))
    first = checked.store.rows(
        f"SELECT set_number, row {where} ORDER BY set_number, row LIMIT {_ROWS_NAMED}", (root, name, role)
    )
    return {"num_rows": num_rows, "rows": [f"{checked.sets[number].name}[{row}]" for number, row in first]}


def _report(checked: Checked, counts: Counter[str], examples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    store, settings = checked.store, checked.settings
    by_severity: dict[str, int] = dict.fromkeys(SEVERITIES, 0)
    for code, count in counts.items():
        by_severity[KINDS[code].severity] += count
    facts = [part for number in range(len(checked.sets)) for part in store.facts(f"rows {number}")]
    lengths = merge_lengths([part["lengths"] for part in facts])
    sets = [_set_facts(checked, number) for number in range(len(checked.sets))]
    return {
        "report": "llmga check",
        "version": REPORT_VERSION,
        "path": str(settings.path),
        "settings": {**settings.that_matter(), "ignore": list(settings.ignore), "fail_on": settings.fail_on},
        "failed": any(by_severity[severity] for severity in severities_that_fail(settings.fail_on)),
        "counts": {
            "rows": sum(facts["rows"] for facts in sets),
            "usable_rows": sum(facts["usable_rows"] for facts in sets),
            "pictures": store.value("SELECT count(*) FROM pictures WHERE role = 'image'"),
            "masks": store.value("SELECT count(*) FROM pictures WHERE role = 'mask'"),
            "reference_pictures": store.value("SELECT count(*) FROM pictures WHERE role = 'reference'"),
            "picture_bytes": store.value("SELECT coalesce(sum(bytes), 0) FROM pictures"),
        },
        "severities": by_severity,
        "kinds": [
            {**asdict(kind), "count": counts[kind.code], "examples": examples[kind.code]}
            for kind in sorted(KINDS.values(), key=lambda kind: SEVERITIES.index(kind.severity))
            if counts[kind.code]
        ],
        "sets": sets,
        "folders": store.facts("whole")[0]["folders"],
        "pictures": _picture_facts(checked),
        "lengths": {
            "clip": summarise_clip(lengths, settings.max_chunks),
            "llm": summarise_llm(lengths, settings.max_length),
        },
        "worst": worst_pictures(checked),
    }


def severities_that_fail(fail_on: Severity) -> tuple[str, ...]:
    """The severities of which a finding makes the exit code 1."""
    return SEVERITIES[: SEVERITIES.index(fail_on) + 1]


def _set_facts(checked: Checked, number: int) -> dict[str, Any]:
    """Rows, tasks, scripts and reader's notes of one file."""
    source, index = checked.sets[number], checked.indexes[number]
    counts: Counter[str] = Counter()
    for part in checked.store.facts(f"rows {number}"):
        counts.update(part["counts"])

    def named(prefix: str) -> dict[str, int]:
        return {key.removeprefix(prefix): counts[key] for key in sorted(counts) if key.startswith(prefix)}

    bad = checked.store.value(
        f"SELECT count(DISTINCT row) FROM ({ROW_FINDINGS}) WHERE set_number = ? AND code IN ({_listed(checked)})",
        (number,),
    )
    return {
        "name": source.name,
        "path": str(source.path),
        "format": source.format,
        "image_root": str(source.image_root),
        "rows": index.rows,
        "records": counts["records"],
        "usable_rows": index.rows - bad,
        "tasks": named("task "),
        "scripts": named("script "),
        "reader_notes": named("note "),
    }


def _listed(checked: Checked) -> str:
    return ", ".join(f"'{code}'" for code in sorted(codes_left_out(checked)))


def codes_left_out(checked: Checked) -> set[str]:
    """Codes whose rows cannot or shall not be trained on: errors that are not ignored, and what `drop` names."""
    errors = {code for code, kind in KINDS.items() if kind.severity == "error"}
    return (errors - set(checked.settings.ignore)) | set(checked.settings.drop)


def _picture_facts(checked: Checked) -> dict[str, Any]:
    """Formats, modes, and a histogram of short sides in pixels."""

    def counted(column: str) -> dict[str, int]:
        query = (
            f"SELECT {column}, count(*) FROM pictures WHERE width > 0 AND role = 'image' GROUP BY 1 ORDER BY 2 DESC, 1"
        )
        return dict(checked.store.rows(query))

    sides = counted(f"min(width, height) / {_SIDE_BIN_PX} * {_SIDE_BIN_PX}")
    return {
        "formats": counted("format"),
        "modes": counted("mode"),
        "short_sides": [[side, sides[side]] for side in sorted(sides)],
        "short_sides_bin": _SIDE_BIN_PX,
    }


def worst_pictures(checked: Checked) -> list[dict[str, Any]]:
    """The pictures with the gravest findings that exist on the disk, the worst first, each with its reasons."""
    scores = " ".join(
        f"WHEN '{code}' THEN {0 if code in checked.settings.ignore else SCORES[kind.severity]}"
        for code, kind in KINDS.items()
    )
    query = (
        f"SELECT p.number, p.root, p.name, p.role, p.width, p.height, sum(CASE f.code {scores} END) AS score "
        "FROM findings f JOIN pictures p ON f.picture = p.number WHERE f.code != 'picture_missing' "
        f"GROUP BY p.number HAVING score >= {_WORST_SCORE} ORDER BY score DESC, p.number LIMIT {WORST_PICTURES}"
    )
    worst = []
    for number, root, name, role, width, height, score in list(checked.store.rows(query)):
        reasons = checked.store.rows("SELECT code, detail FROM findings WHERE picture = ? ORDER BY 1, 2", (number,))
        worst.append(
            {
                "picture": f"{root}/{name}",
                "role": role,
                "width": width,
                "height": height,
                "score": score,
                "reasons": [
                    {"code": code, "severity": KINDS[code].severity, "detail": detail}
                    for code, detail in reasons
                    if code not in checked.settings.ignore
                ],
                **_uses(checked, root, name, role),
            }
        )
    return worst


def summary_lines(report: dict[str, Any], folder: Path) -> Iterator[str]:
    """The report in a few lines for a terminal."""
    counts = report["counts"]
    yield (
        f"{report['path']}: {counts['rows']:,} rows, {counts['usable_rows']:,} usable; "
        f"{counts['pictures']:,} pictures" + (f", {counts['masks']:,} masks" if counts["masks"] else "")
    )
    for kind in report["kinds"]:
        yield f"  {kind['severity']:8}{kind['count']:>9,}  {kind['code']:28}{kind['meaning']}"
    if clip := report["lengths"]["clip"]:
        yield (
            f"  prompts: median {clip['median']} CLIP tokens, {clip['share_past_77']:.1%} past one window of 77, "
            f"{clip['share_past_max_chunks']:.1%} past {clip['max_chunks']}"
        )
    words = ", ".join(
        f"{count:,} {severity}{'' if count == 1 else 's'}" for severity, count in report["severities"].items()
    )
    yield f"{words}; open {folder / 'index.html'}"
