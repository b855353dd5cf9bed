"""Training images per second of stage 2 from cached latents, against the published loop, on the same UNet in one run.

    python benchmarks/stage2_train.py --size small
    python benchmarks/stage2_train.py --size sd15 --batch 32 --out benchmarks/results/stage2_train.json

The published loop, written plainly: each step encodes the pictures with the autoencoder, encodes the chunks of the
prompts one after the other, and updates every weight by AdamW's plain loop. Ours (`cached`) reads moments from memory,
encodes all chunks of a batch in one call with equal ones once, and updates by the fused kernel; `cached_with_text`
reads what the text encoder says from memory too, as `cache.text: true` does. All run the same random UNet in the same
precision with the same batch; pictures and prompts are made up, the loader is left out of all.

Sizes: small (widths of a quarter, 64 px, for a CPU) and sd15 (the full layout with random weights, 512 px, for a GPU).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from llmga.machine import machine_in_words, matrix_peak_tflops
from llmga.stage2.chunks import join_rows
from llmga.stage2.loss import noise_prediction_loss
from llmga.stage2.prompt_encoder import LongPromptEncoder
from llmga.stage2.prompt_layout import prompt_layout
from llmga.tokens import clip_tokenizer

WORDS = ("red", "circle", "beside", "two", "striped", "squares", "under", "an", "old", "lamp", "on", "green", "ground")
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "side": 64,
        "unet": {"block_out_channels": (64, 128, 192), "down": 3, "cross_attention_dim": 192, "attention_head_dim": 8},
        "vae": (32, 64, 128, 128),
        "text": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 3},
    },
    "sd15": {
        "side": 512,
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "down": 4, "cross_attention_dim": 768,
                 "attention_head_dim": 8},
        "vae": (128, 256, 512, 512),
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
}  # fmt: skip


def main() -> None:
    """Measure both loops in alternation and print, or write, the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute in both; the published loop does")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, help="file to write the result to")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    steps = build_steps(options, device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm up
    for _ in range(options.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, options.steps, device))
    rates = {name: round(options.batch / statistics.median(found), 3) for name, found in seconds.items()}
    result = {
        "size": options.size, "batch": options.batch, "gradient_checkpointing": options.checkpointing,
        "precision": str(dtype).removeprefix("torch."), "device": device_name(device),
        "images_per_s": rates, "ratio": round(rates["cached"] / rates["published"], 3),
        "ratio_with_text": round(rates["cached_with_text"] / rates["published"], 3),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "matrix_peak_tflops": round(matrix_peak_tflops(device), 1) if device.type == "cuda" else None,
        "machine": machine_in_words("torch", "diffusers", threads=torch.get_num_threads(), note=options.note),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def build_steps(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """One training step of each loop, each with its own copy of the same UNet."""
    size = SIZES[options.size]
    torch.manual_seed(0)
    vae = _vae(size).to(device, dtype).requires_grad_(False).eval()
    text_config = CLIPTextConfig(**size["text"], bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    text = CLIPTextModel(text_config).to(device, dtype).requires_grad_(False).eval()
    tokenizer = clip_tokenizer()
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pixels = torch.rand(options.batch, 3, size["side"], size["side"], device=device) * 2 - 1
    with torch.no_grad():
        moments = vae.encode(pixels.to(dtype)).latent_dist
        mean, std = moments.mean.float(), moments.std.float()
    prompts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(60 + 50 * (i % 4))) for i in range(options.batch)]
    encoder = LongPromptEncoder.for_sd(tokenizer, text, prompt_layout("published"))
    tokens = encoder.tokenize(prompts)

    def published_text() -> Tensor:
        rows, counts = tokens.towers[0].rows.to(device), tokens.towers[0].num_chunks
        by_chunk = rows.unflatten(0, (len(counts), int(counts[0])))
        states = [text(by_chunk[:, chunk]).last_hidden_state for chunk in range(by_chunk.shape[1])]
        return join_rows(torch.stack(states, dim=1).flatten(0, 1), counts, keep_middle=False)[0]

    def latents(from_cache: bool) -> Tensor:
        if from_cache:
            return (mean + std * torch.randn_like(std)) * 0.18215
        return vae.encode(pixels.to(dtype)).latent_dist.sample().float() * 0.18215

    with torch.no_grad():
        kept_states = encoder.encode_tokens(tokens).prompt_embeds

    def states_of(name: str) -> Tensor:
        if name == "cached_with_text":
            return kept_states
        return published_text() if name == "published" else encoder.encode_tokens(tokens).prompt_embeds

    def make(name: str) -> Callable[[], None]:
        torch.manual_seed(1)
        unet = _unet(size).to(device).train()
        if options.checkpointing:
            unet.enable_gradient_checkpointing()
        fused = {"foreach": False, "fused": False} if name == "published" else {"fused": True}
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=0.01, **fused)

        def step() -> None:
            with torch.no_grad():
                states, clean = states_of(name), latents(from_cache=name != "published")
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = noise_prediction_loss(unet, scheduler, clean, states.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return {name: make(name) for name in ("published", "cached", "cached_with_text")}


def timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of one step; on a CPU those that this process worked, whatever else the machine did."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    begin = clock()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - begin) / steps


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _unet(size: dict[str, Any]) -> UNet2DConditionModel:
    settings = dict(size["unet"])
    levels = settings.pop("down")
    return UNet2DConditionModel(
        sample_size=size["side"] // 8,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        **settings,
    )


def _vae(size: dict[str, Any]) -> AutoencoderKL:
    widths = size["vae"]
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=4,
    )


if __name__ == "__main__":
    main()
