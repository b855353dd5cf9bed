"""What no row and no picture shows alone: duplicates, leaks, masks beside their pictures, files that nobody uses."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmga.check.folders import check_folders
from llmga.check.near_duplicates import difference_hash, find_similar
from llmga.check.picture_check import SIGNATURE_SIDE
from llmga.check.sets import RowSet
from llmga.check.settings import CheckSettings
from llmga.check.store import Store

_SIDE = SIGNATURE_SIDE
_ASPECT_TOLERANCE = 0.01  # relative; what rounding to whole pixels does to a scaled mask
_REPEATED = """
SELECT set_number, row, first FROM (
    SELECT set_number, row, min(row) OVER (PARTITION BY set_number, key) AS first FROM keys WHERE kind = ?
) WHERE row > first ORDER BY set_number, row
"""


def check_whole_set(store: Store, sets: Sequence[RowSet], settings: CheckSettings) -> None:
    """Compare rows with rows and pictures with pictures; one transaction, done once."""
    if store.is_done("whole", 0):
        return
    with store.db:
        _repeated_rows(store)
        _split_leaks(store)
        facts: dict[str, Any] = {"folders": []}
        if settings.pictures:
            _equal_pictures(store)
            if settings.near:
                _similar_pictures(store, settings.near)
            _masks(store)
            roots = sorted({os.path.realpath(source.image_root) for source in sets})
            facts["folders"] = check_folders(store, roots, settings)
        store.finish("whole", **facts)


def _repeated_rows(store: Store) -> None:
    """Ids, rows and captions that came before."""
    for kind, code, words in (("id", "duplicate_id", "has its id"), ("row", "duplicate_row", "says the same")):
        repeated = list(store.rows(_REPEATED, (kind,)))
        store.add_findings((number, row, None, code, f"row {first} {words}") for number, row, first in repeated)
    same_rows = "SELECT set_number, row FROM findings WHERE code = 'duplicate_row'"
    texts = store.rows(f"SELECT * FROM ({_REPEATED}) WHERE (set_number, row) NOT IN ({same_rows})", ("text",))
    store.add_findings(
        [(number, row, None, "duplicate_text", f"row {first} has the same caption") for number, row, first in texts]
    )


def _split_leaks(store: Store) -> None:
    """Training rows whose picture a validation or test row has as well."""
    leaks = store.rows(
        "SELECT u.set_number, u.row, u.name, held.split, min(held.row) FROM uses u JOIN uses held "
        "ON (held.root, held.name) = (u.root, u.name) AND held.split IN ('validation', 'test') "
        "WHERE u.role = 'image' AND held.role = 'image' AND u.split = 'train' "
        "GROUP BY u.set_number, u.row ORDER BY u.set_number, u.row"
    )
    store.add_findings(
        [
            (number, row, None, "split_leak", f"{name} is in row {other} of split {split} as well")
            for number, row, name, split, other in leaks
        ]
    )


def _equal_pictures(store: Store) -> None:
    """Pictures with the same bytes, in one picture folder and in the reference set.

    That LLaVA's folder and LLMGA's both hold COCO is how they were published, and no duplicate.
    """
    store.db.execute("CREATE INDEX IF NOT EXISTS by_content ON pictures (sha256, role)")
    equal = store.rows(
        "SELECT p.number, q.name FROM pictures p JOIN pictures q ON q.number = "
        "(SELECT min(number) FROM pictures r WHERE r.sha256 = p.sha256 AND r.role = 'image' AND r.root = p.root) "
        "WHERE p.role = 'image' AND p.bytes > 0 AND q.number < p.number ORDER BY p.number"
    )
    store.add_findings([(None, None, number, "duplicate_picture", f"equals {name}") for number, name in equal])
    shared = store.rows(
        "SELECT p.number, min(q.name) FROM pictures p JOIN pictures q ON q.sha256 = p.sha256 AND q.role = 'reference' "
        "WHERE p.role = 'image' AND p.bytes > 0 GROUP BY p.number ORDER BY p.number"
    )
    store.add_findings([(None, None, number, "in_reference", f"equals {name} of it") for number, name in shared])


def _similar_pictures(store: Store, bits: int) -> None:
    """Pictures that look alike though their bytes differ, among themselves and with the reference set."""
    roots = [root for (root,) in list(store.rows("SELECT DISTINCT root FROM pictures WHERE role = 'image' ORDER BY 1"))]
    for root, with_reference in [(root, flag) for root in roots for flag in (False, True)]:
        numbers, hashes, others = _hashes(store, root, with_reference)
        code = "in_reference" if with_reference else "near_duplicate"
        if with_reference and not others:
            continue

        def signatures_of(chosen: np.ndarray, numbers: np.ndarray = numbers) -> np.ndarray:
            return np.stack([_signature(store, int(numbers[index])) for index in chosen])

        like = find_similar(hashes, bits, signatures_of, others)
        found = [(int(numbers[index]), int(numbers[like[index]])) for index in np.flatnonzero(like >= 0)]
        names = {other: store.value("SELECT name FROM pictures WHERE number = ?", (other,)) for _, other in found}
        store.add_findings((None, None, number, code, f"looks like {names[other]}") for number, other in sorted(found))


def _hashes(store: Store, root: str, with_reference: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Numbers and (N, 16) hashes of a folder's pictures; behind those of the reference set, and how many these are.

    Plain pictures, which all look alike, stay out; so do those that equal another one, which have been told.
    """
    numbers: list[np.ndarray] = []
    hashes: list[np.ndarray] = [np.empty((0, 16), np.uint8)]
    counts = []
    told = "SELECT picture FROM findings WHERE code IN ('duplicate_picture', 'in_reference') AND picture IS NOT NULL"
    for role in ("reference", "image") if with_reference else ("image",):
        cursor = store.db.execute(
            f"SELECT number, signature FROM pictures WHERE role = ? AND (role = 'reference' OR root = ?) "
            f"AND length(signature) > 0 AND number NOT IN ({told}) ORDER BY number",
            (role, root),
        )
        count = 0
        while block := cursor.fetchmany(4096):
            signatures = np.frombuffer(b"".join(small for _, small in block), np.uint8)
            hashes.append(difference_hash(signatures.reshape(-1, _SIDE, _SIDE, 3)))
            numbers.append(np.array([number for number, _ in block], np.int64))
            count += len(block)
        counts.append(count)
    joined = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
    return joined, np.concatenate(hashes), counts[0] if with_reference else 0


