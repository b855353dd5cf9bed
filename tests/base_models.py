"""Tiny random base models of every family: tokenizers of the right kind, and embeddings that are tied, padded or odd.

`from tests.base_models import FAMILIES, make_llm, make_tower`
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SENTENCES = (
    "A person asks for a picture, and the assistant describes what the picture should show.",
    "The dog runs across a green field under a cloudy sky while two children are watching.",
    "What is in the picture? It shows a red kettle on a wooden table, close to the window.",
    "Draw a city at night with bright lights and wet streets. Make it larger and add a bridge.",
    "USER ASSISTANT INST system user model assistant\n\n1 + 1 = 2",
)
IMAGE_SIZE_PX, PATCH_SIZE_PX = 32, 16
_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@dataclass(frozen=True)
class BaseModel:
    """One family.

    Attributes:
        config: name of its config class in transformers.
        tokenizer: which of the tokenizers below.
        turn_tokens: added behind the vocabulary.
        template: the tokenizer's own, which marks no answers; None for a base model without one.
        row: the template that must be chosen for it.
        named: it has to be named in the config, for nothing in the folder tells.
        tied, spare_rows: of the embedding.
        end: what an answer ends with.
    """

    config: str
    tokenizer: str
    row: str
    end: str
    turn_tokens: tuple[str, ...] = ()
    template: str | None = None
    named: bool = False
    tied: bool = False
    spare_rows: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "vicuna": BaseModel("LlamaConfig", "sentencepiece", "vicuna", "</s>", named=True),
    "llama2": BaseModel(
        "LlamaConfig",
        "sentencepiece",
        "llama2",
        "</s>",
        template="{{ bos_token }}[INST] <<SYS>>\n{{ messages[0].content }}\n<</SYS>> [/INST]",
    ),
    "llama3": BaseModel(
        "LlamaConfig",
        "byte_level",
        "llama3",
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        extra={"num_key_value_heads": 1},
    ),
    "mistral": BaseModel(
        "MistralConfig",
        "sentencepiece",
        "mistral",
        "</s>",
        template="{{ bos_token }}[INST] {{ messages[0].content }} [/INST]",
        extra={"num_key_value_heads": 1, "sliding_window": None},
    ),
    "qwen2": BaseModel(
        "Qwen2Config",
        "byte_level",
        "qwen2",
        "<|im_end|>",
        ("<|im_start|>", "<|im_end|>"),
        template=_CHATML,
        tied=True,
        spare_rows=13,
    ),
    "qwen3": BaseModel(
        "Qwen3Config",
        "byte_level",
        "qwen2",
        "<|im_end|>",
        ("<|im_start|>", "<|im_end|>"),
        spare_rows=1,
        extra={"head_dim": 16},
    ),
    "phi3": BaseModel(
        "Phi3Config",
        "sentencepiece",
        "phi3",
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        spare_rows=5,
    ),
    "gemma": BaseModel(
        "GemmaConfig",
        "gemma",
        "gemma",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        tied=True,
        extra={"head_dim": 16},
    ),
    "gemma2": BaseModel(
        "Gemma2Config",
        "gemma",
        "gemma",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        tied=True,
        extra={"head_dim": 16, "query_pre_attn_scalar": 16},
    ),
}


def make_llm(folder: Path, family: BaseModel, rows: int | None = None) -> Path:
    """Write a random causal LM with its tokenizer, and return the folder.

    Args:
        rows: of the embedding; None for the tokenizer's size and the family's spare rows.
    """
    import torch
    import transformers

    tokenizer = make_tokenizer(family)
    config = getattr(transformers, family.config)(
        vocab_size=len(tokenizer) + family.spare_rows if rows is None else rows,
        max_position_embeddings=1024,
        tie_word_embeddings=family.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **{**_SHAPE, "num_key_value_heads": 2, **family.extra},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tower(folder: Path, kind: str = "clip", whole: bool = True) -> Path:
    """Write a random CLIP or SigLIP with its image processor, and return the folder.

    Args:
        whole: with its text half, as published; else the vision half alone.
    """
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    shape = {**_SHAPE, "hidden_size": 24, "num_hidden_layers": 3}
    vision = {"image_size": IMAGE_SIZE_PX, "patch_size": PATCH_SIZE_PX, **shape}
    text = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **shape}
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "clip":
            config = transformers.CLIPConfig(vision_config=vision, text_config=text)
            model, processor = (
                transformers.CLIPModel(config),
                CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE_PX}, crop_size=size),
            )
        else:
            config = transformers.SiglipConfig(vision_config=vision, text_config=text)
            model, processor = transformers.SiglipModel(config), SiglipImageProcessorPil(size=size)
    (model if whole else model.vision_model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_tokenizer(family: BaseModel) -> Any:
    """A tokenizer of the family's kind, with its turn tokens and its own chat template."""
    from tokenizers import AddedToken

    tokenizer = {"sentencepiece": _sentencepiece, "gemma": _gemma, "byte_level": _byte_level}[family.tokenizer]()
    # Phi-3's markers swallow the line break behind them.
    swallows = family.tokenizer == "sentencepiece"
    tokens = [AddedToken(t, special=True, normalized=False, rstrip=swallows) for t in family.turn_tokens]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if "<|begin_of_text|>" in family.turn_tokens:
        tokenizer.bos_token = "<|begin_of_text|>"
    tokenizer.chat_template = family.template
    return tokenizer


def _sentencepiece() -> Any:
    from transformers import LlamaTokenizer

    vocab, merges = _pieces(("<unk>", "<s>", "</s>"))
    return LlamaTokenizer(vocab=dict(vocab), merges=list(merges))


def _gemma() -> Any:
    from transformers import GemmaTokenizer

    vocab, merges = _pieces(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "\n\n"))
    return GemmaTokenizer(vocab=dict(vocab), merges=list(merges))


@cache
def _pieces(first: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as SentencePiece trains them: a mark for each space, every other text as bytes."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    pieces, merges = _train(split, [])
    vocabulary = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *(p for p in pieces if p not in first)]
    return {piece: index for index, piece in enumerate(vocabulary)}, merges


def _byte_level() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = _train(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet)
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|endoftext|>"])}
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def _train(split: Any, alphabet: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    import json

    from tokenizers import Tokenizer, models, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 200, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator(SENTENCES, trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]
