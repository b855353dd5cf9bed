"""Which files a path stands for, in which format each is, and where its pictures lie."""

from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from llmga.check.settings import CheckError, CheckSettings
from llmga.files import no_such_file
from llmga.json_stream import StreamError, stream_rows
from llmga.published_rows import FORMATS, guess_formats

_SUFFIXES = (".json", ".jsonl", ".parquet")
_ROWS_LOOKED_AT = 200
_PICTURE_FOLDERS = ("imgs", "images", "llmga-imgs")


@dataclass(frozen=True, slots=True)
class RowSet:
    """One file of rows.

    Attributes:
        format: "manifest", one of `FORMATS`, or "unknown" where not even the first row can be read.
        image_root: the folder its pictures count from.
        name: what reports call it: its path below the folder that is checked.
    """

    path: Path
    format: str
    image_root: Path
    name: str


def find_sets(settings: CheckSettings) -> list[RowSet]:
    """The files to check: `path` itself, or those of a folder, in order of their names.

    A folder with `jsons/` is taken for the published layout (`jsons/`, `llmga-imgs` or `imgs`, `llava-imgs`): only the
    files in `jsons/` are read. In any other folder all .json, .jsonl and .parquet files are.

    Raises:
        CheckError: nothing is there, or the format is unknown.
    """
    path, format = settings.path, settings.format
    if format not in ("auto", "manifest", *FORMATS):
        close = get_close_matches(format, ("manifest", *FORMATS), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(('manifest', *FORMATS))}"
        raise CheckError(f"unknown format {format!r}; {hint}")
    if path.is_file():
        root = settings.image_root or path.parent
        return [RowSet(path, _format_of(path) if format == "auto" else format, root, path.name)]
    if not path.is_dir():
        raise CheckError(no_such_file(path))
    rows_folder = path / "jsons" if (path / "jsons").is_dir() else path
    files = sorted(file for file in rows_folder.rglob("*") if file.suffix in _SUFFIXES and not _is_hidden(file, path))
    if not files:
        raise CheckError(f"{path} holds no {', '.join(_SUFFIXES)} file; name the file of rows, or its folder")
    sets = []
    for file in files:
        found = _format_of(file) if format == "auto" else format
        root = settings.image_root or _image_root(path, file, found)
        sets.append(RowSet(file, found, root, file.relative_to(path).as_posix()))
    return sets


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _format_of(path: Path) -> str:
    """The format that the first rows of a file have the fields of; its path decides between equals."""
    if path.suffix == ".parquet":
        return "manifest"
    rows: list[dict[str, Any]] = []
    with suppress(StreamError):  # told when the file is read
        rows.extend(row.value for row in islice(stream_rows(path), _ROWS_LOOKED_AT) if isinstance(row.value, dict))
    guesses = guess_formats(rows[0]) if rows else ()
    if "llmga_inpainting" in guesses and "inpaint" in path.as_posix().lower():
        return "llmga_inpainting"
    if "llava" in guesses and any("image" in row for row in rows):
        return "llava"
    if guesses:
        return guesses[0]
    # A bad first row must not hide the others: the name often says what its row does not.
    named = {"t2i": "llmga_t2i", "sg": "llmga_sg", "inpainting": "llmga_inpainting", "edit": "llmga_edit"}
    return named.get(path.parent.name.lower(), "unknown")


def _image_root(folder: Path, file: Path, format: str) -> Path:
    """Where the published layout keeps the pictures of a file; else a folder of pictures beside it, or above."""
    if format in ("llava", "sharegpt") and (folder / "llava-imgs").is_dir():
        return folder / "llava-imgs"
    for parent in (file.parent, *file.parent.parents):
        found = next((parent / name for name in _PICTURE_FOLDERS if (parent / name).is_dir()), None)
        if found is not None:
            return found
        if parent == folder:
            break
    return file.parent if format == "manifest" else folder
