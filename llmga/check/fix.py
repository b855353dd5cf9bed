"""A cleaned manifest beside the original, and a quarantine list for the original: nothing that was checked is touched.

Rows are left out that have an error, in themselves or in a picture or mask that they use, and those with a code that
`--drop` names.
"""

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from llmga.check.report import ROW_FINDINGS, codes_left_out
from llmga.check.row_file import RowFile
from llmga.check.run import Checked
from llmga.check.settings import CheckError
from llmga.problem import Problem
from llmga.quarantine import write_quarantine
from llmga.records import Record, write_manifest


def write_quarantines(checked: Checked) -> list[Path]:
    """Write the quarantine list of every file that has rows to leave out, into the check's folder."""
    written = []
    for number, source in enumerate(checked.sets):
        name = "quarantine" if len(checked.sets) == 1 else source.name.replace("/", "-").rsplit(".", 1)[0]
        path = checked.settings.folder / ("quarantine.jsonl" if len(checked.sets) == 1 else f"quarantine/{name}.jsonl")
        if write_quarantine(path, source.path, _bad_rows(checked, number)):
            written.append(path)
        else:
            path.unlink()
    return written


def write_cleaned(checked: Checked, out: Path) -> list[tuple[Path, int]]:
    """Write the rows that can be trained on as manifests.

    Args:
        out: the manifest, .jsonl or .parquet; for a folder of several files, the folder for one .jsonl of each.
    Returns:
        Each path written, with its number of rows.
    Raises:
        CheckError: `out` is one of the files that were checked.
    """
    single = len(checked.sets) == 1
    targets = [out if single else out / f"{source.name.rsplit('.', 1)[0]}.jsonl" for source in checked.sets]
    for target in targets:
        if any(target.exists() and os.path.samefile(target, source.path) for source in checked.sets):
            raise CheckError(
                f"--fix {target} is a file that is checked; originals are never changed, give another name"
            )
    return [(target, write_manifest(target, _good_records(checked, number))) for number, target in enumerate(targets)]


def check_target(checked_path: Path, out: Path) -> None:
    """Refuse a bad `--fix` before hours are spent.

    Raises:
        CheckError: it has the suffix of no manifest, or is the file to be checked.
    """
    if checked_path.is_file() and out.suffix not in (".jsonl", ".parquet"):
        raise CheckError(f"--fix {out}: a manifest ends in .jsonl or .parquet")
    if out.exists() and checked_path.exists() and os.path.samefile(out, checked_path):
        raise CheckError(f"--fix {out} is what is checked; originals are never changed, give another name")


def _bad_rows(checked: Checked, number: int) -> Iterator[tuple[int, list[str]]]:
    """(row, its codes) of the rows of a set that are left out, ascending."""
    left_out = codes_left_out(checked)
    found = checked.store.rows(
        f"SELECT row, code FROM ({ROW_FINDINGS}) WHERE set_number = ? ORDER BY row, code", (number,)
    )
    for row, pairs in groupby(found, key=lambda pair: pair[0]):
        if codes := [code for _, code in pairs if code in left_out]:
            yield row, codes


def _good_records(checked: Checked, number: int) -> Iterator[Record]:
    """The records of the rows of a set that stay, in order."""
    file = RowFile(checked.sets[number], checked.indexes[number])
    bad = _bad_rows(checked, number)
    next_bad = next(bad, (None, []))[0]
    for row in range(file.index.rows):
        if row == next_bad:
            next_bad = next(bad, (None, []))[0]
            continue
        record = file.record(row, lambda note: None)
        if not isinstance(record, Problem):  # its code is ignored; it still makes no record
            yield record
    file.close()
