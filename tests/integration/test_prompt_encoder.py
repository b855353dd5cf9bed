"""Guards the encoder object: a prompt's picture depends on that prompt alone, negatives fit, stock pipelines agree.

Run: pytest tests/integration/test_prompt_encoder.py
"""

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmga.prompt_chunks import PromptError
from llmga.stage2.prompt_batch import UNCONDITIONAL, EncodedPrompts, PromptPair, attending_to
from llmga.stage2.prompt_encoder import LongPromptEncoder, TextEncoderError
from llmga.stage2.prompt_layout import prompt_layout, stamp_layout
from llmga.tokens import CLIP_WINDOW, clip_tokenizer
from tests.toy_diffusion import toy_sd_pipeline, toy_sdxl_pipeline, toy_text_encoder, toy_unet

TOLERANCE = 1e-5
WORDS = ["cat", "dog", "sun", "red", "sea", "tree", "lamp"]  # a token each


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(number + start) % 7] for number in range(count))


BATCH = [words(280), "a red boat", "", words(151, 3), words(76, 5)]  # 4, 1, 1, 3 and 2 chunks


@pytest.fixture(scope="module")
def text_encoders() -> tuple[Any, Any]:
    return toy_text_encoder(), toy_text_encoder(projection=24, seed=3)


@pytest.fixture(scope="module")
def sd(text_encoders: Any) -> LongPromptEncoder:
    return LongPromptEncoder.for_sd(clip_tokenizer(), text_encoders[0])


@pytest.fixture(scope="module")
def sdxl(text_encoders: Any) -> LongPromptEncoder:
    return LongPromptEncoder.for_sdxl([clip_tokenizer(), clip_tokenizer("!")], text_encoders)


def run_unet(unet: Any, prompts: EncodedPrompts) -> Tensor:
    """What the UNet predicts for each prompt on the same noise."""
    count = len(prompts.prompt_embeds)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1, -1)
    added = None
    if prompts.pooled_prompt_embeds is not None:
        time_ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).expand(count, -1)
        added = {"text_embeds": prompts.pooled_prompt_embeds, "time_ids": time_ids}
    with torch.no_grad():
        return unet(
            noise,
            torch.full((count,), 500),
            prompts.prompt_embeds,
            encoder_attention_mask=prompts.attention_mask,
            added_cond_kwargs=added,
        ).sample


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_prompts_result_does_not_depend_on_its_neighbours(
    kind: str, weighted: bool, request: pytest.FixtureRequest
) -> None:
    encoder = request.getfixturevalue(kind)
    unet = toy_unet(encoder.width, pooled=24 if kind == "sdxl" else None)
    prompts = [f"({text}:1.3) boat" for text in BATCH] if weighted else BATCH
    together = encoder.encode(prompts, weighted)
    predicted = run_unet(unet, together)
    assert together.prompt_embeds.shape == (5, 302, encoder.width)
    for number, text in enumerate(prompts):
        alone = encoder.encode(text, weighted)
        length = alone.prompt_embeds.shape[1]
        assert together.attention_mask[number].sum() == length
        torch.testing.assert_close(
            together.prompt_embeds[number, :length], alone.prompt_embeds[0], rtol=0, atol=TOLERANCE
        )
        torch.testing.assert_close(predicted[number], run_unet(unet, alone)[0], rtol=0, atol=TOLERANCE)
        if kind == "sdxl":
            pooled = alone.pooled_prompt_embeds[0]
            torch.testing.assert_close(together.pooled_prompt_embeds[number], pooled, rtol=0, atol=TOLERANCE)
    short = encoder.encode(prompts[1], weighted)  # what the mask hides would otherwise be seen
    shown = together[1:2]
    unmasked = EncodedPrompts(shown.prompt_embeds, None, shown.pooled_prompt_embeds, shown.prompts)
    assert (run_unet(unet, unmasked) - run_unet(unet, short)).abs().max() > 1e-3


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.sampled_from([*BATCH, "😀 👩‍🎨 🇫🇷", "\x00\x1b[31m", "湖のほとり " * 20, " \n\t "]), min_size=1, max_size=5
    )
)
def test_any_mixture_of_prompts_encodes_each_as_alone(sdxl: LongPromptEncoder, prompts: list[str]) -> None:
    together = sdxl.encode(prompts)
    assert together.prompt_embeds.isfinite().all()
    for number, text in enumerate(prompts):
        alone = sdxl.encode(text)
        length = alone.prompt_embeds.shape[1]
        torch.testing.assert_close(
            together.prompt_embeds[number, :length], alone.prompt_embeds[0], rtol=0, atol=TOLERANCE
        )
        assert not together.prompt_embeds[number, length:].any()


