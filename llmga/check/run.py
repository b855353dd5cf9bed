"""A check from path to report: rows, then the pictures they use, then what only the whole set can show.

Everything found is kept in `state.sqlite` in the check's folder, range by range; see `llmga.check.store`. The report is
made from there in a fixed order, so it is the same however often the check was interrupted.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmga.check.archives import Archive, check_archive, disk_problem, read_archive_list
from llmga.check.lengths import LengthCounter, load_tokenizer
from llmga.check.picture_check import PICTURE_SUFFIXES, PictureFacts, check_picture
from llmga.check.pool import Pool
from llmga.check.progress import CheckProgress
from llmga.check.row_check import Finding, RowResults, check_rows, joined
from llmga.check.row_file import RowFile, RowIndex, index_rows
from llmga.check.sets import RowSet, find_sets
from llmga.check.settings import CheckError, CheckSettings
from llmga.check.store import Store
from llmga.check.whole_set import check_whole_set
from llmga.problem import Problem

ROWS_PER_PIECE = 2000
PICTURES_PER_PIECE = 128
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """What a check found, still in its store; `close` it when its reports are written."""

    settings: CheckSettings
    sets: list[RowSet]
    indexes: list[RowIndex]
    store: Store

    def close(self) -> None:
        """Remove the state: the check is finished, and the next one looks anew."""
        self.store.close()
        shutil.rmtree(_work_folder(self.settings), ignore_errors=True)


def run_check(settings: CheckSettings) -> Checked:
    """Look at every row and every picture, going on where an interrupted check of the same files stopped.

    Raises:
        CheckError: there is nothing to check, or an option is wrong.
    """
    sets = find_sets(settings)
    archives = [] if settings.archives is None else read_archive_list(settings.archives)
    if settings.tokenizer is not None:
        load_tokenizer(settings.tokenizer)  # a wrong path is told now, and by this process
    references = list(_references(settings)) if settings.reference and settings.pictures else []
    work = _work_folder(settings)
    try:
        store = Store(work / "state.sqlite", _about(settings, sets, archives, references), settings.resume)
    except OSError as problem:
        raise CheckError(f"--out {settings.folder} cannot be written: {problem}") from None
    if store.resumed:
        logger.info("going on with the unfinished check in %s", settings.folder)
    indexes = [index_rows(source, work, number) for number, source in enumerate(sets)]
    with CheckProgress() as progress:
        for number, (source, index) in enumerate(zip(sets, indexes, strict=True)):
            _check_set(store, number, source, index, settings, progress)
        _check_archives(store, archives, settings, progress)
        if settings.pictures:
            _check_pictures(store, references, settings, progress)
        progress.start("whole set", 1)
        check_whole_set(store, sets, settings)
    return Checked(settings, sets, indexes, store)


def _work_folder(settings: CheckSettings) -> Path:
    return settings.folder / "unfinished"


def _about(
    settings: CheckSettings, sets: Sequence[RowSet], archives: Sequence[Archive], references: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """What must be the same for an unfinished check to be gone on with."""
    files = [(str(source.path.absolute()), source.format, str(source.image_root.absolute())) for source in sets]
    return {
        "settings": settings.that_matter(),
        "files": files,
        "states": _states(source.path for source in sets),
        "archives": [(archive.sha256, _states([archive.path, *archive.begun_paths])) for archive in archives],
        "references": _digest([references, _states(Path(root, name) for root, name in references)]),
    }


def _states(paths: Iterable[Path]) -> list[tuple[int, int] | None]:
    """Size in bytes and time of change of each file, None for one that is not there."""
    stats = (path.stat() if path.exists() else None for path in paths)
    return [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]


def _digest(value: object) -> str:
    """Stands for a value that may be long: a reference set has tens of thousands of pictures."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _references(settings: CheckSettings) -> Iterator[tuple[str, str]]:
    """(folder, name) of the pictures of the reference set."""
    assert settings.reference is not None
    if settings.reference.is_dir():
        root = os.path.realpath(settings.reference)
        for name in picture_names(root):
            yield root, name
        return
    seen: set[str] = set()
    for source in find_sets(CheckSettings(settings.reference)):
        file = RowFile(source, index_rows(source, _work_folder(settings) / "reference", 0))
        for row in range(file.index.rows):
            record = file.record(row, lambda note: None)
            if not isinstance(record, Problem) and record.image and record.image not in seen:
                seen.add(record.image)
                yield os.path.realpath(source.image_root), record.image


