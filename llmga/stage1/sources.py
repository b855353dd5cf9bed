"""Where rows come from: one entry of `data.sources` or `data.validation`, opened."""

import logging
from collections.abc import Sequence

import numpy as np

from llmga.published import manifest_of
from llmga.quarantine import read_quarantine
from llmga.records import Record
from llmga.stage1.config import SourceConfig

log = logging.getLogger(__name__)


class SourceError(ValueError):
    """A source that has no rows to draw."""


class Source:
    """The rows of one entry of `data.sources`: those of the wanted tasks that are not in quarantine, up to `max_rows`.

    Args:
        config: the entry.
        name: what logs and tables call it; by default its own name, or that of its file.
    Raises:
        SourceError: no row is left.
        QuarantineError: the quarantine list belongs to another file, or cannot be read.
    """

    def __init__(self, config: SourceConfig, name: str | None = None) -> None:
        self.path = config.path
        self.name = name or _name_of(config)
        self.weight = config.weight
        self.manifest = manifest_of(config.path, config.format, image_root=config.image_root)
        self._rows = self._select(config)
        if not len(self._rows):
            wanted = f" of the tasks {', '.join(config.tasks)}" if config.tasks else ""
            raise SourceError(f"{self.path} has no rows{wanted}, and nothing can be drawn from it; check data.sources")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Record:
        return self.manifest[int(self._rows[row])]

    def place(self, row: int) -> str:
        """Where a row stands, for messages: `FILE:LINE`."""
        return self.manifest.where(int(self._rows[row]))

    def manifest_row(self, row: int) -> int:
        """Which row of the whole manifest `row` is; they differ when tasks are left out."""
        return int(self._rows[row])

    def _select(self, config: SourceConfig) -> Sequence[int] | np.ndarray:
        limit = config.max_rows if config.max_rows is not None else len(self.manifest)
        left_out = self._quarantined(config)
        if config.tasks is None and not left_out:
            return range(min(limit, len(self.manifest)))
        if config.tasks is None:
            return np.delete(np.arange(len(self.manifest)), left_out)[:limit]
        kept: list[int] = []
        unread = set(left_out)  # a row in quarantine may not even be JSON
        for row in range(len(self.manifest)):
            if len(kept) == limit:
                break
            if row not in unread and self.manifest[row].task in config.tasks:
                kept.append(row)
        return np.array(kept, np.int64)

    def _quarantined(self, config: SourceConfig) -> list[int]:
        """Rows of the manifest that the quarantine list names."""
        if config.quarantine is None:
            return []
        found = (self.manifest.find_row(row) for row in read_quarantine(config.quarantine, config.path))
        rows = [row for row in found if row is not None]
        log.info("%s: %d rows are left out, as %s says", self.path, len(rows), config.quarantine)
        return rows


def open_sources(configs: Sequence[SourceConfig]) -> list[Source]:
    """Open sources in order; a name that comes twice gets a number."""
    sources: list[Source] = []
    for config in configs:
        name = _name_of(config)
        namesakes = sum(_name_of(earlier) == name for earlier in configs[: len(sources)])
        sources.append(Source(config, f"{name}-{namesakes + 1}" if namesakes else name))
    return sources


def _name_of(config: SourceConfig) -> str:
    return config.name or config.path.stem
