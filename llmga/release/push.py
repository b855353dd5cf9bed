"""A release into its repository: everything in one commit, or nothing; an interrupted push goes on by file."""

import logging
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import RepositoryNotFoundError

from llmga.release.hub import Hub, HubError, listed_remotely, status_of
from llmga.release.kinds import ReleaseError
from llmga.release.listing import LISTING, check_listing, git_sha1, listed, release_files

_NOT_OURS_BUT_FINE = (".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md")
_COMMIT_TRIES = 4
logger = logging.getLogger(__name__)


class Pushed(NamedTuple):
    """What a push came to."""

    commit: str
    url: str
    changed: list[str]
    removed: list[str]
    made: bool

    def __str__(self) -> str:
        if not self.changed and not self.removed:
            return f"{self.url} holds this release already, at commit {self.commit}"
        gone = f", {len(self.removed)} removed" if self.removed else ""
        return f"{self.url} at commit {self.commit}: {len(self.changed)} files changed{gone}, in one commit"


class _Difference(NamedTuple):
    """From what a repository holds to the release."""

    head: str
    changed: list[str]
    removed: list[str]


def push(hub: Hub, folder: Path, private: bool = True, replace: bool = False, message: str = "Release") -> Pushed:
    """Make or update a repository so that it holds a release.

    Large files are uploaded first, and nobody sees them before the commit that names them. What arrived stays there for
    the next try. Files of an earlier release that this one lacks are removed in the same commit.

    Args:
        folder: what `export` wrote.
        private: of a repository that is made; a public one is refused when this is set.
        replace: remove what no release has put there as well.
    Raises:
        ReleaseError: the folder is no whole release, or the repository holds other things.
        HubError: the Hub does not let us, or cannot be reached; nothing was published.
    """
    if not check_listing(folder):
        raise ReleaseError(f"{folder} has no {LISTING}; expected what `llmga release` put together")
    hub.call("ask who the token belongs to", lambda: hub.api.whoami())
    made = _make(hub, private)
    difference = _compare(hub, folder, replace)
    if not difference.changed and not difference.removed:
        return Pushed(difference.head, _url(hub), [], [], made)
    additions = [CommitOperationAdd(name, folder / name) for name in difference.changed]
    logger.info("uploading what is missing of %d files", len(additions))
    hub.call("upload", lambda: hub.api.preupload_lfs_files(hub.repo, additions), tries=1)  # the library tries again
    commit = _commit(hub, folder, replace, difference, additions, message)
    return Pushed(commit, _url(hub), difference.changed, difference.removed, made)


def _make(hub: Hub, private: bool) -> bool:
    """Make the repository if there is none; True if there was none."""
    info = hub.call(f"look at {hub.repo}", lambda: _info(hub))
    if info is None:
        hub.call(f"make {hub.repo}", lambda: hub.api.create_repo(hub.repo, private=private, exist_ok=True))
        return True
    if private and not info.private:
        raise ReleaseError(
            f"{hub.repo} exists and everybody can see it; set private=false to publish there, or choose another name"
        )
    return False


def _info(hub: Hub) -> Any:
    try:
        return hub.api.model_info(hub.repo)
    except RepositoryNotFoundError as error:
        if status_of(error) == 404:
            return None
        raise


def _compare(hub: Hub, folder: Path, replace: bool) -> _Difference:
    """What has to change in the repository, against its newest commit."""
    head = str(hub.call(f"look at {hub.repo}", lambda: hub.api.model_info(hub.repo)).sha)
    remote = hub.call(f"list {hub.repo}", lambda: listed_remotely(hub.api, hub.repo, head))
    local = {file.path: file for file in release_files(folder)}
    changed = [name for name, file in local.items() if not _is_same(remote.get(name), folder / name, file.sha256)]
    others = sorted(remote.keys() - local.keys() - {".gitattributes"})
    ours = _released_before(hub, head) if LISTING in remote else None
    if ours is not None:
        removed = [name for name in others if replace or name in ours]
    elif replace:
        removed = others
    else:
        removed = []
        strange = sorted(remote.keys() - set(_NOT_OURS_BUT_FINE))
        if strange:
            raise ReleaseError(
                f"{hub.repo} holds {len(strange)} files that no release has put there, first {strange[0]}; choose "
                "another name, or set replace=true to replace them in the release's commit"
            )
    return _Difference(head, changed, removed)


def _is_same(remote: Any, path: Path, sha256: str) -> bool:
    if remote is None:
        return False
    return bool(remote.lfs.sha256 == sha256) if remote.lfs is not None else bool(remote.blob_id == git_sha1(path))


def _released_before(hub: Hub, head: str) -> set[str]:
    """The files that the release in the repository lists."""

    def fetch() -> set[str]:
        with tempfile.TemporaryDirectory() as temporary:
            path = hub.api.hf_hub_download(hub.repo, LISTING, revision=head, local_dir=temporary)
            return {*listed(Path(path)), LISTING}

    return hub.call(f"read {LISTING} of {hub.repo}", fetch)


def _commit(
    hub: Hub, folder: Path, replace: bool, difference: _Difference, additions: list[CommitOperationAdd], message: str
) -> str:
    """Make the commit once, also when its answer is lost on the way.

    A commit that was made without our hearing of it is found by comparing again; one that someone else made meanwhile
    is refused by the Hub, because ours names the commit it builds on.
    """
    removals = [CommitOperationDelete(name) for name in difference.removed]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions, *removals]

    def attempt() -> str:
        now = _compare(hub, folder, replace)
        if not now.changed and not now.removed:
            return now.head
        if now.head != difference.head:
            raise HubError(
                f"cannot commit: {hub.repo} was changed by someone else meanwhile; look at it and run this again: "
                "what was uploaded is kept"
            )
        made = hub.api.create_commit(hub.repo, operations, commit_message=message, parent_commit=difference.head)
        return str(made.oid)

    commit = hub.call("commit", attempt, tries=_COMMIT_TRIES)
    left = _compare(hub, folder, replace)  # by the hashes that the Hub computed
    if left.changed:
        raise HubError(f"{hub.repo} holds another {left.changed[0]} than was pushed; run this again")
    return commit


def _url(hub: Hub) -> str:
    return f"{hub.api.endpoint}/{hub.repo}"
