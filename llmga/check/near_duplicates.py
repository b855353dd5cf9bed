"""Pictures that look alike: a 128-bit difference hash finds candidates, the small pictures themselves decide.

Two hashes that differ in at most 7 bits are equal in one of their eight 16-bit parts. So candidates are pairs that
share a part: found by sorting, eight times, without comparing everything with everything. Memory is 40 bytes a picture.
"""

from collections.abc import Callable

import numpy as np

from llmga.check.picture_check import SIGNATURE_SIDE

_PARTS = 8
_ALIKE = 6.0  # mean difference in grey levels up to which two 9 x 9 pictures are the same picture
_BLOCK = 2048  # of a group that shares a part, compared at a time


def difference_hash(signatures: np.ndarray) -> np.ndarray:
    """Which of neighbouring cells is brighter, across and down.

    Args:
        signatures: (N, 9, 9, 3) uint8.
    Returns:
        (N, 16) uint8, 128 bits each.
    """
    grey = signatures.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    last = SIGNATURE_SIDE - 1
    across = grey[:, :last, 1:] > grey[:, :last, :-1]
    down = grey[:, 1:, :last] > grey[:, :-1, :last]
    bits = np.concatenate([across.reshape(len(grey), -1), down.reshape(len(grey), -1)], axis=1)
    return np.packbits(bits, axis=1)


SignaturesOf = Callable[[np.ndarray], np.ndarray]


def find_similar(hashes: np.ndarray, bits: int, signatures_of: SignaturesOf, others: int = 0) -> np.ndarray:
    """Of each picture, an earlier one that it looks like.

    Without `others`, pictures are compared with those earlier ones that look like none before them, so that twenty
    copies of one picture all name the same one.

    Args:
        hashes: (N, 16) uint8 of `difference_hash`.
        bits: by which hashes may differ; up to 7 every pair is found, beyond that most.
        signatures_of: the (n, 9, 9, 3) small pictures of an array of n numbers.
        others: the first so many pictures are another set: the rest are compared with them, and with them alone.
    Returns:
        (N,) int64: the number of the other picture, or -1.
    """
    parts = np.ascontiguousarray(hashes).view(np.uint16)  # (N, 8)
    like = np.full(len(hashes), -1, np.int64)
    for part in range(_PARTS):
        order = np.argsort(parts[:, part], kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(parts[order, part])) + 1):
            if len(group) < 2:
                continue
            left, right = (group[group < others], group[group >= others]) if others else (group, group)
            for start in range(0, len(left), _BLOCK):
                for other in range(0 if others else start, len(right), _BLOCK):
                    blocks = left[start : start + _BLOCK], right[other : other + _BLOCK]
                    _link(*blocks, hashes, bits, signatures_of, like, leaders_only=not others)
    first = np.where(like >= 0, like, np.arange(len(like)))
    while (nearer := first[first] != first).any():  # a copy of a copy names what that one names
        first[nearer] = first[first[nearer]]
    return np.where(like >= 0, first, -1)


def _link(
    left: np.ndarray,
    right: np.ndarray,
    hashes: np.ndarray,
    bits: int,
    signatures_of: SignaturesOf,
    like: np.ndarray,
    leaders_only: bool,
) -> None:
    """Set `like` of pictures on the right that look like one on the left; one block against one block."""
    close = _distances(hashes[left], hashes[right]) <= bits
    close &= left[:, None] < right[None, :]
    if not close.any():
        return
    rows, columns = np.flatnonzero(close.any(axis=1)), np.flatnonzero(close.any(axis=0))
    on_the_left, on_the_right = signatures_of(left[rows]), signatures_of(right[columns])
    for row, signature in zip(rows, on_the_left, strict=True):
        if leaders_only and like[left[row]] >= 0:
            continue
        candidates = np.flatnonzero(close[row, columns] & (like[right[columns]] < 0))
        difference = np.abs(on_the_right[candidates].astype(np.int16) - signature.astype(np.int16))
        alike = candidates[difference.mean(axis=(1, 2, 3)) <= _ALIKE]
        like[right[columns[alike]]] = left[row]


def _distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(n, m) uint8: bits that differ between (n, 16) and (m, 16) hashes."""
    wide_left, wide_right = (np.ascontiguousarray(side).view(np.uint64) for side in (left, right))
    words = (np.bitwise_count(wide_left[:, None, k] ^ wide_right[None, :, k]) for k in range(wide_left.shape[1]))
    return np.asarray(sum(words))
