"""Small folders in the layout of released checkpoints, with tokenizers of every kind that was released.

`from tests.released import released_folder, slow_ids`

Tokenizers are trained here on a few sentences: SentencePiece models with byte fallback (Vicuna, Mistral, Phi-3, Gemma)
and byte-level BPE (Llama 3, Qwen2), with the published special tokens around them. Weights are random, under the names
and in the shapes of LLaVA's code; the goldens in tests/golden/stage1_checkpoints are the ones with known outputs.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

CORPUS = (
    "A chat between a person and an assistant. USER: What is in this picture? ASSISTANT: A red kite over two hills.",
    "<gen_image> A small boat on a calm lake, seen from below, with 12 birds </gen_image>",
    "[INST] <<SYS>> <</SYS>> Draw a large blue boat and make it brighter. [/INST] You are welcome. Thanks!",
    "system user assistant model line one line two word sentence",
) * 4
HIDDEN, VISION_WIDTH = 16, 12
GEMMA_MARKERS = ("<start_of_turn>", "<end_of_turn>")
LLAMA3_MARKERS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
# Phi-3's own tokenizer: every marker swallows the white space behind it; none is among the named special tokens.
PHI3_MARKERS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


@dataclass(frozen=True)
class Kind:
    """One kind of released checkpoint: what its config and tokenizer say."""

    model_type: str
    tokenizer: Any  # writes its files into a folder and returns how many tokens there are
    extra: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    fused: bool = False  # qkv_proj and gate_up_proj
    biased: bool = False  # Qwen2: biases on q, k and v


@cache
def sentencepiece_model(gemma: bool = False) -> bytes:
    """A SentencePiece BPE model of 400 pieces with byte fallback, as Llama's (or Gemma's) is made."""
    writer = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} if gemma else {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    names = {"bos_piece": "<bos>", "eos_piece": "<eos>", "pad_piece": "<pad>"} if gemma else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=writer,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        user_defined_symbols=["<mask>", *GEMMA_MARKERS, "\n", "\n\n"] if gemma else [],
        minloglevel=2,
        **ids,
        **names,
    )
    return writer.getvalue()


def _llama_tokenizer(legacy: bool, markers: Sequence[str] = ()) -> Any:
    def write(folder: Path) -> int:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        base = {str(number): _token(content, rstrip=False) for number, content in enumerate(("<unk>", "<s>", "</s>"))}
        added = {str(400 + number): _token(content, rstrip=True) for number, content in enumerate(markers)}
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": legacy,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>" if markers else "</s>",
            "unk_token": "<unk>",
            "pad_token": "<|endoftext|>" if markers else None,
            "added_tokens_decoder": base | added,
            "model_max_length": 2048,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if markers:
            numbers = {content: 400 + number for number, content in enumerate(markers)}
            (folder / "added_tokens.json").write_text(json.dumps(numbers))
        return 400 + len(markers)

    return write


def _gemma_tokenizer(folder: Path) -> int:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(gemma=True))
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        **{"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        **{"add_bos_token": True, "add_eos_token": False, "model_max_length": 2048},
        "additional_special_tokens": list(GEMMA_MARKERS),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return 400


def _byte_level(special: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet)))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def _llama3_tokenizer(folder: Path) -> int:
    from tokenizers import processors

    backend = _byte_level(LLAMA3_MARKERS)
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()


def _qwen2_tokenizer(folder: Path) -> int:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend = _byte_level(special)
    model = json.loads(backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        **{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None},
        "added_tokens_decoder": {
            str(len(model["vocab"]) + number): _token(content, rstrip=False) for number, content in enumerate(special)
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(model["vocab"]) + len(special)


def _token(content: str, rstrip: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": rstrip, "single_word": False, "special": True}
    return {"content": content, **flags}


KINDS = {
    "vicuna": Kind("llava_llama", _llama_tokenizer(legacy=False)),
    "vicuna-legacy": Kind("llava_llama", _llama_tokenizer(legacy=True)),
    "llama3": Kind("llava_llama", _llama3_tokenizer, {"rope_theta": 500000.0}),
    "mistral": Kind("llava_mistral", _llama_tokenizer(legacy=False), {"sliding_window": None}),
    "mistral-legacy": Kind("llava_mistral", _llama_tokenizer(legacy=True), {"sliding_window": None}),
    "qwen2": Kind("llava_Qwen2", _qwen2_tokenizer, tied=True, biased=True),
    "phi3": Kind(
        "llava_Phi3",
        _llama_tokenizer(legacy=False, markers=PHI3_MARKERS),
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "su", "long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]},
        },
        fused=True,
    ),
    "gemma": Kind("llava_gemma", _gemma_tokenizer, {"head_dim": 8, "hidden_act": "gelu"}, tied=True),
}


def released_folder(
    folder: Path, kind: str, spare_rows: int = 0, dtype: torch.dtype = torch.bfloat16, with_tower: bool = True
) -> Path:
    """Write a checkpoint of random weights: one layer, 16 wide, a CLIP tower of 8 px patches in 16 px pictures."""
    what = KINDS[kind]
    folder.mkdir(parents=True)
    rows = what.tokenizer(folder) + spare_rows
    config = {
        **{"architectures": ["Llava"], "model_type": what.model_type, "vocab_size": rows, "hidden_size": HIDDEN},
        **{"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"max_position_embeddings": 2048, "tie_word_embeddings": what.tied, "bos_token_id": 1, "eos_token_id": 2},
        **{"mm_hidden_size": VISION_WIDTH, "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "../clip"},
        **{"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False},
        **{"torch_dtype": str(dtype).removeprefix("torch."), "use_cache": False, "tokenizer_model_max_length": 2048},
        **what.extra,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = random_tensors(language_shapes(what, rows) | (tower_shapes() if with_tower else {}), dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    clip_folder(folder.parent / "clip")
    return folder


def clip_folder(folder: Path) -> Path:
    """A CLIP vision tower on its own, with weights under CLIP's names."""
    folder.mkdir(exist_ok=True)
    config = {
        **{"model_type": "clip_vision_model", "hidden_size": VISION_WIDTH, "intermediate_size": 20},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 8},
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name.removeprefix("model.vision_tower.vision_tower."): shape for name, shape in tower_shapes().items()}
    save_file(random_tensors(shapes, torch.float32), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Normal values from a generator of our own."""
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}


def language_shapes(kind: Kind, rows: int) -> dict[str, tuple[int, ...]]:
    """LLaVA's names of LLM and projector -> shapes."""
    head = 8
    attention = {"q": (2 * head, HIDDEN), "k": (head, HIDDEN), "v": (head, HIDDEN)}
    if kind.fused:
        layer = {"self_attn.qkv_proj.weight": (4 * head, HIDDEN), "mlp.gate_up_proj.weight": (48, HIDDEN)}
    else:
        layer = {f"self_attn.{part}_proj.weight": shape for part, shape in attention.items()}
        layer |= {f"mlp.{part}_proj.weight": (24, HIDDEN) for part in ("gate", "up")}
    if kind.biased:
        layer |= {f"self_attn.{part}_proj.bias": shape[:1] for part, shape in attention.items()}
    layer |= {"self_attn.o_proj.weight": (HIDDEN, 2 * head), "mlp.down_proj.weight": (HIDDEN, 24)}
    layer |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    return {
        "model.embed_tokens.weight": (rows, HIDDEN),
        **{f"model.layers.0.{name}": shape for name, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        **({} if kind.tied else {"lm_head.weight": (rows, HIDDEN)}),
        **projector_shapes("model.mm_projector."),
    }


def projector_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """The four tensors of a projector under LLaVA's names."""
    return {
        f"{prefix}0.weight": (HIDDEN, VISION_WIDTH),
        f"{prefix}0.bias": (HIDDEN,),
        f"{prefix}2.weight": (HIDDEN, HIDDEN),
        f"{prefix}2.bias": (HIDDEN,),
    }


def tower_shapes() -> dict[str, tuple[int, ...]]:
    """LLaVA's names of the CLIP tower -> shapes."""
    width, wide = VISION_WIDTH, 20
    layer: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in {
        **{f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")},
        **{"mlp.fc1": (wide, width), "mlp.fc2": (width, wide)},
    }.items():
        layer |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    norms = {f"{name}.{kind}": (width,) for name in ("layer_norm1", "layer_norm2") for kind in ("weight", "bias")}
    outer = {f"{name}.{kind}": (width,) for name in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")}
    return {
        f"model.vision_tower.vision_tower.vision_model.{name}": shape
        for name, shape in {
            "embeddings.class_embedding": (width,),
            "embeddings.patch_embedding.weight": (width, 3, 8, 8),
            "embeddings.position_embedding.weight": (5, width),
            **{
                f"encoder.layers.{number}.{name}": shape for number in (0, 1) for name, shape in (layer | norms).items()
            },
            **outer,
        }.items()
    }


def slow_ids(text: str, legacy: bool, markers: Sequence[str], bos: bool = True) -> list[int]:
    """Ids of a text by the slow Llama tokenizer of transformers 4.41, written anew on the SentencePiece library.

    Without `legacy`, a space mark is put in front of the whole text (unless a named special token begins it), and
    SentencePiece adds none; with it, SentencePiece adds one in front of every stretch between special tokens.
    """
    named = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|endoftext|>": 400}
    numbers = {"<unk>": 0, "<s>": 1, "</s>": 2} | {content: 400 + number for number, content in enumerate(markers)}
    ids = [1] if bos else []
    rest = text if legacy else "\u2581" + text
    if not legacy and any(text.startswith(token) for token in named if token in numbers):
        rest = text
    while rest:
        found = min(((rest.find(token), token) for token in numbers if token in rest), default=(len(rest), ""))
        ids += _stretch(rest[: found[0]], legacy)
        rest = rest[found[0] + len(found[1]) :]
        if found[1]:
            ids.append(numbers[found[1]])
            rest = rest.lstrip() if found[1] in markers else rest
    return ids


def _stretch(text: str, legacy: bool) -> list[int]:
    if not text:
        return []
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    if legacy:
        return processor.encode(text)
    # No dummy prefix: the text stands behind a sentinel, whose pieces are taken off again.
    sentinel = processor.encode("\n")
    return processor.encode("\n" + text.replace("\u2581", " "))[len(sentinel) :]
