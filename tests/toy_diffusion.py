"""Tiny Stable Diffusion parts with random weights, in the real architectures and with CLIP's real vocabulary."""

from typing import Any

import torch

from llmga.tokens import clip_tokenizer

WIDTH = 32
LATENT_CHANNELS = 4


def toy_text_encoder(projection: int | None = None, layers: int = 2, seed: int = 0, width: int = WIDTH) -> Any:
    """A CLIPTextModel, or with `projection` channels a CLIPTextModelWithProjection; float32, eval mode."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=projection or width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0 if projection else 49407,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
        norm = getattr(model, "text_model", model).final_layer_norm
        torch.nn.init.normal_(norm.bias, std=0.1)  # as trained ones are: without it, states have a mean of zero
    return model


def toy_unet(text_width: int = WIDTH, in_channels: int = LATENT_CHANNELS, pooled: int | None = None) -> Any:
    """A UNet2DConditionModel with two levels; with `pooled` channels it takes SDXL's pooled vector and time ids."""
    from diffusers import UNet2DConditionModel

    sdxl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": (pooled or 0) + 6 * 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            out_channels=LATENT_CHANNELS,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=text_width,
            attention_head_dim=8,
            **(sdxl if pooled else {}),
        ).eval()


def toy_vae() -> Any:
    """An AutoencoderKL of factor 2: 16 px pictures have latents of 8 by 8."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(2)
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
        ).eval()


def toy_sd_pipeline(kind: str = "StableDiffusionPipeline", in_channels: int = LATENT_CHANNELS) -> Any:
    """An SD1.5 pipeline of stock diffusers for 16 px pictures, silent."""
    import diffusers

    return _silent(
        getattr(diffusers, kind)(
            vae=toy_vae(),
            text_encoder=toy_text_encoder(),
            tokenizer=clip_tokenizer(),
            unet=toy_unet(in_channels=in_channels),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def toy_sdxl_pipeline(kind: str = "StableDiffusionXLPipeline", in_channels: int = LATENT_CHANNELS) -> Any:
    """An SDXL pipeline of stock diffusers for 16 px pictures, silent; pooled vectors have 24 channels."""
    import diffusers

    return _silent(
        getattr(diffusers, kind)(
            vae=toy_vae(),
            text_encoder=toy_text_encoder(),
            text_encoder_2=toy_text_encoder(projection=24, seed=3),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(pad_token="!"),
            unet=toy_unet(2 * WIDTH, in_channels, pooled=24),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            add_watermarker=False,
        )
    )


def _silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
