"""A release put together in a folder of its own: weights, settings, card and list of hashes, all of it read back."""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from llmga.checkpoint import write_folder_atomically
from llmga.release.card import write_card
from llmga.release.compare import Comparison, compare
from llmga.release.config import ReleaseConfig
from llmga.release.contents import copy_settings, left_out, refuse_local_paths, refuse_unsafe, weights
from llmga.release.kinds import NAMES, Kind, ReleaseError, kind_of
from llmga.release.listing import LISTING, write_listing
from llmga.release.results import read_results
from llmga.release.weights import reshard

_BYTES_PER_GB = 10**9


class Exported(NamedTuple):
    """A release that is ready to be pushed."""

    folder: Path
    kind: Kind
    comparison: Comparison
    left_out: list[str]

    def __str__(self) -> str:
        rest = f"; {len(self.left_out)} files stay here: {', '.join(self.left_out[:5])}" if self.left_out else ""
        return f"{self.folder}: {NAMES[self.kind]}, {self.comparison}{rest}"


def export(cfg: ReleaseConfig) -> Exported:
    """Put a release together, or fail and leave nothing behind.

    The same settings and folder give the same bytes, so that a push which was interrupted goes on where it was.

    Raises:
        ReleaseError: what stands in the way, in one sentence.
    """
    kind = kind_of(cfg.folder)
    refuse_unsafe(cfg.folder)
    measured = read_results(cfg.results, cfg.folder) if cfg.results else None
    if kind != "adapter" and cfg.merge:
        raise ReleaseError(f"merge: {cfg.folder} is a {NAMES[kind]} and no adapter; remove the key")
    if kind == "adapter" and cfg.base_model is None:
        raise ReleaseError(
            f"base_model: {cfg.folder} is an adapter, which is of no use without its base; set base_model.id"
        )
    _make_room(cfg.staging)
    with tempfile.TemporaryDirectory() as temporary:
        source, base = cfg.folder, cfg.base_model.folder if cfg.base_model else None
        if cfg.merge:
            source, kind = _merged(cfg.folder, base, Path(temporary) / "merged"), "mllm"
        taken = weights(source, kind)
        with write_folder_atomically(cfg.staging, durable=False) as out:
            copy_settings(source, kind, out, cfg.base_model.id if cfg.base_model else None)
            for at, stem, files in taken:
                reshard(files, out / at, stem, int(cfg.shard_gb * _BYTES_PER_GB))
            comparison = compare(kind, source, taken, out, base)
            write_card(cfg, kind, source, out, measured, str(comparison))
            refuse_local_paths(out)
            write_listing(out, kind)
    return Exported(cfg.staging, kind, comparison, left_out(source, kind, taken) if source == cfg.folder else [])


def _merged(adapter: Path, base: Path | None, folder: Path) -> Path:
    """The adapter in its base, as a model's folder that says what it was merged from."""
    from llmga.stage1.lora import merge_adapter

    merge_adapter(adapter, folder, base)
    return folder


def _make_room(folder: Path) -> None:
    """Remove an earlier release from the place where this one is put together, and nothing else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / LISTING).is_file():
        raise ReleaseError(f"export_dir: {folder} holds something that is no release; choose another folder")
    shutil.rmtree(folder)
