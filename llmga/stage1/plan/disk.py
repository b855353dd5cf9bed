"""What a run writes: checkpoints, one more while the next is being written, and the finished model."""

from dataclasses import dataclass

from llmga.stage1.config import Stage1Config
from llmga.stage1.plan.memory import MemoryModel
from llmga.stage1.plan.states import optimizer_bytes

PART_BYTES = 2  # a weight of a published base model, in bf16 or fp16


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Attributes:
        checkpoint: one of them.
        count: how many lie there at the fullest moment.
        final: the finished model, or adapter.
        base: what is put together from parts before the run, 0 for a model that comes whole.
    """

    checkpoint: int
    count: int
    final: int
    base: int

    @property
    def total(self) -> int:
        """At the fullest moment."""
        return self.checkpoint * self.count + self.final + self.base


def disk_use(cfg: Stage1Config, model: MemoryModel) -> Disk:
    """Bytes that a run's folder needs; sample pages and logs are small beside them.

    A plain checkpoint holds the weights and the optimizer's states in float32. DeepSpeed's holds the weights twice in
    the run's precision (its own files, and the gathered model; under ZeRO-3 its shares are within the optimizer's), and
    weights and moments of what learns in float32. Of an adapter's run only the adapter is saved. A checkpoint is taken
    at the end in any case.
    """
    adapter = cfg.model.lora is not None
    everything, size = model.trained + model.frozen, model.engine.compute_bytes
    saved = model.trained if adapter else everything
    if model.engine.stage is None:
        checkpoint = 4 * saved + optimizer_bytes(model.trained, model.matrices)
    else:
        checkpoint = (2 if model.engine.stage < 3 else 1) * size * saved + 12 * model.trained
    final = saved * (2 if cfg.run.precision == "bf16" and not adapter else 4)
    count = cfg.run.keep_last + 1 if cfg.run.save_every_steps else 1
    return Disk(checkpoint, count, final, PART_BYTES * everything if cfg.model.path is None else 0)
