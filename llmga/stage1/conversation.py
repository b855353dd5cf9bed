"""Conversations become token ids and labels; the tokenizer's own chat template decides what is trained.

A template marks what the assistant writes with `{% generation %}`; everything outside those spans is ignored by the
loss. No code here knows a model family: another one brings another template.

Control strings (special tokens, picture placeholders, generation tags) mean something only where our code wrote them.
In text by people they are broken up with a space; so are special tokens and placeholders in an assistant's text,
whose generation tags stay: `llmga.stage1.tasks` has already broken up those it did not write itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from llmga.tokens import IGNORE_INDEX, TAG_LITERALS, neutralise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Our own template, for the toy models: every turn is marker, text, `<|end|>`. `<|end|>` is also the tokenizer's eos,
# so the terminator that an answer is trained to end with is the token that stops generation.
TOY_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOY_TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")


class ConversationError(ValueError):
    """A conversation that cannot be trained on, or a tokenizer that cannot say how."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: what was said, and whether the picture is shown with it."""

    role: Literal["system", "user", "assistant"]
    content: str
    has_picture: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a question.

    Attributes:
        turns: user and assistant in turn, the last one by the user.
        picture: what the one turn with `has_picture` shows, RGB.
    """

    turns: Sequence[Turn]
    picture: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels of one conversation, equally long; labels are IGNORE_INDEX where nothing is trained."""

    input_ids: list[int]
    labels: list[int]


def marks_answers(template: str | None) -> bool:
    """Whether a chat template has `{% generation %}` spans."""
    return bool(_GENERATION_MARK.search(str(template)))


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    image_token: str,
    num_image_tokens: int,
    record_id: str = "",
) -> Encoded:
    """Encode a conversation for training: answers and their terminators carry labels, nothing else does.

    Turns before the first question are dropped (a system turn in front stays), and so are questions without an answer.
    The full length is returned: a picture must never be cut, so the caller drops what is too long.

    Args:
        tokenizer: has a chat template with `{% generation %}` spans, and `image_token` in its vocabulary.
        turns: in order; user and assistant alternate.
        image_token: placeholder, written with a newline in front of each turn that has a picture.
        num_image_tokens: how many placeholder ids stand for one picture.
        record_id: named in errors.
    Raises:
        ConversationError: roles do not alternate, no token is trained, or the template or placeholder is missing.
    """
    where = f"record {record_id!r}: " if record_id else ""
    kept = _answered(_from_first_question(turns, where), where)
    if not kept or kept[-1].role != "assistant":
        raise ConversationError(f"{where}no question has an answer, so no token would be trained; remove the record")
    if not marks_answers(tokenizer.chat_template):
        raise ConversationError(
            "the tokenizer's chat template marks no answer with {% generation %} ... {% endgeneration %}, so what to "
            "train is unknown; give it a template that does (llmga.stage1.conversation.TOY_CHAT_TEMPLATE shows how)"
        )
    rendered = tokenizer.apply_chat_template(
        _messages(tokenizer, kept, image_token), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    input_ids, trained = rendered["input_ids"], rendered["assistant_masks"]
    # Where the tokenizer swallows a span's first or last character, transformers skips the span or runs it on.
    spans = (b"\0" + bytes(trained)).count(b"\0\1")
    answers = sum(turn.role == "assistant" for turn in kept)
    if spans != answers:
        raise ConversationError(f"{where}the chat template marks {spans} spans of tokens for {answers} answers; fix it")
    labels = [token if flag else IGNORE_INDEX for token, flag in zip(input_ids, trained, strict=True)]
    pictures = _picture_positions(tokenizer, kept, input_ids, image_token, where)
    return Encoded(_expand(input_ids, pictures, num_image_tokens), _expand(labels, pictures, num_image_tokens))


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    image_token: str,
    num_image_tokens: int,
) -> list[int]:
    """Encode a conversation that waits for an answer: earlier turns, the last question, the template's answer header.

    The ids are those that `encode_conversation` puts in front of the same answer.

    Raises:
        ConversationError: the last turn is not a question, or as for `encode_conversation`.
    """
    kept = _from_first_question(turns, "")
    if not kept or kept[-1].role != "user":
        raise ConversationError("the conversation does not end with a question, so there is nothing to answer")
    if not tokenizer.chat_template:
        raise ConversationError(
            "the tokenizer has no chat template, so turns cannot be written; set one (TOY_CHAT_TEMPLATE shows how)"
        )
    kept = [*_answered(kept[:-1], ""), kept[-1]]
    input_ids = tokenizer.apply_chat_template(
        _messages(tokenizer, kept, image_token), tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    return _expand(input_ids, _picture_positions(tokenizer, kept, input_ids, image_token, ""), num_image_tokens)


def _from_first_question(turns: Sequence[Turn], where: str) -> list[Turn]:
    """The system turn if there is one, then everything from the first question on; user and assistant alternate."""
    system = list(turns[:1]) if turns and turns[0].role == "system" else []
    rest = list(turns[len(system) :])
    while rest and rest[0].role != "user":
        rest.pop(0)
    for position, turn in enumerate(rest):
        expected = "assistant" if position % 2 else "user"
        if turn.role != expected:
            raise ConversationError(
                f"{where}turn {len(turns) - len(rest) + position + 1} is by {turn.role!r}, expected {expected!r}: "
                "questions and answers must alternate; join or remove turns"
            )
        if turn.has_picture and turn.role != "user":
            raise ConversationError(f"{where}an answer has a picture; only questions can show one")
    return system + rest


def _answered(turns: list[Turn], where: str) -> list[Turn]:
    """Leave out questions whose answer is empty or missing; their picture moves to the next question."""
    kept = [turn for turn in turns[:1] if turn.role == "system"]
    shown = False
    rest = turns[len(kept) :]
    for question, answer in zip(rest[::2], rest[1::2], strict=False):
        shown = shown or question.has_picture
        if answer.content.strip() and (question.content.strip() or shown):
            kept += [replace(question, has_picture=shown), answer]
            shown = False
    if shown or (len(rest) % 2 and rest[-1].has_picture):
        raise ConversationError(f"{where}the picture belongs to a question without an answer; remove the record")
    return kept


def _messages(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], image_token: str) -> list[dict[str, str]]:
    """Turns as the chat template reads them: nothing but our own placeholder can be taken for a control string.

    White space in front of an answer goes: some tokenizers' markers (Phi-3's) swallow what is behind them, and would be
    trained with it.
    """
    literals = control_strings(tokenizer, image_token)
    in_answers = tuple(literal for literal in literals if literal not in TAG_LITERALS)
    messages = []
    for turn in turns:
        is_answer = turn.role == "assistant"
        text = neutralise(turn.content.lstrip() if is_answer else turn.content, in_answers if is_answer else literals)
        messages.append({"role": turn.role, "content": f"{image_token}\n{text}" if turn.has_picture else text})
    return messages


