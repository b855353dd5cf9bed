"""Make the toy Stable Diffusion `base`: autoencoder, text encoder, UNet and its inpainting twin. `make toy-sd` runs it.

It stands where SD1.5 stands in the paper: trained on captions that fit CLIP's window, from brief to about 70 tokens, it
knows how words bind to places, and has met neither the prose of long prompts nor a second window.

    python scripts/make_toy_sd.py                       # all steps, in runs/toy_sd
    python scripts/make_toy_sd.py --stop-after unet     # autoencoder, text_encoder, unet, inpainting
    python scripts/make_toy_sd.py --measure docs/results/toy_sd.json    # what the parser reads on the test split
    python scripts/make_toy_sd.py --ship llmga/toyworld/checkpoints/base    # pipelines sd and sd_inpainting, float16
    python scripts/make_toy_sd.py --ship-tuned llmga/toyworld/checkpoints   # what stage 2 made of them, beside base/

Each step is skipped when what it makes is there already; killed within one, the next call goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from llmga.checkpoint import write_folder_atomically

MLLM = Path("llmga/toyworld/checkpoints/base/mllm")
STEPS = ("autoencoder", "text_encoder", "unet", "inpainting")
TUNED_RUNS = {"sd": Path("runs/stage2_toy"), "sd_inpainting": Path("runs/stage2_toy_inpainting")}


def main(arguments: list[str]) -> None:
    """Run the steps in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/toy_sd"), help="folder of the steps")
    parser.add_argument("--stop-after", choices=STEPS)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure what is there, on the test split")
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="put the finished pipelines there")
    parser.add_argument("--ship-tuned", type=Path, metavar="FOLDER", help="put there what `make stage2` made of base/")
    options = parser.parse_args(arguments)
    if options.ship_tuned is not None:
        for name, run in TUNED_RUNS.items():
            ship_tuned(run / "final", options.ship_tuned / "tuned" / name, options.ship_tuned / "base" / "sd")
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    makers = {
        "autoencoder": make_autoencoder,
        "text_encoder": make_text_encoder,
        "unet": make_unet,
        "inpainting": make_inpainting,
    }
    for name, make in makers.items():
        make_step(options.work / name, make)
        if name == options.stop_after:
            break
    if options.measure is not None:
        measure(options.work, options.measure)
    if options.ship is not None:
        for name, unet in (("sd", "unet"), ("sd_inpainting", "inpainting")):
            ship(options.work, options.ship / name, unet, shared=None if name == "sd" else options.ship / "sd")


def make_step(folder: Path, make: Callable) -> None:
    """Make what a step makes, unless it is there; `make` gets the work folder and the path of its training state."""
    if folder.exists():
        print(f"{folder} is there already", flush=True)
        return
    state = folder.with_name(f"{folder.name}.training.pt")
    model = make(folder.parent, state)
    with write_folder_atomically(folder) as aside:
        model.save_pretrained(aside)
    state.unlink(missing_ok=True)


def make_autoencoder(work: Path, state: Path):
    """The autoencoder, judged by what the parser reads of its reconstructions."""
    from llmga.stage1.model import load_mllm
    from llmga.toyworld.autoencoder import AutoencoderRecipe, train_autoencoder

    tower = load_mllm(MLLM).model.model.vision_tower
    return train_autoencoder(AutoencoderRecipe(), tower, state, log)


def make_text_encoder(work: Path, state: Path):
    """The text encoder, judged by what can be read from its states."""
    from llmga.toyworld.text_encoder import TextRecipe, train_text_encoder

    return train_text_encoder(TextRecipe(), state, log)


def make_unet(work: Path, state: Path):
    """Text to image, judged by what the parser reads of samples."""
    from llmga.toyworld.unet import UnetRecipe, build_unet, prepare_latents, train_unet

    recipe, (autoencoder, text_encoder) = UnetRecipe(), frozen_parts(work)
    unet = build_unet(recipe, text_encoder.config.hidden_size)
    latents = prepare_latents(recipe, autoencoder, text_encoder)
    return train_unet(unet, latents, text_encoder, autoencoder, recipe, state, log)


