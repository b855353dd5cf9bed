"""Guards packing: a conversation in a row with others gives the loss and the gradients that it gives alone.

Every way to mix conversations in silence (a mask, a cache, positions that run on) must stop the run instead.
Run: pytest tests/unit/test_packing.py
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers import modeling_flash_attention_utils as flash
from transformers.models.llama import modeling_llama

from llmga.stage1.arithmetic import use_liger
from llmga.stage1.cross_entropy import use_chunked_cross_entropy
from llmga.stage1.data import Collator
from llmga.stage1.packed_attention import PackingError, use_packed_sdpa
from llmga.stage1.packing import PackingCollator, RowLimit, check_packed
from llmga.tokens import IGNORE_INDEX

VOCABULARY, PAD, IMAGE = 61, 0, 3
PICTURE = (3, 32, 32)
NUM_IMAGE_TOKENS = 4
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLM = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_key_value_heads": 2, "pad_token_id": PAD}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, **LLM),
    "mistral": MistralConfig(**SHAPE, **LLM, sliding_window=7),  # shorter than most of the examples
    "qwen2": Qwen2Config(**SHAPE, **LLM),
    "phi3": Phi3Config(**SHAPE, **LLM, bos_token_id=1, eos_token_id=2),
    "gemma": GemmaConfig(**SHAPE, **LLM, head_dim=8),
}
PADDED = Collator(PAD, IMAGE, NUM_IMAGE_TOKENS, PICTURE)
PACKING = PackingCollator(PADDED)


def example(length: int, with_picture: bool, seed: int, trained_from: float = 0.5) -> dict[str, Any]:
    """A conversation of random tokens whose last part is trained, the first token too where nothing is before it."""
    rng = np.random.default_rng(seed)
    ids = [*[IMAGE] * (NUM_IMAGE_TOKENS * with_picture), *rng.integers(5, VOCABULARY, length).tolist()]
    begin = NUM_IMAGE_TOKENS * with_picture + int(length * trained_from)
    labels = [IGNORE_INDEX] * begin + ids[begin:]
    pixels = rng.normal(size=PICTURE).astype(np.float32) if with_picture else None
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "sample_id": seed, "held_out": False}


MIXED = [
    example(9, True, 0),
    example(14, False, 1, trained_from=0.0),
    example(1, True, 2),
    example(21, True, 3),
    example(3, False, 4),
]
TEXTS = [example(9, False, 5), example(17, False, 6)]


def model_of(family: str) -> Any:
    tower = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=32, **SHAPE)
    config = LlavaConfig(
        vision_config=tower,
        text_config=FAMILIES[family],
        image_token_id=IMAGE,
        image_seq_length=NUM_IMAGE_TOKENS,
        tie_word_embeddings=FAMILIES[family].tie_word_embeddings,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).train()


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_padded_batch(family, checkpointing):
    model = model_of(family)
    loss, gradients = loss_and_gradients(model, PADDED(MIXED))
    use_packed_sdpa(model.model.language_model)
    use_chunked_cross_entropy(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    packed_loss, packed_gradients = loss_and_gradients(model, PACKING(MIXED))
    torch.testing.assert_close(packed_loss, loss, rtol=0, atol=1e-6)
    assert packed_gradients.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(packed_gradients[name], gradients[name], rtol=0, atol=1e-6, msg=name)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_passes_the_packing_attention_unchanged(family):
    model = model_of(family).eval()
    batch = {name: value for name, value in PADDED(MIXED).items() if name != "labels"}
    left = {**batch, "input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    alone = {"input_ids": torch.tensor([TEXTS[1]["input_ids"]])}  # no mask at all, longer than Mistral's window
    with torch.no_grad():
        expected = [model(**inputs).logits for inputs in (batch, left, alone)]
        reply = model.generate(**left, max_new_tokens=12, do_sample=False)
        use_packed_sdpa(model.model.language_model)
        for inputs, logits in zip((batch, left, alone), expected, strict=True):
            torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=1e-5)
        assert torch.equal(model.generate(**left, max_new_tokens=12, do_sample=False), reply)


def plain_flash_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size=(-1, -1)
):
    """What flash-attn's `flash_attn_varlen_func` promises of queries (T, H, D), computed without its kernel."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max() and causal
    window, _ = window_size
    segments = []
    for begin, end in pairwise(cu_seqlens_q.tolist()):
        places = torch.arange(end - begin)
        back = places[:, None] - places[None, :]
        seen = (back >= 0) & ((back <= window) | (window < 0))
        part = [tensor[begin:end].transpose(0, 1) for tensor in (q, k, v)]
        segments.append(scaled_dot_product_attention(*part, seen, scale=softmax_scale, enable_gqa=True))
    return torch.cat(segments, dim=1).transpose(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_is_told_where_conversations_begin(family, monkeypatch):
    """All but the kernel is transformers' own; a fault in what it is told would show on a GPU alone."""

    functions = None, plain_flash_attention, None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    model = model_of(family)
    loss, gradients = loss_and_gradients(model, PADDED(MIXED))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    for batch in (PACKING(MIXED), PADDED(MIXED)):
        flash_loss, flash_gradients = loss_and_gradients(model, batch)
        torch.testing.assert_close(flash_loss, loss, rtol=0, atol=1e-6)
        for name in gradients:
            torch.testing.assert_close(flash_gradients[name], gradients[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("package", ["flash_attn", "liger_kernel"])
def test_kernels_of_other_packages_agree(package, monkeypatch):
    pytest.importorskip(package)
    model = model_of("llama").cuda().bfloat16()
    batch = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in PACKING(MIXED).items()}
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    use_packed_sdpa(model.model.language_model)
    loss, gradients = loss_and_gradients(model, batch)
    if package == "flash_attn":
        model.model.language_model.set_attn_implementation("flash_attention_2")
    else:
        for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):  # exchanged for all models: put back later
            monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
        use_liger(model.model.language_model)
    kernel_loss, kernel_gradients = loss_and_gradients(model, batch)
    torch.testing.assert_close(kernel_loss, loss, rtol=1e-2, atol=0)
    for name in gradients:
        if "language_model" in name:
            atol = 0.05 * float(gradients[name].abs().max())  # bf16, summed in another order
            torch.testing.assert_close(kernel_gradients[name], gradients[name], rtol=0, atol=atol, msg=name)


def test_texts_alone_get_a_picture_segment_that_changes_nothing():
    model = model_of("llama")
    use_packed_sdpa(model.model.language_model)
    batch = PACKING(TEXTS)
    assert batch["cu_seq_lens_q"].tolist() == [0, 9, 26, 26 + NUM_IMAGE_TOKENS]
    assert (batch["labels"][0, 26:] == IGNORE_INDEX).all() and batch["pixel_values"].shape == (1, *PICTURE)
    loss, gradients = loss_and_gradients(model, batch)
    projector = [gradient for name, gradient in gradients.items() if "projector" in name]
    assert len(projector) == 4 and not any(gradient.any() for gradient in projector)  # run, and unmoved
    padded_loss, padded = loss_and_gradients(model, PADDED(TEXTS))
    torch.testing.assert_close(loss, padded_loss, rtol=0, atol=1e-6)
    for name in padded:
        torch.testing.assert_close(gradients[name], padded[name], rtol=0, atol=1e-6, msg=name)


def test_the_bounds_are_read_once_for_all_layers_and_their_recomputation(monkeypatch):
    model = model_of("llama")
    use_packed_sdpa(model.model.language_model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    batches, read, tolist = [PACKING(MIXED), PACKING(TEXTS)], [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: read.append(id(self)) or tolist(self))
    for batch in batches:
        loss_and_gradients(model, batch)
    assert read == [id(batch["cu_seq_lens_q"]) for batch in batches]


def test_held_out_batches_are_padded():
    held_out = [{**one, "held_out": True} for one in MIXED]
    batch = PACKING(held_out)
    assert batch.keys() == PADDED(MIXED).keys() and batch["input_ids"].shape[0] == len(MIXED)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.floats(0, 0.9)), min_size=1, max_size=9))
