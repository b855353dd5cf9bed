"""Long prompts for a Stable Diffusion model: one object for training, validation, painting and editing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmga.prompt_chunks import PromptError
from llmga.stage2.chunks import MAX_ROWS, EncodedRows, encode_rows, join_rows
from llmga.stage2.long_prompt import pool_rows, side_by_side
from llmga.stage2.prompt_batch import (
    UNCONDITIONAL,
    EncodedPrompts,
    Prompt,
    PromptBatch,
    PromptPair,
    PromptTokenizer,
    Unconditional,
)
from llmga.stage2.prompt_layout import PromptLayout, layout_of, prompt_layout
from llmga.stage2.prompt_weights import weigh
from llmga.tokens import CLIP_WINDOW


class TextEncoderError(ValueError):
    """Parts of a pipeline that do not fit each other; the message says which."""


@dataclass(frozen=True, slots=True)
class TextTower:
    """A text encoder, its tokenizer, and which of its hidden states the UNet reads.

    Attributes:
        tokenizer, text_encoder: of transformers.
        skipped_layers: how many of the last layers to pass over.
        final_norm: apply the layer norm that follows the last layer.
    """

    tokenizer: Any
    text_encoder: Any
    skipped_layers: int = 0
    final_norm: bool = True

    def __post_init__(self) -> None:
        """Check that tokenizer and encoder belong together."""
        config = self.text_encoder.config
        if config.max_position_embeddings != CLIP_WINDOW:
            raise TextEncoderError(
                f"the text encoder reads {config.max_position_embeddings} positions, expected CLIP's {CLIP_WINDOW}"
            )
        if len(self.tokenizer) > config.vocab_size:
            raise TextEncoderError(
                f"the tokenizer has {len(self.tokenizer):,} tokens, its text encoder {config.vocab_size:,}; "
                "take both from the same pipeline"
            )


class LongPromptEncoder:
    """Encodes prompts of any length under a layout: no gradient, every distinct chunk of a batch once.

    In layouts with own chunks, a prompt's result does not depend on the prompts beside it.
    """

    def __init__(
        self,
        towers: Sequence[TextTower],
        layout: PromptLayout,
        *,
        has_pooled: bool = False,
        zero_unconditional: bool = False,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """Put towers together; `for_sd`, `for_sdxl` and `from_pipeline` know how.

        Args:
            towers: their states come side by side.
            has_pooled: the last tower gives a pooled vector.
            zero_unconditional: "no prompt" is zeros (SDXL base) and not the encoding of an empty text.
            max_rows: chunks in one call of a text encoder.
        """
        self.towers = tuple(towers)
        self.layout = layout
        self.has_pooled = has_pooled
        self.zero_unconditional = zero_unconditional
        self.max_rows = max_rows
        self.tokenize = PromptTokenizer([tower.tokenizer for tower in self.towers], layout)

    @classmethod
    def for_sd(
        cls, tokenizer: Any, text_encoder: Any, layout: PromptLayout | None = None, clip_skip: int = 0, **options: Any
    ) -> "LongPromptEncoder":
        """For SD1.5: the last hidden state, after the final layer norm."""
        return cls([TextTower(tokenizer, text_encoder, clip_skip)], layout or prompt_layout(), **options)

    @classmethod
    def for_sdxl(
        cls,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[Any],
        layout: PromptLayout | None = None,
        clip_skip: int = 0,
        zero_unconditional: bool = True,
        **options: Any,
    ) -> "LongPromptEncoder":
        """For SDXL: the penultimate hidden states of both encoders, and the second's pooled vector."""
        towers = [
            TextTower(tokenizer, text_encoder, 1 + clip_skip, final_norm=False)
            for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True)
        ]
        return cls(towers, layout or prompt_layout(), has_pooled=True, zero_unconditional=zero_unconditional, **options)

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, layout: PromptLayout | None = None, clip_skip: int = 0, **options: Any
    ) -> "LongPromptEncoder":
        """For a diffusers pipeline, in the layout that its UNet was trained with.

        Args:
            pipeline: any SD or SDXL pipeline.
            layout: None: what the UNet's config names, else the default.
        Raises:
            TextEncoderError: the text encoders are not as wide as the UNet expects.
        """
        layout = layout or layout_of(pipeline.unet.config) or prompt_layout()
        second = getattr(pipeline, "text_encoder_2", None)
        if second is None:
            encoder = cls.for_sd(pipeline.tokenizer, pipeline.text_encoder, layout, clip_skip, **options)
        else:
            pairs = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, second)]
            tokenizers, text_encoders = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
            zero = bool(pipeline.config.get("force_zeros_for_empty_prompt", True))
            encoder = cls.for_sdxl(tokenizers, text_encoders, layout, clip_skip, zero, **options)
        encoder.check_width(pipeline.unet.config.cross_attention_dim)
        return encoder

    @property
    def width(self) -> int:
        """Channels of the embeddings."""
        return sum(tower.text_encoder.config.hidden_size for tower in self.towers)

    def check_width(self, cross_attention_dim: int | Sequence[int]) -> None:
        """Compare with the width that a UNet reads, as its config says it.

        Raises:
            TextEncoderError: they differ.
        """
        expected = {cross_attention_dim} if isinstance(cross_attention_dim, int) else set(cross_attention_dim)
        if expected != {self.width}:
            raise TextEncoderError(
                f"the text encoders give {self.width} channels, the UNet reads {', '.join(map(str, expected))} "
                "(cross_attention_dim); take both from the same pipeline"
            )

    def encode(self, prompts: Prompt | Sequence[Prompt], weighted: bool = False) -> EncodedPrompts:
        """Tokenize and encode a batch of prompts; arguments and errors as `PromptTokenizer`."""
        return self.encode_tokens(self.tokenize(prompts, weighted))

    def encode_pair(
        self,
        prompts: Prompt | Sequence[Prompt],
        negatives: Prompt | Sequence[Prompt] = UNCONDITIONAL,
        weighted: bool = False,
    ) -> PromptPair:
        """Encode prompts and what to steer away from, to equal length; both sides in one call of each encoder.

        In layouts with own chunks, prompt and negative keep their own numbers of chunks and the shorter is padded
        and masked; in the others both have the number of the longest.

        Args:
            negatives: one for all prompts or one for each; left out: the model's own input for "no prompt".
        Raises:
            PromptError: as `PromptTokenizer`, or there are neither one nor as many negatives as prompts.
        """
        positive = [prompts] if isinstance(prompts, str | Unconditional) else list(prompts)
        negative = [negatives] * len(positive) if isinstance(negatives, str | Unconditional) else list(negatives)
        if len(negative) != len(positive):
            raise PromptError(
                f"there are {len(negative)} negative prompts for {len(positive)} prompts; "
                "expected one for all or one for each"
            )
        both = self.encode([*positive, *negative], weighted)
        return PromptPair(both[: len(positive)], both[len(positive) :])

    @torch.no_grad()
    def encode_windows(self, batch: PromptBatch) -> tuple[EncodedRows, ...]:
        """What each text encoder says of a batch's windows, every distinct one encoded once."""
        return tuple(
            encode_rows(windows.rows, tower.text_encoder, tower.skipped_layers, tower.final_norm, self.max_rows)
            for tower, windows in zip(self.towers, batch.towers, strict=True)
        )

    @torch.no_grad()
    def encode_tokens(self, batch: PromptBatch, encoded: Sequence[EncodedRows] | None = None) -> EncodedPrompts:
        """Encode what `tokenize` made, perhaps in another process.

        Args:
            encoded: what `encode_windows` says of the batch, where that is known already.
        """
        by_tower = self.encode_windows(batch) if encoded is None else encoded
        sequences = []
        for rows, windows in zip(by_tower, batch.towers, strict=True):
            states, mask = join_rows(rows.states, windows.num_chunks, self.layout.keep_middle)
            if windows.weights is not None:
                weights, _ = join_rows(windows.weights[:, :, None], windows.num_chunks, self.layout.keep_middle)
                states = weigh(states, weights[:, :, 0])
            sequences.append(states)
        embeds = side_by_side(sequences)
        pooled = None
        if self.has_pooled:  # of the last tower, whose rows the loop has left here
            pooled = pool_rows(rows, windows.num_chunks, self.layout.pooled, windows.num_text_chunks)
        if self.zero_unconditional and bool(batch.unconditional.any()):
            embeds = embeds.masked_fill(batch.unconditional[:, None, None].to(embeds.device), 0)
            if pooled is not None:
                pooled = pooled.masked_fill(batch.unconditional[:, None].to(pooled.device), 0)
        return EncodedPrompts(embeds, mask if self.layout.own_chunks else None, pooled, batch.prompts)
