"""Turn a published file into a manifest; or our own rows, as JSON Lines, Parquet or one JSON array, into another form.

    python data_tools/convert.py jsons/llmga-data/SG/train.json --format llmga_sg --out data/sg.jsonl

Writes the manifest and OUT.report.json with all counts; names every row that was skipped, and why. Formats:
llmga_t2i, llmga_sg, llmga_inpainting, llmga_edit, llava, sharegpt, manifest. Exit code 2 when nothing was written,
or with --strict when a row was skipped.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmga.config import EXIT_BAD_INPUT, EXIT_OK
from llmga.json_stream import stream_rows
from llmga.published import FORMATS, Report, convert_published
from llmga.records import Record, RecordError, open_manifest, record_from_row, write_manifest


def convert(path: Path, format: str, out: Path) -> Report:
    """Write the manifest and its report.

    Raises:
        ValueError: the file cannot be read as `format`; nothing is written.
    """
    if path.resolve() == out.resolve():
        raise ValueError(f"{out} is the file to read; give --out another name")
    if format == "manifest":
        rows = write_manifest(out, own_rows(path) if path.suffix == ".json" else open_manifest(path))
        report = Report(path, format, rows=rows, records=rows)
    else:
        report = convert_published(path, format, out)
    report.save(out.with_name(f"{out.name}.report.json"))
    return report


def own_rows(path: Path) -> Iterator[Record]:
    """The records of one JSON array of manifest rows.

    Raises:
        ValueError: the file is not JSON, or a row is not a record.
    """
    for row in stream_rows(path):
        try:
            yield record_from_row(row.value)
        except RecordError as problem:
            raise RecordError(f"{path}[{row.row}] (byte {row.offset}): {problem}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file to read")
    parser.add_argument("--format", required=True, choices=[*FORMATS, "manifest"])
    parser.add_argument("--out", type=Path, required=True, help="the manifest to write: .jsonl or .parquet")
    parser.add_argument("--strict", action="store_true", help="exit with code 2 when a row was skipped")
    args = parser.parse_args(argv)
    try:
        report = convert(args.path, args.format, args.out)
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return EXIT_BAD_INPUT
    for line in report.name_bad():
        print(f"skipped {line}")
    for note, count in report.notes.most_common():
        print(f"{count} x {note}")
    print(f"{report.summary()}; wrote {args.out}")
    return EXIT_BAD_INPUT if args.strict and report.bad else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
