"""A prompt as CLIP tokens, cut to the chunks it may have: how long it is, and which of its words do not fit.

Everybody counts here: recording, training, sampling, metrics. No tensors, no models.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median
from typing import Any

from llmga.tokens import CHUNK_TOKENS, clip_tokenizer

logger = logging.getLogger(__name__)
_LONGEST_WORD = 40  # characters; longer runs are scripts without spaces, where a word is not what spaces enclose
_NAMED_WORDS = 8  # words of a cut prompt that a log line shows
_NAMED_PROMPTS = 3
_BATCH = 512

WeightedText = tuple[str, float]


class PromptError(ValueError):
    """A prompt that cannot be encoded; the message says which one and why."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as CLIP reads it.

    Attributes:
        ids: tokens that are kept, without BOS and EOS: at most 75 for each chunk the prompt may have.
        num_tokens: tokens of the whole text.
        lost_words: words of the text that are lost wholly or in part, in order.
        weights: one for each id, when brackets were read.
    """

    ids: tuple[int, ...]
    num_tokens: int
    lost_words: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks that the kept tokens fill; 1 for an empty prompt."""
        return max(1, math.ceil(len(self.ids) / CHUNK_TOKENS))


def tokenize_prompts(
    tokenizer: Any,
    prompts: str | Sequence[str],
    max_chunks: int,
    read: Callable[[str], Sequence[WeightedText]] | None = None,
) -> list[PromptTokens]:
    """Every prompt as tokens, cut where `max_chunks` chunks of 75 end.

    Args:
        tokenizer: a CLIP tokenizer of transformers.
        prompts: one text or several; empty ones are allowed.
        max_chunks: 1 or more.
        read: splits a text into pieces with weights, each tokenized on its own; None: the text as it stands.
    Raises:
        PromptError: there is no prompt, one is not text, or `max_chunks` is below 1.
    """
    texts = _checked(prompts, max_chunks)
    pieces = [read(text) if read else [(text, 1.0)] for text in texts]
    encoded = iter(_encode(tokenizer, [piece for parts in pieces for piece, _ in parts]))
    return [
        _cut(tokenizer, parts, [next(encoded) for _ in parts], CHUNK_TOKENS * max_chunks, weighted=read is not None)
        for parts in pieces
    ]


def warn_of_lost_words(prompts: Sequence[PromptTokens], max_chunks: int) -> None:
    """One log line when prompts are longer than their chunks: how many, and which words are lost."""
    cut = [(number, prompt) for number, prompt in enumerate(prompts) if prompt.lost_words]
    if not cut:
        return
    named = "; ".join(_name_lost(number, prompt) for number, prompt in cut[:_NAMED_PROMPTS])
    logger.warning(
        "%d of %d prompts are longer than %d chunks of %d tokens (max_chunks) and lose words: %s%s",
        *(len(cut), len(prompts), max_chunks, CHUNK_TOKENS, named),
        "; ..." if len(cut) > _NAMED_PROMPTS else "",
    )


@dataclass(frozen=True, slots=True)
class PromptStatistics:
    """What a set of prompts needs and what it loses.

    Attributes:
        num_prompts: how many there are.
        mean_tokens, median_tokens, max_tokens: of whole texts, BOS and EOS not counted.
        chunks: number of chunks -> number of prompts that fill so many.
        lost_words: number of a prompt, counted from 0 -> its lost words; only prompts that lose any.
    """

    num_prompts: int
    mean_tokens: float
    median_tokens: float
    max_tokens: int
    chunks: dict[int, int]
    lost_words: dict[int, tuple[str, ...]]

    @property
    def num_lost_words(self) -> int:
        """Words lost by all prompts together."""
        return sum(map(len, self.lost_words.values()))

    def __str__(self) -> str:
        """One line for a report."""
        shares = ", ".join(f"{count:,} in {chunks}" for chunks, count in self.chunks.items())
        lost = f"{len(self.lost_words):,} lose {self.num_lost_words:,} words" if self.lost_words else "no word is lost"
        return (
            f"{self.num_prompts:,} prompts of {self.median_tokens:g} tokens in the median (mean "
            f"{self.mean_tokens:.1f}, longest {self.max_tokens:,}); by chunks: {shares}; {lost}"
        )


