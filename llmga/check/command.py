"""`llmga check` from settings to files: check, report, page, quarantine and, if asked, the cleaned manifest."""

from llmga.check.fix import check_target, write_cleaned, write_quarantines
from llmga.check.page import write_page
from llmga.check.report import summary_lines, write_report
from llmga.check.run import run_check
from llmga.check.settings import CheckSettings


def check_and_report(settings: CheckSettings) -> tuple[list[str], bool]:
    """Check, write everything into `settings.folder`, and say what was found.

    Returns:
        The lines to show, and whether there are findings as grave as `settings.fail_on`.
    Raises:
        CheckError: it cannot be checked.
    """
    if settings.fix is not None:
        check_target(settings.path, settings.fix)
    checked = run_check(settings)
    folder = settings.folder
    lines = []
    for path in write_quarantines(checked):
        lines.append(f"rows to leave out: {path} (data.sources[].quarantine)")
    if settings.fix is not None:
        roots = [str(source.image_root) for source in checked.sets]
        for (path, rows), root in zip(write_cleaned(checked, settings.fix), roots, strict=True):
            lines.append(f"cleaned manifest: {path}, {rows:,} rows (image_root {root})")
    report = write_report(checked)
    write_page(report, folder / "index.html")
    checked.close()
    return [*summary_lines(report, folder), *lines], bool(report["failed"])
