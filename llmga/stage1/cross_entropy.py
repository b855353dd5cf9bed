"""Cross-entropy of the trained tokens alone, a chunk of logits at a time.

A plain causal LM writes logits for every token, in float32 once more for the loss, and keeps both for the backward
pass: 8 GB for 16k tokens of a vocabulary of 128k. Most of those tokens (pictures, questions, padding) train nothing.
Here only the trained ones pass the head, chunk by chunk, and each chunk leaves its gradients at once and its logits
never. That is three matrix products, as without chunks, and exact: nothing is approximated.

The model's class stays as it is: its `lm_head` is exchanged for one with the same weight, name and output, that gives
the loss instead of logits when the model was called with labels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from llmga.tokens import IGNORE_INDEX

CHUNK_LOGITS = 2**26  # 256 MB in float32; fewer per chunk and a GPU would spend its time on adding up weight gradients


def use_chunked_cross_entropy(model: LlavaForConditionalGeneration) -> None:
    """Compute the loss by chunks from now on. Call it when the vocabulary has its final size.

    A call with labels gives, in place of logits: while training, the sum of the token losses (a scalar); else (B, 2)
    float64, per row the sum of its token losses and how many there are. A call without labels gives logits.
    """
    with torch.device("meta"):
        head = LossHead(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight = model.lm_head.weight  # the same parameter: tied, sharded and trained as before
    head.train(model.training)
    model.lm_head = head
    model.register_forward_pre_hook(_hand_over_labels, with_kwargs=True)
    model.loss_function = mean_loss


class LossHead(nn.Linear):
    """An output head that turns hidden states into the loss of `labels`, if it was given some, and else into logits.

    Attributes:
        labels: (B, T) int64 of the call at hand, IGNORE_INDEX where nothing is trained; token t + 1 is the target of
            position t.
    """

    labels: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) to what `use_chunked_cross_entropy` says."""
        labels, self.labels = self.labels, None
        if labels is None:
            return super().forward(hidden)
        assert hidden.shape[:2] == labels.shape, f"{tuple(hidden.shape)} hidden states, {tuple(labels.shape)} labels"
        hidden, targets = hidden[:, :-1], labels[:, 1:]
        trained = targets != IGNORE_INDEX
        if self.training:
            return summed_cross_entropy(hidden[trained], self.weight, targets[trained])
        rows = zip(hidden, targets, trained, strict=True)
        sums = [summed_cross_entropy(row[kept], self.weight, target[kept]) for row, target, kept in rows]
        return torch.stack([torch.stack(sums).double(), trained.sum(dim=1).double()], dim=1)


def mean_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """The model's loss function: the mean over the trained tokens of this call, or of the whole step.

    Args:
        logits: what `LossHead` gave in their place.
        labels: (B, T) int64.
        num_items_in_batch: trained tokens of the step over all forward passes and ranks; None for this call's own.
    """
    total = logits if logits.dim() == 0 else logits[:, 0].sum()
    count = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


@torch.compiler.disable  # how many tokens are trained changes with every batch, and so would what is compiled
def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_logits: int = CHUNK_LOGITS) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` against `targets`, in float32.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int64, all in [0, V).
        chunk_logits: how many logits exist at a time.
    """
    return _SummedCrossEntropy.apply(hidden, weight, targets, max(1, chunk_logits // weight.shape[0]))


class _SummedCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits are there; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Added up in float32, whatever the arithmetic: in bf16 the chunks would round each other away.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(hidden), chunk_tokens):
            chunk = hidden[begin : begin + chunk_tokens].to(dtype)
            target = targets[begin : begin + chunk_tokens, None]
            logits = functional.linear(chunk, matrix).float()
            log_total = logits.logsumexp(dim=1, keepdim=True)
            total += (log_total - logits.gather(1, target)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.sub_(log_total).exp_()  # the probabilities
            grad.scatter_add_(1, target, torch.full_like(log_total, -1.0))
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[begin : begin + chunk_tokens] = grad @ matrix
            if grad_weight is not None:
                if dtype == torch.float32:
                    grad_weight.addmm_(grad.T, chunk)
                else:
                    grad_weight += grad.T @ chunk
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        assert ctx.gradients is not None, "a second backward pass over the same loss; its gradients are gone"
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_total)  # in place: the weight's gradient is as large as the weight
        return *gradients, None, None


@torch.compiler.disable
def _hand_over_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: the head is called without the labels."""
    module.lm_head.labels = kwargs.get("labels")