def _signature(store: Store, number: int) -> np.ndarray:
    small = store.value("SELECT signature FROM pictures WHERE number = ?", (number,))
    return np.frombuffer(small, np.uint8).reshape(_SIDE, _SIDE, 3)


def _masks(store: Store) -> None:
    """Masks beside the pictures they belong to."""
    pairs = store.rows(
        "SELECT m.set_number, m.row, m.name, mask.width, mask.height, image.width, image.height "
        "FROM uses m JOIN uses i ON (i.set_number, i.row, i.role) = (m.set_number, m.row, 'image') "
        "JOIN pictures mask ON (mask.root, mask.name, mask.role) = (m.root, m.name, 'mask') "
        "JOIN pictures image ON (image.root, image.name, image.role) = (i.root, i.name, 'image') "
        "WHERE m.role = 'mask' AND mask.width > 0 AND image.width > 0 ORDER BY m.set_number, m.row"
    )
    found = []
    for number, row, name, width, height, picture_width, picture_height in pairs:
        if (width, height) == (picture_width, picture_height):
            continue
        ratio = (width * picture_height) / (height * picture_width)
        code = "mask_size" if abs(ratio - 1) <= _ASPECT_TOLERANCE else "mask_aspect"
        detail = f"mask {name} is {width} x {height}, its picture {picture_width} x {picture_height}"
        found.append((number, row, None, code, detail))
    store.add_findings(found)
    # The shape of the border is asked of outpainting alone.
    store.db.execute(
        "DELETE FROM findings WHERE code = 'mask_not_border' AND picture NOT IN (SELECT p.number FROM pictures p "
        "JOIN uses u ON (u.root, u.name, u.role) = (p.root, p.name, p.role) WHERE u.task = 'outpainting')"
    )
