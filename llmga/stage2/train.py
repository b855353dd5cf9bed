"""Stage 2: Stable Diffusion learns to follow long prompts. This file reads in the order things happen.

`llmga.loop` runs the loop; here is what differs: a pipeline whose UNet learns, pictures with prompts, the loss, what is
measured and painted on the way, and the pipeline folder that comes out.
"""

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmga.bad_samples import BAD_SAMPLES_FILE, KINDS, BadSampleBudget
from llmga.learner import Learner, fused_adamw, lr_factor
from llmga.loop import Job, Place, run_loop
from llmga.run_folder import hashes
from llmga.runtime import on_main
from llmga.stage2.buckets import bucket_table
from llmga.stage2.cache import LatentCache, open_caches
from llmga.stage2.config import Stage2Config
from llmga.stage2.data import LatentShape, Stage2Collator, Stage2Dataset, sizes_of, training_order
from llmga.stage2.held_out import HeldOutLoss
from llmga.stage2.loss import inpainting_condition, noise_prediction_loss
from llmga.stage2.parts import Parts, load_parts, read_index
from llmga.stage2.prompt_layout import save_layout, stamp_layout
from llmga.stage2.sample_page import SamplePictures
from llmga.stage2.sources import Source, open_sources
from llmga.stage2.text_cache import TextCache, open_texts

logger = logging.getLogger(__name__)
_SAVED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(cfg: Stage2Config) -> Path:
    """Run stage 2, or go on with it, to its end; arguments, result and errors as `llmga.loop.run_loop`."""
    return run_loop(cfg, lambda place: build_job(cfg, place))


def build_job(cfg: Stage2Config, place: Place) -> Job:
    """Load the pipeline, open the data, and say how they learn."""
    # Data first: a manifest without prompts is found in a moment, a pipeline is loaded in a minute.
    sources = open_sources(cfg.data.sources, "data.sources")
    held_out = open_sources(cfg.data.validation, "data.validation")
    buckets = [bucket_table(source, sizes_of(cfg)) for source in sources] if cfg.data.aspect_buckets else None
    caches, texts = _open_caches(cfg, sources, buckets), _open_texts(cfg, sources)
    parts = load_parts(cfg, place.accelerator.device)
    stamp_layout(parts.unet, parts.encoder.layout)

    # The run in examples
    rows = sum(len(source) for source in sources if source.weight is None or source.weight > 0)
    total_steps = cfg.run.max_steps or math.ceil((cfg.run.epochs or 1.0) * rows / place.examples_per_step)
    order, positions = training_order(cfg, sources, total_steps, place.examples_per_step, buckets)
    shape = LatentShape(parts.latent_channels, parts.vae_factor, parts.noise_scheduler.config.num_train_timesteps)
    bad_samples = place.run.path / BAD_SAMPLES_FILE
    examples = Stage2Dataset(
        cfg, sources, order, shape, cfg.run.seed,
        positions=positions, buckets=buckets, bad_samples=bad_samples, caches=caches, texts=texts,
    )  # fmt: skip
    collate = Stage2Collator(parts.encoder.tokenize)
    logger.info(
        "%d steps of %d examples, %.3g epochs of %d; layout %s of up to %d chunks",
        total_steps, place.examples_per_step, total_steps * place.examples_per_step / rows, rows,
        parts.encoder.layout.name, parts.encoder.layout.max_chunks,
    )  # fmt: skip

    # What learns
    step = TrainingLoss(cfg, parts)
    learner = Learner(
        "unet",
        parts.unet,
        fused_adamw(parts.unet.parameters(), cfg.optim),
        step,
        lr_factor(cfg.optim, total_steps),
        cfg.optim.max_grad_norm,
        cfg.objective.ema_decay if cfg.objective.ema else None,
    )
    trained = sum(parameter.numel() for parameter in learner.trained.values())
    logger.info("%s parameters of the UNet learn, of %s", f"{trained:,}", f"{_size(parts.unet):,}")

    # What is measured and painted
    validate = HeldOutLoss(cfg, held_out, shape, collate, step, learner, place) if held_out else None
    show = None
    if cfg.run.sample_every_steps:
        pictures = SamplePictures(cfg, parts, learner, place, held_out)
        show = pictures.paint
    budget = BadSampleBudget(bad_samples, cfg.data.max_bad_share, total_steps * place.examples_per_step)
    on_main(lambda: budget.forget_after(place.first_step * place.examples_per_step))

    def figures(done: int) -> Mapping[str, float]:
        seen = done * place.examples_per_step
        budget.check(seen)
        counts = budget.counts(seen)
        return {f"replaced_{kind}": counts[kind] for kind in KINDS}

    return Job(
        total_steps=total_steps,
        examples=examples,
        collate=collate,
        learners=[learner],
        export=lambda folder: export_pipeline(cfg, parts, learner, folder),
        samples_per_epoch=rows,
        validate=validate,
        show=show,
        figures=figures,
        provenance={
            "stage": 2,
            "base": str(cfg.model.path),
            "task": cfg.task,
            "layout": parts.encoder.layout.name,
            "inputs": hashes([*_part_folders(cfg.model.path), *(source.path for source in cfg.data.sources)]),
        },
    )


