"""Recording: rows to prompts, resumable, by any number of processes that never wait for each other."""

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import islice
from threading import Event
from typing import TYPE_CHECKING, Any

from llmga.images import PictureError, open_picture, picture_path
from llmga.progress import duration
from llmga.records import RecordError
from llmga.runtime import Interrupted, Ranks
from llmga.stage1.record.config import RecordConfig
from llmga.stage1.record.endpoint import EndpointEngine
from llmga.stage1.record.merge import Merged, merge_parts
from llmga.stage1.record.parts import PartWriter, agree_on_settings, done_rows, parts_folder
from llmga.stage1.record.questions import Question, build_question, is_asked, read_reply
from llmga.stage1.sources import Source
from llmga.tokens import clip_length

if TYPE_CHECKING:
    from llmga.stage1.record.engines import Engine

logger = logging.getLogger(__name__)
_LOG_EVERY_S = 10.0
_SHOWN_REPLY = 2_000  # characters of a malformed reply that are kept


class RecordingError(ValueError):
    """Rows that cannot be recorded as asked."""


def record_prompts(cfg: RecordConfig, ranks: Ranks) -> Merged | None:
    """Record this process's share of the rows; whoever finds all rows done merges the parts.

    Rank r of n takes every n-th row. Ranks are only numbers: processes need not start, run or stop together.

    Returns:
        What was made, or None when other processes still have rows to record.
    Raises:
        ValueError of ours: settings, rows, model or server cannot be used.
        Interrupted: a signal came; everything recorded is kept.
    """
    source = Source(cfg.source)
    folder = parts_folder(cfg.out)
    engine = build_engine(cfg, ranks)
    agree_on_settings(folder, shared_settings(cfg, source, engine))
    with PartWriter(folder, ranks.rank, ranks.world_size) as part, _Stop() as stop:
        done, asked = done_rows(folder), _asked_rows(cfg, source)
        mine = asked[ranks.rank :: ranks.world_size]
        left = [row for row in mine if source.manifest_row(row) not in done]
        by = cfg.model or f"{engine.provenance['model']} at {cfg.endpoint and cfg.endpoint.url}"
        logger.info(
            "rank %d of %d: %d of %d rows to record, by %s", ranks.rank, ranks.world_size, len(left), len(mine), by
        )
        progress = _Progress(ranks, len(left))
        rows = iter(left)
        while batch := list(islice(rows, cfg.batch_size)):
            if stop.is_set():
                raise Interrupted(f"stopped with {progress.rows} rows recorded; the same command goes on")
            entries = list(record_rows(cfg, source, batch, engine))
            part.append(entries)
            progress.advance(entries)
    if {source.manifest_row(row) for row in asked} - done_rows(folder):
        logger.info("rank %d of %d is done; others still record", ranks.rank, ranks.world_size)
        return None
    return merge_parts(cfg, source)


def build_engine(cfg: RecordConfig, ranks: Ranks) -> "Engine":
    """The model of the settings, in this process or behind its server."""
    if cfg.endpoint is not None:
        return EndpointEngine(cfg)
    from llmga.stage1.record.engines import LocalEngine  # and transformers, which a server's clients do not need

    return LocalEngine(cfg, ranks)


def record_rows(cfg: RecordConfig, source: Source, rows: Sequence[int], engine: "Engine") -> Iterator[dict[str, Any]]:
    """One line for each row: its prompt, or why it has none."""
    questions: list[Question] = []
    lines: dict[int, dict[str, Any]] = {}
    pictures: dict[int, str] = {}
    for row in rows:
        try:
            questions.append(_question(cfg, source, row, pictures))
        except (RecordError, PictureError) as problem:
            rejected = {"rejected": problem.code, "reason": str(problem)}
            lines[row] = {"row": source.manifest_row(row), "id": source[row].id, **rejected}
    failed: dict[int, list[str]] = {}
    for attempt in range(cfg.sampling.attempts):
        if not questions:
            break
        sampling = cfg.sampling
        temperature = max(sampling.temperature, sampling.retry_temperature if attempt else 0)
        seeds = [reply_seed(cfg.seed, question.id, attempt) for question in questions]
        replies = engine.answer([question.prompt for question in questions], seeds, temperature)
        again = []
        for question, seed, reply in zip(questions, seeds, replies, strict=True):
            head = {"row": source.manifest_row(question.row), "id": question.id}
            if isinstance(reply, Exception):
                lines[question.row] = {**head, "rejected": "refused", "reason": str(reply)}
                continue
            prompt, reason = read_reply(reply, cfg)
            if prompt is not None:
                recorded = {
                    **engine.provenance,
                    **question.asked,
                    **({"picture": pictures[question.row]} if question.row in pictures else {}),
                    **{"temperature": temperature, "top_p": cfg.sampling.top_p, "seed": seed, "attempt": attempt},
                    "tokens": clip_length(prompt),
                }
                lines[question.row] = {**head, "prompt": prompt, "recorded": recorded}
                continue
            failed.setdefault(question.row, []).append(reply[:_SHOWN_REPLY])
            lines[question.row] = {**head, "rejected": reason, "replies": failed[question.row]}
            again.append(question)
        questions = again
    return (lines[row] for row in rows)