def test_every_token_of_every_example_is_there_once_and_none_other(shapes):
    examples = [example(length, picture, seed, share) for seed, (length, picture, share) in enumerate(shapes)]
    batch = PACKING(examples)
    check_packed({**batch, "use_cache": False}, "packed_sdpa")
    bounds = batch["cu_seq_lens_q"].tolist()
    guard = not any(picture for _, picture, _ in shapes)
    assert len(bounds) == len(examples) + 1 + guard and bounds[-1] == batch["input_ids"].shape[1]
    for one, (begin, end) in zip(examples, pairwise(bounds), strict=False):
        assert batch["input_ids"][0, begin:end].tolist() == one["input_ids"]
        assert batch["labels"][0, begin:end].tolist() == [IGNORE_INDEX, *one["labels"][1:]]
        assert batch["position_ids"][0, begin:end].tolist() == list(range(end - begin))
    pixels = [one["pixel_values"] for one in examples if one["pixel_values"] is not None]
    assert np.array_equal(batch["pixel_values"], np.stack(pixels) if pixels else np.zeros((1, *PICTURE)))
    assert batch["max_length_q"] == max(np.diff(bounds))
    targets = (PADDED(examples)["labels"][:, 1:] != IGNORE_INDEX).sum()
    assert (batch["labels"][:, 1:] != IGNORE_INDEX).sum() == targets


# ---------------------------------------------------------------- how long a row may be


class Noted:
    """What a RowLimit asks of a Stage1Dataset."""

    num_image_tokens = NUM_IMAGE_TOKENS

    def __init__(self) -> None:
        self.left_out: list[tuple[int, int, str]] = []

    def leave_out(self, index: int, row: int, reason: str) -> None:
        self.left_out.append((index, row, reason))


