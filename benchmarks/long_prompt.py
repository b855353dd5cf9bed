"""Encoding long prompts with SD1.5's text encoder: all chunks at once, beside the published loop over chunks.

    python benchmarks/long_prompt.py

One thread, random weights in the real size, float32; processor time is counted, so that other work on the machine
matters little. The best of the rounds counts; the result goes to benchmarks/results/long_prompt.json.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from llmga.machine import machine_in_words
from llmga.stage2.long_prompt import encode_long_prompt, tokenize_long_prompt
from llmga.stage2.prompt_batch import EncodedPrompts
from llmga.stage2.prompt_encoder import LongPromptEncoder
from llmga.tokens import CHUNK_TOKENS, clip_tokenizer

RESULT = Path(__file__).parent / "results" / "long_prompt.json"
MAX_CHUNKS = 4
BATCH = 32
EMPTY_SHARE = 0.1  # prompts that training replaces by the empty one
MEDIAN_TOKENS, SPREAD = 110, 0.5  # log-normal: as long as the prompts of long-prompt test sets, a tail to four chunks
WORDS = ["cat", "dog", "sun", "red", "sea", "tree", "lamp", "boat", "stone", "cloud", "light"]  # a token each


def text_of(num_tokens: int, rng: np.random.Generator) -> str:
    """A text of so many tokens, unlike any other."""
    return " ".join(rng.choice(WORDS, num_tokens))


def training_batch(rng: np.random.Generator) -> list[str]:
    """Prompts as long as a model writes them, some replaced by the empty one."""
    lengths = rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, BATCH).round().clip(20, CHUNK_TOKENS * MAX_CHUNKS)
    empty = rng.permutation(BATCH) < round(EMPTY_SHARE * BATCH)
    return ["" if drop else text_of(int(length), rng) for length, drop in zip(lengths, empty, strict=True)]


def full_batch(rng: np.random.Generator) -> list[str]:
    """Every prompt fills all chunks; no two chunks are equal."""
    return [text_of(CHUNK_TOKENS * MAX_CHUNKS, rng) for _ in range(BATCH)]


def guided_batch(rng: np.random.Generator) -> list[str]:
    """One prompt of four chunks and its empty negative."""
    return [text_of(280, rng), ""]


# Kind -> how a batch is made, and how many are measured: lengths differ from one training batch to the next.
BATCHES: dict[str, tuple[Callable[[np.random.Generator], list[str]], int]] = {
    "training batches, 32 prompts of up to 4 chunks": (training_batch, 4),
    "no duplicates, 32 prompts of 4 full chunks": (full_batch, 1),
    "one prompt of 4 chunks and its empty negative": (guided_batch, 1),
}


def published_loop(input_ids: Tensor, text_encoder: CLIPTextModel) -> Tensor:
    """The arithmetic of the published code: the batch's first chunks, then its second ones, and so on."""
    parts = []
    for body in input_ids[:, 1:-1].split(CHUNK_TOKENS, dim=1):
        window = torch.cat([input_ids[:, :1], body, input_ids[:, -1:]], dim=1)
        parts.append(text_encoder(window).last_hidden_state)
    return torch.cat([parts[0][:, :1], *(part[:, 1:-1] for part in parts), parts[-1][:, -1:]], dim=1)


def measure(
    prompts: Sequence[str], text_encoder: CLIPTextModel, encoder: LongPromptEncoder, rounds: int
) -> dict[str, Any]:
    """Seconds of each way to encode the same prompts, tokenizing included."""
    rows: list[int] = []
    hook = text_encoder.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))

    def with_loop() -> Tensor:
        return published_loop(tokenize_long_prompt(encoder.towers[0].tokenizer, prompts, MAX_CHUNKS), text_encoder)

    def with_ours() -> Tensor:
        return encode_long_prompt(tokenize_long_prompt(encoder.towers[0].tokenizer, prompts, MAX_CHUNKS), text_encoder)

    ways: dict[str, Callable[[], Tensor | EncodedPrompts]] = {
        "published loop": with_loop,
        "same result, at once": with_ours,
        "own chunks and mask": partial(encoder.encode, list(prompts)),
    }
    best: dict[str, dict[str, Any]] = {}
    results = {}
    for _ in range(rounds):
        for name, way in ways.items():
            rows.clear()
            start = time.process_time()
            results[name] = way()
            seconds = time.process_time() - start
            if name not in best or seconds < best[name]["seconds"]:
                best[name] = {"seconds": round(seconds, 3), "calls": len(rows), "windows": sum(rows)}
    hook.remove()
    loop = best["published loop"]["seconds"]
    for figures in best.values():
        figures["times_faster"] = round(loop / figures["seconds"], 2)
    lengths = [prompt.num_tokens for prompt in results["own chunks and mask"].prompts]
    return {
        "tokens": {"mean": round(float(np.mean(lengths)), 1), "longest": max(lengths), "empty": lengths.count(0)},
        "ways": best,
        "largest_difference": float((results["published loop"] - results["same result, at once"]).abs().max()),
    }


def together(batches: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each way's sums over the batches, and how many times faster than the loop it was over all of them."""
    sums: dict[str, dict[str, float]] = {}
    for name in batches[0]["ways"]:
        figures = [batch["ways"][name] for batch in batches]
        sums[name] = {key: round(sum(one[key] for one in figures), 3) for key in ("seconds", "calls", "windows")}
        sums[name]["times_faster"] = round(sums["published loop"]["seconds"] / sums[name]["seconds"], 2)
    return sums


@torch.no_grad()
def main() -> None:
    """Measure every kind of batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # read when torch is imported, so start anew
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    torch.manual_seed(args.seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    ).eval()
    encoder = LongPromptEncoder.for_sd(clip_tokenizer(), text_encoder)
    encoder.encode("warm up")
    kinds = {}
    for number, (kind, (make, count)) in enumerate(BATCHES.items()):
        batches = []
        for index in range(count):
            prompts = make(np.random.default_rng([args.seed, number, index]))
            batches.append(measure(prompts, text_encoder, encoder, args.rounds))
            print(kind, json.dumps(batches[-1]), flush=True)
        kinds[kind] = {"together": together(batches), "batches": batches}
    result = {
        "command": f"python benchmarks/long_prompt.py --rounds {args.rounds} --seed {args.seed}",
        "machine": machine_in_words("torch", "transformers", threads=1, note="shared; processor time is counted"),
        "text_encoder": "CLIPTextModel, 12 layers, 768 wide, random weights, float32",
        "kinds": kinds,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}; {result['machine']}")


if __name__ == "__main__":
    main()
