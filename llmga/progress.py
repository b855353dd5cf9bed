"""How far a run is: a bar on a terminal, one line per log elsewhere."""

import logging
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

logger = logging.getLogger(__name__)


class RunProgress:
    """Shows step, loss, speed, memory and the time left; silent on all ranks but the first.

    Args:
        total_steps: where the run ends.
        shown: False on ranks that show nothing.
    """

    def __init__(self, total_steps: int, shown: bool) -> None:
        self.total_steps = total_steps
        self._shown = shown
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(bar_width=12),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total_steps)) + 1)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("starting", total=total_steps)

    def __enter__(self) -> "RunProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, figures: dict[str, Any]) -> None:
        """Show the figures of one log: beside the bar, or as a line where there is no terminal."""
        if self._bar is not None and "loss" in figures:
            short = {key: value for key, value in figures.items() if key not in ("lr", "grad_norm")}
            self._bar.update(self._task, completed=step, description=figures_line(short))
        elif self._shown:  # held-out losses stay as lines above the bar
            logger.info("step %d/%d  %s", step, self.total_steps, figures_line(figures))


def figures_line(figures: dict[str, Any]) -> str:
    """The figures of a log for people, those that are there, in a fixed order."""
    parts = [
        f"{label} {figures[key]:{form}}"
        for key, label, form in (("loss", "loss", ".4f"), ("lr", "lr", ".2e"), ("grad_norm", "gradient", ".3g"))
        if figures.get(key) is not None
    ]
    parts += [f"held out {key.removeprefix('eval_')} {figures[key]:.4f}" for key in figures if key.startswith("eval_")]
    if "tokens_per_s" in figures:
        parts.append(f"{figures['tokens_per_s']:,.0f} tokens/s")
    elif "samples_per_s" in figures:
        parts.append(f"{figures['samples_per_s']:,.4g} samples/s")
    if figures.get("loader_wait", 0) >= 0.03:  # above it, more loading workers would help
        parts.append(f"{figures['loader_wait']:.0%} waiting for data")
    memory = figures.get("cuda_gb", figures.get("memory_gb"))
    if memory is not None:
        parts.append(f"{memory:.2f} GB")
    if "eta_s" in figures:
        parts.append(f"{duration(figures['eta_s'])} left")
    replaced = [key for key in figures if key.startswith("replaced_") and figures[key]]
    if replaced:
        counts = (f"{figures[key]} {key.removeprefix('replaced_').replace('_', ' ')}" for key in replaced)
        parts.append(f"replaced: {', '.join(counts)}")
    if figures.get("left_out"):
        parts.append(f"{figures['left_out']} left out of full rows")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m20s, 5h07m, 2d05h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
