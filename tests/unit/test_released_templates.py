"""Hazard: one wrong space in a template prompts released weights with what they never saw."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llmga.stage1.families import FAMILIES, SystemText, families_of, fitting_family, released_template

TALK = [
    {"role": "user", "content": "<image>\nU1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]
# Byte for byte what the published code tokenizes, with BOS and EOS as [ and ], and the trained parts.
LAYOUTS = {
    "vicuna": ("[SYS USER: <image>\nU1 ASSISTANT: A1]USER: U2 ASSISTANT: A2]", [" A1]", " A2]"]),
    "mistral": (
        "[[INST] <<SYS>>\n\n<</SYS>>\n\n<image>\nU1 [/INST] A1 ][[INST] U2 [/INST] A2 ]",
        [" A1 ]", " A2 ]"],
    ),
    "llama3": (
        "[<|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nU1<|eot_id|>"
        "<|start_header_id|>system<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|>"
        "<|start_header_id|>system<|end_header_id|>\n\nA2<|eot_id|>",
        ["A1<|eot_id|>", "A2<|eot_id|>"],
    ),
    "qwen2": (
        "<|im_start|>system\nSYS<|im_end|><|im_start|>user\n<image>\nU1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
        "<|im_start|>user\nU2<|im_end|><|im_start|>assistant\nA2<|im_end|>",
        ["A1<|im_end|>", "A2<|im_end|>"],
    ),
    "phi3": (
        "[<|user|>\n<image>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nU2<|end|>\n<|assistant|>\nA2<|end|>\n",
        ["A1<|end|>", "A2<|end|>"],
    ),
    "gemma": (
        "[<start_of_turn>user\n<image>\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n]"
        "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n]",
        ["A1<end_of_turn>\n]", "A2<end_of_turn>\n]"],
    ),
}


def render(name: str, messages: list[dict], system: str = "SYS", space_mark: str = "", **options: object) -> tuple:
    row = FAMILIES[name]
    template = released_template(row, system if row.system_text else "", space_mark)
    options = {"bos_token": "[", "eos_token": "]", "return_assistant_tokens_mask": True} | options
    [text], spans = render_jinja_template(conversations=[messages], chat_template=template, **options)
    return text, [text[start:end] for start, end in (spans[0] if spans else [])]


@pytest.mark.parametrize("name", FAMILIES)
def test_layout_and_trained_parts(name: str) -> None:
    assert render(name, TALK) == LAYOUTS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_the_beginning_of_what_was_trained(name: str) -> None:
    whole, [first, _] = LAYOUTS[name]
    prompt, _ = render(name, TALK[:1], add_generation_prompt=True, return_assistant_tokens_mask=False)
    assert prompt == whole[: whole.index(first)]


@pytest.mark.parametrize("name", FAMILIES)
def test_space_marks_stand_behind_bos_and_pictures_alone(name: str) -> None:
    plain, spaced = render(name, TALK)[0], render(name, TALK, space_mark=" ")[0]
    expected = plain.replace("<image>", "<image> ")
    assert spaced == (f"[ {expected[1:]}" if plain.startswith("[") else f" {expected}")


def test_messages_in_parts_are_the_same_text() -> None:
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "U1"}]}, *TALK[1:]]
    assert render("vicuna", parts, space_mark=" ") == render("vicuna", TALK, space_mark=" ")


def test_system_texts_with_quotes_braces_and_accents_survive() -> None:
    text = 'It\'s "{{ odd }}" {% raw %} \u00e9\n\\n.'
    assert render("qwen2", TALK, system=text)[0].startswith(f"<|im_start|>system\n{text}<|im_end|>")


def test_a_system_turn_takes_the_slot() -> None:
    talk = [{"role": "system", "content": "MINE"}, *TALK]
    for name in ("vicuna", "llama3", "qwen2"):
        assert render(name, talk)[0] == LAYOUTS[name][0].replace("SYS", "MINE")
    for name in ("mistral", "phi3", "gemma"):
        with pytest.raises(Exception, match="trained without a system text"):
            render(name, talk)


def test_an_empty_slot_of_vicuna_leaves_no_space_behind() -> None:
    assert render("vicuna", TALK, system="")[0] == LAYOUTS["vicuna"][0].replace("SYS ", "")
    assert render("vicuna", TALK, system="", space_mark=" ")[0].startswith("[ USER: ")


def test_model_types_ignore_capitals_and_the_tokenizer_decides_between_llamas() -> None:
    assert [row.name for row in families_of("LLaVA_Phi3")] == ["phi3"]
    assert families_of("llava_mpt") == []
    llamas = families_of("llava_llama")
    assert fitting_family(llamas, {"</s>", "<unk>"}) is FAMILIES["vicuna"]
    assert fitting_family(llamas, {"<|eot_id|>"}) is FAMILIES["llama3"]
    assert fitting_family(llamas, {"other"}) is None


def test_a_system_text_is_known_by_length_and_hash() -> None:
    known = SystemText(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")  # SHA-256 of abc
    assert known.is_met_by("abc")
    assert not known.is_met_by("abd")
