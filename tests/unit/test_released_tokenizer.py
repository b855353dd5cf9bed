"""Hazard: ids that differ by one space mark from those that the weights were trained on."""

from pathlib import Path

import pytest
from transformers import AddedToken

from llmga.stage1.families import FAMILIES, released_template
from llmga.stage1.released_tokenizer import (
    add_placeholder,
    choose_template,
    load_tokenizer,
    published_ids,
    sample_messages,
    set_special_tokens,
)
from llmga.stage1.released_weights import ConvertError
from llmga.tokens import IGNORE_INDEX
from tests.released import KINDS, PHI3_MARKERS, slow_ids

SYSTEM = "A chat between a person and an assistant."
# kind -> the space mark that the template needs; Llama-like kinds are also checked against the slow tokenizer itself.
SPACE_MARKS = {
    **{"vicuna": " ", "mistral": " ", "phi3": " "},
    **{"vicuna-legacy": "", "mistral-legacy": "", "llama3": "", "qwen2": "", "gemma": ""},
}


def tokenizer_of(kind: str, folder: Path):
    KINDS[kind].tokenizer(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", SPACE_MARKS)
def test_the_variant_is_found_by_trying(kind: str, tmp_path: Path) -> None:
    tokenizer, family = tokenizer_of(kind, tmp_path), FAMILIES[kind.split("-")[0]]
    add_placeholder(tokenizer, "<image>", 500)
    template, space_mark = choose_template(tokenizer, family, SYSTEM if family.system_text else "", "<image>")
    assert space_mark == SPACE_MARKS[kind]
    for messages in sample_messages("<image>"):  # what is trained begins and ends where the layout says
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        labels = [
            token if flag else IGNORE_INDEX
            for token, flag in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        ]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        text = tokenizer.decode([token for token in labels if token != IGNORE_INDEX])
        assert all(answer in text for answer in answers)
        stop = tokenizer.convert_tokens_to_ids(family.stop_tokens[0])
        assert labels.count(stop) == len(answers)
        assert tokenizer.convert_tokens_to_ids("<image>") not in labels


@pytest.mark.parametrize("kind", ["vicuna", "vicuna-legacy", "mistral", "mistral-legacy", "phi3"])
def test_published_ids_are_those_of_the_slow_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind, tmp_path)
    image_id = add_placeholder(tokenizer, "<image>", 500).id
    family = FAMILIES[kind.split("-")[0]]
    template = released_template(family, SYSTEM if family.system_text else "")
    for messages in sample_messages("<image>"):
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False).removeprefix("<s>")
        expected = [1]
        for number, piece in enumerate(text.split("<image>")):
            expected += [image_id] if number else []
            expected += slow_ids(piece, "legacy" in kind, PHI3_MARKERS if kind == "phi3" else (), bos=False)
        assert published_ids(tokenizer, text, "<image>") == expected


def test_a_tokenizer_that_matches_no_variant_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("vicuna", tmp_path)
    # A placeholder that swallows what stands behind it, the newline included.
    tokenizer.add_tokens([AddedToken("<image>", special=True, rstrip=True)], special_tokens=True)
    with pytest.raises(
        ConvertError, match=r"no variant of the vicuna template .*with space mark '': .* instead of .* ' ': "
    ):
        choose_template(tokenizer, FAMILIES["vicuna"], SYSTEM, "<image>")


def test_a_tokenizer_without_the_tokens_of_a_layout_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen2", tmp_path)
    add_placeholder(tokenizer, "<image>", 500)
    with pytest.raises(ConvertError, match="the vicuna template cannot be filled: 'bos_token' is undefined"):
        choose_template(tokenizer, FAMILIES["vicuna"], SYSTEM, "<image>")


def test_placeholder_takes_a_spare_row_grows_the_embedding_or_reuses_a_reserved_token(tmp_path: Path) -> None:
    KINDS["llama3"].tokenizer(tmp_path)
    spare = add_placeholder(load_tokenizer(tmp_path), "<image>", 408)
    assert (spare.id, spare.rows) == (407, 408)
    grown = add_placeholder(load_tokenizer(tmp_path), "<image>", 407)
    assert (grown.id, grown.rows) == (407, 448)
    tokenizer = load_tokenizer(tmp_path)
    reserved = add_placeholder(tokenizer, "<|reserved_special_token_1|>", 407)
    assert (reserved.id, reserved.rows, len(tokenizer)) == (403, 407, 407)


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    KINDS["llama3"].tokenizer(tmp_path)
    with pytest.raises(ConvertError, match="the tokenizer knows 407 tokens, but the embedding has 400 rows"):
        add_placeholder(load_tokenizer(tmp_path), "<image>", 400)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConvertError, match="the tokenizer cannot be loaded without foreign code"):
        load_tokenizer(tmp_path)


def test_padding_of_the_family_is_used_where_the_tokenizer_has_it(tmp_path: Path) -> None:
    KINDS["llama3"].tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert set_special_tokens(tokenizer, FAMILIES["llama3"]) == []
    assert tokenizer.pad_token == "<|reserved_special_token_0|>"
    other = load_tokenizer(tmp_path)
    assert set_special_tokens(other, FAMILIES["gemma"]) == [
        "the tokenizer has no '<pad>', which padded the weights' batches; '<|eot_id|>' does"
    ]