def prompt_statistics(prompts: Iterable[str], max_chunks: int, tokenizer: Any = None) -> PromptStatistics:
    """Tokens, chunks and lost words of many prompts, read in batches.

    Args:
        tokenizer: None: CLIP's own, as SD1.5 has it.
    Raises:
        PromptError: as `tokenize_prompts`.
    """
    tokenizer = tokenizer or clip_tokenizer()
    num_tokens: list[int] = []
    chunks: Counter[int] = Counter()
    lost: dict[int, tuple[str, ...]] = {}
    remaining = iter(prompts)
    while batch := list(islice(remaining, _BATCH)):
        for prompt in tokenize_prompts(tokenizer, _checked(batch, max_chunks, len(num_tokens)), max_chunks):
            if prompt.lost_words:
                lost[len(num_tokens)] = prompt.lost_words
            num_tokens.append(prompt.num_tokens)
            chunks[prompt.num_chunks] += 1
    if not num_tokens:
        raise PromptError("there is no prompt to count; expected one or more")
    return PromptStatistics(
        len(num_tokens), fmean(num_tokens), median(num_tokens), max(num_tokens), dict(sorted(chunks.items())), lost
    )


def _checked(prompts: str | Sequence[str], max_chunks: int, first: int = 0) -> list[str]:
    """The prompts as a list of texts that a tokenizer can read; `first` is the number of the first, for errors."""
    if max_chunks < 1:
        raise PromptError(f"max_chunks is {max_chunks}, expected 1 or more chunks of {CHUNK_TOKENS} tokens")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise PromptError("there is no prompt to encode; expected one or more")
    for number, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise PromptError(f"prompt {number} is {text!r:.60}, expected text")
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise PromptError(
                f"prompt {number} holds {text[problem.start]!r}, half of a surrogate pair, which is not a character; "
                "read the text again from its source as UTF-8"
            ) from None
    return texts


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[tuple[list[int], list[int] | None]]:
    """Ids of each text without BOS and EOS, and the character at which each token starts, if the tokenizer knows."""
    has_offsets = getattr(tokenizer, "is_fast", False)
    encoding = tokenizer(texts, verbose=False, **({"return_offsets_mapping": True} if has_offsets else {}))
    offsets = encoding["offset_mapping"] if has_offsets else [None] * len(texts)
    for ids, spans in zip(encoding["input_ids"], offsets, strict=True):
        if len(ids) < 2 or (ids[0], ids[-1]) != (tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise PromptError(
                f"{type(tokenizer).__name__} puts no BOS and EOS around a text; expected a CLIP tokenizer, as in the "
                "tokenizer folder of a Stable Diffusion pipeline"
            )
        yield list(ids[1:-1]), [start for start, _ in spans[1:-1]] if spans is not None else None


def _cut(
    tokenizer: Any,
    parts: Sequence[WeightedText],
    encoded: Sequence[tuple[list[int], list[int] | None]],
    limit: int,
    weighted: bool,
) -> PromptTokens:
    """One prompt from its tokenized pieces."""
    ids = [token for piece, _ in encoded for token in piece]
    weights = [weight for (_, weight), (piece, _) in zip(parts, encoded, strict=True) for _ in piece]
    return PromptTokens(
        ids=tuple(ids[:limit]),
        num_tokens=len(ids),
        lost_words=_lost_words(tokenizer, parts, encoded, ids, limit) if len(ids) > limit else (),
        weights=tuple(weights[:limit]) if weighted else None,
    )


def _lost_words(
    tokenizer: Any,
    parts: Sequence[WeightedText],
    encoded: Sequence[tuple[list[int], list[int] | None]],
    ids: Sequence[int],
    limit: int,
) -> tuple[str, ...]:
    """The words behind the cut, the word that it goes through included."""
    starts: list[int] = []
    offset = 0
    for (text, _), (_, piece_starts) in zip(parts, encoded, strict=True):
        if piece_starts is None:
            return tuple(tokenizer.decode(ids[limit:]).split())
        starts += [offset + start for start in piece_starts]
        offset += len(text)
    text = "".join(piece for piece, _ in parts)
    cut = starts[limit]
    word = cut
    while word and not text[word - 1].isspace() and cut - word < _LONGEST_WORD:
        word -= 1
    return tuple(text[cut if cut - word >= _LONGEST_WORD else word :].split())


def _name_lost(number: int, prompt: PromptTokens) -> str:
    words = prompt.lost_words
    more = " ..." if len(words) > _NAMED_WORDS else ""
    shown = " ".join(f"{word:.{_LONGEST_WORD}}" for word in words[:_NAMED_WORDS]) + more
    return f"prompt {number} ({prompt.num_tokens:,} tokens) loses {len(words):,}: {shown!r}"