def test_ten_thousand_words_are_encoded_and_the_lost_ones_named(
    sd: LongPromptEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        encoded = sd.encode([words(10_000), "short"])
    assert encoded.prompt_embeds.shape == (2, 302, 32)
    assert len(encoded.prompts[0].lost_words) == 9_700 and not encoded.prompts[1].lost_words
    assert "prompt 0 (10,000 tokens) loses 9,700" in caplog.text


def test_whitespace_alone_is_the_empty_prompt(sd: LongPromptEncoder) -> None:
    assert torch.equal(sd.encode(" \n\t\u3000").prompt_embeds, sd.encode("").prompt_embeds)


@torch.no_grad()
def test_a_prompt_of_one_chunk_is_what_stock_pipelines_make_of_it() -> None:
    pipeline = toy_sd_pipeline()
    stock, stock_negative = pipeline.encode_prompt("a red boat", "cpu", 1, True, "fog")
    pair = LongPromptEncoder.from_pipeline(pipeline).encode_pair("a red boat", "fog")
    torch.testing.assert_close(pair.positive.prompt_embeds, stock)
    torch.testing.assert_close(pair.negative.prompt_embeds, stock_negative)

    pipeline = toy_sdxl_pipeline()
    for negative in ("fog", None):
        expected = pipeline.encode_prompt("a red boat!", negative_prompt=negative)
        pair = LongPromptEncoder.from_pipeline(pipeline).encode_pair("a red boat!", negative or UNCONDITIONAL)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        assert set(pair.pipeline_arguments()) == set(names)
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(pair.pipeline_arguments()[name], value)
    assert not pair.negative.prompt_embeds.any() and not pair.negative.pooled_prompt_embeds.any()


def test_no_prompt_is_zeros_or_the_empty_text_as_the_model_has_it(text_encoders: Any) -> None:
    tokenizers = [clip_tokenizer(), clip_tokenizer("!")]
    zeros = LongPromptEncoder.for_sdxl(tokenizers, text_encoders).encode(["boat", UNCONDITIONAL, ""])
    assert zeros.prompt_embeds[0].any() and zeros.prompt_embeds[2].any()
    assert not zeros.prompt_embeds[1].any() and not zeros.pooled_prompt_embeds[1].any()
    assert zeros.attention_mask.all()
    texts = LongPromptEncoder.for_sdxl(tokenizers, text_encoders, zero_unconditional=False)
    assert torch.equal(texts.encode([UNCONDITIONAL]).prompt_embeds, texts.encode("").prompt_embeds)


def test_negatives_of_another_length_are_masked_or_share_the_chunks(text_encoders: Any) -> None:
    ours = LongPromptEncoder.for_sd(clip_tokenizer(), text_encoders[0])
    for prompt, negative in [(words(200), "fog"), ("a boat", words(200))]:
        pair = ours.encode_pair(prompt, negative)
        assert pair.positive.prompt_embeds.shape == pair.negative.prompt_embeds.shape == (1, 227, 32)
        lengths = [int(part.attention_mask.sum()) for part in (pair.positive, pair.negative)]
        assert sorted(lengths) == [77, 227]
        alone = ours.encode(negative).prompt_embeds[0]
        torch.testing.assert_close(pair.negative.prompt_embeds[0, : len(alone)], alone, rtol=0, atol=TOLERANCE)
    published = LongPromptEncoder.for_sd(clip_tokenizer(), text_encoders[0], prompt_layout("published"))
    pair = published.encode_pair([words(200), "cat"], "fog")
    assert pair.negative.prompt_embeds.shape == (2, 227, 32) and pair.negative.attention_mask is None
    alone = published.encode(["fog", words(200)]).prompt_embeds[0]  # padding alone fills the later chunks
    torch.testing.assert_close(pair.negative.prompt_embeds[1], alone, rtol=0, atol=TOLERANCE)


def test_both_sides_of_guidance_go_through_the_encoder_in_one_call(text_encoders: Any) -> None:
    calls: list[int] = []
    hook = text_encoders[0].register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    LongPromptEncoder.for_sd(clip_tokenizer(), text_encoders[0]).encode_pair([words(200), "cat", "sun"], "fog")
    hook.remove()
    assert calls == [3 + 1 + 1 + 1]  # "fog" is encoded once for all three


def test_encoding_leaves_no_graph_behind(sd: LongPromptEncoder) -> None:
    assert not sd.encode("a boat").prompt_embeds.requires_grad


def test_tokens_are_made_in_one_process_and_encoded_in_another(sdxl: LongPromptEncoder) -> None:
    prompts = [words(100), UNCONDITIONAL, "(boat:1.4)"]
    tokenizer = pickle.loads(pickle.dumps(sdxl.tokenize))
    batch = pickle.loads(pickle.dumps(tokenizer(prompts, weighted=True)))
    assert torch.equal(sdxl.encode_tokens(batch).prompt_embeds, sdxl.encode(prompts, weighted=True).prompt_embeds)


def test_end_tokens_written_in_a_prompt_are_text_in_ours_and_tokens_as_published(text_encoders: Any) -> None:
    text = "a boat <|endoftext|> at sea"
    for name, found in [("masked", False), ("published", True)]:
        encoder = LongPromptEncoder.for_sd(clip_tokenizer(), text_encoders[0], prompt_layout(name))
        assert (49407 in encoder.tokenize(text).prompts[0].ids) is found


def test_tokenizers_that_disagree_give_both_encoders_the_longer_ones_chunks(sdxl: LongPromptEncoder) -> None:
    text = words(73) + " wow!!" + " wow!!"
    first, second = (part.num_text_chunks.item() for part in sdxl.tokenize(text).towers)
    assert (first, second) == (2, 2)
    text = words(71) + " wow!! wow!!"  # 75 tokens for one tokenizer, 77 for the other
    first, second = (part.num_text_chunks.item() for part in sdxl.tokenize(text).towers)
    assert (first, second) == (1, 2)
    encoded = sdxl.encode(text)
    assert encoded.prompt_embeds.shape == (1, 152, 64) and encoded.attention_mask.all()


def test_weights_move_their_own_words_and_keep_the_mean(sd: LongPromptEncoder) -> None:
    plain = sd.encode("a red boat at sea").prompt_embeds
    weighted = sd.encode("a (red:1.5) boat at sea", weighted=True).prompt_embeds
    torch.testing.assert_close(weighted.double().mean(), plain.double().mean(), rtol=1e-4, atol=0)
    factor = (weighted / plain)[0].median(dim=1).values
    assert factor[2] / factor[1] == pytest.approx(1.5, rel=1e-4)
    torch.testing.assert_close(factor[3:], factor[:1].expand(74), rtol=1e-4, atol=0)
    assert torch.equal(
        sd.encode("a (red:1.0) boat", weighted=True).prompt_embeds, sd.encode("a red boat").prompt_embeds
    )
    assert sd.encode("a (red) boat").prompts[0].num_tokens == 5  # off unless asked for


def test_a_pipeline_is_encoded_in_the_layout_its_unet_names() -> None:
    pipeline = toy_sd_pipeline()
    assert LongPromptEncoder.from_pipeline(pipeline).layout == prompt_layout("masked", 4)
    stamp_layout(pipeline.unet, prompt_layout("published", 2))
    assert LongPromptEncoder.from_pipeline(pipeline).layout == prompt_layout("published", 2)
    assert LongPromptEncoder.from_pipeline(pipeline, prompt_layout("published_keep")).layout.keep_middle


def test_the_mask_reaches_the_unet_of_a_stock_pipeline(sd: LongPromptEncoder) -> None:
    unet, seen = toy_unet(), []
    pair = sd.encode_pair([words(200), "a boat"], "fog")
    states = torch.cat([part.prompt_embeds for part in (pair.negative, pair.positive)])
    noise = torch.randn(4, 4, 8, 8)
    mask = torch.cat([pair.negative.attention_mask, pair.positive.attention_mask])
    with torch.no_grad():
        expected = unet(noise, 1, encoder_hidden_states=states, encoder_attention_mask=mask).sample
        with attending_to(unet, pair):
            seen.append(unet(noise, 1, encoder_hidden_states=states).sample)
            seen.append(unet(noise, 1, states).sample)
            unguided = unet(noise[2:], 1, pair.positive.prompt_embeds).sample
        with attending_to(unet, pair, num_images_per_prompt=2):
            twice = unet(noise.repeat_interleave(2, 0), 1, states.repeat_interleave(2, 0)).sample
        assert (unet(noise, 1, states).sample - expected).abs().max() > 1e-3  # gone with the block
    assert all(torch.equal(sample, expected) for sample in seen)
    torch.testing.assert_close(unguided, expected[2:], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(twice[::2], expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="runs on 3 rows of text, the prompts given to attending_to make 2 or 4"):  # noqa: SIM117
        with attending_to(unet, pair):
            unet(noise[:3], 1, states[:3])
    with attending_to(unet, pair.positive):
        pass


def test_equal_lengths_need_no_mask(sd: LongPromptEncoder) -> None:
    unet = toy_unet()
    with attending_to(unet, sd.encode_pair("a boat", "fog")):
        assert not unet._forward_pre_hooks


@pytest.mark.parametrize("negatives", [[], ["a", "b"]])
def test_negatives_that_do_not_match_are_refused(sd: LongPromptEncoder, negatives: list[str]) -> None:
    with pytest.raises(PromptError, match=f"there are {len(negatives)} negative prompts for 1 prompts"):
        sd.encode_pair("a boat", negatives)


def test_what_is_no_prompt_is_refused(sd: LongPromptEncoder) -> None:
    with pytest.raises(PromptError, match="prompt 1 is None, expected text"):
        sd.encode(["a", None])  # type: ignore[list-item]


def test_parts_that_do_not_fit_are_refused(sd: LongPromptEncoder) -> None:
    with pytest.raises(TextEncoderError, match=r"give 32 channels, the UNet reads 768 \(cross_attention_dim\)"):
        sd.check_width(768)
    sd.check_width([32, 32])
    encoder = toy_text_encoder()
    encoder.config.max_position_embeddings = 64
    with pytest.raises(TextEncoderError, match=f"reads 64 positions, expected CLIP's {CLIP_WINDOW}"):
        LongPromptEncoder.for_sd(clip_tokenizer(), encoder)
    encoder.config.max_position_embeddings, encoder.config.vocab_size = 77, 1000
    with pytest.raises(TextEncoderError, match="the tokenizer has 49,408 tokens, its text encoder 1,000"):
        LongPromptEncoder.for_sd(clip_tokenizer(), encoder)


def test_a_pair_gives_pipelines_no_pooled_vector_that_does_not_exist(sd: LongPromptEncoder) -> None:
    pair = sd.encode_pair("a", "b")
    assert isinstance(pair, PromptPair) and set(pair.pipeline_arguments()) == {
        "prompt_embeds",
        "negative_prompt_embeds",
    }


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_the_saved_tokenizer_folder_is_a_standard_one(tmp_path: Path, pad_token: str) -> None:
    from transformers import AutoTokenizer, CLIPTokenizer

    built = clip_tokenizer(pad_token)
    built.save_pretrained(tmp_path)
    texts = ["A weathered boat, it's 3.14!!", "ok?!  naïve 😀", "", "don't <|endoftext|> stop"]
    for loaded in (CLIPTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(texts).input_ids == built(texts).input_ids
        assert (loaded.pad_token_id, loaded.model_max_length) == (built.pad_token_id, 77)
    assert built.pad_token_id == {"!": 0, "<|endoftext|>": 49407}[pad_token]
