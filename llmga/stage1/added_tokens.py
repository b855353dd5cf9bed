"""New tokens, and their rows in the input embedding and the output head: tied or not, with rows to spare or without.

A new row starts at the mean of the trained rows, so an untrained token is neither likely nor out of the distribution.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AddedToken

from llmga.tokens import GenerationTags

if TYPE_CHECKING:
    from llmga.stage1.model import Mllm


def add_generation_tags(mllm: "Mllm", tags: GenerationTags) -> int:
    """Make each of `tags` a token of its own. Without this call tags are plain text, spelled in word pieces.

    The tokens are not "special": decoding without special tokens keeps them in the reply.

    Returns:
        How many tokens were added: 2, or 0 when they are there already.
    """
    mllm.write_tags(tags)
    num_known = num_token_ids(mllm.tokenizer)
    added = add_tag_tokens(mllm.tokenizer, tags)
    if added:
        give_rows(mllm.model, num_known, num_token_ids(mllm.tokenizer))
    return added


def add_tag_tokens(tokenizer: Any, tags: GenerationTags) -> int:
    """Make tags tokens that are not special; returns how many the tokenizer did not know."""
    literals = [AddedToken(literal, special=False, normalized=False) for literal in (tags.open, tags.close)]
    return tokenizer.add_tokens([token for token in literals if token.content not in tokenizer.get_added_vocab()])


def num_token_ids(tokenizer: Any) -> int:
    """How many rows a tokenizer needs: one past its highest id, for ids can have gaps that `len` does not count."""
    return 1 + max(tokenizer.get_vocab().values())


def give_rows(model: Any, num_known: int, num_needed: int, multiple: int = 1) -> None:
    """Make rows for the ids from `num_known` up to `num_needed`. Rows to spare are used before the embedding grows.

    Args:
        model: a causal LM or a LLaVA; weights that ZeRO-3 has sharded are gathered.
        num_known: ids below it are trained.
        multiple: a size that has to grow is rounded up to a multiple of this; the rows on top are means too.
    """
    rows = model.config.get_text_config().vocab_size
    last = num_needed
    if num_needed > rows:
        last = -(-num_needed // multiple) * multiple
        model.resize_token_embeddings(last, mean_resizing=False)
    num_known = min(num_known, rows)
    weights = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not weights[0]:  # not tied
        weights.append(model.get_output_embeddings().weight)
    with torch.no_grad(), _whole(weights):
        for weight in weights:
            weight[num_known:last] = weight[:num_known].mean(dim=0, dtype=torch.float32).to(weight.dtype)


@contextmanager
def _whole(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has sharded; what is written to them, the same on all ranks, is kept."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    for parameter in sharded:
        parameter.all_gather()
    yield
    for parameter in sharded:
        parameter.partition(has_been_updated=True)