def reply_seed(seed: int, id: str, attempt: int) -> int:
    """The seed of one reply: it depends on the row and the attempt, not on processes or batches."""
    return int.from_bytes(sha256(f"{seed}\0{id}\0{attempt}".encode("utf-8", "surrogatepass")).digest()[:4]) >> 1


def shared_settings(cfg: RecordConfig, source: Source, engine: "Engine") -> dict[str, Any]:
    """What decides the prompts; all processes, and all starts of one recording, must have the same."""
    sampling = {key: getattr(cfg.sampling, key) for key in vars(cfg.sampling) if not key.startswith("_")}
    stat = source.path.stat()
    return {
        **engine.provenance,
        **sampling,
        **{key: getattr(cfg, key) for key in ("task", "reply", "phrasing", "language", "picture_size", "seed")},
        "picture_mode": cfg.picture_mode,
        "manifest": source.path.name,
        "manifest_bytes": stat.st_size,
        "rows": len(source),
    }


def _question(cfg: RecordConfig, source: Source, row: int, pictures: dict[int, str]) -> Question:
    """The question of a row; the hash of the picture file it shows is put down on the way."""
    root = source.manifest.image_root
    record = source[row]

    def load(name: str) -> Any:
        path = picture_path(root, name)
        picture = open_picture(path)
        if name == record.image:
            pictures[row] = sha256(path.read_bytes()).hexdigest()[:16]
        return picture

    try:
        return build_question(row, record, cfg, load)
    except RecordError as problem:
        raise RecordError(f"{source.place(row)}: {problem}", problem.code) from None


def _asked_rows(cfg: RecordConfig, source: Source) -> Sequence[int]:
    """Rows that get a prompt; where all do, none has to be read for that.

    Raises:
        RecordingError: there are none.
    """
    if cfg.task is not None:
        return range(len(source))
    rows = [row for row in range(len(source)) if is_asked(source[row], cfg)]
    if not rows:
        raise RecordingError(
            f"no row of {source.path} asks for a picture; set task, for example task=similar_image to have every "
            "picture described"
        )
    return rows


class _Progress:
    """Says now and then how far this process is."""

    def __init__(self, ranks: Ranks, total: int) -> None:
        self.rank, self.total = ranks.rank, total
        self.rows = self.tokens = self.rejected = self.retried = 0
        self.started = self.told = time.monotonic()

    def advance(self, entries: Sequence[dict[str, Any]]) -> None:
        """Count what was written."""
        self.rows += len(entries)
        for entry in entries:
            self.rejected += "rejected" in entry
            self.tokens += entry.get("recorded", {}).get("tokens", 0)
            self.retried += entry.get("recorded", {}).get("attempt", 0) > 0
        now = time.monotonic()
        if now - self.told >= _LOG_EVERY_S or self.rows == self.total:
            seconds = max(now - self.started, 1e-9)
            logger.info(
                "rank %d: %d/%d rows  %.1f rows/s  %.0f CLIP tokens/s  %d drawn again  %d rejected  %s left",
                *(self.rank, self.rows, self.total, self.rows / seconds, self.tokens / seconds),
                *(self.retried, self.rejected, duration(seconds / self.rows * (self.total - self.rows))),
            )
            self.told = now


class _Stop:
    """Ctrl-C and SIGTERM end the run behind the current batch; a second one ends it at once."""

    def __init__(self) -> None:
        self._asked = Event()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._former[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: whoever runs us handles signals
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._asked.is_set()

    def _handle(self, number: int, frame: object) -> None:
        if self._asked.is_set():
            os._exit(130)
        self._asked.set()
