"""Held-out loss by timestep: where along the noise the UNet gained, on the same rows and noise at every step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from llmga.learner import Learner
from llmga.loop import Place
from llmga.runtime import sum_over_ranks
from llmga.stage2.config import Stage2Config
from llmga.stage2.data import LatentShape, Stage2Collator, Stage2Dataset
from llmga.stage2.sources import Source

if TYPE_CHECKING:
    from llmga.stage2.train import TrainingLoss

BUCKETS = 4
_SEED = 0  # not the run's: held-out losses of all runs are about the same noise


class HeldOutLoss:
    """Measures every row of the held-out sets once in each quarter of the timesteps, with the averaged weights.

    A row's timestep lies at a fixed random place within the quarter; its latents are the posterior's mean. So figures
    of two steps differ by nothing but the weights. Rows are shared out over the processes; the sum does not depend on
    how many there are but for rounding.
    """

    def __init__(
        self,
        cfg: Stage2Config,
        sources: Sequence[Source],
        shape: LatentShape,
        collate: Stage2Collator,
        loss: "TrainingLoss",
        learner: Learner,
        place: Place,
    ) -> None:
        order = [(number, row, 0) for number, source in enumerate(sources) for row in range(len(source))]
        self.examples = Stage2Dataset(cfg, sources, order, shape, _SEED, held_out=True)
        self.batch_size, self.num_timesteps = cfg.run.batch_size, shape.num_timesteps
        self.collate, self.loss, self.learner, self.place = collate, loss, learner, place

    def __call__(self, step: int) -> dict[str, float]:
        """`eval_loss`, and `eval_loss_t<first timestep>` of each quarter; all ranks call."""
        ranks = self.place.ranks
        sums = np.zeros(BUCKETS)
        mine = range(ranks.rank, len(self.examples), ranks.world_size)
        with self.learner.averaged() as unet:
            for start in range(0, len(mine), self.batch_size):
                sums += self._losses(unet, list(mine[start : start + self.batch_size]))
        totals = sum_over_ranks([*sums, len(mine)])
        means = [total / totals[-1] for total in totals[:-1]]
        quarter = self.num_timesteps // BUCKETS
        by_timestep = {f"eval_loss_t{quarter * number}": mean for number, mean in enumerate(means)}
        return {"eval_loss": sum(means) / BUCKETS, **by_timestep}

    def _losses(self, unet: Any, indices: list[int]) -> np.ndarray:
        """(BUCKETS,) sums over some rows."""
        batch = self.collate([self.examples[index] for index in indices])
        batch["posterior_noise"] = torch.zeros_like(batch["posterior_noise"])
        batch = send_to_device(batch, self.place.accelerator.device)
        places = [np.random.default_rng([_SEED, index, BUCKETS]).random() for index in indices]
        sums = []
        for number in range(BUCKETS):
            timesteps = [int((number + place) * self.num_timesteps / BUCKETS) for place in places]
            batch["timesteps"] = torch.tensor(timesteps, device=batch["noise"].device)
            sums.append(self.loss.of_each(unet, batch).double().sum())
        return torch.stack(sums).cpu().numpy()