def make_inpainting(work: Path, state: Path):
    """The inpainting twin, tuned from the UNet."""
    from diffusers import UNet2DConditionModel

    from llmga.toyworld.unet import UnetRecipe, prepare_latents, train_unet, widen_for_inpainting

    recipe, (autoencoder, text_encoder) = UnetRecipe(), frozen_parts(work)
    unet = widen_for_inpainting(UNet2DConditionModel.from_pretrained(work / "unet"))
    latents = prepare_latents(recipe, autoencoder, text_encoder, inpainting=True)
    return train_unet(unet, latents, text_encoder, autoencoder, recipe, state, log)


def frozen_parts(work: Path):
    """Autoencoder and text encoder, as the first two steps made them."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    autoencoder = AutoencoderKL.from_pretrained(work / "autoencoder").eval()
    return autoencoder, CLIPTextModel.from_pretrained(work / "text_encoder").eval()


def measure(work: Path, file: Path, num_scenes: int = 500) -> None:
    """Write what is right on held-out scenes: reconstructions (the ceiling), and samples by kind of fact."""
    from diffusers import UNet2DConditionModel

    from llmga.files import atomic_write
    from llmga.machine import machine_in_words
    from llmga.toyworld.autoencoder import parse_ceiling
    from llmga.toyworld.scene import SPLITS, sample_scene
    from llmga.toyworld.unet import read_samples

    autoencoder, text_encoder = frozen_parts(work)
    seeds = SPLITS["test"][:num_scenes]
    report = {"scenes": num_scenes, "ceiling": parse_ceiling(autoencoder, [sample_scene(seed) for seed in seeds])}
    for name in ("unet", "inpainting"):
        if (work / name).is_dir():
            unet = UNet2DConditionModel.from_pretrained(work / name).eval()
            report[name] = read_samples(unet, text_encoder, autoencoder, seeds)
    report["machine"] = machine_in_words("torch", "diffusers")
    atomic_write(file, json.dumps(report, indent=1) + "\n")
    log(json.dumps(report, indent=1))


def ship(work: Path, destination: Path, unet_name: str, shared: Path | None) -> None:
    """Save a stock pipeline in float16; parts that equal those of `shared` become links to them."""
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel

    from llmga.stage2.prompt_layout import prompt_layout, save_layout
    from llmga.tokens import clip_tokenizer
    from llmga.toyworld.unet import build_scheduler

    autoencoder, text_encoder = frozen_parts(work)
    kind = StableDiffusionPipeline if shared is None else StableDiffusionInpaintPipeline
    pipeline = kind(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(work / unet_name),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16)
    with write_folder_atomically(destination) as aside:
        pipeline.save_pretrained(aside)
        save_layout(aside, prompt_layout())
        if shared is not None:
            link_frozen_parts(aside, shared, destination)
    tell_sizes(destination)


def ship_tuned(final: Path, destination: Path, shared: Path) -> None:
    """Copy a result of stage 2 with its UNet in float16; what it left as it was are links to the parts of `shared`."""
    from diffusers import UNet2DConditionModel

    with write_folder_atomically(destination) as aside:
        shutil.copytree(final, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet"))
        UNet2DConditionModel.from_pretrained(final / "unet").half().save_pretrained(aside / "unet")
        link_frozen_parts(aside, shared, destination)
    tell_sizes(destination)


def link_frozen_parts(aside: Path, shared: Path, destination: Path) -> None:
    """Put links in the place of parts that several pipelines have in common."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(aside / part)
        (aside / part).symlink_to(os.path.relpath(shared / part, destination))


def tell_sizes(destination: Path) -> None:
    """Log how large a shipped pipeline is."""
    sizes = [file.stat().st_size for file in destination.rglob("*") if file.is_file() and not file.is_symlink()]
    log(f"shipped {destination}: {sum(sizes) / 2**20:.1f} MiB, largest file {max(sizes) / 2**20:.1f} MiB")


def log(line: str) -> None:
    """Tell how it goes."""
    print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