class TrainingLoss:
    """The loss of a batch of `Stage2Collator`: pictures and prompts through the frozen parts, then the UNet."""

    def __init__(self, cfg: Stage2Config, parts: Parts) -> None:
        self.cfg, self.parts = cfg, parts
        self._blank: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # latents of pictures hidden entirely, by size

    def __call__(self, unet: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Mean over the batch; `unet` is the network as it must be called."""
        return self.of_each(unet, batch, self.cfg.objective.min_snr_gamma).mean()

    def of_each(self, unet: nn.Module, batch: dict[str, Any], min_snr_gamma: float | None = None) -> Tensor:
        """(B,) loss of each example."""
        parts, noise = self.parts, batch["noise"]
        encoded = parts.encoder.encode_tokens(batch["prompts"], batch.get("encoded"))
        mean, std = (batch["mean"], batch["std"]) if "mean" in batch else parts.encode_pixels(batch["pixels"])
        windows = batch["prompts"].towers[0].num_chunks  # on the host: no waiting for the device
        ragged = bool((windows != windows[0]).any())
        added = None
        if parts.is_sdxl:
            assert encoded.pooled_prompt_embeds is not None
            added = {"text_embeds": encoded.pooled_prompt_embeds.float(), "time_ids": batch["time_ids"]}
        return noise_prediction_loss(
            unet,
            parts.noise_scheduler,
            parts.scaled(mean, std, batch["posterior_noise"]),
            encoded.prompt_embeds.float(),
            noise=noise,
            timesteps=batch["timesteps"],
            encoder_attention_mask=encoded.attention_mask if ragged else None,
            condition=self._condition(batch) if self.cfg.task == "inpainting" else None,
            added_cond_kwargs=added,
            min_snr_gamma=min_snr_gamma,
            reduction="none",
        )

    def _condition(self, batch: dict[str, Any]) -> Tensor:
        """(B, 5, h, w) mask and masked latents; only pictures of which something is kept are encoded."""
        rows, pixels, noise = batch["hidden_rows"], batch["hidden_pixels"], batch["posterior_noise"]
        size = tuple(pixels.shape[1:])
        if size not in self._blank:
            self._blank[size] = self.parts.encode_pixels(pixels.new_zeros(1, *size))
        blank_mean, blank_std = self._blank[size]
        mean, std = blank_mean.expand_as(noise).clone(), blank_std.expand_as(noise).clone()
        if len(rows):
            mean[rows], std[rows] = self.parts.encode_pixels(pixels)
        return inpainting_condition(batch["mask"], self.parts.scaled(mean, std, noise))


def export_pipeline(cfg: Stage2Config, parts: Parts, learner: Learner, folder: Path) -> None:
    """Write the pipeline that came out: the trained UNet, its average where there is one; what is frozen as it was."""
    unet: Any = learner.module.float()  # first, or an average would be cut to what DeepSpeed trained in
    if learner.ema is not None:
        learner.ema.copy_to_weights()
    if cfg.model.lora is not None:
        _save_adapter(parts, unet, folder)
        unet.fuse_lora()
        unet.unload_lora()
    for part in _part_folders(cfg.model.path):
        if part.name != "unet":
            shutil.copytree(part, folder / part.name)
    shutil.copy(cfg.model.path / "model_index.json", folder)
    unet.to(_SAVED[cfg.model.save_precision]).save_pretrained(folder / "unet")
    save_layout(folder, parts.encoder.layout)


def _save_adapter(parts: Parts, unet: Any, folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(unet)
    type(parts.pipeline).save_lora_weights(folder / "lora", unet_lora_layers=layers)


def _part_folders(pipeline: Path) -> list[Path]:
    """The folders that a pipeline's index names; other files in it are copies in other formats."""
    return [pipeline / name for name in read_index(pipeline) if (pipeline / name).is_dir()]


def _open_caches(
    cfg: Stage2Config, sources: list[Source], buckets: list[np.ndarray] | None
) -> list[LatentCache] | None:
    if cfg.cache.path is None:
        return None
    on_main(lambda: len(open_caches(cfg, sources, buckets)))  # checked once
    return open_caches(cfg, sources, buckets, checked=True)


def _open_texts(cfg: Stage2Config, sources: list[Source]) -> list[TextCache] | None:
    if not cfg.cache.text:
        return None
    on_main(lambda: len(open_texts(cfg, sources)))  # checked once
    return open_texts(cfg, sources, checked=True)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
