"""Small real objects for tests: a tokenizer, a processor and a LLaVA that build in milliseconds.

`from tests.toy import toy_tokenizer, toy_processor, toy_llava, toy_mllm_folder, toy_restorer`
"""

from pathlib import Path
from typing import Any

from llmga.stage1.conversation import TOY_CHAT_TEMPLATE, TOY_TURN_TOKENS

IMAGE_TOKEN = "<image>"
BOS, EOS, PAD = "<s>", "<|end|>", "<pad>"
IMAGE_SIZE_PX, PATCH_SIZE_PX = 32, 16
NUM_IMAGE_TOKENS = (IMAGE_SIZE_PX // PATCH_SIZE_PX) ** 2


def toy_tokenizer(extra_special_tokens: tuple[str, ...] = ()) -> Any:
    """One id per byte of UTF-8 (0 to 255, not in the order of the bytes), then pad, bos, image and the turn markers.

    Args:
        extra_special_tokens: added behind, for instance the generation tags ("<gen_img>", "</gen_img>").
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [PAD, BOS, IMAGE_TOKEN, *TOY_TURN_TOKENS, *extra_special_tokens]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=TOY_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def toy_processor(tokenizer: Any = None) -> Any:
    """A LlavaProcessor for 32 px pictures in 16 px patches (4 image tokens), Pillow backend."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE_PX}, crop_size=size),
        tokenizer=tokenizer or toy_tokenizer(),
        patch_size=PATCH_SIZE_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=TOY_CHAT_TEMPLATE,
    )


def toy_llava(tokenizer: Any = None, seed: int = 0) -> Any:
    """A random LlavaForConditionalGeneration: CLIP tower and Llama, 2 layers and 32 wide each, float32, eval mode."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = tokenizer or toy_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=IMAGE_SIZE_PX, patch_size=PATCH_SIZE_PX, projection_dim=32, **shape),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            **shape,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=NUM_IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def toy_mllm_folder(folder: Path, extra_special_tokens: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Write model and processor as a folder that `from_pretrained` reads, and return it."""
    tokenizer = toy_tokenizer(extra_special_tokens)
    toy_llava(tokenizer, seed).save_pretrained(folder)
    toy_processor(tokenizer).save_pretrained(folder)
    return folder


def toy_restorer(seed: int = 0, **settings: Any) -> Any:
    """A random DiffRIR of 8 channels and one block per level, prior of 16 numbers, float32, eval mode."""
    import torch

    from llmga.diffrir.network import DiffRIR

    small = {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "prior_width": 16, "num_prior_blocks": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiffRIR(**{**small, **settings}).eval()
