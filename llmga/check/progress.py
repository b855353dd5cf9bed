"""How far a check is: a bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmga.progress import duration

_SECONDS_BETWEEN_LINES = 10.0
logger = logging.getLogger(__name__)


class CheckProgress:
    """Shows the phase of a check, its speed, and the time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._name, self._total, self._done = "", 0, 0
        self._started = self._told = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("starting", total=1, speed="")

    def __enter__(self) -> "CheckProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, name: str, total: int) -> None:
        """Begin a phase of `total` steps."""
        self._name, self._total, self._done = name, total, 0
        self._started = self._told = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, total=max(1, total), description=name, speed="")

    def advance(self, count: int) -> None:
        """Say that `count` more steps are done."""
        self._done += count
        now = time.monotonic()
        speed = self._done / max(1e-9, now - self._started)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, speed=f"{speed:,.0f}/s")
        elif now - self._told > _SECONDS_BETWEEN_LINES:
            self._told = now
            left = duration((self._total - self._done) / max(1e-9, speed))
            logger.info("%s %d/%d  %.0f/s  %s left", self._name, self._done, self._total, speed, left)
