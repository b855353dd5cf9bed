"""Guards the plain functions: windows, joins, what is refused, and that equal chunks are encoded once.

Run: pytest tests/unit/test_stage2_long_prompt.py
"""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from llmga.stage2.chunks import chunk_rows, encode_rows, join_rows
from llmga.stage2.long_prompt import encode_long_prompt, encode_long_prompt_sdxl, pool_rows, tokenize_long_prompt
from llmga.tokens import clip_tokenizer
from tests.toy_diffusion import toy_text_encoder

BOS, EOS = 49406, 49407
WORDS = ["cat", "dog", "sun", "red", "sea", "tree", "lamp"]  # a token each


class CountingEncoder(torch.nn.Module):
    """A real text encoder that remembers the batches it was given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = toy_text_encoder(**options)
        self.batches: list[Tensor] = []

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        self.batches.append(input_ids)
        return self.inner(input_ids, **options)


def words(count: int) -> str:
    return " ".join(WORDS[number % 7] for number in range(count))


def serial(input_ids: Tensor, text_encoder: Any) -> Tensor:
    """The published loop: one chunk after another."""
    parts = []
    for chunk in input_ids[:, 1:-1].split(75, dim=1):
        parts.append(text_encoder(torch.cat([input_ids[:, :1], chunk, input_ids[:, -1:]], dim=1)).last_hidden_state)
    return torch.cat([parts[0][:, :1], *(part[:, 1:-1] for part in parts), parts[-1][:, -1:]], dim=1)


@pytest.mark.parametrize(("longest", "chunks"), [(0, 1), (75, 1), (76, 2), (300, 4), (400, 4)])
def test_tokens_are_padded_before_the_one_eos(longest: int, chunks: int) -> None:
    ids = tokenize_long_prompt(clip_tokenizer(pad_token="!"), ["cat", words(longest)], max_chunks=4)
    assert ids.shape == (2, 75 * chunks + 2) and ids.dtype == torch.int64
    assert ids[0].tolist() == [BOS, 2368, *[0] * (75 * chunks - 1), EOS]
    content = min(longest, 300)
    assert (ids[1] == 0).sum() == 75 * chunks - content and ids[1, -1] == EOS


def test_lost_words_are_named_when_a_batch_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenize_long_prompt(clip_tokenizer(), words(75) + " golden hour", max_chunks=1)
    assert "prompt 0 (77 tokens) loses 2: 'golden hour'" in caplog.text


@torch.no_grad()
def test_all_chunks_go_through_the_encoder_together_and_equal_ones_once() -> None:
    ids = tokenize_long_prompt(clip_tokenizer(), [words(280), "blue", "", words(280)], max_chunks=4)
    encoder = CountingEncoder()
    embeds = encode_long_prompt(ids, encoder)
    torch.testing.assert_close(embeds, serial(ids, encoder.inner), rtol=0, atol=1e-5)
    # Four chunks of the long prompt, one of "blue", and the one of padding alone stand for sixteen.
    assert [batch.shape for batch in encoder.batches] == [(6, 77)]


@torch.no_grad()
def test_memory_is_bounded_by_rows_per_call_without_changing_anything() -> None:
    ids = tokenize_long_prompt(clip_tokenizer(), [words(280), "blue", ""], max_chunks=4)
    encoder = CountingEncoder()
    bounded = encode_long_prompt(ids, encoder, max_rows=4)
    assert [len(batch) for batch in encoder.batches] == [4, 2]
    torch.testing.assert_close(bounded, encode_long_prompt(ids, encoder), rtol=0, atol=1e-5)


@torch.no_grad()
def test_middle_tokens_are_kept_on_request() -> None:
    encoder = toy_text_encoder()
    ids = tokenize_long_prompt(clip_tokenizer(), words(200), max_chunks=4)
    kept, stripped = encode_long_prompt(ids, encoder, keep_middle=True), encode_long_prompt(ids, encoder)
    assert kept.shape == (1, 231, 32) and stripped.shape == (1, 227, 32)
    inner = [76, 77, 153, 154]
    outer = [position for position in range(231) if position not in inner]
    assert torch.equal(kept[:, outer], stripped)


@torch.no_grad()
def test_one_chunk_is_what_the_stock_tokenizer_and_encoder_give() -> None:
    encoder, tokenizer = toy_text_encoder(), clip_tokenizer()
    stock = encoder(tokenizer("a red boat", padding="max_length", return_tensors="pt").input_ids).last_hidden_state
    torch.testing.assert_close(encode_long_prompt(tokenize_long_prompt(tokenizer, "a red boat", 4), encoder), stock)


@torch.no_grad()
def test_clip_skip_takes_an_earlier_layer_and_the_final_norm() -> None:
    encoder = toy_text_encoder(layers=3)
    ids = tokenize_long_prompt(clip_tokenizer(), "a red boat", 1)
    for skip in (1, 2):
        states = encoder(ids, output_hidden_states=True).hidden_states[-1 - skip]
        expected = encoder.final_layer_norm(states)
        torch.testing.assert_close(encode_long_prompt(ids, encoder, clip_skip=skip), expected)
    projecting = toy_text_encoder(projection=24)  # keeps its layer norm one level below
    states = projecting(ids, output_hidden_states=True).hidden_states[-2]
    expected = projecting.text_model.final_layer_norm(states)
    torch.testing.assert_close(encode_long_prompt(ids, projecting, clip_skip=1), expected)


def test_gradients_reach_the_encoder_through_shared_chunks() -> None:
    encoder = toy_text_encoder()
    ids = tokenize_long_prompt(clip_tokenizer(), [words(100), "", ""], 2)
    ours = torch.autograd.grad(encode_long_prompt(ids, encoder).square().sum(), encoder.final_layer_norm.weight)[0]
    theirs = torch.autograd.grad(serial(ids, encoder).square().sum(), encoder.final_layer_norm.weight)[0]
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_sdxl_is_cut_to_the_shorter_tokenizer_and_pools_the_last_chunk() -> None:
    first, second = toy_text_encoder(), toy_text_encoder(projection=24, seed=3)
    text = words(72) + " wow!!"  # 74 tokens for the first tokenizer; "!!" is two for the second
    ids, ids_2 = (tokenize_long_prompt(clip_tokenizer(pad), text + "!!" * 2, 4) for pad in ("<|endoftext|>", "!"))
    assert (ids.shape[1], ids_2.shape[1]) == (77, 152)
    embeds, pooled = encode_long_prompt_sdxl(ids, ids_2, first, second)
    assert embeds.shape == (1, 77, 64)
    last = torch.cat([ids_2[:, :1], ids_2[:, 76:151], ids_2[:, -1:]], dim=1)
    torch.testing.assert_close(pooled, second(last).text_embeds)
    penultimate = second(ids_2[:, :77], output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(embeds[:, :76, 32:], penultimate[:, :76])  # causal: what ends a chunk changes no other


def test_joining_pads_each_prompt_on_the_right_of_its_own_end() -> None:
    values = torch.arange(3 * 77, dtype=torch.float32).reshape(3, 77, 1) + 1
    joined, mask = join_rows(values, torch.tensor([2, 1]), keep_middle=False)
    assert joined.shape == (2, 152, 1) and mask.sum(dim=1).tolist() == [152, 77]
    assert joined[0, :, 0].tolist() == [*range(1, 77), *range(79, 155)]
    assert joined[1, :, 0].tolist() == [*range(155, 232), *[0] * 75]
    joined, mask = join_rows(values, torch.tensor([1, 2]), keep_middle=True)
    assert joined.shape == (2, 154, 1) and mask.sum(dim=1).tolist() == [77, 154]
    assert joined[0, :, 0].tolist() == [*range(1, 78), *[0] * 77]


def test_pooled_vectors_of_the_first_the_last_or_all_chunks_with_text() -> None:
    encoded = encode_rows(
        chunk_rows([[320], [2368], [], [736]], clip_tokenizer("!"), eos_after_text=True), toy_text_encoder(24)
    )
    counts, with_text = torch.tensor([3, 1]), torch.tensor([2, 1])
    vectors = encoded.projected
    assert vectors is not None and vectors.shape == (4, 24)
    assert torch.equal(pool_rows(encoded, counts, "first"), vectors[[0, 3]])
    assert torch.equal(pool_rows(encoded, counts, "last"), vectors[[2, 3]])
    expected = torch.stack([(vectors[0] + vectors[1]) / 2, vectors[3]])
    torch.testing.assert_close(pool_rows(encoded, counts, "mean", with_text), expected)


@pytest.mark.parametrize("shape", [(1, 2), (1, 76), (1, 78), (2, 151), (77,), (1, 77, 1)])
def test_tokens_of_a_wrong_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 75 \* K \+ 2\); build it with tokenize_long_prompt"):
        encode_long_prompt(torch.zeros(shape, dtype=torch.int64), toy_text_encoder())


def test_other_mistakes_are_refused_in_one_sentence() -> None:
    encoder, ids = toy_text_encoder(), tokenize_long_prompt(clip_tokenizer(), ["a", "b"], 1)
    with pytest.raises(ValueError, match="clip_skip is -1, expected 0"):
        encode_long_prompt(ids, encoder, clip_skip=-1)
    with pytest.raises(ValueError, match="passes over 3 layers of a text encoder that has 2"):
        encode_long_prompt(ids, encoder, clip_skip=3)
    with pytest.raises(ValueError, match="input_ids has 2 prompts, input_ids_2 has 1"):
        encode_long_prompt_sdxl(ids, ids[:1], encoder, encoder)
    with pytest.raises(ValueError, match="gives no text_embeds to pool; expected a CLIPTextModelWithProjection"):
        encode_long_prompt_sdxl(ids, ids, encoder, encoder)
