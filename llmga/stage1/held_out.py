"""Held-out loss as the mean over trained tokens: the same whatever the batch size and the number of ranks.

The Trainer's own figure is a mean over batches, in which a short answer's tokens count for more than a long one's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from llmga.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import EvalPrediction  # with it comes the Trainer, which takes seconds to import

TOKEN_LOSS = "token_loss"


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Reduce a batch's logits to what the mean needs, ahead of gathering them (`preprocess_logits_for_metrics`).

    Args:
        logits: (B, L, V), or what `cross_entropy.LossHead` gives in their place, which is the answer; or the model's
            outputs with these first.
        labels: (B, L) int64.
    Returns:
        (B, 2) float64: sum of the token losses of each example, and how many tokens there were.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if logits.dim() == 2:
        return logits
    rows = []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):  # position i predicts token i + 1
        trained = targets != IGNORE_INDEX
        total = functional.cross_entropy(row[trained].float(), targets[trained], reduction="sum")
        rows.append(torch.stack([total.double(), trained.sum().double()]))
    return torch.stack(rows)


def mean_token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Mean over all tokens of a held-out set (`compute_metrics`)."""
    total, count = prediction.predictions.sum(axis=0)
    return {TOKEN_LOSS: float(total / max(count, 1.0))}
