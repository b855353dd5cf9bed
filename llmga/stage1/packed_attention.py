"""SDPA over the segments of a packed row: each conversation attends to itself alone, at the cost of itself alone.

transformers' own SDPA separates packed conversations with a dense (T, T) mask. That costs T squared where the segments
need the sum of their squares, forbids the fused causal kernels, and a mask of 16k tokens has 256 million entries. Here
the row is cut at `cu_seq_lens_q` and transformers' SDPA called once per segment, so there is no mask at all.

The function is registered under transformers' public tables of attentions and masks. What is not packed (held-out
batches, generation) goes to transformers' SDPA as it is.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"
SEPARATING_ATTENTION = (PACKED_SDPA, "flash_attention_2")  # those that read cu_seq_lens_q
_bounds_of_batches = WeakTensorKeyDictionary()  # reading them from a GPU waits for all that is under way: not per layer


class PackingError(RuntimeError):
    """Conversations of a packed row would be mixed: a mistake of ours, or a library that changed."""


def refuse(mixed: bool, what: str) -> None:
    """Raise a PackingError where conversations would be mixed."""
    if mixed:
        raise PackingError(what)


def use_packed_sdpa(language_model: PreTrainedModel) -> None:
    """Let an LLM separate the segments of packed rows; the vision tower keeps its attention."""
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, no_mask_where_none_is_needed)
    language_model.set_attn_implementation(PACKED_SDPA)


@torch.compiler.disable  # segments differ in number and length with every batch, and so would what is compiled
def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: the attention layer.
        query, key, value: (B, H, T, D) and (B, G, T, D), B = 1 when packed.
        attention_mask: None when packed.
        dropout, scaling: as in `scaled_dot_product_attention`.
        sliding_window: how many tokens back a token sees, itself included; None for all.
        cu_seq_lens_q: (S + 1,) int32, where the segments begin, and T; None when the row is not packed.
    Returns:
        (B, T, H, D), and no attention weights.
    Raises:
        PackingError: the row has a mask, or other bounds than its own.
    """
    length, num_keys = query.shape[2], key.shape[2]
    if cu_seq_lens_q is None and (attention_mask is not None or length != num_keys):  # padded, or generating
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    bounds = [0, length] if cu_seq_lens_q is None else _bounds(cu_seq_lens_q)
    refuse(attention_mask is not None, "a packed row came with an attention mask: conversations would be mixed")
    whole = bounds[0] == 0 and bounds[-1] == length == num_keys
    refuse(not whole, f"segments end at {bounds[-1]}, the row at {num_keys}")
    lengths = [end - begin for begin, end in pairwise(bounds)]
    # `split` has one backward pass for all parts; a slice would fill a whole row of zeros for each of them.
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    segments = []
    for length, part in zip(lengths, parts, strict=True):
        mask = None if sliding_window is None else _window_mask(length, sliding_window, query.device)
        segments.append(sdpa_attention_forward(module, *part, mask, dropout, scaling)[0])
    return torch.cat(segments, dim=1), None


def no_mask_where_none_is_needed(
    batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """Mask for `packed_sdpa`: none for rows without padding, which it cuts and masks itself; else as for SDPA."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)


def _bounds(cu_seq_lens: Tensor) -> list[int]:
    """The numbers in `cu_seq_lens` (S + 1,), read once for all layers of a forward pass and of its recomputation."""
    bounds: list[int] | None = _bounds_of_batches.get(cu_seq_lens)
    if bounds is None:
        bounds = _bounds_of_batches[cu_seq_lens] = cu_seq_lens.tolist()
    return bounds


def _window_mask(length: int, window: int, device: torch.device) -> Tensor | None:
    """(1, 1, length, length) bool, True where seen; None when the window reaches over the whole segment."""
    if length <= window:
        return None
    places = torch.arange(length, device=device)
    back = places[:, None] - places[None, :]
    return ((back >= 0) & (back < window))[None, None]
