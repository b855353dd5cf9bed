"""Commands about data: check it, draw some."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmga.commands.common import log_to_stderr, one_clear_message

Severity = Literal["error", "warning", "note"]


def check(
    path: Annotated[Path, typer.Argument(help="Manifest, published file, or a folder of them.")],
    format: Annotated[str, typer.Option(help="auto, manifest, llmga_t2i, llmga_sg, ..., llava, sharegpt.")] = "auto",
    image_root: Annotated[Path | None, typer.Option(help="Folder that pictures count from; else the file's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the reports; else runs/check/NAME.")] = None,
    fix: Annotated[Path | None, typer.Option(help="Cleaned manifest to write (a folder for several).")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Code that --fix leaves out as well; repeatable.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Code that is not reported; repeatable.")] = None,
    fail_on: Annotated[Severity, typer.Option(help="Mildest severity that makes the exit code 1.")] = "error",
    reference: Annotated[Path | None, typer.Option(help="Pictures that must not be trained on.")] = None,
    archives: Annotated[Path | None, typer.Option(help="List of SHA-256 sums of the archives beside it.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="An LLM's tokenizer, to count its tokens too.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished check of the same files.")] = True,
    pictures: Annotated[bool, typer.Option(help="Open pictures; without, texts alone are checked.")] = True,
    orphans: Annotated[bool, typer.Option(help="Look for pictures that no row uses.")] = True,
    min_side: Annotated[int, typer.Option(min=1, help="Warn of pictures below so many pixels.")] = 64,
    max_ratio: Annotated[float, typer.Option(min=1, help="Warn of sides that differ by more.")] = 5.0,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Refuse larger pictures.")] = None,
    mask_area: Annotated[tuple[float, float], typer.Option(help="Usual share of a mask.")] = (0.005, 0.95),
    near: Annotated[int, typer.Option(help="Bits by which similar pictures may differ; 0: do not compare.")] = 10,
    max_chunks: Annotated[int, typer.Option(min=1, help="Windows of 75 CLIP tokens of a prompt.")] = 4,
    max_length: Annotated[int, typer.Option(min=1, help="LLM tokens of a row, for --tokenizer.")] = 2048,
) -> None:
    """Check data row by row and picture by picture. Exit code 0: clean, 1: problems found, 2: cannot check."""
    with one_clear_message():
        from llmga.check.command import check_and_report
        from llmga.check.settings import CheckSettings
        from llmga.images import MAX_PIXELS

        log_to_stderr()
        settings = CheckSettings(
            path, format, image_root, out, workers, reference, archives, tokenizer, pictures, orphans,
            tuple(ignore or ()), tuple(drop or ()), fail_on, fix, resume, min_side, max_ratio,
            max_pixels or MAX_PIXELS, mask_area, near, max_chunks, max_length,
        )  # fmt: skip
        lines, failed = check_and_report(settings)
        for line in lines:
            typer.echo(line)
        if failed:
            raise typer.Exit(1)


def world(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("data/toy"),
    rows: Annotated[int, typer.Option(help="Training records; validation and test come on top.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed, other scenes and words.")] = 0,
    preset: Annotated[str, typer.Option(help="learnable (2x2 grid) or dense (3x3).")] = "learnable",
    kind: Annotated[
        str, typer.Option(help="base: what a base model has seen; stage1: what stage 1 trains.")
    ] = "stage1",
    split: Annotated[list[str] | None, typer.Option(metavar="NAME=RECORDS", help="Instead of --rows.")] = None,
    sheet: Annotated[bool, typer.Option(help="Write index.html, a page to look at.")] = True,
) -> None:
    """Build toy data: pictures, and rows for every task."""
    with one_clear_message():
        import time

        from llmga.toyworld.build import build_world, splits_from

        started = time.perf_counter()
        splits = splits_from(split) if split else None
        report = build_world(out, rows, seed, preset, kind, splits=splits, sheet=sheet)
        typer.echo(report.in_words(time.perf_counter() - started))
