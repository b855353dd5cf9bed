"""What stays in memory from step to step: weights, optimizer states, gradients and buffers, by who owns them.

Plain runs (one device, or DDP) keep everything on every device in float32. DeepSpeed computes in the run's precision
and shares out, over N devices, optimizer states (stage 1), gradients too (2), weights too (3); or puts them in host
memory. Bytes below are per parameter. Source: deepspeed 0.19 runtime/zero/stage_1_and_2.py and stage3.py, as read; what
they hold was measured for benchmarks/results/plan_memory.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmga.engine import deepspeed_settings
from llmga.stage1.config import Stage1Config
from llmga.stage1.plan.live_bytes import GRADIENTS

WEIGHTS, OPTIMIZER, BUFFERS = "weights", "optimizer states", "communication buffers"
_MASTER, _ADAM, _MUON = 4, 8, 4  # float32 copy of a weight; its two moments, or its one momentum
_REUSE = 1_000_000_000  # parameters; DeepSpeed's default for stage3_max_reuse_distance


@dataclass(frozen=True)
class Engine:
    """Who owns optimizer and weights.

    Attributes:
        stage: of ZeRO; None for a plain run.
        zero: the `zero_optimization` section of its file.
        devices: that share.
        compute_bytes: of a weight as it computes: 2 for bf16, 4 for fp32.
    """

    stage: int | None
    devices: int
    compute_bytes: int
    zero: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: Stage1Config, devices: int) -> "Engine":
        """The engine of a config; a DeepSpeed file that is not there counts as none."""
        if cfg.run.deepspeed is None or not cfg.run.deepspeed.is_file():
            return cls(None, devices, 4)
        zero = deepspeed_settings(cfg.run.deepspeed)["zero_optimization"]
        return cls(zero.get("stage", 0), devices, 2 if cfg.run.precision == "bf16" else 4, zero)

    def offloads(self, what: str) -> bool:
        """Whether "optimizer" or "param" lie in host memory."""
        return (self.zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

    def size(self, key: str, default: int, automatic: int) -> int:
        """A number of the file; `automatic` for "auto", as transformers fills it in."""
        value = self.zero.get(key, default)
        return automatic if value == "auto" else int(value)


@dataclass(frozen=True)
class States:
    """Bytes on one device.

    Attributes:
        parts: what is there during forward and backward pass.
        step_extra: what comes on top while the optimizer makes its step; activations are gone by then.
        host: bytes in host memory, for one device.
    """

    parts: dict[str, int]
    step_extra: int
    host: int


def optimizer_bytes(trained: int, matrices: int) -> int:
    """Float32 states of what learns.

    Args:
        trained: parameters, by AdamW but for the matrices.
        matrices: parameters that Muon trains.
    """
    return _ADAM * (trained - matrices) + _MUON * matrices


def standing_states(
    engine: Engine, trained: int, frozen: int, hidden_size: int, weight_bytes: int, matrices: int = 0
) -> States:
    """What one device holds beside a step's activations.

    Args:
        trained, frozen: parameters.
        hidden_size: of the LLM; transformers derives DeepSpeed's bucket sizes from it.
        weight_bytes: of all weights as loaded; less than 4 a parameter for a quantised base.
        matrices: of the trained parameters, by Muon; none under DeepSpeed.
    """
    if engine.stage is None:
        buckets = 4 * trained if engine.devices > 1 else 0  # DDP keeps a second copy of the gradients
        states = optimizer_bytes(trained, matrices)
        return States({WEIGHTS: weight_bytes, OPTIMIZER: states, BUFFERS: buckets}, 0, 0)
    if engine.stage < 3:
        return _sharing_optimizer(engine, trained, hidden_size, weight_bytes)
    return _sharing_weights(engine, trained, hidden_size, weight_bytes)


def _sharing_optimizer(engine: Engine, trained: int, hidden_size: int, weight_bytes: int) -> States:
    """ZeRO-1 and 2."""
    share = trained // (engine.devices if engine.stage else 1)
    size = engine.compute_bytes
    bucket = min(engine.size("reduce_bucket_size", 5 * 10**8, hidden_size**2), trained)
    buffers = size * bucket * (2 if engine.zero.get("overlap_comm") else 1)
    gradients = size * (share if engine.stage == 2 else trained)
    flattened = size * share + (4 * share if size == 2 else 0)  # one piece of all, then in float32
    if engine.offloads("optimizer"):
        return States({WEIGHTS: weight_bytes, GRADIENTS: 0, OPTIMIZER: 0, BUFFERS: buffers}, 0, (16 + size) * share)
    parts = {WEIGHTS: weight_bytes, GRADIENTS: gradients, OPTIMIZER: (_MASTER + _ADAM) * share, BUFFERS: buffers}
    return States(parts, flattened, 0)


def _sharing_weights(engine: Engine, trained: int, hidden_size: int, weight_bytes: int) -> States:
    """ZeRO-3."""
    share, size = trained // engine.devices, engine.compute_bytes
    bucket = min(engine.size("reduce_bucket_size", 5 * 10**8, hidden_size**2), trained)
    prefetch = engine.size("stage3_prefetch_bucket_size", 5 * 10**7, int(0.9 * hidden_size**2))
    # A weight used again soon stays whole: where forward turns to backward these are the last ones, each met twice.
    reuse = engine.size("stage3_max_reuse_distance", _REUSE, _REUSE) // 2
    scattered = engine.devices > 1 or engine.offloads("param")
    whole = min(weight_bytes, size * (reuse + prefetch)) if scattered else 0
    buffers = whole + size * bucket * (2 if engine.zero.get("overlap_comm", True) else 1)
    group = min(engine.size("sub_group_size", 10**9, 10**9), share)
    flattened = size * group + (4 * group if size == 2 else 0)
    master = _MASTER if size == 2 else 0  # in float32 the shares themselves are stepped
    parts = {WEIGHTS: weight_bytes // engine.devices, BUFFERS: buffers}
    host = 0
    if engine.offloads("param"):
        host += parts[WEIGHTS]
        parts[WEIGHTS] = 0
    if engine.offloads("optimizer"):
        return States(parts, 0, host + (4 + _MASTER + _ADAM + size) * share)
    parts |= {GRADIENTS: size * share, OPTIMIZER: (master + _ADAM) * share}
    return States(parts, flattened, host)
