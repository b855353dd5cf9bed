"""How many facts of its scene does a picture show? The parser reads it; an object not drawn is wrong in all it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmga.toyworld.parse import ParsedScene, parse_batch
from llmga.toyworld.scene import ATTRIBUTES, Facts, Scene

KINDS = ("background", *ATTRIBUTES)


def count_right(
    pictures: np.ndarray, scenes: Sequence[Scene], asked: Sequence[Facts] | None = None
) -> dict[str, tuple[int, int]]:
    """Compare pictures with the scenes that they should show.

    Args:
        pictures: (N, 64, 64, 3) uint8 RGB.
        scenes: one for each, of one preset.
        asked: those of its facts that count, for each; None: all.
    Returns:
        as `count_right_read`.
    """
    return count_right_read(parse_batch(pictures, scenes[0].preset), scenes, asked)


def count_right_read(
    read: Sequence[ParsedScene], scenes: Sequence[Scene], asked: Sequence[Facts] | None = None
) -> dict[str, tuple[int, int]]:
    """`count_right` of pictures that were read already.

    Returns:
        kind of fact -> (right, all); `empty` counts the empty cells, right where nothing was drawn.
    """
    right = dict.fromkeys((*KINDS, "empty"), 0)
    total = dict.fromkeys(right, 0)
    asked = asked or [scene.facts() for scene in scenes]
    for parsed, scene, facts in zip(read, scenes, asked, strict=True):
        said = parsed.facts()
        for (kind, cell), value in facts.items():
            total[kind] += 1
            right[kind] += said.get((kind, cell)) == value
        total["empty"] += len(scene.empty_cells())
        right["empty"] += len(scene.empty_cells()) - len(parsed.extra(scene))
    return {kind: (right[kind], total[kind]) for kind in right}


def shares(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Share right of each kind, and `mean` over the kinds of facts (`KINDS`), each counted alike."""
    found = {kind: right / max(total, 1) for kind, (right, total) in counts.items()}
    return {**found, "mean": float(np.mean([found[kind] for kind in KINDS]))}


def in_words(found: dict[str, float]) -> str:
    """Shares in one line, in per cent."""
    return ", ".join(f"{kind} {100 * share:.1f}" for kind, share in found.items())
