"""A repository onto this machine: checked by name before, by hash after, and at its place only when it is whole."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from llmga.checkpoint import sha256
from llmga.release.hub import Hub, HubError, listed_remotely
from llmga.release.kinds import ReleaseError
from llmga.release.listing import check_listing, git_sha1
from llmga.release.safety import refuse_contents, refuse_names, refuse_remote_code

_STATE = ".cache"  # huggingface_hub's, of downloads that go on
_ORIGIN = ".origin.json"
logger = logging.getLogger(__name__)


class Pulled(NamedTuple):
    """What a pull came to."""

    folder: Path
    repo: str
    commit: str
    files: int
    listed: int

    def __str__(self) -> str:
        also = f", {self.listed} of them by release.json as well" if self.listed else ""
        return f"{self.folder}: {self.repo} at {self.commit}, {self.files} files checked by their hashes{also}"


def pull(hub: Hub, folder: Path, revision: str | None = None) -> Pulled:
    """Fetch a repository into a new folder.

    It is fetched beside that folder and renamed when everything was checked. What arrived before an interruption is
    kept there and not fetched again.

    Args:
        folder: new or empty.
        revision: branch, tag or commit; None: the main branch.
    Raises:
        ReleaseError: pickles, code, a file that differs from its hash, or a folder that holds something.
        HubError: the Hub does not give it, or cannot be reached.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ReleaseError(f"{folder} exists already and is not empty; choose another folder (--out)")
    info = hub.call(f"look at {hub.repo}", lambda: hub.api.model_info(hub.repo, revision=revision))
    commit = str(info.sha)
    remote = hub.call(f"list {hub.repo}", lambda: listed_remotely(hub.api, hub.repo, commit))
    if not remote:
        raise ReleaseError(f"{hub.repo} at {commit} holds no files")
    refuse_names(remote, hub.repo)
    aside = _aside(folder, {"repo": hub.repo, "commit": commit})
    # Settings first: they are small, and decide whether the weights are wanted.
    for name in sorted(remote, key=lambda name: (not name.endswith(".json"), name)):
        _fetch(hub, remote[name], name, aside, commit)
        if name.endswith(".json") and not name.endswith(("tokenizer.json", "vocab.json")):
            refuse_remote_code(aside / name)
    shutil.rmtree(aside / _STATE, ignore_errors=True)
    refuse_contents(aside)
    listed = check_listing(aside)
    (aside / _ORIGIN).unlink()
    if folder.is_dir():
        folder.rmdir()
    os.replace(aside, folder)
    return Pulled(folder, hub.repo, commit, len(remote), listed)


def _aside(folder: Path, origin: dict[str, Any]) -> Path:
    """Where files arrive: what an earlier try of the same commit left, else a new folder."""
    aside = folder.with_name(f".{folder.name}.partial")
    note = aside / _ORIGIN
    if not note.is_file() or note.read_text(encoding="utf-8") != json.dumps(origin):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        note.write_text(json.dumps(origin), encoding="utf-8")
    return aside


def _fetch(hub: Hub, remote: Any, name: str, aside: Path, commit: str) -> None:
    """One file, unless it is there; its hash must be the one that the Hub lists."""
    path = aside / name
    if path.is_file() and _has_hash(path, remote):
        return

    def download() -> None:
        path.unlink(missing_ok=True)
        hub.api.hf_hub_download(hub.repo, name, revision=commit, local_dir=aside)

    hub.call(f"fetch {name}", download)
    if not _has_hash(path, remote):
        shutil.rmtree(aside / _STATE, ignore_errors=True)
        path.unlink()
        raise HubError(f"{hub.repo}: {name} arrived with another hash than the Hub lists; run this again")


def _has_hash(path: Path, remote: Any) -> bool:
    if path.stat().st_size != remote.size:
        return False
    return bool(sha256(path) == remote.lfs.sha256) if remote.lfs is not None else git_sha1(path) == remote.blob_id
