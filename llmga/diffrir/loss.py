"""What each phase minimises: pixels, the prior, and a discriminator's opinion."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from llmga.diffrir.reference import InputError

DISTILLATION_TEMPERATURE = 0.15


class Distillation(NamedTuple):
    """How far a predicted prior is from the teacher's.

    Attributes:
        divergence: Kullback-Leibler divergence of the two as softmax distributions; published runs log it only.
        absolute: mean absolute difference, what is minimised.
    """

    divergence: Tensor
    absolute: Tensor


def pixel_loss(restored: Tensor, target: Tensor, weight_mask: Tensor | None = None) -> Tensor:
    """Mean absolute difference over all pixels and channels.

    Args:
        restored, target: (B, 3, H, W); composed or not, see `llmga.diffrir.reference.compose`.
        weight_mask: (B, 1, H, W), averages over its ones only; zero without any. None is the published loss, whose
            composed form grows with the area of the hole.
    """
    if restored.shape != target.shape:
        raise InputError(f"restored is {tuple(restored.shape)} and target {tuple(target.shape)}; expected equal shapes")
    if weight_mask is None:
        return F.l1_loss(restored, target)
    weights = weight_mask.to(restored).expand_as(restored)
    return ((restored - target).abs() * weights).sum() / weights.sum().clamp_min(1)


def distillation_loss(
    prior: Tensor, teacher_prior: Tensor, temperature: float = DISTILLATION_TEMPERATURE
) -> Distillation:
    """Both distances between (B, prior_width) vectors; the teacher's gets no gradient."""
    teacher_prior = teacher_prior.detach()
    divergence = F.kl_div(
        (prior / temperature).log_softmax(dim=1), (teacher_prior / temperature).softmax(dim=1), reduction="batchmean"
    )
    return Distillation(divergence, F.l1_loss(prior, teacher_prior))


def adversarial_loss(logits: Tensor, is_real: bool) -> Tensor:
    """Binary cross-entropy of a discriminator's logits (B, 1, H, W) against one answer for all pixels.

    The generator's term is `adversarial_loss(discriminator(restored), is_real=True)`; the discriminator's are this for
    real pictures and `is_real=False` for restored ones, detached.
    """
    return F.binary_cross_entropy_with_logits(logits, logits.new_full((), float(is_real)).expand_as(logits))