def limited(examples: list[dict[str, Any]], max_tokens: int) -> tuple[list[int], Noted]:
    """Which of the examples are taken, and what was noted of the others."""
    noted: Any = Noted()
    taken = RowLimit(noted, max_tokens)([{**one, "row": 7 * one["sample_id"]} for one in examples])
    return [one["sample_id"] for one in taken], noted


def test_what_a_row_has_no_room_for_is_left_out_and_told():
    lengths = [len(one["input_ids"]) for one in MIXED]
    assert lengths == [13, 14, 5, 25, 3]
    taken, noted = limited(MIXED, 60)
    assert taken == [0, 1, 2, 3, 4] and not noted.left_out
    taken, noted = limited(MIXED, 35)  # the long one goes, the short one behind it still fits
    assert taken == [0, 1, 2, 4]
    assert noted.left_out == [(3, 21, "25 tokens, and its row holds 32 of data.max_tokens = 35")]
    assert limited(TEXTS, 26 + NUM_IMAGE_TOKENS)[0] == [5, 6]
    assert limited(TEXTS, 26 + NUM_IMAGE_TOKENS - 1)[0] == [5]  # a row of texts needs room for the black picture
    assert limited(TEXTS, 9 + NUM_IMAGE_TOKENS - 1)[0] == []  # the first one, too
    assert limited([{**one, "held_out": True} for one in MIXED], 20)[0] == [0, 1, 2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=9), st.integers(1, 80))
def test_no_row_is_longer_than_the_limit_and_the_first_that_fits_is_in_it(shapes, max_tokens):
    examples = [example(length, picture, seed) for seed, (length, picture) in enumerate(shapes)]
    taken, noted = limited(examples, max_tokens)
    assert sorted([*taken, *(index for index, _, _ in noted.left_out)]) == list(range(len(shapes)))
    alone = [PACKING([one])["input_ids"].shape[1] for one in examples]
    assert taken[:1] == [index for index, tokens in enumerate(alone) if tokens <= max_tokens][:1]
    if taken:
        assert PACKING([examples[index] for index in taken])["input_ids"].shape[1] <= max_tokens


# ---------------------------------------------------------------- what would mix conversations in silence


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"attention_mask": torch.ones(1, 60)}, "attention mask: conversations would be mixed"),
        ({"use_cache": True}, "use_cache: conversations would be mixed"),
        ({"use_cache": None}, "use_cache: conversations would be mixed"),
        ({"past_key_values": ()}, "past keys"),
        ({"position_ids": None}, "without position_ids"),
        ({"position_ids": torch.arange(60)[None]}, "do not restart"),
        ({"position_ids": torch.arange(59)[None]}, r"shape \(1, 59\)"),
        ({"cu_seq_lens_k": torch.tensor([0, 60], dtype=torch.int32)}, "different places"),
        ({"cu_seq_lens_q": None}, "lost them"),
        ({"input_ids": torch.ones(2, 60, dtype=torch.long)}, "2 rows"),
    ],
)
def test_a_batch_that_would_mix_conversations_stops_at_the_door(change, match):
    batch = {**PACKING(MIXED), "use_cache": False}
    check_packed(batch, "flash_attention_2")
    with pytest.raises(PackingError, match=match):
        check_packed({**batch, **change}, "packed_sdpa")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_that_cannot_separate_stops_at_the_door(attention):
    with pytest.raises(PackingError, match=f"{attention} attention does not read"):
        check_packed({**PACKING(MIXED), "use_cache": False}, attention)


def test_the_attention_itself_refuses_a_mask_and_a_cache():
    model = model_of("llama")
    use_packed_sdpa(model.model.language_model)
    batch = PACKING(MIXED)
    mask = torch.ones_like(batch["input_ids"])
    right = model(**batch, use_cache=False).loss
    assert torch.equal(model(**batch, use_cache=False, attention_mask=mask).loss, right)  # all ones: no mask at all
    mask[0, -1] = 0
    with pytest.raises(PackingError, match="conversations would be mixed"):
        model(**batch, use_cache=False, attention_mask=mask)
    cache = model(input_ids=torch.tensor([[7, 8, 9]]), use_cache=True).past_key_values
    with pytest.raises(PackingError, match="conversations would be mixed"):
        model(**batch, past_key_values=cache)


def test_what_the_guards_are_for_is_real():
    """Without them: all tokens see all, no error is raised, and the loss is another one."""
    model = model_of("llama")
    batch = {name: value for name, value in PACKING(MIXED).items() if "seq_lens" not in name}
    right = model(**batch, use_cache=False).loss
    mixed = model(**batch, use_cache=False, attention_mask=torch.ones_like(batch["input_ids"])).loss
    assert abs(mixed - right) > 1e-4
