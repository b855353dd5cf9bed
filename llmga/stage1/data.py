"""Rows become examples, examples become batches; every example is a pure function of (seed, index).

    Stage1Dataset   index -> (source, row, epoch) -> record -> conversation -> input_ids, labels, pixel_values
    Collator        examples -> one padded batch

What cannot be used is replaced by another row of its source, chosen by the seed, and written down, see
`llmga.bad_samples`. Nothing is ever cut.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmga.bad_samples import NO_ROOM, TRAIN, Kind, write_down
from llmga.images import PictureError, open_picture, picture_path
from llmga.mixture import Mixture, rows_per_epoch
from llmga.records import Record
from llmga.stage1.config import Stage1Config
from llmga.stage1.conversation import Encoded, encode_conversation
from llmga.stage1.model import choose_tags
from llmga.stage1.pixels import PixelEncoder, num_image_tokens
from llmga.stage1.sources import Source, open_sources
from llmga.stage1.tasks import Example, TaskSettings, build_example
from llmga.tokens import IGNORE_INDEX

MAX_NEIGHBOURS = 10  # rows tried in place of one that cannot be used; all bad by chance: never, by a wrong path: always
VALIDATION_SEED = 0  # not the run's: held-out losses of all runs are about the same examples


class SampleError(ValueError):
    """A row that cannot be trained on; the message names file, row and record."""


# ---------------------------------------------------------------- examples


@dataclass(frozen=True)
class Sample:
    """One example with everything it was made from.

    Attributes:
        index: its place in the run.
        row: of its source; another than the run's order says when that one could not be used.
        encoded: token ids and labels, pictures expanded.
        pixel_values: (3, H, W) float32, or None without a picture.
    """

    index: int
    source: Source
    row: int
    epoch: int
    record: Record
    example: Example
    encoded: Encoded
    pixel_values: np.ndarray | None


class _Unusable(Exception):
    """Why a row is replaced by another one."""

    def __init__(self, kind: Kind, reason: str, picture: str | None = None) -> None:
        super().__init__(reason)
        self.kind, self.picture = kind, picture


class Stage1Dataset(Dataset[dict[str, Any]]):
    """Examples by index, the same ones in any process, at any time, in any order.

    Chance (instruction, order, mask) is drawn from a generator made of (seed, source, row, epoch), so it depends
    neither on ranks, workers nor on where a run was resumed.

    Args:
        sources: where rows come from.
        order: index -> (source, row, epoch): a `Mixture`, or a plain list.
        processor: tokenizer, image processor (PIL backend) and placeholder of the model, a `LlavaProcessor`.
        settings: how records become conversations.
        max_length: tokens, those of the picture included.
        too_long: "drop" replaces a longer example, "error" raises.
        seed: of everything drawn.
        name: of this set in `bad_samples.jsonl`.
        bad_samples_path: where replaced rows are written down; None for nowhere.
        max_row_tokens: of a packed row. A text that leaves no room in it for the placeholders of the black picture,
            which a row of texts gets, is too long as well. None for rows of any length.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: Sequence[tuple[int, int, int]] | Mixture,
        processor: Any,
        settings: TaskSettings,
        max_length: int,
        too_long: Literal["drop", "error"] = "drop",
        seed: int = 0,
        name: str = TRAIN,
        bad_samples_path: Path | None = None,
        max_row_tokens: int | None = None,
    ) -> None:
        self.name = name
        self.sources = list(sources)
        self.order = order
        self.settings = settings
        self.max_length, self.too_long, self.seed = max_length, too_long, seed
        self.bad_samples_path, self.max_row_tokens = bad_samples_path, max_row_tokens
        self.tokenizer, self.image_token = processor.tokenizer, processor.image_token
        self.pixels = PixelEncoder(processor.image_processor)
        self.num_image_tokens = num_image_tokens(processor, self.pixels.shape)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What batches are made of.

        Returns:
            input_ids, labels (lists of int), pixel_values ((3, H, W) float32 or None), sample_id (the index), row (of
            its source), held_out.

        Raises:
            SampleError: see `sample`.
        """
        sample = self.sample(index)
        return {
            "input_ids": sample.encoded.input_ids,
            "labels": sample.encoded.labels,
            "pixel_values": sample.pixel_values,
            "sample_id": index,
            "row": sample.row,
            "held_out": self.name != TRAIN,
        }

    def sample(self, index: int) -> Sample:
        """The example at `index`, with its record and its picture.

        Raises:
            SampleError: the record lacks what its task needs, no token would be trained, the example is too long and
                `too_long` is "error", or too many rows tried in its place are unusable as well.
            RecordError: the row cannot be read.
        """
        number, row, epoch = self.order[index]
        source = self.sources[number]
        tried: list[str] = []
        for attempt, taken in enumerate(self._candidates(number, row, epoch)):
            rng = np.random.default_rng([self.seed, number, row, epoch, attempt])
            record = source[taken]
            try:
                return Sample(index, source, taken, epoch, record, *self._build(record, source, taken, rng))
            except _Unusable as problem:
                self._write_down(index, source, taken, record, problem)
                where = f"{problem.picture}: " if problem.picture else ""
                tried.append(f"row {source.manifest_row(taken)}, {where}{problem}")
        raise SampleError(
            f"{len(tried)} rows of {source.path} tried one after the other cannot be used, so image_root or "
            f"a limit (data.max_length, data.max_tokens) is likely wrong; they are {'; '.join(tried)}"
        )

    def leave_out(self, index: int, row: int, reason: str) -> None:
        """Write an example down that its batch has no room for.

        Args:
            index, row: `sample_id` and `row` of the example.
        Raises:
            SampleError: `too_long` is "error".
        """
        source = self.sources[self.order[index][0]]
        record = source[row]
        if self.too_long == "error":
            raise SampleError(
                f"{source.place(row)}: record {record.id!r}: {reason}; raise data.max_tokens, or set "
                "data.too_long=drop to leave it out"
            )
        self._write_down(index, source, row, record, _Unusable(NO_ROOM, reason))

    def _candidates(self, number: int, row: int, epoch: int) -> Iterator[int]:
        """The row itself, then others of its source in its place, drawn by the seed, none twice."""
        yield row
        others = len(self.sources[number]) - 1
        rng = np.random.default_rng([self.seed, number, row, epoch, MAX_NEIGHBOURS + 1])
        for other in rng.choice(others, min(others, MAX_NEIGHBOURS), replace=False) if others else ():
            yield int(other) + (other >= row)

    def _build(
        self, record: Record, source: Source, row: int, rng: np.random.Generator
    ) -> tuple[Example, Encoded, np.ndarray | None]:
        """Conversation, tokens and pixels of one record."""
        root = source.manifest.image_root
        try:
            example = build_example(record, rng, self.settings, lambda name: open_picture(picture_path(root, name)))
            encoded = encode_conversation(
                self.tokenizer, example.messages, self.image_token, self.num_image_tokens, record.id
            )
        except PictureError as error:
            raise _Unusable("picture", error.reason, str(error.path)) from error
        except ValueError as error:
            raise SampleError(f"{source.place(row)}: {error}") from error
        if limit := self._exceeded(len(encoded.input_ids), example.picture is not None):
            reason = f"record {record.id!r} has {len(encoded.input_ids)} tokens, more than {limit}"
            if self.too_long == "error":
                raise SampleError(f"{source.place(row)}: {reason}; raise it, or set data.too_long=drop to leave it out")
            raise _Unusable("too_long", reason)
        return example, encoded, None if example.picture is None else self.pixels(example.picture)

    def _exceeded(self, tokens: int, has_picture: bool) -> str | None:
        """The limit that an example is too long for, in words; None where it fits."""
        if tokens > self.max_length:
            return f"data.max_length = {self.max_length}"
        if self.max_row_tokens is None or has_picture or tokens + self.num_image_tokens <= self.max_row_tokens:
            return None
        black = f"the {self.num_image_tokens} of the black picture that a row of texts gets"
        return f"data.max_tokens = {self.max_row_tokens} has room for beside {black}"

    def _write_down(self, index: int, source: Source, row: int, record: Record, problem: _Unusable) -> None:
        if self.bad_samples_path is None:
            return
        entry = {
            "set": self.name,
            "index": index,
            "kind": problem.kind,
            "path": str(source.path),
            "row": source.manifest_row(row),
            "id": record.id,
            "picture": problem.picture,
            "reason": str(problem),
        }
        write_down(self.bad_samples_path, entry)


def build_datasets(
    cfg: Stage1Config, processor: Any, total: int | None = None, bad_samples_path: Path | None = None
) -> tuple[Stage1Dataset, dict[str, Stage1Dataset]]:
    """The training set of a run, and its held-out sets by name.

    Args:
        cfg: of the run.
        processor: a `LlavaProcessor`, its image processor with the PIL backend.
        total: examples in the whole run; None for `run.epochs` times the rows of all sources that are drawn from.
        bad_samples_path: where rows are written down that had to be replaced, `BAD_SAMPLES_FILE` in the run folder;
            held-out sets write there too, under their own names.
    Returns:
        The training set in the order of its `Mixture` (`.order`), and per entry of `data.validation` a set that is the
        same in all runs: its rows in order, each once.
    Raises:
        SampleError, RecordError, MixtureError: a source without rows, or one that cannot be read.
    """
    sources = open_sources(cfg.data.sources)
    lengths, weights = [len(source) for source in sources], [source.weight for source in sources]
    if total is None:
        total = math.ceil((cfg.run.epochs or 1.0) * rows_per_epoch(lengths, weights))
    order = Mixture(lengths, weights, total, cfg.run.seed, [source.name for source in sources])
    settings = TaskSettings.from_config(cfg.data, choose_tags(cfg.model.tag_name, cfg.model.path))

    def build(
        name: str, sources: list[Source], order: Any, seed: int, max_row_tokens: int | None = None
    ) -> Stage1Dataset:
        limits = cfg.data.max_length, cfg.data.too_long
        return Stage1Dataset(sources, order, processor, settings, *limits, seed, name, bad_samples_path, max_row_tokens)

    train = build(TRAIN, sources, order, cfg.run.seed, cfg.data.max_tokens)
    held_out = open_sources(cfg.data.validation)
    in_order = [[(0, row, 0) for row in range(len(source))] for source in held_out]
    return train, {
        source.name: build(f"validation {source.name}", [source], order, VALIDATION_SEED)
        for source, order in zip(held_out, in_order, strict=True)
    }


# ---------------------------------------------------------------- batches


class Collator:
    """Pads examples to one batch; a batch without a picture gets a block that keeps all ranks in step.

    A rank whose batch has no picture would run neither vision tower nor projector, and wait for ever for ranks that
    do. So the shortest row of such a batch gets the placeholders of one black picture behind its end, with attention 0
    and no label: they change no loss and no gradient, but every rank runs the same modules.

    Args:
        pad_id: token behind the end of shorter rows.
        image_token_id: the picture's placeholder.
        num_image_tokens: placeholders per picture.
        picture_shape: (3, H, W) of the pixel values of one picture.
    """

    def __init__(
        self, pad_id: int, image_token_id: int, num_image_tokens: int, picture_shape: tuple[int, int, int]
    ) -> None:
        self.pad_id, self.image_token_id = pad_id, image_token_id
        self.num_image_tokens, self.picture_shape = num_image_tokens, tuple(picture_shape)

    @classmethod
    def of(cls, dataset: Stage1Dataset) -> "Collator":
        """The collator that fits a dataset's tokenizer and pictures."""
        tokenizer = dataset.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token and save it with the model")
        image_token_id = tokenizer.convert_tokens_to_ids(dataset.image_token)
        return cls(tokenizer.pad_token_id, image_token_id, dataset.num_image_tokens, dataset.pixels.shape)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate what `Stage1Dataset` gives; `sample_id` stays out, for the model takes no such argument.

        Returns:
            input_ids, labels, attention_mask: (B, L) int64, padded on the right.
            pixel_values: (N, 3, H, W) float32, pictures in the order of their placeholders, N at least 1.
        """
        pictures = self.pictures(examples)
        lengths = np.array([len(example["input_ids"]) for example in examples])
        room = np.zeros_like(lengths)  # for the block of a picture that is not there
        if not pictures:
            pictures = [np.zeros(self.picture_shape, np.float32)]
            room[lengths.argmin()] = self.num_image_tokens

        shape = len(examples), int((lengths + room).max())
        input_ids, labels = np.full(shape, self.pad_id), np.full(shape, IGNORE_INDEX)
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            input_ids[row, :length] = example["input_ids"]
            input_ids[row, length : length + room[row]] = self.image_token_id
            labels[row, :length] = example["labels"]
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": (np.arange(shape[1]) < lengths[:, None]).astype(np.int64),
            "pixel_values": np.stack(pictures),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def pictures(self, examples: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """Pixel values of the examples that have a picture, each checked to have its placeholders."""
        for example in examples:
            expected = 0 if example["pixel_values"] is None else self.num_image_tokens
            found = example["input_ids"].count(self.image_token_id)
            assert found == expected, f"sample {example['sample_id']}: {found} picture tokens, expected {expected}"
        return [example["pixel_values"] for example in examples if example["pixel_values"] is not None]
