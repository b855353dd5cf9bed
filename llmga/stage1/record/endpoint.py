"""A server that speaks OpenAI's chat completions: many requests at a time, patient with a busy or restarting server.

The key is read from the environment when a request is sent. It is in no error, log or file.
"""

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from llmga.images import data_url
from llmga.stage1.conversation import Prompt
from llmga.stage1.record.config import EndpointConfig, RecordConfig

_LONGEST_WAIT_S = 60.0
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
_THIS_PROMPT = {400, 413, 422}  # too large, too long, refused: another prompt may well pass


class EndpointError(ValueError):
    """A server that cannot be used: unreachable, refusing the key, or not speaking the protocol."""


class RefusedPrompt(ValueError):
    """The server refuses this one prompt."""


class EndpointEngine:
    """Answers by asking a server."""

    def __init__(self, cfg: RecordConfig) -> None:
        """Take the settings; nothing is sent yet."""
        assert cfg.endpoint is not None
        self.cfg, self.endpoint = cfg, cfg.endpoint
        self.provenance = {"engine": "endpoint", "model": self.endpoint.model}

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float) -> list[str | Exception]:
        """See `Engine`.

        Raises:
            EndpointError: the server cannot be used, or refused every prompt.
        """
        pool = ThreadPoolExecutor(self.endpoint.concurrency)
        try:
            replies = list(pool.map(self._one, prompts, seeds, [temperature] * len(prompts)))
        finally:
            pool.shutdown(cancel_futures=True)  # one that cannot go on spares the server the rest
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        if len(refused) == len(replies) > 1:
            raise EndpointError(f"{self.endpoint.url} refuses all of {len(refused)} prompts; the first: {refused[0]}")
        return replies

    def _one(self, prompt: Prompt, seed: int, temperature: float) -> str | Exception:
        body = {
            "model": self.endpoint.model,
            "messages": messages(prompt),
            "temperature": temperature,
            "top_p": self.cfg.sampling.top_p,
            "max_tokens": self.cfg.sampling.max_new_tokens,
            "seed": seed,
            **self.endpoint.extra,
        }
        try:
            return text_of(post(self.endpoint, "chat/completions", body))
        except RefusedPrompt as refusal:
            return refusal


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A conversation as the protocol writes it; its picture travels inside, as PNG."""
    written: list[dict[str, Any]] = []
    for turn in prompt.turns:
        content: Any = turn.content
        if turn.has_picture:
            assert prompt.picture is not None
            picture = {"type": "image_url", "image_url": {"url": data_url(prompt.picture)}}
            content = [picture, {"type": "text", "text": turn.content}]
        written.append({"role": turn.role, "content": content})
    return written


def text_of(answer: Any) -> str:
    """The text of a completion; one that was cut at its longest is returned as it is, and found to lack its end.

    Raises:
        EndpointError: the answer is not a completion.
    """
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        shown = json.dumps(answer)[:200]
        raise EndpointError(f"the server's answer is no chat completion: {shown}") from None
    return str(content or "").strip()


def post(endpoint: EndpointConfig, path: str, body: dict[str, Any]) -> Any:
    """Send JSON and return the JSON that comes back; waits and tries again while the server is busy or away.

    Raises:
        RefusedPrompt: the server says that this request is not acceptable.
        EndpointError: it refuses the key or the model, answers something else than JSON, or stays away.
    """
    url, data = f"{endpoint.url.rstrip('/')}/{path}", json.dumps(body).encode()
    problem = ""
    for attempt in range(endpoint.retries + 1):
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **_authorization(endpoint)})
        wait = min(_LONGEST_WAIT_S, endpoint.backoff_s * 2**attempt) * random.uniform(0.5, 1.0)
        try:
            with urllib.request.urlopen(request, timeout=endpoint.timeout_s) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {_message(error, endpoint)}"
            if error.code in _THIS_PROMPT:
                raise RefusedPrompt(problem) from None
            if error.code in (401, 403):
                state = "is not set" if not os.environ.get(endpoint.key_env) else "holds a key that it does not accept"
                raise EndpointError(f"{url} refuses access ({error.code}); ${endpoint.key_env} {state}") from None
            if error.code not in _BUSY:
                raise EndpointError(f"{url} answers {problem}; check endpoint.url and endpoint.model") from None
            wait = _asked_wait(error) or wait
        except ValueError as error:  # not JSON: a proxy's page, or an answer cut short
            problem = f"its answer is not JSON ({error})"
        except (OSError, HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt < endpoint.retries:
            time.sleep(wait)
    tried = f"tried {endpoint.retries + 1} times (endpoint.retries)"
    raise EndpointError(f"{url} cannot be used, {tried}: {problem}; what is recorded is kept, run the same again")


def _authorization(endpoint: EndpointConfig) -> dict[str, str]:
    key = os.environ.get(endpoint.key_env)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _message(error: urllib.error.HTTPError, endpoint: EndpointConfig) -> str:
    """What the server says about an error, in at most 200 characters; a key that it repeats is blotted out."""
    try:
        text = error.read().decode("utf-8", "replace")
    except OSError:
        return error.reason
    try:
        told = json.loads(text)
        found = told.get("error", told)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    if key := os.environ.get(endpoint.key_env):
        text = text.replace(key, f"${endpoint.key_env}")
    return " ".join(text.split())[:200] or error.reason


def _asked_wait(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait, at most a minute."""
    try:
        return min(_LONGEST_WAIT_S, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None
