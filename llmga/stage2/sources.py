"""Manifests of pictures with prompts: one entry of `data.sources` or `data.validation`, opened."""

import logging
from collections.abc import Sequence

import numpy as np

from llmga.quarantine import read_quarantine
from llmga.records import Record, open_manifest
from llmga.stage2.config import SourceConfig

logger = logging.getLogger(__name__)
_LOOKED_AT = 64  # rows of each source that are checked before training


class Stage2DataError(ValueError):
    """A manifest or row that stage 2 cannot train on; the message names it and says what to do."""


class Source:
    """The rows of one entry that have a picture and are not in quarantine, up to `max_rows`.

    Raises:
        Stage2DataError: no row is left, or the first ones lack a picture or a prompt.
    """

    def __init__(self, config: SourceConfig, key: str) -> None:
        self.key, self.path, self.text, self.weight = key, config.path, config.text, config.weight
        self.name = config.name or config.path.stem
        self.manifest = open_manifest(config.path, config.image_root)
        self.image_root = self.manifest.image_root
        rows = np.arange(len(self.manifest))
        if config.quarantine is not None:
            left_out = read_quarantine(config.quarantine, config.path)
            logger.info("%s: %d rows are left out, as %s says", self.path, len(left_out), config.quarantine)
            rows = np.delete(rows, left_out)
        if config.tasks is not None:
            rows = np.array([row for row in rows if self.manifest[int(row)].task in config.tasks], np.int64)
        self.rows = rows[: config.max_rows]
        if not len(self.rows):
            wanted = f" of the tasks {', '.join(config.tasks)}" if config.tasks else ""
            raise Stage2DataError(f"{self.path} has no rows{wanted}, and nothing can be drawn from it; check {key}")
        for row in range(min(_LOOKED_AT, len(self))):
            self.check(row, self[row])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Record:
        return self.manifest[int(self.rows[row])]

    def place(self, row: int) -> str:
        """Where a row stands, for messages: `FILE:LINE`."""
        return self.manifest.where(int(self.rows[row]))

    def check(self, row: int, record: Record) -> str:
        """The text that a row is trained on.

        Raises:
            Stage2DataError: the row has no picture or no such text.
        """
        if not record.image:
            raise Stage2DataError(
                f"{self.place(row)} (id {record.id!r}) has no picture; stage 2 trains on pictures with prompts, so "
                "leave rows of other tasks out of its manifest"
            )
        text = getattr(record, self.text)
        if not text or not text.strip():
            if self.text == "prompt":
                raise Stage2DataError(
                    f"{self.place(row)} (id {record.id!r}) has no prompt; record prompts with a trained MLLM first "
                    f"(`make record`, scripts/record_prompts.py), or set {self.key}.text=caption to train on captions"
                )
            raise Stage2DataError(f"{self.place(row)} (id {record.id!r}) has no caption; set {self.key}.text=prompt")
        return str(text)


def open_sources(configs: Sequence[SourceConfig], key: str) -> list[Source]:
    """Open the entries of `data.sources` or `data.validation`, whose name is `key`."""
    return [Source(config, f"{key}.{number}") for number, config in enumerate(configs)]
