"""Tokens per second of stage 1 at full size on a GPU, and which share that is of the card's own matrix peak.

    python benchmarks/stage1_gpu.py --out benchmarks/results/stage1_gpu.json
    python benchmarks/stage1_gpu.py model.attention=flash_attention_2 run.batch_size=16

A model with the sizes of LLaVA-1.5 7B and random weights (another one: --config) trains on made-up conversations, each
with a picture, by the code of a run: packed rows, their attention, chunked cross-entropy, gradient checkpointing, fused
AdamW. Weights, gradients and moments are bf16, so that all fit on one card of 80 GB; loading of data is left out.

The peak is measured: the fastest of several large bf16 products on the same card just before. Arithmetic is counted as
`llmga plan` counts it. `share_of_peak` is of the arithmetic that training needs, `share_with_recomputation` also counts
what gradient checkpointing computes twice.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llmga.config import EXIT_BAD_INPUT, EXIT_OK, load_config
from llmga.machine import machine_in_words, matrix_peak_tflops
from llmga.stage1.arithmetic import set_arithmetic
from llmga.stage1.config import Stage1Config
from llmga.stage1.data import Collator
from llmga.stage1.model import set_trainable
from llmga.stage1.packing import PackingCollator
from llmga.stage1.plan.architecture import read_architecture
from llmga.stage1.plan.memory import MemoryModel
from llmga.stage1.plan.speed import flops_per_token
from llmga.tokens import IGNORE_INDEX

CONFIG = Path(__file__).parents[1] / "configs" / "stage1" / "llava15_7b_full_80gb.yaml"
ON_ONE_CARD = ("run.deepspeed=null", "run.batch_size=8", "run.precision=bf16")
TRAINED_SHARE = 0.5  # of a conversation's text


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the result where asked; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings on top of the config's")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--tokens", type=int, default=1024, help="of a conversation, its picture included")
    parser.add_argument("--steps", type=int, default=10, help="timed, after two to warm up")
    parser.add_argument("--out", type=Path, help="file to write the result to")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks/stage1_gpu.py needs a CUDA device and none is visible; run it on a GPU machine\n")
        return EXIT_BAD_INPUT
    cfg = load_config(Stage1Config, options.config, [*ON_ONE_CARD, *options.overrides], check_machine=False)
    device = torch.device("cuda")
    result = {
        "command": " ".join(["python benchmarks/stage1_gpu.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": machine_in_words("torch", "transformers", note=torch.cuda.get_device_name(device)),
        **measure(cfg, device, options.tokens, options.steps, matrix_peak_tflops(device)),
        "memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return EXIT_OK


def measure(cfg: Stage1Config, device: torch.device, tokens: int, steps: int, peak_tflops: float) -> dict[str, Any]:
    """Train a random model of a config's sizes.

    Args:
        tokens: of a conversation, its picture included.
        steps: timed, after two to warm up.
        peak_tflops: of the device, in bf16.
    Returns:
        Figures: median seconds of a step, tokens per second, arithmetic, shares of the peak, first and last loss.
    """
    architecture = read_architecture(cfg.model)
    model = build_model(architecture.config, cfg, device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=cfg.optim.lr, fused=True)
    batch = make_batch(architecture.config, cfg.run.batch_size, tokens, device)
    seconds, losses = [], []
    for _ in range(2 + steps):
        start = now(device)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(device) - start)
        losses.append(float(loss.detach()))
    tokens_per_s = batch["input_ids"].numel() / statistics.median(seconds[2:])
    trained_share = float((batch["labels"] != IGNORE_INDEX).sum()) / batch["labels"].numel()
    counts = MemoryModel(cfg, architecture).counts
    once = replace(cfg, run=replace(cfg.run, gradient_checkpointing=False))
    needed, done = (flops_per_token(c, architecture.config, counts, tokens, 1, trained_share) for c in (once, cfg))
    return {
        "parameters": sum(count.trained + count.frozen for count in counts.values()),
        "tokens_per_step": batch["input_ids"].numel(),
        "seconds_per_step": round(statistics.median(seconds[2:]), 4),
        "tokens_per_s": round(tokens_per_s, 1),
        "gflop_per_token": round(needed / 1e9, 3),
        "measured_peak_tflops": round(peak_tflops, 1),
        "share_of_peak": round(tokens_per_s * needed / (peak_tflops * 1e12), 4),
        "share_with_recomputation": round(tokens_per_s * done / (peak_tflops * 1e12), 4),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def build_model(config: LlavaConfig, cfg: Stage1Config, device: torch.device) -> LlavaForConditionalGeneration:
    """Random weights in bf16, computing as the settings say."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(
            config, attn_implementation=cfg.model.attention, dtype=torch.bfloat16
        )
    set_trainable(model.train(), cfg.model.trainable)
    set_arithmetic(model, cfg)
    if cfg.run.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(config: LlavaConfig, conversations: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """One packed row of conversations of noise, the end of each trained."""
    rng = np.random.default_rng(0)
    side, placeholder = config.vision_config.image_size, config.image_token_id
    picture = [placeholder] * config.image_seq_length
    if tokens < len(picture) + 4:
        raise SystemExit(
            f"--tokens {tokens} has no room for a picture of {len(picture)}; give {len(picture) + 4} or more"
        )
    examples = []
    for index in range(conversations):
        text = rng.integers(0, config.text_config.vocab_size - 1, tokens - len(picture))
        text[text >= placeholder] += 1  # no placeholder among them
        answer = round(TRAINED_SHARE * len(text))
        ids = [*picture, *text.tolist()]
        labels = [IGNORE_INDEX] * (tokens - answer) + ids[tokens - answer :]
        pixels = rng.standard_normal((3, side, side), np.float32)
        example = {"input_ids": ids, "labels": labels, "pixel_values": pixels, "sample_id": index, "held_out": False}
        examples.append(example)
    batch = PackingCollator(Collator(0, placeholder, len(picture), (3, side, side)))(examples)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
