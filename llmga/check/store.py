"""What a check has found so far: one SQLite file in its folder, so that memory stays the same whatever the set's size,
and a check that was killed goes on from the last range that was finished.

One process writes. Everything found in a range, and the mark that the range is done, are one transaction: they are on
the disk together or not at all.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmga.check.kinds import KINDS
from llmga.check.picture_check import PictureFacts
from llmga.check.row_check import RowResults

VERSION = 1  # raise it when checks find or store other things, so that older unfinished ones start anew
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE done (phase TEXT, start INTEGER, facts TEXT, PRIMARY KEY (phase, start));
CREATE TABLE findings (set_number INTEGER, row INTEGER, picture INTEGER, code TEXT, detail TEXT);
CREATE TABLE uses (set_number INTEGER, row INTEGER, role TEXT, root TEXT, name TEXT, split TEXT, task TEXT);
CREATE TABLE keys (set_number INTEGER, row INTEGER, kind TEXT, key INTEGER);
CREATE TABLE pictures (
    number INTEGER PRIMARY KEY, root TEXT, name TEXT, role TEXT, bytes INTEGER, sha256 TEXT, format TEXT, mode TEXT,
    width INTEGER, height INTEGER, signature BLOB, coverage REAL
);
"""


class Store:
    """The state of one check.

    Args:
        path: the SQLite file.
        about: settings and states of files; a stored check with others is begun anew.
        resume: False begins anew in any case.

    Attributes:
        resumed: whether an unfinished check is gone on with.
    """

    def __init__(self, path: Path, about: dict[str, Any], resume: bool = True) -> None:
        self.path = path
        wanted = {"version": str(VERSION), "about": json.dumps(about, sort_keys=True)}
        self.resumed = resume and path.is_file() and _stored_about(path) == wanted
        if not self.resumed:
            for leftover in (path, path.with_name(path.name + "-journal")):
                leftover.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path)
        self.db.execute("PRAGMA synchronous = NORMAL")
        if not self.resumed:
            with self.db:
                self.db.executescript(_TABLES)
                self.db.executemany("INSERT INTO about VALUES (?, ?)", wanted.items())

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    # ------------------------------------------------------------ ranges

    def is_done(self, phase: str, start: int) -> bool:
        """Whether a range was finished, now or before an interruption."""
        return (
            self.db.execute("SELECT 1 FROM done WHERE phase = ? AND start = ?", (phase, start)).fetchone() is not None
        )

    def facts(self, phase: str) -> list[dict[str, Any]]:
        """What was stored with the ranges of a phase, in their order."""
        rows = self.db.execute("SELECT facts FROM done WHERE phase = ? ORDER BY start", (phase,))
        return [json.loads(text) for (text,) in rows]

    def finish(self, phase: str, start: int = 0, **facts: Any) -> None:
        """Mark a range as done within the caller's transaction."""
        self.db.execute("INSERT INTO done VALUES (?, ?, ?)", (phase, start, json.dumps(facts)))

    def add_rows(self, number: int, start: int, root: str, found: RowResults) -> None:
        """Everything that was found in a range of rows."""
        with self.db:
            self.add_findings((number, row, None, code, detail) for row, code, detail in found.findings)
            self.db.executemany(
                "INSERT INTO uses VALUES (?, ?, ?, ?, ?, ?, ?)",
                ((number, use.row, use.role, root, use.name, use.split, use.task) for use in found.uses),
            )
            self.db.executemany(
                "INSERT INTO keys VALUES (?, ?, ?, ?)", ((number, key.row, key.kind, key.key) for key in found.keys)
            )
            self.finish(f"rows {number}", start, counts=dict(found.counts), lengths=found.lengths)

    def add_pictures(self, start: int, checked: Iterable[tuple[int, PictureFacts]]) -> None:
        """Everything that was found in a range of pictures."""
        with self.db:
            for number, facts in checked:
                self.db.execute(
                    "UPDATE pictures SET bytes = ?, sha256 = ?, format = ?, mode = ?, width = ?, height = ?, "
                    "signature = ?, coverage = ? WHERE number = ?",
                    (
                        facts.num_bytes, facts.sha256, facts.format, facts.mode, *facts.size, facts.signature,
                        facts.coverage, number,
                    ),
                )  # fmt: skip
                self.add_findings((None, None, number, problem.code, str(problem)) for problem in facts.problems)
            self.finish("pictures", start)

    def add_findings(self, findings: Iterable[tuple[int | None, int | None, int | None, str, str]]) -> None:
        """Findings as (set, row, picture, code, detail), within the caller's transaction.

        A finding of a row has set and row, of a whole file the set alone, of a picture its number, else nothing.
        """
        self.db.executemany("INSERT INTO findings VALUES (?, ?, ?, ?, ?)", map(_known, findings))

    # ------------------------------------------------------------ pictures

    def list_pictures(self, references: Iterable[tuple[str, str]]) -> int:
        """Number every picture that rows use, each once per role, and the reference set's; returns how many."""
        if not self.is_done("list", 0):
            with self.db:
                self.db.execute(
                    "INSERT INTO pictures (root, name, role) "
                    "SELECT root, name, role FROM uses GROUP BY root, name, role ORDER BY root, name, role"
                )
                self.db.executemany("INSERT INTO pictures (root, name, role) VALUES (?, ?, 'reference')", references)
                self.db.execute("CREATE INDEX by_name ON pictures (root, name, role)")
                self.db.execute("CREATE INDEX by_use ON uses (root, name, role)")
                self.finish("list")
        return int(self.value("SELECT coalesce(max(number), 0) FROM pictures"))

    def pictures_between(self, start: int, stop: int) -> list[tuple[int, str, str, str]]:
        """(number, root, name, role) of the pictures numbered [start, stop)."""
        query = "SELECT number, root, name, role FROM pictures WHERE number >= ? AND number < ? ORDER BY number"
        return self.db.execute(query, (start, stop)).fetchall()

    # ------------------------------------------------------------ questions

    def value(self, query: str, arguments: Sequence[Any] = ()) -> Any:
        """The first value of a query's first row."""
        return self.db.execute(query, arguments).fetchone()[0]

    def rows(self, query: str, arguments: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, one by one."""
        yield from self.db.execute(query, arguments)


def _known(finding: tuple[Any, ...]) -> tuple[Any, ...]:
    """A finding whose code has its row in the table; one that has not is a mistake of ours."""
    assert finding[3] in KINDS, finding
    # Half a surrogate pair, from a file name that is not UTF-8, cannot be stored as text.
    return (*finding[:4], finding[4].encode("utf-8", "backslashreplace").decode())


def _stored_about(path: Path) -> dict[str, str] | None:
    """What a stored check is about; None when the file is no database of ours."""
    try:
        with sqlite3.connect(path) as db:
            return dict(db.execute("SELECT name, value FROM about"))
    except sqlite3.DatabaseError:
        return None
