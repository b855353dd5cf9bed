"""Memory per device, by part, at the fullest moment of a step."""

from dataclasses import dataclass
from typing import Any

import torch

from llmga.muon import split_parameters
from llmga.stage1.config import Stage1Config
from llmga.stage1.model import is_in_llm_block, learn_in_float32
from llmga.stage1.model_checks import has_class_token
from llmga.stage1.plan.architecture import Architecture, Counts, build_without_weights, count_by_part, part_of
from llmga.stage1.plan.live_bytes import ACTIVATIONS, GRADIENTS, LOSS
from llmga.stage1.plan.rehearsal import BatchShape, HowToStep, rehearse_muon, rehearse_step
from llmga.stage1.plan.states import BUFFERS, OPTIMIZER, WEIGHTS, Engine, States, standing_states

# Four bits, an 8-bit scale for 64 of them, and a float32 scale for 256 scales: nf4 with double quantisation.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
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
        matrices: parameters that Muon trains.
    """

    def __init__(self, cfg: Stage1Config, architecture: Architecture, devices: int = 1) -> None:
        self.cfg, self.architecture = cfg, architecture
        self.engine = Engine.of(cfg, devices)
        self._model = self._build()
        self.counts: dict[str, Counts] = count_by_part(self._model)
        by_muon = split_parameters(self._model, is_in_llm_block)[0] if cfg.optim.matrix_lr is not None else []
        self.matrices = sum(matrix.numel() for matrix in by_muon)

    @property
    def trained(self) -> int:
        """Parameters that learn."""
        return sum(part.trained for part in self.counts.values())

    @property
    def frozen(self) -> int:
        """Parameters that do not."""
        return sum(part.frozen for part in self.counts.values())

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one picture: the tower's patches, plus its class token where that is kept."""
        config = self.architecture.config
        tower, keeps_all = config.vision_config, config.vision_feature_select_strategy == "full"
        patches: int = (tower.image_size // tower.patch_size) ** 2
        return patches + (keeps_all and has_class_token(self._model.model.vision_tower))

    def at(self, batch: BatchShape) -> DeviceMemory:
        """Rehearse one step with a batch."""
        states = self._states()
        step = rehearse_step(self._model, batch, self._how())
        step[ACTIVATIONS] += self._unpacked_weight()
        backward = {part: states.parts.get(part, 0) + step.get(part, 0) for part in MEMORY_PARTS}
        stepping = {part: states.parts.get(part, 0) for part in MEMORY_PARTS}
        stepping[GRADIENTS] += states.step_extra
        if self.engine.stage is None:
            stepping[GRADIENTS] += 4 * self.trained
        if self.matrices:
            stepping[OPTIMIZER] += rehearse_muon(self._model)
        parts, moment = max(
            (backward, "backward pass"), (stepping, "optimizer step"), key=lambda one: sum(one[0].values())
        )
        return DeviceMemory(batch, parts, moment, states.host)

    def _states(self) -> States:
        hidden = self.architecture.config.text_config.hidden_size
        weights = self._weight_bytes()
        return standing_states(self.engine, self.trained, self.frozen, hidden, weights, self.matrices)

    def _weight_bytes(self) -> int:
        """All weights as they lie in a device's memory before anything is shared out."""
        in_four_bits = self._four_bit_parameters()
        names = dict(self._model.named_parameters())
        whole = (
            parameter.numel() * (parameter.element_size() if self.engine.stage is None else self.engine.compute_bytes)
            for name, parameter in names.items()
            if name not in in_four_bits
        )
        return sum(whole) + round(NF4_BYTES * sum(names[name].numel() for name in in_four_bits))

    def _unpacked_weight(self) -> int:
        """The largest weight of four bits, which is made whole to be multiplied with."""
        in_four_bits = self._four_bit_parameters()
        sizes = (p.numel() * p.element_size() for name, p in self._model.named_parameters() if name in in_four_bits)
        return max(sizes, default=0)

    def _four_bit_parameters(self) -> set[str]:
        """Names of the weights that quantising replaces: the frozen matrices of the LLM's layers."""
        if self.cfg.model.quantize == "none":
            return set()
        return {
            name
            for name, parameter in self._model.named_parameters()
            if part_of(name) == "LLM layers" and parameter.dim() == 2
        }

    def _how(self) -> HowToStep:
        run = self.cfg.run
        plain = self.engine.stage is None
        stay = "stay" if run.accumulation_steps > 1 else "arrive"
        return HowToStep(
            autocast=plain and run.precision == "bf16",
            checkpointing=run.gradient_checkpointing,
            chunked=self.cfg.model.cross_entropy == "chunked",
            gradients=stay if plain else "leave",
        )

    def _build(self) -> Any:
        """Under DeepSpeed all is in the run's precision; else float32, but for what is frozen beside a frozen LLM."""
        model, plain = self.cfg.model, self.engine.stage is None
        frozen_llm = model.lora is not None or model.trainable == "projector"
        low = self.engine.compute_bytes == 2 or (frozen_llm and self.cfg.run.precision == "bf16")
        built = build_without_weights(self.architecture, self.cfg, torch.bfloat16 if low else torch.float32)
        if plain and low and model.lora is None:
            learn_in_float32(built)
        return built
