"""Stock diffusers pipelines from a folder: which class a task needs, and whether the weights fit it."""

import inspect
from pathlib import Path
from typing import Any

import torch

from llmga.stage2.config import Task
from llmga.stage2.prompt_layout import load_layout, stamp_layout

# (has a second text encoder, task) -> class in diffusers
CLASSES: dict[tuple[bool, Task], str] = {
    (False, "text_to_image"): "StableDiffusionPipeline",
    (False, "inpainting"): "StableDiffusionInpaintPipeline",
    (True, "text_to_image"): "StableDiffusionXLPipeline",
    (True, "inpainting"): "StableDiffusionXLInpaintPipeline",
}
_CHANNELS: dict[Task, tuple[int, ...]] = {"text_to_image": (4,), "inpainting": (9, 4)}


class PipelineError(ValueError):
    """A folder or pipeline that cannot paint what is asked."""


def load_pipeline(folder: Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """A pipeline with the prompt layout that its folder names.

    Args:
        folder: what a diffusers pipeline's `save_pretrained` wrote; nothing is ever downloaded.
        device: None: the GPU where there is one.
        dtype: None: float16 on a GPU, float32 elsewhere.
    Raises:
        PipelineError: no such folder, not a Stable Diffusion pipeline, or weights that are not safetensors.
        LayoutError: the folder contradicts itself about the layout.
    """
    from diffusers import DiffusionPipeline

    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        what = "has no model_index.json" if folder.is_dir() else "does not exist"
        raise PipelineError(f"{folder} {what}; expected the folder of a diffusers pipeline, as stage 2 saves it")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if target.type == "cuda" else torch.float32)
    layout = load_layout(folder)
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(f"{folder} cannot be loaded: {reason}; weights must be safetensors") from None
    if layout is not None:
        stamp_layout(pipeline.unet, layout)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(target)


def pipeline_for(pipeline: Any, task: Task) -> Any:
    """The same weights in the class that a task needs; nothing is copied.

    Raises:
        PipelineError: not a Stable Diffusion pipeline, or its UNet was trained for the other task.
    """
    parts = pipeline.components
    if not {"unet", "vae", "text_encoder", "tokenizer"} <= parts.keys():
        raise PipelineError(f"{type(pipeline).__name__} is not a Stable Diffusion pipeline; expected SD1.5 or SDXL")
    channels = parts["unet"].config.in_channels
    if channels not in _CHANNELS[task]:
        if channels == 9:
            raise PipelineError(
                "the UNet has 9 input channels, so it was trained for inpainting: "
                "give it a picture with a mask or margins"
            )
        raise PipelineError(
            f"the UNet has {channels} input channels, expected {' or '.join(map(str, _CHANNELS[task]))}"
        )
    import diffusers

    kind = getattr(diffusers, CLASSES["text_encoder_2" in parts, task])
    if type(pipeline) is kind:
        return pipeline
    options = {} if "text_encoder_2" in parts else {"requires_safety_checker": False}
    taken = inspect.signature(kind.__init__).parameters
    wanted = {name: part for name, part in parts.items() if name in taken}
    made = kind(**wanted, **options)
    made.register_to_config(
        **{key: pipeline.config[key] for key in ("force_zeros_for_empty_prompt",) if key in pipeline.config}
    )
    made.set_progress_bar_config(disable=True)
    return made
