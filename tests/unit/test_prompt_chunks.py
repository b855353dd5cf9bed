"""Guards the counting of tokens, chunks and lost words: a word that a picture will not show is always named.

Run: pytest tests/unit/test_prompt_chunks.py
"""

import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmga.prompt_chunks import PromptError, PromptTokens, prompt_statistics, tokenize_prompts, warn_of_lost_words
from llmga.stage2.prompt_weights import read_brackets
from llmga.tokens import clip_length, clip_tokenizer

ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
ONE_TOKEN_WORDS = ["cat", "dog", "sun", "red", "sea", "tree", "lamp", "boat"]


def words(count: int) -> str:
    return " ".join(ONE_TOKEN_WORDS[number % len(ONE_TOKEN_WORDS)] for number in range(count))


def tokens(text: str, max_chunks: int = 1, **options: Any) -> PromptTokens:
    [prompt] = tokenize_prompts(clip_tokenizer(), text, max_chunks, **options)
    return prompt


@pytest.mark.parametrize(
    ("count", "chunks", "lost"), [(0, 1, 0), (1, 1, 0), (75, 1, 0), (76, 2, 0), (150, 2, 0), (151, 2, 1), (400, 2, 250)]
)
def test_chunks_and_lost_words_at_the_borders(count: int, chunks: int, lost: int) -> None:
    prompt = tokens(words(count), max_chunks=2)
    assert (prompt.num_tokens, prompt.num_chunks, len(prompt.lost_words)) == (count, chunks, lost)
    assert prompt.lost_words == tuple(words(count).split()[count - lost :])


def test_a_word_that_the_cut_goes_through_is_lost() -> None:
    prompt = tokens(f"{words(74)} antidisestablishmentarianism, then more")
    assert len(prompt.ids) == 75
    assert prompt.lost_words == ("antidisestablishmentarianism,", "then", "more")


def test_scripts_without_spaces_name_what_lies_behind_the_cut() -> None:
    text = "湖のほとりに古い木の舟がある。" * 20
    prompt = tokens(text)
    [lost] = prompt.lost_words
    assert text.endswith(lost) and 0 < len(lost) < len(text)
    assert clip_length(text[: -len(lost)]) <= 75


def test_brackets_are_not_counted_when_they_are_read_as_weights() -> None:
    text = f"(red:1.5) {words(73)} ([blue] lost)"
    prompt = tokens(text, read=read_brackets)
    assert prompt.num_tokens == 76 and prompt.lost_words == ("lost",)
    assert prompt.weights is not None and prompt.weights[:2] == (1.5, 1.0) and len(prompt.weights) == 75


def test_lost_words_are_logged_with_their_prompt_and_number(caplog: pytest.LogCaptureFixture) -> None:
    prompts = tokenize_prompts(clip_tokenizer(), ["short", words(75) + " golden \x1b[31m hour"], max_chunks=1)
    with caplog.at_level(logging.WARNING):
        warn_of_lost_words(prompts, max_chunks=1)
    [record] = caplog.records
    message = record.getMessage()
    assert message.startswith("1 of 2 prompts are longer than 1 chunks of 75 tokens (max_chunks) and lose words")
    assert "prompt 1" in message and "loses 3: 'golden \\x1b[31m hour'" in message  # no control signs on a terminal


def test_nothing_is_logged_when_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_lost_words(tokenize_prompts(clip_tokenizer(), ["short", ""], 1), 1)
    assert not caplog.records


def test_statistics_of_many_prompts() -> None:
    statistics = prompt_statistics((words(count) for count in [*range(600), 700]), max_chunks=4)
    assert statistics.num_prompts == 601
    assert statistics.max_tokens == 700 and statistics.median_tokens == 300
    assert statistics.mean_tokens == pytest.approx((sum(range(600)) + 700) / 601)
    assert statistics.chunks == {1: 76, 2: 75, 3: 75, 4: 375}
    assert set(statistics.lost_words) == {*range(301, 601)}
    assert statistics.num_lost_words == sum(count - 300 for count in range(301, 600)) + 400
    assert len(statistics.lost_words[599]) == 299 and len(statistics.lost_words[600]) == 400
    assert "601 prompts of 300 tokens in the median" in str(statistics) and "76 in 1, 75 in 2" in str(statistics)
    assert "300 lose 45,250 words" in str(statistics)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        (["a", None], "prompt 1 is None, expected text"),
        (["a", ["b"]], r"prompt 1 is \['b'\], expected text"),
        (["a", "half \ud83d"], r"prompt 1 holds '\\ud83d', half of a surrogate pair"),
    ],
)
def test_what_is_no_prompt_is_refused_by_number(prompts: list[Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        tokenize_prompts(clip_tokenizer(), prompts, 4)


def test_statistics_name_a_bad_prompt_by_its_place_in_all() -> None:
    with pytest.raises(PromptError, match="prompt 1000 is None"):
        prompt_statistics(["a"] * 1000 + [None], 4)  # type: ignore[list-item]
    with pytest.raises(PromptError, match="no prompt to count"):
        prompt_statistics([], 4)


def test_a_limit_below_one_chunk_is_refused() -> None:
    with pytest.raises(PromptError, match="max_chunks is 0, expected 1 or more"):
        tokenize_prompts(clip_tokenizer(), "a", 0)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    from tests.toy import toy_tokenizer

    with pytest.raises(PromptError, match="puts no BOS and EOS around a text; expected a CLIP tokenizer"):
        tokenize_prompts(toy_tokenizer(), "a cat", 4)


ODD = st.one_of(
    st.text(),
    st.text(alphabet="\x00\x01\x1b\x7f\u200b\u202e \t\n"),
    st.text(alphabet="😀👩\u200d🎨🇫🇷❤️ "),
    st.lists(st.sampled_from(["湖", "Привет", "سلام", "नमस्ते", "boat", "Ω", "42", "<|endoftext|>", "(a:1.2)"])).map(
        " ".join
    ),
)


@ANY_SPEED
@given(ODD, st.integers(1, 3))
def test_any_text_is_cut_where_its_chunks_end_and_nothing_is_lost_in_silence(text: str, max_chunks: int) -> None:
    text = text * 7
    prompt = tokens(text, max_chunks)
    assert prompt.num_tokens == clip_length(text)
    assert len(prompt.ids) == min(prompt.num_tokens, 75 * max_chunks)
    assert 1 <= prompt.num_chunks <= max_chunks
    assert bool(prompt.lost_words) == (prompt.num_tokens > 75 * max_chunks)
    behind = text.split()[len(text.split()) - len(prompt.lost_words) :]
    assert all(word.endswith(lost) for word, lost in zip(behind, prompt.lost_words, strict=True))


def test_ten_thousand_words_are_counted_and_the_lost_ones_named() -> None:
    prompt = tokens(words(10_000), max_chunks=4)
    assert prompt.num_tokens == 10_000 and len(prompt.lost_words) == 9_700
