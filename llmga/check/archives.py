"""Archives as they were published: a list of SHA-256 sums, checked against the files beside it."""

import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llmga.check.settings import CheckError
from llmga.checkpoint import sha256
from llmga.files import no_such_file
from llmga.problem import Problem

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_PARTIAL = (".part", ".partial", ".incomplete", ".crdownload", ".aria2", ".tmp")


@dataclass(frozen=True, slots=True)
class Archive:
    """One line of the list."""

    path: Path
    sha256: str

    @property
    def begun_paths(self) -> list[Path]:
        """Where the usual tools keep a download of it that is not finished."""
        return [self.path.with_name(self.path.name + suffix) for suffix in _PARTIAL]


def read_archive_list(path: Path) -> list[Archive]:
    """The archives of a list as `sha256sum` writes it; names count from the list's folder.

    Raises:
        CheckError: the list is missing, or a line of it is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise CheckError(f"--archives {no_such_file(path) if not path.is_file() else path}: no readable list") from None
    archives = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if not (match := _LINE.fullmatch(line.strip())):
            raise CheckError(
                f"{path}:{number}: found {line[:60]!r}, expected a SHA-256 sum, two spaces and a file name"
            )
        archives.append(Archive(path.parent / match[2], match[1].lower()))
    return archives


def check_archive(archive: Archive) -> Problem | None:
    """Whether an archive is there, whole and the published one."""
    path = archive.path
    if not path.is_file():
        begun = next((other for other in archive.begun_paths if other.is_file()), None)
        begun_text = f"; {begun.name} is a download of {begun.stat().st_size:,} bytes to go on with" if begun else ""
        return Problem("archive_missing", f"{path} does not exist{begun_text}")
    if (found := sha256(path)) != archive.sha256:
        size = path.stat().st_size
        return Problem("archive_differs", f"{path} ({size:,} bytes) has SHA-256 {found}, expected {archive.sha256}")
    return None


def disk_problem(archives: list[Archive], folder: Path) -> Problem | None:
    """Whether there is room to unpack all archives that are there."""
    needed = sum(unpacked_bytes(archive.path) for archive in archives if archive.path.is_file())
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    reason = f"{free / 1e9:.1f} GB free in {folder}, the archives take {needed / 1e9:.1f} GB unpacked"
    return Problem("little_disk", reason)


def unpacked_bytes(path: Path) -> int:
    """What the files in an archive take, as a zip says of its members; any other counts with its own size.

    For a tar that is right. One that is compressed would have to be read to its end, and takes more than is counted.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return path.stat().st_size
