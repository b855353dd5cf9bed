"""CLIP score that reads the whole prompt.

CLIP sees 77 positions, 75 tokens of text. What its libraries do with more differs, and all of it is wrong for a score:
cut at 77 (every prompt loses what comes late), or cut without the end token that the text is read at (all long prompts
become one). Here the rule is:

1. A text of at most 75 tokens is encoded whole, as everybody does.
2. A longer one is either refused, or encoded sentence by sentence, each window with its own end token. A sentence
   longer than 75 tokens is cut into windows of nearly equal length, at ends of words where it has any.
3. The score of a long text is the mean of its windows' cosines; the lowest stands beside it, which tells whether some
   sentence was not drawn at all.

Windows say less than whole texts, so scores of short and of long texts do not compare: give the share of long ones with
every number. Scores are cosines in [-1, 1], neither scaled nor clipped.

Source: Hessel et al., "CLIPScore: a reference-free evaluation metric for image captioning" (2021), without its factor.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from llmga.metrics.clip import Clip
from llmga.metrics.features import MetricError, paired_cosine

LongTexts = Literal["windows", "refuse"]
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_WORD_END = "</w>"
Window = tuple[int, ...]


class ClipScores(NamedTuple):
    """Scores of pictures and their texts, (N,) each.

    Attributes:
        mean: float64, over the windows of a text; the score itself where there is one window.
        lowest: float64, of its worst window.
        windows: int64, how many there are.
    """

    mean: np.ndarray
    lowest: np.ndarray
    windows: np.ndarray

    @property
    def long_share(self) -> float:
        """Share of texts that did not fit one window."""
        return float((self.windows > 1).mean())


def clip_scores(clip: Clip, images: Tensor, texts: Sequence[str], long_texts: LongTexts = "windows") -> ClipScores:
    """Cosine of each picture with its text.

    Args:
        images: (N, 3, H, W) uint8.
        texts: N of them.
        long_texts: what becomes of texts over one window.
    Raises:
        MetricError: counts that differ, pictures or texts that cannot be encoded, or a long text under "refuse".
    """
    if len(images) != len(texts):
        raise MetricError(f"there are {len(images)} pictures and {len(texts)} texts; expected one text for each")
    return score_features(clip, clip.features(images), texts, long_texts)


def score_features(clip: Clip, features: Tensor, texts: Sequence[str], long_texts: LongTexts = "windows") -> ClipScores:
    """`clip_scores` of pictures whose features are known: a picture is scored against its short and its long text."""
    windows = [
        _windows_of(number, text, clip.tokenizer, clip.window_tokens, long_texts) for number, text in enumerate(texts)
    ]
    counts = np.array([len(parts) for parts in windows])
    if len(features) != len(texts) or not len(texts):
        raise MetricError(f"there are {len(features)} pictures and {len(texts)} texts; expected one text for each")
    encoded = clip.window_features([window for parts in windows for window in parts])
    cosines = paired_cosine(torch.as_tensor(features).repeat_interleave(torch.from_numpy(counts), dim=0), encoded)
    starts = np.cumsum(counts) - counts
    return ClipScores(np.add.reduceat(cosines, starts) / counts, np.minimum.reduceat(cosines, starts), counts)


def text_windows(text: str, tokenizer: Any, max_tokens: int = 75, long_texts: LongTexts = "windows") -> list[Window]:
    """A text as the windows it is scored by, without BOS and EOS; see the rule above.

    Args:
        tokenizer: open_clip's SimpleTokenizer.
    Raises:
        MetricError: the text is empty, holds a control token, or is long where that is refused.
    """
    if long_texts not in get_args(LongTexts):
        raise MetricError(f"long_texts is {long_texts!r}; expected one of {', '.join(get_args(LongTexts))}")
    ids = tuple(tokenizer.encode(text))
    if not ids:
        raise MetricError("it is empty; leave out pictures without a text")
    if not set(tokenizer.all_special_ids).isdisjoint(ids):
        raise MetricError("it holds a control token of CLIP, behind which nothing is read; take it out of the text")
    if len(ids) <= max_tokens:
        return [ids]
    if long_texts == "refuse":
        raise MetricError(
            f"it has {len(ids)} tokens, and CLIP reads {max_tokens} at once; score it by windows "
            "(long_texts='windows'), or score the short caption"
        )
    sentences = [tuple(tokenizer.encode(sentence)) for sentence in _SENTENCE_END.split(text)]
    return [window for sentence in sentences if sentence for window in _cut(sentence, tokenizer, max_tokens)]


def _windows_of(number: int, text: str, tokenizer: Any, max_tokens: int, long_texts: LongTexts) -> list[Window]:
    try:
        return text_windows(text, tokenizer, max_tokens, long_texts)
    except MetricError as error:
        raise MetricError(f"text {number} ({text:.40}): {error}") from error


def _cut(ids: Window, tokenizer: Any, max_tokens: int) -> list[Window]:
    """One sentence in the fewest windows, of nearly equal length, cut behind ends of words."""
    windows = []
    while len(ids) > max_tokens:
        end = max_tokens
        fair = math.ceil(len(ids) / math.ceil(len(ids) / max_tokens))
        for place in range(fair, max_tokens + 1):  # not before the fair share, or one window more might be needed
            if tokenizer.decoder[ids[place - 1]].endswith(_WORD_END):
                end = place
                break
        windows.append(ids[:end])
        ids = ids[end:]
    return [*windows, ids]
