"""Prompts longer than CLIP's window: cut into chunks of 75 tokens, each encoded alone, joined to one sequence.

These functions are the published rules in their plainest form; `prompt_encoder` puts layouts, masks and pipelines on
top, with the same parts.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmga.prompt_chunks import tokenize_prompts, warn_of_lost_words
from llmga.stage2.chunks import MAX_ROWS, EncodedRows, chunk_rows, encode_rows, join_rows
from llmga.tokens import CHUNK_TOKENS, CLIP_WINDOW


def tokenize_long_prompt(tokenizer: Any, prompts: str | Sequence[str], max_chunks: int) -> Tensor:
    """Tokens of a batch of prompts: BOS, text, padding, EOS, as many chunks for all as the longest prompt fills.

    A log line names the words that are lost where a prompt is longer than `max_chunks` chunks.

    Args:
        tokenizer: a CLIP tokenizer of transformers.
        prompts: one text or several; empty ones are allowed.
        max_chunks: limit of chunks of 75 tokens.
    Returns:
        (B, 75 * K + 2) int64, 1 <= K <= max_chunks.
    Raises:
        ValueError: there is no prompt, one is not text, or `max_chunks` is below 1.
    Source: the published stage-2 code; padding comes before the one EOS, also where it is not EOS itself (SDXL).
    """
    tokens = tokenize_prompts(tokenizer, prompts, max_chunks)
    warn_of_lost_words(tokens, max_chunks)
    num_chunks = max(prompt.num_chunks for prompt in tokens)
    chunks = split_chunks([prompt.ids for prompt in tokens], [num_chunks] * len(tokens))
    rows = chunk_rows(chunks, tokenizer, eos_after_text=False)
    return join_rows(rows[:, :, None], torch.full((len(tokens),), num_chunks), keep_middle=False)[0].squeeze(2)


def encode_long_prompt(
    input_ids: Tensor,
    text_encoder: Any,
    *,
    keep_middle: bool = False,
    clip_skip: int = 0,
    max_rows: int = MAX_ROWS,
) -> Tensor:
    """Encode prompts longer than CLIP's window (SD1.5): each chunk alone, all in one call, equal ones once.

    Differentiable with respect to the encoder.

    Args:
        input_ids: (B, 75 * K + 2) integers: BOS, K chunks, EOS, as `tokenize_long_prompt` builds them.
        text_encoder: a CLIPTextModel.
        keep_middle: keep the EOS and BOS between chunks.
        clip_skip: how many of the last layers to pass over; the final layer norm is applied all the same.
        max_rows: chunks in one call of the encoder.
    Returns:
        (B, 75 * K + 2, D) last hidden states, one per input token; (B, 77 * K, D) with `keep_middle`.
    Raises:
        ValueError: the length is not 75 * K + 2, or `clip_skip` exceeds the layers.
    Source: the published stage-2 code; equality is shown in tests/parity/test_long_prompt.py.
    """
    encoded, num_chunks = _encode_ids(input_ids, text_encoder, _checked_skip(clip_skip), True, max_rows)
    return join_rows(encoded.states, num_chunks, keep_middle)[0]


def encode_long_prompt_sdxl(
    input_ids: Tensor,
    input_ids_2: Tensor,
    text_encoder: Any,
    text_encoder_2: Any,
    *,
    keep_middle: bool = False,
    clip_skip: int = 0,
    max_rows: int = MAX_ROWS,
) -> tuple[Tensor, Tensor]:
    """Encode prompts longer than CLIP's window with SDXL's two encoders, as published.

    Where the two tokenizers disagree on the number of chunks, the longer sequence is cut to the shorter.

    Args:
        input_ids, input_ids_2: (B, 75 * K + 2) integers, from each encoder's own tokenizer by `tokenize_long_prompt`.
        text_encoder: a CLIPTextModel.
        text_encoder_2: a CLIPTextModelWithProjection.
        keep_middle, max_rows: as in `encode_long_prompt`.
        clip_skip: layers to pass over before the penultimate, which is what SDXL reads.
    Returns:
        (B, S, D1 + D2) hidden states of both encoders side by side, without the final layer norm; and (B, P), the
        second encoder's projected vector of each prompt's last chunk.
    Raises:
        ValueError: a length is not 75 * K + 2, the batches differ, or the second encoder has no projection.
    Source: the published stage-2 code; equality is shown in tests/parity/test_long_prompt.py.
    """
    if len(input_ids) != len(input_ids_2):
        raise ValueError(
            f"input_ids has {len(input_ids)} prompts, input_ids_2 has {len(input_ids_2)}; expected as many"
        )
    skipped = 1 + _checked_skip(clip_skip)
    encoded, num_chunks = _encode_ids(input_ids, text_encoder, skipped, False, max_rows)
    encoded_2, num_chunks_2 = _encode_ids(input_ids_2, text_encoder_2, skipped, False, max_rows)
    joined = [join_rows(encoded.states, num_chunks, keep_middle)[0]]
    joined += [join_rows(encoded_2.states, num_chunks_2, keep_middle)[0]]
    return side_by_side(joined), pool_rows(encoded_2, num_chunks_2, "last")


def split_chunks(values: Iterable[Sequence[Any]], num_chunks: Sequence[int]) -> list[Sequence[Any]]:
    """What each chunk of each prompt holds of its values (one per token); chunks behind the text are empty."""
    return [
        own[CHUNK_TOKENS * chunk : CHUNK_TOKENS * (chunk + 1)]
        for own, count in zip(values, num_chunks, strict=True)
        for chunk in range(count)
    ]


def side_by_side(sequences: Sequence[Tensor]) -> Tensor:
    """(B, S, D) states of several encoders next to each other, cut to the shortest sequence."""
    length = min(states.shape[1] for states in sequences)
    return torch.cat([states[:, :length] for states in sequences], dim=2)


def pool_rows(encoded: EncodedRows, num_chunks: Tensor, chunk: str, num_text_chunks: Tensor | None = None) -> Tensor:
    """One projected vector for each prompt: of its "first" or "last" chunk, or the "mean" over those with text.

    Args:
        num_chunks: (B,) windows of each prompt.
        num_text_chunks: (B,) those of them that hold text; None: all.
    Returns:
        (B, P).
    Raises:
        ValueError: the encoder has no projection.
    """
    if encoded.projected is None:
        raise ValueError("the text encoder gives no text_embeds to pool; expected a CLIPTextModelWithProjection")
    device = encoded.projected.device
    end = num_chunks.cumsum(0)
    start = end - num_chunks
    if chunk == "last":
        return encoded.projected[(end - 1).to(device)]
    if chunk == "first":
        return encoded.projected[start.to(device)]
    count = num_chunks if num_text_chunks is None else num_text_chunks
    row = torch.arange(len(encoded.projected))
    share = ((row >= start[:, None]) & (row < (start + count)[:, None])) / count[:, None]  # (B, R)
    return share.to(encoded.projected) @ encoded.projected


def _encode_ids(
    input_ids: Tensor, text_encoder: Any, skipped_layers: int, final_norm: bool, max_rows: int
) -> tuple[EncodedRows, Tensor]:
    """Encode the windows of (B, 75 * K + 2) tokens; also K for each prompt."""
    length = input_ids.shape[1] if input_ids.dim() == 2 else 0
    if length <= 2 or (length - 2) % CHUNK_TOKENS:
        found = f"{length} tokens" if length else f"the shape {tuple(input_ids.shape)}"
        raise ValueError(f"input_ids has {found}, expected (B, 75 * K + 2); build it with tokenize_long_prompt")
    rows = input_ids.long().unfold(1, CLIP_WINDOW, CHUNK_TOKENS).clone()  # (B, K, 77), neighbours share two columns
    rows[:, :, 0], rows[:, :, -1] = input_ids[:, :1], input_ids[:, -1:]
    encoded = encode_rows(rows.flatten(0, 1), text_encoder, skipped_layers, final_norm, max_rows)
    return encoded, torch.full((rows.shape[0],), rows.shape[1])


def _checked_skip(clip_skip: int) -> int:
    if clip_skip < 0:
        raise ValueError(f"clip_skip is {clip_skip}, expected 0 (the usual layer) or more")
    return clip_skip
