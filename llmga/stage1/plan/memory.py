"""Memory per device, by part, at the fullest moment of a step."""

from dataclasses import dataclass
from typing import Any

import torch

from llmga.stage1.config import Stage1Config
from llmga.stage1.plan.architecture import Architecture, Counts, build_without_weights, count_parameters
from llmga.stage1.plan.rehearsal import ACTIVATIONS, GRADIENTS, LOSS, BatchShape, HowToStep, rehearse_step
from llmga.stage1.plan.states import BUFFERS, OPTIMIZER, WEIGHTS, Engine, States, standing_states

MEMORY_PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS, BUFFERS)


@dataclass(frozen=True)
class DeviceMemory:
    """What one device holds at its fullest moment.

    Attributes:
        batch: for which micro-batch.
        parts: bytes by `MEMORY_PARTS`.
        moment: "backward pass" or "optimizer step".
        host: bytes in host memory for each device, where something is offloaded.
    """

    batch: BatchShape
    parts: dict[str, int]
    moment: str
    host: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


class MemoryModel:
    """Memory of a run's steps for any batch.

    Args:
        cfg: of the run.
        architecture: of its model.
        devices: that share the work.
    Attributes:
        counts: parameters by part of the model.
    """

    def __init__(self, cfg: Stage1Config, architecture: Architecture, devices: int = 1) -> None:
        self.cfg, self.architecture = cfg, architecture
        self.engine = Engine.of(cfg, devices)
        self.counts: dict[str, Counts] = count_parameters(self._build())

    @property
    def trained(self) -> int:
        """Parameters that learn."""
        return sum(part.trained for part in self.counts.values())

    @property
    def frozen(self) -> int:
        """Parameters that do not."""
        return sum(part.frozen for part in self.counts.values())

    def at(self, batch: BatchShape) -> DeviceMemory:
        """Rehearse one step with a batch."""
        states = self._states()
        step = rehearse_step(self._build(), batch, self._how())
        backward = {part: states.parts.get(part, 0) + step.get(part, 0) for part in MEMORY_PARTS}
        stepping = {part: states.parts.get(part, 0) for part in MEMORY_PARTS}
        stepping[GRADIENTS] += states.step_extra
        if self.engine.stage is None:
            stepping[GRADIENTS] += 4 * self.trained
        parts, moment = max(
            (backward, "backward pass"), (stepping, "optimizer step"), key=lambda one: sum(one[0].values())
        )
        return DeviceMemory(batch, parts, moment, states.host)

    def _states(self) -> States:
        size = self.engine.compute_bytes * (self.trained + self.frozen)
        hidden = self.architecture.config.text_config.hidden_size
        return standing_states(self.engine, self.trained, self.frozen, hidden, size)

    def _how(self) -> HowToStep:
        run = self.cfg.run
        plain = self.engine.stage is None
        stay = "stay" if run.accumulation_steps > 1 else "arrive"
        return HowToStep(
            autocast=plain and run.precision == "bf16",
            checkpointing=run.gradient_checkpointing,
            gradients=stay if plain else "leave",
        )

    def _build(self) -> Any:
        dtype = torch.bfloat16 if self.engine.compute_bytes == 2 else torch.float32
        return build_without_weights(self.architecture, self.cfg, dtype)
