"""Conversations laid end to end in one row: no padding, and nothing seen across the border between two of them.

    examples        [a a a] [b b b b b] [c c]
    input_ids       (1, 10)  a a a b b b b b c c
    position_ids    (1, 10)  0 1 2 0 1 2 3 4 0 1
    cu_seq_lens_q   (4,)     0 3 8 10                 where each conversation begins, and the end

A packed batch has no attention mask. Which tokens see each other is told by `cu_seq_lens_q` alone, in the form that
flash attention reads; `llmga.stage1.packed_attention` reads it for SDPA. Loss and gradients are those of the padded
batch of the same examples, so packing changes neither the order of the data, nor the steps of a run, nor resuming.
How long a row becomes is chance, unless `RowLimit` bounds it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmga.stage1.data import Collator, Stage1Dataset
from llmga.stage1.packed_attention import SEPARATING_ATTENTION, PackingError, refuse
from llmga.tokens import IGNORE_INDEX


class PackingCollator:
    """Packs the examples of a training batch into one row; held-out batches, whose losses are per example, are padded.

    A batch without a picture gets one more segment, the placeholders of a black picture without labels: for the same
    reason as in `Collator`, and like there it changes no loss and no gradient.

    Args:
        padded: knows pad token, placeholder and pictures; collates what is held out.
    """

    def __init__(self, padded: Collator) -> None:
        self.padded = padded

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate what `Stage1Dataset` gives.

        Returns:
            input_ids, labels, position_ids: (1, T) int64, T the tokens of all examples; the first label of each is
                IGNORE_INDEX, for nothing stands before it that could predict it.
            cu_seq_lens_q, cu_seq_lens_k: (S + 1,) int32, where the S segments begin, and T.
            max_length_q, max_length_k: tokens of the longest segment.
            pixel_values: (N, 3, H, W) float32, pictures in the order of their placeholders, N at least 1.
        """
        if any(example["held_out"] for example in examples):
            return dict(self.padded(examples))
        pictures = self.padded.pictures(examples)
        segments = [(example["input_ids"], example["labels"]) for example in examples]
        if not pictures:
            pictures = [np.zeros(self.padded.picture_shape, np.float32)]
            block = [self.padded.image_token_id] * self.padded.num_image_tokens
            segments.append((block, [IGNORE_INDEX] * len(block)))
        lengths = [len(input_ids) for input_ids, _ in segments]
        bounds = np.cumsum([0, *lengths])
        labels = np.concatenate([labels for _, labels in segments])
        labels[bounds[:-1]] = IGNORE_INDEX
        row = {
            "input_ids": np.concatenate([input_ids for input_ids, _ in segments]),
            "labels": labels,
            "position_ids": np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths),
        }
        return {
            **{name: torch.from_numpy(values).unsqueeze(0) for name, values in row.items()},
            "pixel_values": torch.from_numpy(np.stack(pictures)),
            "cu_seq_lens_q": torch.from_numpy(bounds.astype(np.int32)),
            "cu_seq_lens_k": torch.from_numpy(bounds.astype(np.int32)),  # not shared: batches are saved as they are
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }


class RowLimit:
    """Leaves out of a training batch what a packed row of so many tokens has no room for, written down and counted.

    The examples are taken in order, each that still fits, and no row is longer. Texts fit when the segment of a black
    picture fits behind them, unless an example with a picture was taken.

    Args:
        data: where the examples come from, none of them longer than a row of its own; writes down what is left out.
        max_tokens: of a row, at least `data.max_length`.
    """

    def __init__(self, data: Stage1Dataset, max_tokens: int) -> None:
        self.data, self.max_tokens = data, max_tokens

    def __call__(self, examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The examples that share the row, the first one at least; all of them when they are held out.

        Raises:
            SampleError: one has no room, and `data.too_long` is "error".
        """
        taken: list[dict[str, Any]] = []
        tokens, has_picture = 0, False
        for example in examples:
            length = len(example["input_ids"])
            shows = has_picture or example["pixel_values"] is not None
            reserved = 0 if shows else self.data.num_image_tokens
            if not example["held_out"] and tokens + length + reserved > self.max_tokens:
                reason = f"{length} tokens, and its row holds {tokens} of data.max_tokens = {self.max_tokens}"
                self.data.leave_out(example["sample_id"], example["row"], reason)
                continue
            taken.append(example)
            tokens, has_picture = tokens + length, shows
        return taken


def is_packed(batch: dict[str, Any]) -> bool:
    """True for what `PackingCollator` makes of training examples."""
    return batch.get("cu_seq_lens_q") is not None


def check_packed(batch: dict[str, Any], attention: str) -> None:
    """Stop at what would mix conversations in silence, on the way into the model.

    transformers reads packing off the inputs: an attention mask, a cache, or positions that do not restart, and every
    token sees all conversations before its own, without a word. None of it can come from a user's settings, but a
    silent mixture is worth a check that `python -O` keeps.

    Args:
        batch: arguments of the model's forward.
        attention: the LLM's `attn_implementation`.
    Raises:
        PackingError: conversations would be mixed.
    """
    if not is_packed(batch):
        refuse(batch.get("position_ids") is not None, "position_ids without cu_seq_lens_q: a packed batch lost them")
        return
    refuse(attention not in SEPARATING_ATTENTION, f"{attention} attention does not read cu_seq_lens_q")
    refuse(
        batch.get("attention_mask") is not None, "a packed batch has an attention mask: conversations would be mixed"
    )
    refuse(batch.get("use_cache") is not False, "a packed batch with use_cache: conversations would be mixed")
    refuse(batch.get("past_key_values") is not None, "a packed batch with past keys and values")
    rows, tokens = batch["input_ids"].shape
    refuse(rows != 1, f"a packed batch of {rows} rows; cu_seq_lens_q speaks of one")
    bounds, positions = batch["cu_seq_lens_q"], batch.get("position_ids")
    if positions is None:
        raise PackingError("a packed batch without position_ids: they would run on")
    refuse(positions.shape != (1, tokens), f"position_ids of shape {tuple(positions.shape)} for {tokens} tokens")
    refuse(not torch.equal(bounds, batch["cu_seq_lens_k"]), "queries and keys are cut at different places")
    refuse(
        not torch.equal(positions[0], expected_positions(bounds, tokens)),
        "position_ids do not restart at cu_seq_lens_q",
    )


def expected_positions(bounds: Tensor, tokens: int) -> Tensor:
    """Positions (T,) int64 that restart at each of `bounds` (S + 1,) but the last, which is T."""
    places = torch.arange(tokens, device=bounds.device)
    begins = bounds[torch.searchsorted(bounds, places, right=True).clamp(max=len(bounds) - 1) - 1]
    return places - begins
