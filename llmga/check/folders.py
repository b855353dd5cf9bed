"""Pictures counted by folder: used, missing, on the disk, used by no row; and beside what was published."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from llmga.check.picture_check import PICTURE_SUFFIXES
from llmga.check.settings import CheckSettings
from llmga.check.store import Store

# Files of the folders that LLaVA's mixture names, and of COCO's that pictures are measured against, as their owners
# publish them.
PUBLISHED_COUNTS = {
    "coco/train2017": 118_287,
    "coco/train2014": 82_783,
    "coco/val2014": 40_504,
    "gqa/images": 148_854,
    "ocr_vqa/images": 207_572,
    "textvqa/train_images": 25_119,
    "vg/VG_100K": 64_346,
    "vg/VG_100K_2": 43_903,
    "llava_pretrain/images": 558_000,  # told as "558K"; they lie in numbered folders below
}


def check_folders(store: Store, roots: Sequence[str], settings: CheckSettings) -> list[dict[str, Any]]:
    """Count pictures by folder and add findings for orphans and known folders that are not complete.

    Folders below a known one count as that one.

    Returns:
        Per folder: its path, pictures used by rows, how many of those are missing, files on the disk, orphans, and the
        published count where there is one. The last three are None where the disk was not walked.
    """
    used, missing = Counter[str](), Counter[str]()
    for root, name, size in store.rows("SELECT root, name, bytes FROM pictures WHERE role != 'reference'"):
        folder = _known_folder(os.path.dirname(os.path.join(root, name)))
        used[folder] += 1
        missing[folder] += not size
    on_disk, orphans = Counter[str](), Counter[str]()
    if settings.orphans:
        reference = None if settings.reference is None else os.path.realpath(settings.reference)
        for root in roots:
            if any(other != root and root.startswith(other + os.sep) for other in roots):
                continue  # it lies in another one
            for folder, names in _folders_of_pictures(root, reference):
                counted = _known_folder(folder)
                on_disk[counted] += len(names)
                for name in names:
                    path = os.path.join(folder, name)
                    if not _is_used(store, path, roots):
                        orphans[counted] += 1
                        store.add_findings([(None, None, None, "orphan", path)])
    found = []
    for folder in sorted({*used, *on_disk}):
        published = next((n for known, n in PUBLISHED_COUNTS.items() if folder.endswith("/" + known)), None)
        facts = {"folder": folder, "used": used[folder], "missing": missing[folder], "published": published}
        walked = settings.orphans
        found.append(
            {**facts, "on_disk": on_disk[folder] if walked else None, "orphans": orphans[folder] if walked else None}
        )
        if walked and published is not None and on_disk[folder] < published:
            reason = f"{folder} holds {on_disk[folder]:,} pictures, published were {published:,}"
            store.add_findings([(None, None, None, "folder_incomplete", reason)])
    return found


def _known_folder(folder: str) -> str:
    """The known folder that a folder lies in, or else itself."""
    for known in PUBLISHED_COUNTS:
        above, found, _ = f"{folder}/".partition(f"/{known}/")
        if found:
            return f"{above}/{known}"
    return folder


def _folders_of_pictures(root: str, left_out: str | None) -> Iterator[tuple[str, list[str]]]:
    """Every folder below a root with its pictures, in order; hidden ones and one more are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and os.path.join(folder, name) != left_out
        )
        names = [name for name in sorted(files) if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES]
        if names := [name for name in names if not name.startswith(".")]:
            yield folder, names


def _is_used(store: Store, path: str, roots: Sequence[str]) -> bool:
    """Whether any row names the file, counted from whichever root it lies in."""
    for root in roots:
        if path.startswith(root + os.sep):
            name = path[len(root) + 1 :].replace(os.sep, "/")
            query = "SELECT count(*) FROM pictures WHERE root = ? AND name = ? AND role != 'reference'"
            if store.value(query, (root, name)):
                return True
    return False
