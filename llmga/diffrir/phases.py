"""What each phase minimises, as losses for `llmga.loop`; all networks are called as the loop hands them over.

prior    generator and teacher's encoder learn together: pixels
encoder  condition and denoiser learn to predict the teacher's prior; the generator is frozen and not run
joint    all of the restorer: pixels, in the hole alone at scale 1, and the prior
gan      all of the restorer against a discriminator: pixels of the whole picture, prior, VGG19 features, its opinion
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmga.diffrir.config import LossConfig
from llmga.diffrir.loss import adversarial_loss, distillation_loss, pixel_loss
from llmga.diffrir.network import DiffRIR
from llmga.diffrir.reference import compose, concat_reference, hole_of

Batch = dict[str, Any]
Figures = dict[str, Tensor]


def network_inputs(batch: Batch, reference: bool) -> Tensor:
    """What the network sees of a batch: the degraded pictures, and the kept pixels where it takes them."""
    if not reference:
        return batch["low_quality"]
    return concat_reference(batch["low_quality"], target_of(batch), batch["edit_mask"])


def target_of(batch: Batch) -> Tensor:
    """What the network aims at: the truth, sharpened in V2 runs."""
    return batch.get("target", batch["ground_truth"])


class PriorLoss:
    """Phase prior: mean absolute difference over the whole picture."""

    def __init__(self, reference: bool, weights: LossConfig) -> None:
        self.reference, self.weights = reference, weights

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        target = target_of(batch)
        image = network(network_inputs(batch, self.reference), target).image
        return self.weights.pixel * pixel_loss(image, target), {}


class PredictionLoss:
    """Phases encoder, joint and gan: the restorer learns to do without the truth.

    Args:
        teacher: of phase prior, frozen; it is asked without gradients.
        phase: "encoder", "joint" or "gan".
        weights: of the terms.
        perceptual, discriminator: of phase gan, where their terms weigh anything.
    Attributes:
        restored: the pictures of the last call, detached, for the discriminator's turn.
    """

    def __init__(
        self,
        teacher: DiffRIR,
        phase: str,
        weights: LossConfig,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        discriminator: nn.Module | None = None,
    ) -> None:
        self.teacher, self.phase, self.weights = teacher, phase, weights
        self.perceptual, self.discriminator = perceptual, discriminator
        self.restored: Tensor | None = None

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        inputs, target = network_inputs(batch, self.teacher.reference), target_of(batch)
        with torch.no_grad():
            wanted = self.teacher.encode_prior(inputs, target)
        found = network(inputs, teacher_prior=wanted, prior_only=self.phase == "encoder")
        distillation = distillation_loss(found.prior, wanted)
        loss = self.weights.distillation * distillation.absolute
        if self.weights.divergence:
            loss = loss + self.weights.divergence * distillation.divergence
        figures = {"loss_prior": distillation.absolute, "divergence": distillation.divergence}
        if self.phase != "encoder":
            terms = self._of_pictures(found.image, target, batch)
            loss = loss + torch.stack(list(terms.values())).sum()
            figures |= terms
        return loss, figures

    def _of_pictures(self, image: Tensor, target: Tensor, batch: Batch) -> Figures:
        """The weighted terms that look at pictures."""
        terms: Figures = {}
        hole = batch["edit_mask"]
        if self.phase == "joint" and self.teacher.scale == 1:
            composed = compose(image, target, hole)
            area = hole_of(hole) if self.weights.hole_average else None
            terms["loss_pixel"] = self.weights.pixel * pixel_loss(composed, target, area)
        else:
            terms["loss_pixel"] = self.weights.pixel * pixel_loss(image, target)
        if self.phase == "gan":
            self.restored = image.detach()
            if self.perceptual is not None:
                terms["loss_perceptual"] = self.weights.perceptual * self.perceptual(image, target)
            if self.discriminator is not None:
                opinion = adversarial_loss(self.discriminator(image), is_real=True)
                terms["loss_adversarial"] = self.weights.adversarial * opinion
        return terms


class DiscriminatorLoss:
    """Phase gan: tell the truth, never sharpened, from what the restorer made of the same batch.

    Both are judged in one pass; the published code makes two, and its spectral norms take two power iterations.
    """

    def __init__(self, restorer: PredictionLoss) -> None:
        self.restorer = restorer

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        assert self.restorer.restored is not None, "the restorer learns first"
        real, made = network(torch.cat([batch["ground_truth"], self.restorer.restored])).chunk(2)
        return adversarial_loss(real, is_real=True) + adversarial_loss(made, is_real=False), {
            "real_logit": real.mean(),
            "made_logit": made.mean(),
        }
