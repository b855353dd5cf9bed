"""Bracket weights: "(x)" stresses a passage of a prompt, "[x]" plays it down, "(x:1.3)" says how much.

Off unless asked for: natural prose has brackets that mean nothing of the kind.
"""

import math
import re

import torch
from torch import Tensor

from llmga.prompt_chunks import PromptError, WeightedText

_STEP = 1.1  # what one pair of brackets multiplies or divides by
_MAX_DEPTH = 100
_ZERO = 1e-5  # a mean below this share of the mean size is rounding and no basis for a factor
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|(?P<open>[(\[])|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)",
    re.ASCII,
)


def read_brackets(text: str) -> list[WeightedText]:
    r"""Split a prompt into pieces and their weights.

    "(x)" multiplies the weight of x by 1.1, "[x]" divides it by 1.1, "(x:w)" multiplies it by w; nested brackets
    multiply. A backslash makes a bracket plain text; a bracket that is never closed reaches to the end; one that was
    never opened is text.

    Returns:
        At least one piece; neighbours differ in weight.
    Raises:
        PromptError: brackets are nested more than 100 deep, or a weight is too large for a number.
    Source: the weighting of the published SD1.5 inference code.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for match in _PIECE.finditer(text):
        token = match[0]
        if match["open"]:
            opened[token].append(len(pieces))
            if sum(map(len, opened.values())) > _MAX_DEPTH:
                raise PromptError(f"brackets are nested more than {_MAX_DEPTH} deep; expected weights such as (x:1.3)")
        elif match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif token == ")" and opened["("]:
            close("(", _STEP)
        elif token == "]" and opened["["]:
            close("[", 1 / _STEP)
        else:
            pieces.append((match["escaped"] if token[0] == "\\" else token, 1.0))
    for bracket, factor in (("(", _STEP), ("[", 1 / _STEP)):
        while opened[bracket]:
            close(bracket, factor)
    return _joined(pieces)


def _joined(pieces: list[tuple[str, float]]) -> list[WeightedText]:
    """Neighbours of equal weight as one piece."""
    joined: list[WeightedText] = []
    for piece, weight in pieces:
        if not math.isfinite(weight):
            raise PromptError(f"the weight of {piece!r:.60} is {weight}, expected a number such as 1.3")
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + piece, weight)
        else:
            joined.append((piece, weight))
    return joined or [("", 1.0)]


def weigh(prompt_embeds: Tensor, weights: Tensor) -> Tensor:
    """Multiply every position by its weight, then rescale each prompt to the mean it had.

    Args:
        prompt_embeds: (B, S, D).
        weights: (B, S), 1 at BOS, EOS and padding.
    Returns:
        (B, S, D), of the dtype of `prompt_embeds`. A prompt whose mean is zero but for rounding, before or after, is
        not rescaled.
    Source: as `read_brackets`.
    """
    # Both means are near zero, so that a float32 sum gives the factor to five digits only, other ones on each CPU.
    states = prompt_embeds.double()
    weighted = states * weights.to(states)[:, :, None]
    before, after = states.mean(dim=(1, 2), keepdim=True), weighted.mean(dim=(1, 2), keepdim=True)
    smallest = torch.minimum(before.abs(), after.abs())
    scale = torch.where(smallest > _ZERO * states.abs().mean(dim=(1, 2), keepdim=True), before / after, 1.0)
    return (weighted * scale).to(prompt_embeds)
