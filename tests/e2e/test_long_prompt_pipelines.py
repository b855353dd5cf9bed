"""Guards that stock diffusers pipelines paint from our embeddings, and that a saved pipeline keeps its layout.

Run: pytest tests/e2e/test_long_prompt_pipelines.py
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llmga.stage2.prompt_batch import PromptPair, attending_to
from llmga.stage2.prompt_encoder import LongPromptEncoder
from llmga.stage2.prompt_layout import load_layout, prompt_layout, save_layout
from tests.toy_diffusion import WIDTH, toy_sd_pipeline, toy_sdxl_pipeline

SIZE_PX = 16
WORDS = ["cat", "dog", "sun", "red", "sea", "tree", "lamp"]  # a token each
LONG = " ".join(WORDS[number % 7] for number in range(290))
MAKERS = {"sd": toy_sd_pipeline, "sdxl": toy_sdxl_pipeline}
CLASSES = {
    ("sd", "inpaint"): "StableDiffusionInpaintPipeline",
    ("sdxl", "inpaint"): "StableDiffusionXLInpaintPipeline",
}


def paint(pipeline: Any, pair: PromptPair, seeds: list[int], **options: Any) -> np.ndarray:
    """Pictures (B, H, W, 3) in [0, 1] after two steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with attending_to(pipeline.unet, pair):
        return pipeline(
            **pair.pipeline_arguments(),
            generator=generators,
            num_inference_steps=2,
            guidance_scale=5.0,
            height=SIZE_PX,
            width=SIZE_PX,
            output_type="np",
            **options,
        ).images


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("layout", ["masked", "published", "published_keep"])
def test_text_to_image(kind: str, layout: str) -> None:
    pipeline = MAKERS[kind]()
    encoder = LongPromptEncoder.from_pipeline(pipeline, prompt_layout(layout))
    pair = encoder.encode_pair([LONG, LONG[400:]], "fog")
    assert pair.positive.prompt_embeds.shape[1] == (308 if layout == "published_keep" else 302)
    pictures = paint(pipeline, pair, [0, 0])
    assert pictures.shape == (2, SIZE_PX, SIZE_PX, 3) and np.isfinite(pictures).all()
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-4  # same seed, other words


@pytest.mark.parametrize("kind", MAKERS)
def test_inpainting_with_nine_channels(kind: str) -> None:
    pipeline = MAKERS[kind](CLASSES[kind, "inpaint"], in_channels=9)
    encoder = LongPromptEncoder.from_pipeline(pipeline)
    hole = Image.new("L", (SIZE_PX, SIZE_PX), 0)
    hole.paste(255, (0, 0, SIZE_PX, SIZE_PX // 2))
    options = {"image": Image.new("RGB", (SIZE_PX, SIZE_PX), (90, 120, 30)), "mask_image": hole, "strength": 1.0}
    pictures = paint(pipeline, encoder.encode_pair(LONG), [0], **options)
    assert pictures.shape == (1, SIZE_PX, SIZE_PX, 3) and np.isfinite(pictures).all()


def test_controlnet() -> None:
    import diffusers

    base = toy_sd_pipeline()
    controlnet = diffusers.ControlNetModel.from_unet(base.unet, conditioning_channels=3)
    controlnet.controlnet_cond_embedding = type(controlnet.controlnet_cond_embedding)(
        conditioning_embedding_channels=16, block_out_channels=(8, 8)
    )  # the toy autoencoder has factor 2, not 8
    pipeline = diffusers.StableDiffusionControlNetPipeline(**base.components, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    encoder = LongPromptEncoder.from_pipeline(pipeline)
    pictures = paint(pipeline, encoder.encode_pair(LONG, LONG), [0], image=Image.new("RGB", (SIZE_PX, SIZE_PX)))
    assert pictures.shape == (1, SIZE_PX, SIZE_PX, 3) and np.isfinite(pictures).all()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_picture_does_not_depend_on_the_prompts_beside_it(kind: str) -> None:
    pipeline = MAKERS[kind]()
    encoder = LongPromptEncoder.from_pipeline(pipeline)
    prompts = ["a red boat", LONG, "cat " * 100]
    together = paint(pipeline, encoder.encode_pair(prompts, "fog"), [0, 1, 2])
    for number, prompt in enumerate(prompts):
        [alone] = paint(pipeline, encoder.encode_pair(prompt, "fog"), [number])
        np.testing.assert_allclose(together[number], alone, rtol=0, atol=1e-5)


def test_a_saved_pipeline_paints_the_same_after_stock_loading_in_its_own_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = toy_sd_pipeline()
    layout = prompt_layout("published", 3)
    pipeline.save_pretrained(tmp_path / "model")
    save_layout(tmp_path / "model", layout)
    assert load_layout(tmp_path / "model") == layout
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.tokenizer).__name__ == "CLIPTokenizer" and loaded.tokenizer.pad_token_id == 49407
    with caplog.at_level(logging.WARNING, logger="llmga"):
        pairs = [
            LongPromptEncoder.from_pipeline(loaded).encode_pair(LONG),
            LongPromptEncoder.from_pipeline(pipeline, layout).encode_pair(LONG),
        ]
    assert pairs[0].positive.prompt_embeds.shape == (1, 227, WIDTH)
    assert "loses 65: " in caplog.text and len(pairs[0].positive.prompts[0].lost_words) == 65
    ours, stock = paint(pipeline, pairs[1], [0]), paint(loaded, pairs[0], [0])
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-6)
