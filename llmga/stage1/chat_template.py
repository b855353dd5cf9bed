"""Which chat template a run uses: the tokenizer's own where it marks the answers, else the row that fits it.

A template of llava-hf's marks answers too, but reads a turn as a list of parts and lets nothing end an answer. It is no
template to train with; the text that it writes tells which row fits.
"""

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError as JinjaError

from llmga.stage1.chat_rows import MARKERS, RELEASED, read_template, template_names
from llmga.stage1.conversation import ConversationError, Turn, encode_conversation, encode_prompt, marks_answers
from llmga.stage1.released_tokenizer import choose_template
from llmga.stage1.released_weights import ConvertError
from llmga.tokens import IGNORE_INDEX, TAG_LITERALS, neutralise

_PROBE = (("user", "Hello?"), ("assistant", "A dog."))
logger = logging.getLogger(__name__)


class TemplateError(ValueError):
    """A tokenizer and a chat template that do not go together; the message says what to set."""


def set_chat_template(processor: Any, name: str | None, system_text: str | None, where: str) -> str | None:
    """Give a `LlavaProcessor` the chat template of a run, and try it out.

    Args:
        name: of a row; None keeps the tokenizer's own template if it marks answers and reads a turn as text, else takes
            the row that fits.
        system_text: in place of our own; None for ours. It goes into a template file only.
        where: the folder of the tokenizer, for messages.
    Returns:
        The row's name, None when the tokenizer's own template was kept.
    Raises:
        TemplateError: no row fits, there is no place for the system text, or the template does not work out.
    """
    tokenizer = processor.tokenizer
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    if name is None and (not marks_answers(own) or _reads_parts(tokenizer, own)):
        name = _row_that_fits(tokenizer, own or processor.chat_template or "", where)
    if name is None and system_text is not None:
        raise TemplateError(
            f"{where}: the tokenizer's own chat template says what the system text is, so model.system_prompt has no "
            f"place in it; remove it, or set model.chat_template to one of {', '.join(template_names())}"
        )
    if name is not None:
        if system_text is not None:
            literals = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
            literals = {literal for literal in literals if len(literal.strip()) > 1} | {*TAG_LITERALS}
            system_text = neutralise(system_text, literals | {processor.image_token})
        tokenizer.chat_template = (
            _released_template(processor, name, system_text, where)
            if name in RELEASED
            else read_template(name, system_text)
        )
    processor.chat_template = tokenizer.chat_template
    _try_out(processor, name, where)
    return name


def _row_that_fits(tokenizer: Any, own: str, where: str) -> str:
    """The first row whose markers are all tokens, or all written by the template that cannot be kept."""
    tokens = set(tokenizer.get_added_vocab())
    written = own + _rendered(tokenizer, own, _as_parts)
    for name, markers in MARKERS.items():
        if tokens.issuperset(markers) or all(marker in written for marker in markers):
            return name
    found = "a chat template of an unknown kind" if own else "no chat template"
    raise TemplateError(
        f"{where}: the tokenizer has {found}, and its tokens fit none that we know, so how to write turns is unclear; "
        f"set model.chat_template to one of {', '.join(template_names())} (vicuna needs no tokens of its own)"
    )


def _reads_parts(tokenizer: Any, template: str | None) -> bool:
    """Whether a template drops the text of a turn unless it comes as a list of parts."""
    [(_, question), _] = _PROBE
    return question not in _rendered(tokenizer, template, str) and question in _rendered(tokenizer, template, _as_parts)


def _as_parts(text: str) -> list[dict[str, str]]:
    """A turn's content as processors take it."""
    return [{"type": "text", "text": text}]


def _rendered(tokenizer: Any, template: str | None, content: Callable[[str], Any]) -> str:
    """What a template writes for a question and its answer; nothing where it cannot read them."""
    messages = [{"role": role, "content": content(text)} for role, text in _PROBE]
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except (JinjaError, TypeError, ValueError):
        return ""


def _released_template(processor: Any, name: str, system_text: str | None, where: str) -> str:
    """The layout that a family's released weights were trained on, with the ids that the published code made."""
    family = RELEASED[name]
    if system_text and family.system_text is None:
        raise TemplateError(f"{where}: {name} has no place for a system text; remove model.system_prompt")
    if not system_text and family.system_text is not None:
        logger.warning("%s: the weights were trained with a system text; model.system_prompt can bring it", name)
    try:
        return choose_template(processor.tokenizer, family, system_text or "", processor.image_token)[0]
    except ConvertError as error:
        raise TemplateError(f"{where}: {error}") from error


def _try_out(processor: Any, name: str | None, where: str) -> None:
    """Two rounds with a picture: each answer must be marked and terminated, and a prompt must be what training saw."""
    tokenizer, image_token = processor.tokenizer, processor.image_token
    turns = [Turn("user", "Hello?", True), Turn("assistant", "A dog."), Turn("user", "1 + 1"), Turn("assistant", "2")]
    what = f"the chat template {name}" if name else "the tokenizer's own chat template"
    way_out = f"set model.chat_template to another one of {', '.join(template_names())}"
    try:
        encoded = encode_conversation(tokenizer, turns, image_token, 1)
        prompt = encode_prompt(tokenizer, turns[:-1], image_token, 1)
    except (ConversationError, ValueError, TypeError) as error:
        raise TemplateError(f"{where}: {what} does not fit the tokenizer ({error}); {way_out}") from error
    if encoded.input_ids[: len(prompt)] != prompt or encoded.labels[len(prompt)] == IGNORE_INDEX:
        raise TemplateError(f"{where}: with {what} a prompt is not the beginning of what is trained; {way_out}")
    unbroken = [*encoded.labels, IGNORE_INDEX]
    ends = [label for label, after in pairwise(unbroken) if after == IGNORE_INDEX != label]
    silent = set(ends) - set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id}
    if silent:
        text = tokenizer.decode(sorted(silent))
        raise TemplateError(f"{where}: with {what} an answer ends with {text!r}, which stops no reply; {way_out}")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in encoded.input_ids:
        raise TemplateError(f"{where}: {what} writes text that is unknown to the tokenizer; {way_out}")
