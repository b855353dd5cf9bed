"""How long a run takes: from tokens per second that were measured or given, or from a share of the card's peak.

Arithmetic is counted in multiply-adds times two, by what really runs: 2 per weight and token forward, 2 more backward
for what the weights are multiplied with, 2 more for weights that learn, and the layers' forward pass once more with
gradient checkpointing. Attention adds 4 per layer, token and width for every token attended to, half of it causal.
The vision tower runs forward only.
"""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from llmga.config import dump_config
from llmga.stage1.config import Stage1Config
from llmga.stage1.plan.architecture import Counts


class SpeedError(ValueError):
    """A throughput that cannot be taken from what was given; the message says why."""


@dataclass(frozen=True)
class Card:
    """A device as its maker describes it: dense bf16 matrix peak, and memory."""

    word: str  # of its name, as the driver tells it
    peak_tflops: float
    memory_gib: int


CARDS = {
    "RTX-3090": Card("3090", 71, 24),
    "RTX-4090": Card("4090", 165, 24),
    "A10": Card("A10", 125, 24),
    "L40S": Card("L40S", 362, 48),
    "A100-40GB": Card("A100", 312, 40),
    "A100-80GB": Card("A100", 312, 80),
    "H100": Card("H100", 989, 80),
    "H200": Card("H200", 989, 141),
}
ASSUMED_SHARE = 0.4  # of the peak, where nothing was measured


@dataclass(frozen=True)
class Speed:
    """A throughput.

    Attributes:
        tokens_per_s: over all devices, padding excluded.
        basis: one sentence: measured, given or assumed, and from what.
    """

    tokens_per_s: float
    basis: str


def card_here() -> str | None:
    """The table's name of this machine's GPU, None without one that is in it."""
    if not torch.cuda.is_available():
        return None
    return named_card(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30)


def named_card(name: str, memory_gib: float) -> str | None:
    """The row for a card by the driver's name and its memory, which tells two of one name apart."""
    words = re.split(r"[^A-Za-z0-9]+", name)
    rows = [key for key, card in CARDS.items() if card.word in words]
    return min(rows, key=lambda key: abs(CARDS[key].memory_gib - memory_gib), default=None)


def flops_per_token(
    cfg: Stage1Config,
    config: Any,
    counts: dict[str, Counts],
    tokens: float,
    pictures: float,
    trained_share: float = 1.0,
) -> float:
    """Floating-point operations for one token of a step, the vision tower's share included.

    Args:
        config: of the LLaVA.
        counts: parameters by part.
        tokens, pictures: per example; tokens include picture placeholders.
        trained_share: of the tokens; the chunked cross-entropy computes no other logits.
    """
    text = config.text_config
    layers, head = counts["LLM layers"], text.vocab_size * text.hidden_size
    adapters = counts.get("adapters", Counts(0, 0)).trained
    width = text.num_attention_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    attention = 4 * text.num_hidden_layers * width * tokens / 2  # half of all pairs
    forward = 2 * (layers.trained + layers.frozen + adapters) + attention
    backward = 2 * (layers.frozen + adapters) + 4 * layers.trained + 2 * adapters + 2 * attention
    again = forward if cfg.run.gradient_checkpointing else 0.0
    head_trains = counts["embeddings and head"].trained > 0
    logits = head * (6 if head_trains else 4)
    if cfg.model.cross_entropy == "chunked":
        logits *= trained_share
    vision, projector = counts["vision tower"], counts["projector"]
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    picture = patches * (2 * (vision.trained + vision.frozen) + 6 * projector.trained + 2 * projector.frozen)
    return forward + backward + again + logits + picture * pictures / tokens


def speed_from_share(flops: float, card: str, devices: int, share: float | None) -> Speed:
    """Tokens per second when the devices do `share` of their peak; an assumed share where None is given.

    Raises:
        SpeedError: a card that is not in the table.
    """
    check_card(card)
    taken = ASSUMED_SHARE if share is None else share
    peak = CARDS[card].peak_tflops
    basis = (
        f"{'assumed' if share is None else 'given'}: {taken:.0%} of {peak:g} TFLOP/s (bf16 peak of {card}, by its "
        f"maker) on {devices} device{'s'[: devices > 1]}, {flops / 1e9:,.2f} GFLOP per token, recomputation included"
    )
    return Speed(taken * peak * 1e12 * devices / flops, basis)


def check_card(card: str | None) -> None:
    """Refuse a card that is not in the table.

    Raises:
        SpeedError: names those that are.
    """
    if card is not None and card not in CARDS:
        raise SpeedError(f"card {card!r} is not in the table; expected one of {', '.join(CARDS)}")


def speed_of_run(path: Path, cfg: Stage1Config, devices: int) -> Speed:
    """The median throughput of a former run, without its first log, taken to grow with the number of devices.

    Args:
        path: the run's folder, or its metrics.jsonl.
        cfg, devices: of the run to come; what of its shape differs is said.
    Raises:
        SpeedError: no such file, or no throughput in it.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SpeedError(f"{path} cannot be read as the metrics of a run: {error}") from error
    logged = [float(line["tokens_per_s"]) for line in lines if "tokens_per_s" in line]
    if not logged:
        raise SpeedError(f"{path} holds no tokens_per_s; give the metrics.jsonl of a stage-1 run, or --tokens-per-s")
    settled = logged[1:] or logged
    median, basis = statistics.median(settled), f"measured: median of {len(settled)} logs of {path}"
    former = _devices_of(path.parent)
    if former is not None and former != devices:
        median, basis = median / former * devices, f"{basis}, taken from {former} to {devices} devices in proportion"
    if differing := _other_shape(path.parent, cfg):
        basis += f"; that run had another {', '.join(differing)}"
    return Speed(median, basis)


def _devices_of(run: Path) -> int | None:
    """Processes of a former run, None where it does not say."""
    try:
        return int(json.loads((run / "environment.json").read_text(encoding="utf-8"))["starts"][-1]["world_size"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _other_shape(run: Path, cfg: Stage1Config) -> list[str]:
    """Settings that decide the speed and were others in a former run."""
    try:
        former = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    now = dump_config(cfg)
    return [
        f"{section}.{key}"
        for section, keys in _SHAPE.items()
        for key in keys
        if (former.get(section) or {}).get(key) != now[section][key]
    ]


_SHAPE = {
    "model": ("path", "llm", "vision_tower", "trainable", "lora", "quantize", "attention", "cross_entropy", "liger"),
    "data": ("max_length", "packing"),
    "run": ("batch_size", "precision", "gradient_checkpointing", "deepspeed"),
}
