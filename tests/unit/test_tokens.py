"""Guards the strings a model is trained on, and the CLIP counts the toy world relies on.

Run: pytest tests/unit/test_tokens.py
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmga.tokens import (
    GEN_IMAGE,
    GEN_IMG,
    IGNORE_INDEX,
    TAG_LITERALS,
    TAGS,
    ClipWord,
    GenerationTags,
    Reply,
    clip_length,
    clip_positions,
    clip_tokenizer,
    clip_words,
    neutralise,
    parse_reply,
    wrap_generation_prompt,
)

PIECES = st.lists(
    st.sampled_from(
        [*TAG_LITERALS, "<gen_img", "gen_image>", "<", ">", "</", " ", "\n", "a red circle", "<image>", "é"]
    )
)
ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines, first imports
JUNK = PIECES.map("".join) | st.text()


def test_wrapping_puts_exactly_one_space_inside_each_tag() -> None:
    assert wrap_generation_prompt("a cat") == "<gen_img> a cat </gen_img>"
    assert wrap_generation_prompt("  a cat\n", GEN_IMAGE) == "<gen_image> a cat </gen_image>"
    assert {"gen_img": GEN_IMG, "gen_image": GEN_IMAGE} == TAGS
    assert IGNORE_INDEX == -100


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="generation prompt is empty"):
        wrap_generation_prompt(" \n")


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("A plain answer.", Reply("A plain answer.", (), True)),
        ("<gen_img> a cat </gen_img>", Reply("", ("a cat",), True)),
        ("<gen_image>\n a cat\n\n</gen_image>", Reply("", ("a cat",), True)),
        ("<gen_img>a cat</gen_img>", Reply("", ("a cat",), True)),
        ("Here: <gen_img> a </gen_img>\nand <gen_image> b </gen_image>.", Reply("Here:\nand\n.", ("a", "b"), True)),
        ("Sure. <gen_img> a cat on", Reply("Sure.", ("a cat on",), False)),
        ("<gen_img> a </gen_img> <gen_img> b", Reply("", ("a", "b"), False)),
        ("a cat </gen_img> after", Reply("a cat\nafter", (), False)),
        ("<gen_img> a </gen_image>", Reply("", ("a",), False)),
        ("<gen_img> a <gen_img> b </gen_img> c </gen_img>", Reply("c", ("a", "b"), False)),
        ("<gen_img>  </gen_img>", Reply("", (), False)),
        ("<gen_img>", Reply("", (), False)),
        ("</gen_img>", Reply("", (), False)),
        ("</gen_img> a <gen_img>", Reply("a", (), False)),
        ("", Reply("", (), True)),
        ("a < gen_img> is text", Reply("a < gen_img> is text", (), True)),
    ],
)
def test_replies_are_read_tolerantly_and_judged_strictly(text: str, reply: Reply) -> None:
    assert parse_reply(text) == reply


@ANY_SPEED
@given(JUNK.filter(str.strip), st.sampled_from([GEN_IMG, GEN_IMAGE]))
def test_what_was_wrapped_is_parsed_back(text: str, tags: GenerationTags) -> None:
    expected = neutralise(text.strip(), TAG_LITERALS)
    assert parse_reply(wrap_generation_prompt(text, tags)) == Reply("", (expected,), True)


@ANY_SPEED
@given(st.lists(st.text(alphabet="ab ").filter(str.strip), max_size=4), st.text(alphabet="xyz ", max_size=5))
def test_several_wrapped_prompts_are_parsed_back_in_order(prompts: list[str], between: str) -> None:
    reply = parse_reply(between.join(map(wrap_generation_prompt, prompts)))
    assert reply.prompts == tuple(prompt.strip() for prompt in prompts)
    assert reply.well_formed


@ANY_SPEED
@given(JUNK)
def test_any_junk_is_parsed_without_a_tag_left_over(text: str) -> None:
    reply = parse_reply(text)
    for part in (reply.text, *reply.prompts):
        assert not any(literal in part for literal in TAG_LITERALS)
        assert part == part.strip()
    assert all(reply.prompts)


def test_neutralised_text_is_readable_and_no_longer_interpreted() -> None:
    text = neutralise("draw <image> and <gen_img> x </gen_img>", ("<image>", *TAG_LITERALS))
    assert text == "draw < image> and < gen_img> x < /gen_img>"
    assert parse_reply(text) == Reply(text, (), True)
    assert neutralise("nothing to do", []) == "nothing to do"
    assert neutralise("Hi ASSISTANT: no", [" ASSISTANT: "]) == "Hi A SSISTANT: no"


@ANY_SPEED
@given(JUNK, st.lists(st.sampled_from(["<image>", "<gen_img>", "image>", "<<", "ab", "a b", "</s>", " x y "])))
def test_no_control_string_survives_neutralising(text: str, literals: list[str]) -> None:
    clean = neutralise(text, literals)
    assert not any(literal.strip() in clean for literal in literals)
    assert neutralise(clean, literals) == clean
    assert clean.replace(" ", "") == text.replace(" ", "")


def test_a_control_string_too_short_to_break_is_refused() -> None:
    with pytest.raises(ValueError, match="'<' is too short"):
        neutralise("text", ["<"])


# ---------------------------------------------------------------- CLIP

PLAIN_TEXTS = [
    "a photo of a cat",
    "Don't stop: it's the children's, we've, I'll, they'd, I'm, you're; rock'n'roll 'tis ''s",
    "In 1999, 12345 people paid $3.50 (or 7%) -- wow!!! ... #1 @home",
    "Tabs\tand\nnew  lines\r\n and_under_scores, hy-phens/slashes",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis xzqwvk",
    "Café crème, naïve façade, Ærøskøbing, Straße, İstanbul",
    "Привет мир, 日本語のテキスト, 안녕하세요, مرحبا",
    "emoji 🎨🖌️ and flags 🇫🇷, math ½ ² Ⅷ ∑",
    "",
    " . ",
]
WEB_TEXTS = [
    "the cats\u2019 \u201cquoted\u201d don\u2019t",
    "Tom &amp; Jerry &amp;lt;3 &quot;x&quot;",
    "sch\u00c3\u00b6n",  # UTF-8 read as Latin-1
    "\ufb01ne \uff26\uff35\uff2c\uff2c",  # a ligature, full-width letters
    "ΟΔΟΣ",
]


@pytest.fixture(scope="module")
def reference() -> Any:
    """open_clip's tokenizer, loaded from its file: importing the package would import every model as well."""
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]  # type: ignore[union-attr, index]
    spec = importlib.util.spec_from_file_location("reference_tokenizer", Path(folder) / "tokenizer.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_ids_equal_openai_clip(text: str, reference: Any) -> None:
    ids = clip_tokenizer()(text).input_ids
    assert ids == [49406, *reference.encode(text), 49407]


def test_the_clip_tokenizer_has_clips_special_tokens_and_window() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert tokenizer.model_max_length == 77
    assert clip_tokenizer() is tokenizer


@pytest.mark.parametrize("text", [*PLAIN_TEXTS, *WEB_TEXTS, "a <|endoftext|> inside", "nul \x00 and \x1f signs"])
def test_lengths_and_positions_equal_the_tokenizers(text: str) -> None:
    assert_counts_match(text)


@settings(ANY_SPEED, max_examples=200)
@given(
    st.text(alphabet=st.characters(codec="ascii")) | st.text(alphabet="abcdeé'st09.,- <|>A\n", max_size=60) | st.text()
)
def test_lengths_and_positions_equal_the_tokenizers_on_anything(text: str) -> None:
    assert_counts_match(text)


def assert_counts_match(text: str) -> None:
    encoding = clip_tokenizer().backend_tokenizer.encode(text)
    assert clip_length(text) == len(encoding.ids) - 2
    words = clip_words(text)
    assert words == sorted(words) and (words[-1].position if words else 0) == clip_length(text)
    for word in words:
        assert encoding.offsets[word.position][1] == word.end


def test_positions_point_at_the_last_piece_of_a_span() -> None:
    text = "A photo of an antidisestablishmentarianist, it's red."
    assert clip_words("it's red 42") == [
        ClipWord(0, 2, 1),
        ClipWord(2, 4, 2),
        ClipWord(5, 8, 3),
        ClipWord(9, 10, 4),
        ClipWord(10, 11, 5),
    ]
    ids = clip_tokenizer()(text).input_ids
    tokens = clip_tokenizer().convert_ids_to_tokens(ids)
    start = text.index("anti")
    long_word, red, cut, first = clip_positions(
        text, [(start, start + 27), (len(text) - 4, len(text) - 1), (0, 4), (0, 1)]
    )
    assert tokens[red] == "red</w>" and tokens[cut] == "photo</w>" and first == 1
    assert long_word > 5 and tokens[long_word].endswith("ist</w>") and tokens[long_word + 1] == ",</w>"


@pytest.mark.parametrize("span", [(1, 2), (0, 0), (9, 12)])
def test_a_span_without_a_word_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="hold no word"):
        clip_positions("a photo", [span])


def test_counting_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, llmga.tokens as t; assert t.clip_length('a small red circle') == 4;"
        "assert not {'torch', 'transformers', 'open_clip'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
