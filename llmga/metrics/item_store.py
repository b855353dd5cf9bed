"""What was measured of single pictures, kept so that a run that stopped goes on and processes share the work.

A store is a folder of parts, each an `.npz` of some pictures' numbers, written aside and then renamed: a killed process
loses the part it was about to write. The folder's name is a hash of all that decides the numbers, so that what was
measured otherwise is neither mixed in nor thrown away. Processes write parts of their own and never wait for others.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from llmga.files import atomic_write, written_aside

_IDS, _STATES = "ids", "states"
MADE_BY_FILE = "made_by.json"


class StoreError(ValueError):
    """A part that cannot be read, or rows that are not there."""


class ItemStore:
    """Rows of numbers, one for each picture.

    Args:
        folder: holds a folder for each way of measuring.
        made_by: all that decides the numbers, as JSON values.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        text = json.dumps(made_by, sort_keys=True, indent=1, default=str)
        self.folder = folder / sha256(text.encode()).hexdigest()[:16]
        if not (self.folder / MADE_BY_FILE).is_file():
            atomic_write(self.folder / MADE_BY_FILE, text + "\n")

    def missing(self, states: Mapping[str, str]) -> list[str]:
        """The ids that have no row, or one of another state of their picture.

        Args:
            states: id -> what tells the picture's file from a changed one; see `file_states`.
        """
        known = {(id, state) for _, ids, there in self._parts() for id, state in zip(ids, there, strict=True)}
        return [id for id, state in states.items() if (id, state) not in known]

    def add(self, states: Mapping[str, str], columns: Mapping[str, np.ndarray]) -> None:
        """Write a part.

        Args:
            states: of its pictures, in the order of the rows.
            columns: name -> (N, ...) numbers or texts; the same names in every part.
        """
        lengths = {name: len(column) for name, column in columns.items() if len(column) != len(states)}
        if lengths:
            raise StoreError(f"there are {len(states)} pictures and {lengths} rows; expected one for each")
        with written_aside(self.folder / f"part-{secrets.token_hex(6)}.npz") as aside, open(aside, "wb") as file:
            keys = {_IDS: np.array(list(states)), _STATES: np.array(list(states.values()))}
            np.savez(file, **keys, **columns)  # type: ignore[arg-type]  # its stubs take a flag among the arrays

    def read(self, states: Mapping[str, str]) -> dict[str, np.ndarray]:
        """All columns, in the order of `states`.

        Raises:
            StoreError: a picture has no row, or a part cannot be read.
        """
        places: dict[tuple[str, str], tuple[int, int]] = {}
        parts: list[Path] = []
        for number, (path, ids, there) in enumerate(self._parts()):
            parts.append(path)
            places.update({key: (number, row) for row, key in enumerate(zip(ids, there, strict=True))})
        lacking = [id for id in states.items() if id not in places]
        if lacking:
            raise StoreError(f"{self.folder} lacks {len(lacking)} pictures, such as {lacking[0][0]}; measure again")
        wanted = np.array([places[key] for key in states.items()]).reshape(-1, 2)
        columns: dict[str, np.ndarray] = {}
        for number in np.unique(wanted[:, 0]):
            here = wanted[:, 0] == number
            with np.load(parts[number]) as part:
                for name in set(part.files) - {_IDS, _STATES}:
                    values = part[name]
                    kind = object if values.dtype.kind == "U" else values.dtype  # texts of one part may be longer
                    whole = columns.setdefault(name, np.empty((len(wanted), *values.shape[1:]), kind))
                    whole[here] = values[wanted[here, 1]]
        return columns

    def _parts(self) -> Iterator[tuple[Path, Sequence[str], Sequence[str]]]:
        """Each part with its ids and states."""
        for path in sorted(self.folder.glob("part-*.npz")):
            try:
                with np.load(path) as part:
                    yield path, part[_IDS].tolist(), part[_STATES].tolist()
            except (OSError, ValueError, KeyError, BadZipFile) as error:
                raise StoreError(f"{path} is damaged ({error}); delete it, its pictures are measured again") from error


def file_states(files: Mapping[str, Path]) -> dict[str, str]:
    """What tells each file from a later version of it: size and time of its last change; "absent" where it is not."""
    return {id: _file_state(path) for id, path in files.items()}


def _file_state(path: Path) -> str:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return "absent"
    return f"{stat.st_size}-{stat.st_mtime_ns}"
