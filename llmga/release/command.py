"""`llmga release` and `llmga pull`: what they do one after another, and what they tell."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from llmga.release.config import HUB_ID, ReleaseConfig
from llmga.release.hub import Hub, discreet, read_token
from llmga.release.kinds import ReleaseError
from llmga.release.listing import release_files
from llmga.release.pull import Pulled, pull
from llmga.release.push import push

Tell = Callable[[str], None]


def release(cfg: ReleaseConfig, dry_run: bool, tell: Tell) -> None:
    """Put a release together, and push it unless this is a dry run, which asks for no token and no network.

    Raises:
        ReleaseError, HubError: what stands in the way.
    """
    token = None if dry_run else read_token(needed=True)  # before the work, not after it
    from llmga.release.export import export

    tell(str(export(cfg)))
    if dry_run:
        for line in file_table(cfg.staging):
            tell(line)
        where = "private" if cfg.private else "public"
        tell(f"dry run: nothing was pushed to {cfg.repo} ({where} if it is made)")
        return
    with _to_the_hub(token):
        tell(str(push(Hub(cfg.repo, token), cfg.staging, cfg.private, cfg.replace, cfg.message)))


def fetch(repo: str, out: Path | None, revision: str | None) -> Pulled:
    """Pull a repository to `out`, or to models/<name>.

    Raises:
        ReleaseError, HubError: what stands in the way.
    """
    if not HUB_ID.fullmatch(repo):
        raise ReleaseError(f'found "{repo}", expected owner/name, as on the Hub')
    token = read_token(needed=False)
    with _to_the_hub(token):
        return pull(Hub(repo, token), out or Path("models") / repo.rpartition("/")[2], revision)


def file_table(folder: Path) -> list[str]:
    """A line for every file of a release: hash, size, name; and their sum."""
    files = release_files(folder)
    lines = [f"{file.sha256}  {file.bytes:>14,}  {file.path}" for file in files]
    return [*lines, f"{len(files)} files, {sum(file.bytes for file in files):,} bytes"]


def _to_the_hub(token: str | None) -> AbstractContextManager[None]:
    """What the libraries print on the way, kept fit for people and logs."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return discreet(token)
