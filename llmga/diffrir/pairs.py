"""Training pairs that stay together: degraded picture, clean picture and mask, through every crop and exchange."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmga.diffrir.reference import InputError, check_inputs


class Pairs(NamedTuple):
    """A batch of training pairs.

    Attributes:
        low_quality: (B, 3, H/s, W/s).
        ground_truth: (B, 3, H, W).
        edit_mask: (B, 1, H, W), 1 = generated.
    """

    low_quality: Tensor
    ground_truth: Tensor
    edit_mask: Tensor


def random_crop(pairs: Pairs, size: int, rngs: "list[np.random.Generator]") -> Pairs:
    """Cut the same random window out of all three, another one for each pair.

    Args:
        size: side at output resolution, a multiple of the scale.
        rngs: one per pair.
    Raises:
        InputError: the window does not fit.
    """
    scale = check_inputs(*pairs)
    height, width = pairs.low_quality.shape[-2:]
    side = size // scale
    if size % scale or side > min(height, width) or side < 1:
        raise InputError(
            f"a crop of {size} was asked of pictures of {height * scale} x {width * scale} at scale {scale}; "
            "expected a multiple of the scale, no larger than the picture"
        )
    if len(rngs) != len(pairs.low_quality):
        raise InputError(f"{len(rngs)} generators for {len(pairs.low_quality)} pairs; expected one each")
    corners = [(int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))) for rng in rngs]
    factors = (1, scale, scale)
    return Pairs(
        *(
            torch.stack(
                [
                    image[:, top * factor : (top + side) * factor, left * factor : (left + side) * factor]
                    for image, (top, left) in zip(images, corners, strict=True)
                ]
            )
            for images, factor in zip(pairs, factors, strict=True)
        )
    )


class PairPool:
    """A stock of pairs that mixes batches, because pictures of one batch share some of their degradation.

    While the pool fills, fresh batches are stored and used as they are. Then each batch is exchanged for as many random
    pairs of the pool.

    Args:
        capacity: pairs; published 160 per process. 0 uses every batch as it is.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise InputError(f"a pool of {capacity} pairs was asked for; expected 0 or more")
        self.capacity = capacity
        self._stock: Pairs | None = None
        self._count = 0

    def exchange(self, fresh: Pairs, rng: np.random.Generator) -> Pairs:
        """Put a batch in, take one of the same size out.

        Raises:
            InputError: the batch is larger than the pool, or of another shape than what is in it.
        """
        batch = len(fresh.low_quality)
        if self.capacity == 0:
            return fresh
        self._check(fresh, batch)
        if self._stock is None:
            self._stock = Pairs(*(values.new_zeros((self.capacity, *values.shape[1:])) for values in fresh))
        if self._count + batch <= self.capacity:
            self._put(fresh, slice(self._count, self._count + batch))
            self._count += batch
            return fresh
        chosen = torch.from_numpy(rng.choice(self._count, batch, replace=False)).to(fresh.low_quality.device)
        taken = Pairs(*(stock[chosen] for stock in self._stock))
        self._put(fresh, chosen)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What is in the pool, for a checkpoint."""
        stock = {} if self._stock is None else {k: v[: self._count] for k, v in self._stock._asdict().items()}
        return {"count": self._count, **stock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave.

        Raises:
            InputError: it does not fit into this pool.
        """
        count = int(state["count"])
        if count > self.capacity:
            raise InputError(f"the saved pool holds {count} pairs and this one {self.capacity}; use the same capacity")
        self._stock, self._count = None, 0
        if count:
            saved = Pairs(*(state[name] for name in Pairs._fields))
            self._stock = Pairs(*(values.new_zeros((self.capacity, *values.shape[1:])) for values in saved))
            self._put(saved, slice(0, count))
            self._count = count

    def _put(self, pairs: Pairs, where: slice | Tensor) -> None:
        assert self._stock is not None
        for stock, values in zip(self._stock, pairs, strict=True):
            stock[where] = values

    def _check(self, fresh: Pairs, batch: int) -> None:
        if batch > self.capacity:
            raise InputError(f"a batch of {batch} was given to a pool of {self.capacity}; expected a larger pool, or 0")
        check_inputs(*fresh)
        if self._stock is not None and self._stock.ground_truth.shape[1:] != fresh.ground_truth.shape[1:]:
            raise InputError(
                f"the pool holds pictures of {tuple(self._stock.ground_truth.shape[1:])}, the batch of "
                f"{tuple(fresh.ground_truth.shape[1:])}; expected one crop size throughout"
            )
