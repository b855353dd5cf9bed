"""The parts of a Stable Diffusion pipeline for training, and whether they fit each other and the task.

What a pipeline is, its folder says: SDXL where there is a second text encoder, inpainting where the UNet takes the
channels for it. No name of a model is ever looked at.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from llmga.stage2.config import LoraConfig, Stage2Config, Task
from llmga.stage2.loss import checked_prediction_type
from llmga.stage2.prompt_encoder import LongPromptEncoder
from llmga.stage2.prompt_layout import DEFAULT_LAYOUT, PromptLayout, load_layout, prompt_layout

_ENCODED_PIXELS = 8 * 512 * 512  # of pictures that go through the autoencoder at once; bounds its memory
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


class PipelineError(ValueError):
    """A pipeline folder that cannot be trained as asked; the message has both values."""


@dataclass(eq=False)
class Parts:
    """What stage 2 trains and what it trains it with.

    Attributes:
        pipeline: the stock pipeline, holding all of them.
        encoder: prompts to what the UNet reads.
        noise_scheduler: how noise is added, with the pipeline's betas and prediction type.
        is_sdxl: the UNet takes a pooled vector and time ids.
    """

    pipeline: Any
    encoder: LongPromptEncoder
    noise_scheduler: Any
    is_sdxl: bool

    @property
    def unet(self) -> nn.Module:
        """The network that learns."""
        return self.pipeline.unet

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.pipeline.vae.config.latent_channels)

    @property
    def vae_factor(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.pipeline.vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of pictures.

        Args:
            pixels: (B, 3, H, W) float32 in [-1, 1], on the autoencoder's device.
        Returns:
            two of (B, C, h, w) float32, not scaled.
        """
        vae = self.pipeline.vae
        at_once = max(1, _ENCODED_PIXELS // (pixels.shape[-1] * pixels.shape[-2]))
        found = [vae.encode(part.to(vae.dtype)).latent_dist for part in pixels.split(at_once)]
        return torch.cat([d.mean.float() for d in found]), torch.cat([d.std.float() for d in found])

    def scaled(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Latents as the UNet knows them: a sample of the posterior, scaled."""
        shift = getattr(self.pipeline.vae.config, "shift_factor", None) or 0.0
        return (mean + std * noise - shift) * self.pipeline.vae.config.scaling_factor


def load_parts(cfg: Stage2Config, device: torch.device) -> Parts:
    """Load a pipeline for training: the UNet in float32, what is frozen in the precision of the arithmetic.

    The autoencoder of SDXL stays in float32 where its config says that it needs to (`force_upcast`).

    Raises:
        PipelineError, LayoutError, TextEncoderError: parts that do not fit each other, the task or the settings.
    """
    folder = cfg.model.path
    index = read_index(folder)
    low = torch.bfloat16 if cfg.run.precision == "bf16" else torch.float32
    is_sdxl = bool((index.get("text_encoder_2") or [None])[0])
    upcast = is_sdxl and read_part_config(folder, "vae").get("force_upcast", True)
    left_out = {name: None for name in ("safety_checker", "image_encoder") if name in index}
    frozen_unet = low if cfg.model.lora is not None else torch.float32
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            **left_out,
            **({"requires_safety_checker": False} if "safety_checker" in index else {}),
            dtype={"unet": frozen_unet, "vae": torch.float32 if upcast else low, "default": low},
            local_files_only=True,
        )
    except OSError as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise PipelineError(f"{folder} cannot be loaded as a diffusers pipeline: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    check_task(cfg.task, pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels, folder)
    encoder = LongPromptEncoder.from_pipeline(pipeline, chosen_layout(cfg))
    parts = Parts(pipeline, encoder, _noise_scheduler(cfg, pipeline.scheduler), is_sdxl)
    check_resolution(cfg, parts.vae_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1))
    pipeline.to(device)
    for part in (pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None), pipeline.unet):
        if part is not None:
            part.requires_grad_(False)
    if cfg.model.lora is None:
        pipeline.unet.requires_grad_(True)
    else:
        add_adapter(pipeline.unet, cfg.model.lora)
    if cfg.run.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return parts


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline folder's `model_index.json`.

    Raises:
        PipelineError: it is missing or no JSON object.
    """
    path = Path(folder) / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise PipelineError(f"{folder} has no model_index.json; expected a pipeline saved by diffusers") from None
    except ValueError as error:
        raise PipelineError(f"{path} is no JSON: {error}") from None
    if not isinstance(index, dict) or "unet" not in index or "vae" not in index:
        raise PipelineError(f"{path} names no unet and vae; expected a Stable Diffusion pipeline (SD1.5 or SDXL)")
    return index


def read_part_config(folder: Path, part: str) -> dict[str, Any]:
    """The `config.json` of a part of a pipeline folder.

    Raises:
        PipelineError: it is missing or no JSON.
    """
    path = Path(folder) / part / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); is the pipeline folder complete?") from None


def check_task(task: Task, in_channels: int, latent_channels: int, folder: Path) -> None:
    """Compare what a UNet takes with what a task gives it.

    Raises:
        PipelineError: they differ.
    """
    channels = {"text_to_image": latent_channels, "inpainting": 2 * latent_channels + 1}
    if in_channels == channels[task]:
        return
    other = next((name for name, count in channels.items() if count == in_channels), None)
    way = f"set task={other}, or give" if other else "give"
    raise PipelineError(
        f"the UNet of {folder} takes {in_channels} channels, task {task} has {channels[task]}; {way} another model.path"
    )


def check_resolution(cfg: Stage2Config, step: int) -> None:
    """Raise a PipelineError when pictures of the size would not survive the halvings of autoencoder and UNet."""
    given = cfg.data.bucket_step if cfg.data.aspect_buckets else cfg.data.resolution
    if given % step:
        key = "data.bucket_step" if cfg.data.aspect_buckets else "data.resolution"
        raise PipelineError(
            f"{key} is {given}, which {cfg.model.path} cannot halve often enough; expected a multiple of {step}, such "
            f"as {max(step, round(given / step) * step)}"
        )


def chosen_layout(cfg: Stage2Config) -> PromptLayout:
    """The layout of the settings, of the folder where they name none, or ours."""
    stored = load_layout(cfg.model.path)
    name = cfg.model.layout or (stored.name if stored else DEFAULT_LAYOUT)
    max_chunks = cfg.model.max_chunks or (stored.max_chunks if stored else prompt_layout().max_chunks)
    return prompt_layout(name, max_chunks)


def _noise_scheduler(cfg: Stage2Config, scheduler: Any) -> Any:
    asked, says = cfg.objective.prediction_type, scheduler.config.prediction_type
    if asked is not None and asked != says:
        raise PipelineError(
            f"objective.prediction_type is {asked}, the scheduler of {cfg.model.path} says {says}, as its UNet was "
            "trained; leave the setting away, or change scheduler/scheduler_config.json to teach the UNet the other"
        )
    checked_prediction_type(says)
    return DDPMScheduler.from_config(scheduler.config)


def add_adapter(unet: Any, lora: LoraConfig) -> None:
    """Put trained low-rank adapters, in float32, on a frozen UNet."""
    import peft

    target = [*_ATTENTION, *(_FEED_FORWARD if lora.target == "attention+feed_forward" else ())]
    unet.add_adapter(
        peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target, init_lora_weights=True
        )
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
