"""`release.json`: every file of a release with its size and SHA-256, so that what arrives can be checked."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from llmga.checkpoint import sha256
from llmga.release.kinds import Kind, ReleaseError, read_json

LISTING = "release.json"
_VERSION = 1


class ReleasedFile(NamedTuple):
    """One file of a release: its path in the folder, its size and its hash."""

    path: str
    bytes: int
    sha256: str


def release_files(folder: Path) -> list[ReleasedFile]:
    """Every file below a folder, in order; what starts with a dot belongs to tools."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [(path.relative_to(folder).as_posix(), path) for path in paths]
    return [
        ReleasedFile(name, path.stat().st_size, sha256(path))
        for name, path in named
        if not any(part.startswith(".") for part in name.split("/"))
    ]


def write_listing(folder: Path, kind: Kind) -> None:
    """List the files of a finished release."""
    files = {file.path: {"bytes": file.bytes, "sha256": file.sha256} for file in release_files(folder)}
    content = {"schema_version": _VERSION, "kind": kind, "files": files}
    (folder / LISTING).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def listed(path: Path) -> dict[str, ReleasedFile]:
    """What a `release.json` lists.

    Raises:
        ReleaseError: it is damaged, or of a version that this code does not read.
    """
    content = read_json(path)
    if content.get("schema_version") != _VERSION:
        raise ReleaseError(f"{path}: schema_version is {content.get('schema_version')!r}, this code reads {_VERSION}")
    try:
        return {name: ReleasedFile(name, file["bytes"], file["sha256"]) for name, file in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(f"{path} is damaged ({error!r})") from None


def check_listing(folder: Path) -> int:
    """Compare a folder with its list.

    Returns:
        The number of files checked; 0 where there is no list.
    Raises:
        ReleaseError: a file is missing or differs.
    """
    if not (folder / LISTING).is_file():
        return 0
    expected = listed(folder / LISTING)
    found = {file.path: file for file in release_files(folder)}
    for name, file in expected.items():
        if name not in found:
            raise ReleaseError(f"{folder}: {name} is in {LISTING} and is missing")
        if found[name] != file:
            raise ReleaseError(f"{folder}: {name} is not what {LISTING} says (SHA-256 {found[name].sha256[:12]})")
    return len(expected)


def git_sha1(path: Path) -> str:
    """What git, and the Hub, call the content of a small file."""
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
