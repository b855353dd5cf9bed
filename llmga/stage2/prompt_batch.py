"""Prompts on their way to the UNet: tokens of a batch before the text encoders, embeddings after them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from llmga.prompt_chunks import PromptTokens, tokenize_prompts, warn_of_lost_words
from llmga.stage2.chunks import EncodedRows, chunk_rows
from llmga.stage2.long_prompt import split_chunks
from llmga.stage2.prompt_layout import PromptLayout
from llmga.stage2.prompt_weights import read_brackets
from llmga.tokens import CLIP_WINDOW, neutralise


class Unconditional(Enum):
    """The kind of `UNCONDITIONAL`, which has one value and survives pickling."""

    UNCONDITIONAL = "unconditional"


UNCONDITIONAL: Final = Unconditional.UNCONDITIONAL  # in place of a prompt: the model's own input for "no prompt"
Prompt = str | Unconditional


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """One tokenizer's windows for a batch of B prompts.

    Attributes:
        rows: (R, 77) int64, the windows of the first prompt, of the second, and so on.
        weights: (R, 77) float32, or None when no weight differs from 1.
        num_chunks: (B,) int64, windows of each prompt.
        num_text_chunks: (B,) int64, those of them that hold text; 1 for an empty prompt.
    """

    rows: Tensor
    weights: Tensor | None
    num_chunks: Tensor
    num_text_chunks: Tensor


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """A batch of prompts as tokens: what a data loader's worker hands to the process with the models.

    Attributes:
        towers: for each text encoder its windows.
        unconditional: (B,) bool, where the model's own input for "no prompt" is meant.
        prompts: length and lost words of each prompt, by the tokenizer that keeps the least of it.
    """

    towers: tuple[ChunkRows, ...]
    unconditional: Tensor
    prompts: tuple[PromptTokens, ...]


class PromptTokenizer:
    """Turns texts into a `PromptBatch` under one layout; holds no models, so data loaders can carry it."""

    def __init__(self, tokenizers: Sequence[Any], layout: PromptLayout) -> None:
        """Take CLIP tokenizers of transformers, one for each text encoder."""
        self.tokenizers = tuple(tokenizers)
        self.layout = layout

    def __call__(self, prompts: Prompt | Sequence[Prompt], weighted: bool = False) -> PromptBatch:
        """Tokenize a batch; a log line names words that are lost.

        Args:
            prompts: texts, or `UNCONDITIONAL` in place of any.
            weighted: read brackets as weights.
        Raises:
            PromptError: there is no prompt, one is not text, or its brackets cannot be read.
        """
        asked = [prompts] if isinstance(prompts, str | Unconditional) else list(prompts)
        texts = ["" if prompt is UNCONDITIONAL else prompt for prompt in asked]
        read = read_brackets if weighted else None
        max_chunks = self.layout.max_chunks
        by_tower = [
            tokenize_prompts(tokenizer, self._literal(texts, tokenizer), max_chunks, read)
            for tokenizer in self.tokenizers
        ]
        lengths = tuple(max(same, key=lambda prompt: len(prompt.lost_words)) for same in zip(*by_tower, strict=True))
        warn_of_lost_words(lengths, max_chunks)
        counts = self._count_chunks(by_tower)
        return PromptBatch(
            tuple(map(self._rows, self.tokenizers, by_tower, counts)),
            torch.tensor([prompt is UNCONDITIONAL for prompt in asked]),
            lengths,
        )

    def _literal(self, texts: list[Any], tokenizer: Any) -> list[Any]:
        """Texts in which a literal BOS or EOS is plain text; as published, it would be read as one."""
        if not self.layout.eos_after_text:
            return texts
        special = (tokenizer.bos_token, tokenizer.eos_token)
        return [neutralise(text, special) if isinstance(text, str) else text for text in texts]

    def _count_chunks(self, by_tower: Sequence[Sequence[PromptTokens]]) -> list[list[int]]:
        """Windows of each prompt for each tokenizer."""
        counts = [[prompt.num_chunks for prompt in tokens] for tokens in by_tower]
        if not self.layout.own_chunks:
            return [[max(tower)] * len(tower) for tower in counts]
        return [[max(same) for same in zip(*counts, strict=True)]] * len(counts)

    def _rows(self, tokenizer: Any, tokens: Sequence[PromptTokens], num_chunks: list[int]) -> ChunkRows:
        """One tokenizer's windows."""
        chunks = split_chunks([prompt.ids for prompt in tokens], num_chunks)
        weights = None
        if any(weight != 1 for prompt in tokens for weight in prompt.weights or ()):
            parts = split_chunks([prompt.weights or () for prompt in tokens], num_chunks)
            weights = torch.tensor([[1.0, *part, *[1.0] * (CLIP_WINDOW - 1 - len(part))] for part in parts])
        return ChunkRows(
            chunk_rows(chunks, tokenizer, self.layout.eos_after_text),
            weights,
            torch.tensor(num_chunks),
            torch.tensor([prompt.num_chunks for prompt in tokens]),
        )


