"""The door to the Hub: a client with the token from the environment, calls tried again, and errors in one sentence."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmga.release.kinds import ReleaseError

TOKEN = "HF_TOKEN"
TRIES = 5
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is told to the person instead
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # signed addresses are passwords for what they point at
_TRANSPORT = (httpx2.TransportError, ConnectionError, TimeoutError)
Result = TypeVar("Result")
Pause = Callable[[float], None]
logger = logging.getLogger(__name__)


class HubError(Exception):
    """The Hub, or the way to it, did not do what was asked; the sentence says what to do, and never holds the token."""


def read_token(needed: bool) -> str | None:
    """The access token, from the environment alone.

    Args:
        needed: whether nothing can be done without one.
    Raises:
        ReleaseError: there is none, or something that is none; its text is not repeated.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        if needed:
            raise ReleaseError(
                f"{TOKEN} is not set; make a token with write access in the Hub's settings and export it "
                "(it is never taken from a file or the command line)"
            )
        return None
    if not re.fullmatch(r"[!-~]{4,}", token):
        raise ReleaseError(f"{TOKEN} holds spaces or signs that no token has; export it again (it is not shown here)")
    return token


class Hub:
    """A client for one repository.

    Args:
        repo: owner/name.
        token: from `read_token`; None asks for what is public.
        endpoint: None: the Hub's, or $HF_ENDPOINT.
        pause: waits so many seconds.
    """

    def __init__(self, repo: str, token: str | None, endpoint: str | None = None, pause: Pause = time.sleep) -> None:
        self.repo, self.token, self.pause = repo, token, pause
        # False and not None: a token that lies in a file must not be used in its place.
        self.api = HfApi(endpoint=endpoint, token=token or False, library_name="llmga")

    def call(self, doing: str, step: Callable[[], Result], tries: int = TRIES) -> Result:
        """Do one step, again where that can help.

        Args:
            doing: what is done, as in "cannot <doing>".
            step: may be repeated without harm.
            tries: 1 where the library tries again by itself.
        Raises:
            HubError: it did not work.
        """
        wait = _FIRST_WAIT_S
        for left in reversed(range(tries)):
            try:
                return step()
            except (HubError, ReleaseError):
                raise  # told already
            except Exception as error:
                asked = retry_after(error)
                if not left or not is_transient(error) or (asked or 0) > _LONGEST_RETRY_AFTER_S:
                    raise HubError(self.sentence(error, doing)) from None
                seconds = asked if asked is not None else wait
                logger.warning("%s; once more in %.0f s", self.sentence(error, doing), seconds)
                self.pause(seconds)
                wait = min(2 * wait, _LONGEST_WAIT_S)
        raise AssertionError("tries is 1 or more")

    def sentence(self, error: BaseException, doing: str) -> str:
        """What an error means and what to do about it; without token and signed addresses."""
        return redacted(f"cannot {doing}: {self._reason(error)}", self.token)

    def _reason(self, error: BaseException) -> str:
        status, said = status_of(error), said_by(error)
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain(error)):
            return "HF_HUB_OFFLINE is set, so nothing leaves this machine; unset it"
        if any(isinstance(each, HFValidationError) for each in chain(error)):
            return f"{self.repo} is no name that the Hub takes ({one_line(str(error))})"
        if any(isinstance(each, RevisionNotFoundError) for each in chain(error)):
            return f"{self.repo} has no such revision; give a branch, a tag or a commit"
        if any(isinstance(each, RepositoryNotFoundError) for each in chain(error)) and status != 403:
            seen = "that this token may see" if self.token else f"that can be seen without {TOKEN}"
            return f"there is no repository {self.repo} {seen} ({status})"
        if status == 401:
            return f"the Hub does not accept the token in {TOKEN} (401); make a new one in its settings and export it"
        if status == 403:
            owner = self.repo.partition("/")[0]
            return f"the token may not do that (403{said}); it needs write access to {owner}'s repositories"
        if status in (409, 412):
            return f"{self.repo} was changed by someone else meanwhile ({status}{said}); look at it and run this again"
        if status == 429:
            seconds = retry_after(error)
            when = f"in {seconds:.0f} s" if seconds is not None else "in a few minutes"
            return f"the Hub answers too many requests from here (429); run this again {when}"
        if status is not None and status >= 500:
            return f"the Hub has a fault of its own ({status}{said}); run this again later"
        if status is not None:
            return f"the Hub refuses ({status}{said})"
        if any(isinstance(each, _TRANSPORT) for each in chain(error)):
            kind = type(next(each for each in chain(error) if isinstance(each, _TRANSPORT))).__name__
            return f"the connection to {self.api.endpoint} was lost or never made ({kind}); run this again"
        if any(isinstance(each, json.JSONDecodeError) for each in chain(error)):
            return f"{self.api.endpoint} answers something that is no JSON; is it a Hub?"
        return f"{type(error).__name__}: {one_line(str(error))}"


def is_transient(error: BaseException) -> bool:
    """Whether the same call may work in a moment."""
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain(error)):  # a ConnectionError by its class
        return False
    return any(isinstance(each, (*_TRANSPORT, json.JSONDecodeError)) for each in chain(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error, or one it was raised from, brought."""
    return next((each.response.status_code for each in chain(error) if isinstance(each, HfHubHTTPError)), None)


def retry_after(error: BaseException) -> float | None:
    """How many seconds the server asks to wait."""
    headers = (each.response.headers for each in chain(error) if isinstance(each, HfHubHTTPError))
    asked = next((found["retry-after"] for found in headers if "retry-after" in found), "")
    return float(asked) if asked.strip().isdecimal() else None


def said_by(error: BaseException) -> str:
    """What the server said, in brackets' middle."""
    said = next((each.server_message for each in chain(error) if isinstance(each, HfHubHTTPError)), None)
    return f": {one_line(said)[:200]}" if said else ""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def redacted(text: str, token: str | None) -> str:
    """A text without the token, and without what signs an address."""
    text = _QUERY.sub(r"\1", text)
    return text.replace(token, "(token)") if token else text


@contextmanager
def discreet(token: str | None) -> Iterator[None]:
    """Keep token and signed addresses out of what the libraries log while the block runs."""
    hide = _Hide(token)
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx2", "httpcore2")]
    handlers = {handler for each in (*loggers, logging.getLogger()) for handler in each.handlers}
    before = [each.level for each in loggers[1:]]
    for handler in handlers:
        handler.addFilter(hide)
    for each in loggers[1:]:
        each.setLevel(logging.WARNING)  # INFO has a line with the whole address for every request
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hide)
        for each, level in zip(loggers[1:], before, strict=True):
            each.setLevel(level)


class _Hide(logging.Filter):
    """Rewrites what is logged."""

    def __init__(self, token: str | None) -> None:
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), self.token), ()
        return True


def listed_remotely(api: Any, repo: str, revision: str) -> Any:
    """Every file of a revision, as huggingface_hub's `RepoFile`."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