def control_strings(tokenizer: "PreTrainedTokenizerBase", image_token: str) -> tuple[str, ...]:
    """Every string that must not be taken literally from a person's text.

    These are the placeholder, the generation tags of both spellings, the special tokens, and those ordinary added
    tokens that the chat template writes. Other added tokens are words by the tokenizer's own account (Gemma's `<h1>`).

    Raises:
        ConversationError: the placeholder is not a token of its own.
    """
    return _control_strings(tokenizer, image_token, len(tokenizer), str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _control_strings(tokenizer: Any, image_token: str, _size: int, template: str) -> tuple[str, ...]:
    """The size is part of the key because added tokens change the answer."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
    if image_token not in {token.content for token in added}:  # a tokenizer quietly gives the unknown id, or pieces
        raise ConversationError(
            f"the tokenizer has no token {image_token!r} for pictures; add it as a special token and save the tokenizer"
        )
    control = {token.content for token in added if token.special or token.content in template}
    return tuple(sorted(control | {image_token, *TAG_LITERALS}))


def _picture_positions(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], input_ids: list[int], image_token: str, where: str
) -> list[int]:
    """Where the placeholders stand: exactly one for each turn with a picture."""
    expected = sum(turn.has_picture for turn in turns)
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    found = [position for position, token in enumerate(input_ids) if token == image_id]
    if len(found) != expected:
        raise ConversationError(
            f"{where}{len(found)} picture placeholders in the tokens for {expected} pictures; does the chat template "
            "write every turn once?"
        )
    return found


def _expand(values: list[int], positions: list[int], num_image_tokens: int) -> list[int]:
    """Repeat the value at each of the positions, once per feature of the picture."""
    expanded = list(values)
    for position in reversed(positions):
        expanded[position : position + 1] = [values[position]] * num_image_tokens
    return expanded
