"""CLIP windows as rows: built from tokens, encoded all at once, joined to one sequence per prompt.

B prompts, R rows (windows of 77 positions) of all prompts in order, K rows of the longest prompt, D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmga.tokens import CHUNK_TOKENS, CLIP_WINDOW

MAX_ROWS = 32  # windows in one call of a text encoder: bounds memory, and more at once are slower on a CPU's caches


def chunk_rows(chunks: Sequence[Sequence[int]], tokenizer: Any, eos_after_text: bool) -> Tensor:
    """One CLIP window for each chunk of a prompt.

    Args:
        chunks: content tokens, at most 75 each.
        tokenizer: gives the ids of BOS, EOS and padding.
        eos_after_text: BOS, text, EOS, padding, as CLIP was trained; else BOS, text, padding, EOS, as published.
    Returns:
        (R, 77) int64.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for chunk in chunks:
        padding = [pad] * (CHUNK_TOKENS - len(chunk))
        rows.append([bos, *chunk, eos, *padding] if eos_after_text else [bos, *chunk, *padding, eos])
    return torch.tensor(rows, dtype=torch.int64)


class EncodedRows(NamedTuple):
    """What a text encoder says of R windows: hidden states (R, 77, D), and its projected vectors (R, P) or None."""

    states: Tensor
    projected: Tensor | None


def encode_rows(
    rows: Tensor, text_encoder: Any, skipped_layers: int = 0, final_norm: bool = True, max_rows: int = MAX_ROWS
) -> EncodedRows:
    """Run the text encoder on windows, each distinct one once, in as few calls as `max_rows` allows.

    Args:
        rows: (R, 77) int64; on the CPU, distinct ones are found without waiting for the encoder's device.
        text_encoder: a CLIPTextModel, or a CLIPTextModelWithProjection, which also gives projected vectors.
        skipped_layers: how many of the last layers' outputs to pass over.
        final_norm: apply the layer norm that follows the last layer.
    Raises:
        ValueError: the encoder has fewer layers than are skipped.
    """
    device = getattr(text_encoder, "device", rows.device)
    distinct, place = (found.to(device) for found in torch.unique(rows, dim=0, return_inverse=True))
    parts = [_encode(part, text_encoder, skipped_layers, final_norm) for part in distinct.split(max_rows)]
    states = torch.cat([part.states for part in parts])
    projected = [part.projected for part in parts if part.projected is not None]
    return EncodedRows(states[place], torch.cat(projected)[place] if projected else None)


def _encode(rows: Tensor, text_encoder: Any, skipped_layers: int, final_norm: bool) -> EncodedRows:
    """One call of the text encoder."""
    if final_norm and not skipped_layers:
        output = text_encoder(rows)
        return EncodedRows(output.last_hidden_state, getattr(output, "text_embeds", None))
    output = text_encoder(rows, output_hidden_states=True)
    num_layers = len(output.hidden_states) - 1  # the first are the embeddings
    if skipped_layers > num_layers:
        raise ValueError(f"clip_skip passes over {skipped_layers} layers of a text encoder that has {num_layers}")
    states = output.hidden_states[-1 - skipped_layers]
    if final_norm:
        states = getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states)
    return EncodedRows(states, getattr(output, "text_embeds", None))


def join_rows(values: Tensor, num_chunks: Tensor, keep_middle: bool) -> tuple[Tensor, Tensor]:
    """Join the windows of each prompt to one sequence, padded with zeros on the right.

    Args:
        values: (R, 77, D), the windows of the first prompt, of the second, and so on.
        num_chunks: (B,) int64 on the CPU, summing to R.
        keep_middle: keep all 77 positions of each window; else the EOS and BOS between two chunks go.
    Returns:
        (B, S, D) with S = 77 K or 75 K + 2, and (B, S) bool: False where a shorter prompt is padded.
    """
    batch, longest, device = len(num_chunks), int(num_chunks.max()), values.device
    present = torch.arange(longest) < num_chunks[:, None]  # (B, K)
    if bool(present.all()):
        grid = values.unflatten(0, (batch, longest))
    else:
        slots = present.flatten().nonzero().squeeze(1).to(device)
        grid = values.new_zeros(batch * longest, *values.shape[1:]).index_copy(0, slots, values)
        grid = grid.unflatten(0, (batch, longest))  # (B, K, 77, D)
    if keep_middle:
        joined, lengths = grid.flatten(1, 2), CLIP_WINDOW * num_chunks
    else:
        body = grid[:, :, 1:-1].flatten(1, 2)  # (B, 75 K, D)
        joined = torch.cat([grid[:, 0, :1], body, body.new_zeros(batch, 1, body.shape[2])], dim=1)
        prompt = torch.arange(batch, device=device)
        last = num_chunks.to(device)
        joined[prompt, CHUNK_TOKENS * last + 1] = grid[prompt, last - 1, -1]  # each prompt's own last EOS
        lengths = CHUNK_TOKENS * num_chunks + 2
    return joined, (torch.arange(joined.shape[1]) < lengths[:, None]).to(device)