def picture_names(root: str) -> Iterator[str]:
    """Names below a folder that end as pictures do, in order; hidden ones are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class _RowJob:
    """A range of rows for a worker."""

    source: RowSet
    index: RowIndex
    start: int
    stop: int
    settings: CheckSettings


@lru_cache(maxsize=1)
def _opened(source: RowSet, index: RowIndex) -> RowFile:
    return RowFile(source, index)


def _check_row_jobs(jobs: Sequence[_RowJob]) -> list[RowResults]:
    """What a worker does with ranges of rows."""
    found = []
    for job in jobs:
        counter = LengthCounter(job.settings.max_chunks, job.settings.tokenizer, job.settings.max_length)
        found.append(check_rows(_opened(job.source, job.index), job.start, job.stop, counter))
    return found


def _rows_crashed(job: _RowJob) -> RowResults:
    """A row that was not looked at to its end does not count as usable."""
    reason = f"the process that read row {job.start} died; is there enough memory?"
    return RowResults([Finding(row, "unreadable_file", reason) for row in range(job.start, job.stop)])


def _halves(job: _RowJob) -> tuple[_RowJob, ...]:
    """The two halves of a range of rows, so that the row at fault is found; a single row has none."""
    middle = (job.start + job.stop) // 2
    return () if middle == job.start else (replace(job, stop=middle), replace(job, start=middle))


def _check_set(
    store: Store, number: int, source: RowSet, index: RowIndex, settings: CheckSettings, progress: CheckProgress
) -> None:
    phase, root = f"rows {number}", os.path.realpath(source.image_root)
    if not store.is_done("file", number):
        with store.db:
            if index.fault is not None:
                store.add_findings([(number, None, None, index.fault.code, str(index.fault))])
            elif not index.rows:
                store.add_findings([(number, None, None, "no_rows", f"{source.path} has no rows")])
            store.finish("file", number, rows=index.rows)
    starts = range(0, index.rows, ROWS_PER_PIECE)
    progress.start(source.name, index.rows)
    pieces = (
        (start, [_RowJob(source, index, start, min(start + ROWS_PER_PIECE, index.rows), settings)])
        for start in starts
        if not store.is_done(phase, start)
    )
    workers = settings.num_workers if len(starts) > 1 else 1
    for start, (found,) in Pool(_check_row_jobs, workers, _rows_crashed, _halves, joined).map(pieces):
        store.add_rows(number, start, root, found)
        progress.advance(min(ROWS_PER_PIECE, index.rows - start))


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True, slots=True)
class _PictureJob:
    """One picture for a worker."""

    number: int
    root: str
    name: str
    role: str
    settings: CheckSettings


def _check_picture_jobs(jobs: Sequence[_PictureJob]) -> list[tuple[int, PictureFacts]]:
    """What a worker does with pictures."""
    return [(job.number, check_picture(job.root, job.name, job.role, job.settings)) for job in jobs]


def _picture_crashed(job: _PictureJob) -> tuple[int, PictureFacts]:
    return job.number, PictureFacts([Problem("picture_crashes", "the process that decoded it died")])


def _check_pictures(
    store: Store, references: Sequence[tuple[str, str]], settings: CheckSettings, progress: CheckProgress
) -> None:
    total = store.list_pictures(references)
    progress.start("pictures", total)
    pieces = (
        (
            start,
            [_PictureJob(*picture, settings) for picture in store.pictures_between(start, start + PICTURES_PER_PIECE)],
        )
        for start in range(1, total + 1, PICTURES_PER_PIECE)
        if not store.is_done("pictures", start)
    )
    workers = settings.num_workers if total > 1 else 1
    for start, checked in Pool(_check_picture_jobs, workers, _picture_crashed).map(pieces):
        store.add_pictures(start, checked)
        progress.advance(len(checked))


# ---------------------------------------------------------------- archives


def _check_archive_jobs(archives: Sequence[Archive]) -> list[Problem | None]:
    """What a worker does with archives."""
    return [check_archive(archive) for archive in archives]


def _check_archives(
    store: Store, archives: Sequence[Archive], settings: CheckSettings, progress: CheckProgress
) -> None:
    if not archives:
        return
    progress.start("archives", len(archives))
    pieces = ((place, [archive]) for place, archive in enumerate(archives) if not store.is_done("archives", place))
    workers = min(settings.num_workers, len(archives))
    crashed = Problem("archive_differs", "the process that read it died")
    for place, (problem,) in Pool(_check_archive_jobs, workers, lambda _: crashed).map(pieces):
        with store.db:
            if problem is not None:
                store.add_findings([(None, None, None, problem.code, str(problem))])
            store.finish("archives", place)
        progress.advance(1)
    if not store.is_done("disk", 0) and settings.archives is not None:
        with store.db:
            if room := disk_problem(list(archives), settings.archives.parent):
                store.add_findings([(None, None, None, room.code, str(room))])
            store.finish("disk")
