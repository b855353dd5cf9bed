"""How long prompts are: CLIP tokens, windows of 75, words lost; and an LLM's tokens where its tokenizer is given.

CLIP's vocabulary is the one file that open_clip bundles. It is the vocabulary of SD1.5's text encoder and of both of
SDXL's: the three cut a text into the same tokens and differ in what they pad with (end token, or 0), so that one
histogram stands for all of them. tests/unit/test_check_lengths.py compares them.
"""

import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from llmga.check.settings import CheckError
from llmga.problem import Problem
from llmga.records import Record
from llmga.tokens import CLIP_WINDOW, clip_length, clip_words

WINDOW_TOKENS = CLIP_WINDOW - 2  # without BOS and EOS
CLIP, LLM = "clip", "llm"
LOST_IN_ONE, LOST_IN_ALL = "words lost in one window", "words lost in all windows"


class LengthCounter:
    """Counts the tokens of the prompts and texts of rows.

    Args:
        max_chunks: windows of 75 tokens that stage 2 gives a prompt.
        tokenizer: folder or tokenizer.json of an LLM; None counts CLIP's tokens alone.
        max_length: LLM tokens that a row's texts may have.
    """

    def __init__(self, max_chunks: int = 4, tokenizer: Path | None = None, max_length: int = 2048) -> None:
        self.max_chunks, self.max_length = max_chunks, max_length
        self.tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        self._counts: dict[str, Counter[int]] = {}

    def count(self, record: Record) -> list[Problem]:
        """Count a record's prompt, the text that an image generator is given, and all its texts for the LLM."""
        problems = []
        if prompt := record.prompt or (record.target_caption if record.task == "editing" else record.caption):
            length = clip_length(prompt)
            self._add(CLIP, length)
            lost = [0, 0]
            if length > WINDOW_TOKENS:
                words = clip_words(prompt)
                lost = [
                    sum(word.position > windows * WINDOW_TOKENS for word in words) for windows in (1, self.max_chunks)
                ]
            self._add(LOST_IN_ONE, lost[0])
            self._add(LOST_IN_ALL, lost[1])
            if lost[1]:
                limit = self.max_chunks * WINDOW_TOKENS
                reason = f"the prompt has {length} CLIP tokens, {limit} fit; its last {lost[1]} words are lost"
                problems.append(Problem("prompt_cut", reason))
        if self.tokenizer is not None:
            parts = [record.short_caption, record.caption, record.instruction, record.target_caption]
            parts += [message["content"] for message in record.messages or ()]
            texts = [part for part in parts if part]
            length = sum(len(encoding.ids) for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False))
            self._add(LLM, length)
            if length > self.max_length:
                problems.append(
                    Problem("too_long", f"its texts have {length} LLM tokens, {self.max_length} are allowed")
                )
        return problems

    def taken(self) -> dict[str, dict[int, int]]:
        """The histograms (length to count) since the last call."""
        counts = {name: dict(sorted(histogram.items())) for name, histogram in self._counts.items()}
        self._counts = {}
        return counts

    def _add(self, name: str, value: int) -> None:
        self._counts.setdefault(name, Counter())[value] += 1


@cache
def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a folder, as the `tokenizers` library has it; no code of the folder is run.

    Raises:
        CheckError: there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        if path.is_dir():  # older folders hold a sentencepiece model only
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False).backend_tokenizer
    except Exception as problem:  # the libraries raise their own, down to bare Exception
        raise CheckError(f"--tokenizer {path} cannot be read as a tokenizer: {problem}") from None
    raise CheckError(f"--tokenizer {path} is neither a folder of a tokenizer nor a tokenizer.json")


def summarise_clip(merged: dict[str, Counter[int]], max_chunks: int) -> dict[str, Any] | None:
    """Shares past 77, windows needed, and words lost, of the CLIP histogram; None without prompts."""
    lengths = merged.get(CLIP)
    if not lengths:
        return None
    windows: Counter[int] = Counter()
    for length, count in lengths.items():
        windows[max(1, math.ceil(length / WINDOW_TOKENS))] += count
    one, whole = merged[LOST_IN_ONE], merged[LOST_IN_ALL]
    total = lengths.total()
    return {
        "prompts": total,
        **_spread(lengths),
        "share_past_77": _share(lengths, WINDOW_TOKENS),
        "share_past_max_chunks": _share(lengths, max_chunks * WINDOW_TOKENS),
        "max_chunks": max_chunks,
        "windows_needed": {str(number): windows[number] for number in sorted(windows)},
        "words_lost_in_one_window": sum(words * count for words, count in one.items()),
        "words_lost_in_max_chunks": sum(words * count for words, count in whole.items()),
        "tokenizers": "SD1.5's, and both of SDXL's: one vocabulary, the same tokens; only their padding differs",
        "histogram": _bins(lengths, WINDOW_TOKENS // 3),
    }


def summarise_llm(merged: dict[str, Counter[int]], max_length: int) -> dict[str, Any] | None:
    """The LLM's histogram; None where no tokenizer was given."""
    lengths = merged.get(LLM)
    if not lengths:
        return None
    return {
        "rows": lengths.total(),
        **_spread(lengths),
        "max_length": max_length,
        "share_past_max_length": _share(lengths, max_length),
        "histogram": _bins(lengths, max(1, math.ceil(max(lengths) / 32))),
    }


def _spread(lengths: Counter[int]) -> dict[str, Any]:
    """Mean, quantiles and maximum in tokens."""
    total, seen, quantiles = lengths.total(), 0, {}
    wanted = [("median", 0.5), ("p90", 0.9), ("p99", 0.99)]
    for length in sorted(lengths):
        seen += lengths[length]
        while wanted and seen >= wanted[0][1] * total:
            quantiles[wanted.pop(0)[0]] = length
    mean = sum(length * count for length, count in lengths.items()) / total
    return {"mean": round(mean, 1), **quantiles, "max": max(lengths)}


def _share(lengths: Counter[int], limit: int) -> float:
    return round(sum(count for length, count in lengths.items() if length > limit) / lengths.total(), 6)


def _bins(lengths: Counter[int], width: int) -> list[list[int]]:
    """[first length, rows] of every bin up to the last that is not empty."""
    counts: Counter[int] = Counter()
    for length, count in lengths.items():
        counts[length // width] += count
    return [[number * width, counts[number]] for number in range(max(counts) + 1)]