OwnWindows = list[tuple[np.ndarray, np.ndarray | None]]  # per text encoder: states and projected vectors, see below


def join_windows(examples: Sequence[OwnWindows], prompts: PromptBatch) -> tuple[EncodedRows, ...]:
    """What the text encoders say of a batch, from what is known of each of its prompts alone.

    Args:
        examples: for each prompt and text encoder (1 + K, 77, D) states and (1 + K, P) projected vectors or None: of
            the empty text's window, then of the prompt's own; the former fills up where a batch wants more windows.
        prompts: the same prompts as tokens.
    """
    encoded = []
    for tower, windows in enumerate(prompts.towers):
        states, projected = [], []
        for example, count in zip(examples, windows.num_chunks.tolist(), strict=True):
            own = len(example[tower][0]) - 1
            assert own <= count
            order = [*range(1, own + 1), *[0] * (count - own)]
            states.append(example[tower][0][order])
            vectors = example[tower][1]
            if vectors is not None:
                projected.append(vectors[order])
        joined = [torch.from_numpy(np.concatenate(parts)) if parts else None for parts in (states, projected)]
        assert joined[0] is not None
        encoded.append(EncodedRows(joined[0], joined[1]))
    return tuple(encoded)


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """A batch of prompts as the UNet reads them.

    Attributes:
        prompt_embeds: (B, S, D) `encoder_hidden_states`.
        attention_mask: (B, S) bool `encoder_attention_mask`, False on padding behind shorter prompts; None in layouts
            without a mask.
        pooled_prompt_embeds: (B, P) for SDXL, else None.
        prompts: length and lost words of each prompt.
    """

    prompt_embeds: Tensor
    attention_mask: Tensor | None
    pooled_prompt_embeds: Tensor | None
    prompts: tuple[PromptTokens, ...]

    def __getitem__(self, part: slice) -> "EncodedPrompts":
        """Some of the prompts, with the padding they have."""
        return EncodedPrompts(
            self.prompt_embeds[part],
            None if self.attention_mask is None else self.attention_mask[part],
            None if self.pooled_prompt_embeds is None else self.pooled_prompt_embeds[part],
            self.prompts[part],
        )

    def pipeline_arguments(self) -> dict[str, Tensor]:
        """Keyword arguments for a stock diffusers pipeline that is called without guidance."""
        arguments = {"prompt_embeds": self.prompt_embeds, "pooled_prompt_embeds": self.pooled_prompt_embeds}
        return {name: value for name, value in arguments.items() if value is not None}


@dataclass(frozen=True, slots=True)
class PromptPair:
    """Prompts and their negatives, of equal length, as guidance needs them."""

    positive: EncodedPrompts
    negative: EncodedPrompts

    def pipeline_arguments(self) -> dict[str, Tensor]:
        """Keyword arguments for a stock diffusers pipeline; call it inside `attending_to` where there is a mask."""
        negative = self.negative.pipeline_arguments()
        return self.positive.pipeline_arguments() | {f"negative_{name}": value for name, value in negative.items()}


@contextmanager
def attending_to(unet: Any, prompts: PromptPair | EncodedPrompts, num_images_per_prompt: int = 1) -> Iterator[None]:
    """Give the UNet the prompts' mask while a stock pipeline, which knows of none, runs in this block.

    Args:
        unet: the pipeline's UNet2DConditionModel.
        prompts: what the pipeline was given.
        num_images_per_prompt: as given to the pipeline.
    Raises:
        ValueError: the pipeline runs with another number of prompts.
    """
    parts = (prompts.negative, prompts.positive) if isinstance(prompts, PromptPair) else (prompts,)
    masks = [part.attention_mask for part in parts if part.attention_mask is not None]
    if all(bool(mask.all()) for mask in masks):  # nothing to hide, or a layout that hides nothing
        yield
        return
    repeated = [mask.repeat_interleave(num_images_per_prompt, dim=0) for mask in masks]
    by_batch = {len(repeated[-1]): repeated[-1], sum(map(len, repeated)): torch.cat(repeated)}  # without, with guidance

    def add_mask(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = keywords["encoder_hidden_states"] if "encoder_hidden_states" in keywords else arguments[2]
        mask = by_batch.get(len(states))
        if mask is None:
            raise ValueError(
                f"the UNet runs on {len(states)} rows of text, the prompts given to attending_to make "
                f"{' or '.join(map(str, by_batch))}; give it the same prompts and num_images_per_prompt as the pipeline"
            )
        return arguments, keywords | {"encoder_attention_mask": mask.to(states.device)}

    handle = unet.register_forward_pre_hook(add_mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
