"""The tokenizer of a released checkpoint: its placeholder, and the template whose ids are those it was trained on.

The published code tokenized what stands before and after a picture one by one, with slow tokenizers. A chat template
renders one string. The two agree when the string has a space wherever the slow tokenizer put a space mark at the
beginning of a piece. Which tokenizers do that is tried out, never read from a flag: `choose_template` tokenizes sample
conversations both ways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AddedToken, AutoTokenizer, PreTrainedConfig
from transformers.utils.chat_template_utils import render_jinja_template

from llmga.stage1.families import Family, released_template
from llmga.stage1.released_weights import ConvertError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
ANY_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPACE_MARKS = ("", " ")  # the plainest that fits
_ROWS_MULTIPLE = 64

# Pictures first, later and never; one turn and three; letters, digits, line breaks and spaces at the seams.
SAMPLES: tuple[tuple[Mapping[str, str], ...], ...] = (
    (
        {"role": "user", "content": "{image}\nWhat is in this picture?"},
        {"role": "assistant", "content": "A red kite over 2 hills, seen from below."},
    ),
    (
        {"role": "user", "content": "Draw a small boat."},
        {"role": "assistant", "content": "<gen_image> A small boat on a calm lake </gen_image>"},
        {"role": "user", "content": "{image}\n1. Like this one,\n\nbut larger  and blue"},
        {"role": "assistant", "content": "<gen_image> A large blue boat </gen_image>"},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "You are welcome."},
    ),
    (
        {"role": "user", "content": "make it brighter"},
        {"role": "assistant", "content": "Line one.\nLine two: \u00e9t\u00e9."},
    ),
)


@dataclass(frozen=True, slots=True)
class Placeholder:
    """The token that stands for pictures, and how many rows the embedding must have for it."""

    token: str
    id: int
    rows: int


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of any tokenizer."""
    return any((folder / name).is_file() for name in ANY_TOKENIZER)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, by transformers' own classes.

    Raises:
        ConvertError: its files cannot be read, or want code from the folder.
    """
    try:
        # The folder's own config.json names a model that transformers does not know; the tokenizer does not need it.
        return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig(), trust_remote_code=False)
    except Exception as error:  # every class has its own errors
        reason = " ".join(str(error).split())
        raise ConvertError(f"{folder}: the tokenizer cannot be loaded without foreign code ({reason})") from None


def set_special_tokens(tokenizer: Any, family: Family) -> list[str]:
    """Give the tokenizer the padding of its family; returns what could not be done, as sentences."""
    if family.pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = family.pad_token
        return []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [
        f"the tokenizer has no {family.pad_token!r}, which padded the weights' batches; {tokenizer.pad_token!r} does"
    ]


def add_placeholder(tokenizer: Any, token: str, rows: int) -> Placeholder:
    """Make `token` one id of its own: that of the vocabulary where it is known, else a spare row, else a new one.

    Args:
        rows: of the embedding, before.
    Raises:
        ConvertError: the tokenizer still reads it as pieces, or knows more tokens than the embedding has rows.
    """
    if len(tokenizer) > rows:
        raise ConvertError(
            f"the tokenizer knows {len(tokenizer)} tokens, but the embedding has {rows} rows; "
            "the folder's tokenizer and weights do not belong together"
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or ids[0] != tokenizer.convert_tokens_to_ids(token):
        raise ConvertError(f"the tokenizer reads {token!r} as ids {ids}, expected one; name another --image-token")
    return Placeholder(token, ids[0], rows if ids[0] < rows else _round_up(ids[0] + 1))


def _round_up(rows: int) -> int:
    return -(-rows // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def choose_template(tokenizer: Any, family: Family, system_text: str, image_token: str) -> tuple[str, str]:
    """The template whose ids equal those that the published code made, and the space mark it writes.

    Raises:
        ConvertError: no variant gives the same ids; the sentence shows the first difference.
    """
    # An empty slot leaves a space where no text was ever trained, so it says nothing about the tokenizer.
    tried_system = system_text or ("A sentence." if family.system_text else "")
    differences = []
    for space_mark in _SPACE_MARKS:
        template = released_template(family, tried_system, space_mark, image_token)
        plain = released_template(family, tried_system, "", image_token)
        try:
            difference = _first_difference(tokenizer, template, plain, image_token)
        except TemplateError as error:
            raise ConvertError(f"the {family.name} template cannot be filled: {error}") from None
        if difference is None:
            return released_template(family, system_text, space_mark, image_token), space_mark
        differences.append(f"with space mark {space_mark!r}: {difference}")
    raise ConvertError(
        f"no variant of the {family.name} template gives the ids that the weights were trained on "
        f"({'; '.join(differences)}); does the tokenizer belong to these weights?"
    )


def sample_messages(image_token: str) -> list[list[dict[str, str]]]:
    """The sample conversations with their placeholder."""
    return [
        [{**message, "content": message["content"].replace("{image}", image_token)} for message in sample]
        for sample in SAMPLES
    ]


def _first_difference(tokenizer: Any, template: str, plain: str, image_token: str) -> str | None:
    for messages in sample_messages(image_token):
        ours = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
        theirs = published_ids(tokenizer, _render(tokenizer, plain, messages), image_token)
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(theirs))
            left, right = (tokenizer.convert_ids_to_tokens(ids[max(0, at - 1) : at + 3]) for ids in (ours, theirs))
            return f"{left} instead of {right} at token {at}"
    return None


def _render(tokenizer: Any, template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that the published code built: without the BOS that its tokenizer put in front."""
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    [text], _ = render_jinja_template(
        conversations=[list(messages)], chat_template=template, **({"bos_token": "", "eos_token": ""} | special)
    )
    return text.removeprefix(tokenizer.bos_token or "")


def published_ids(tokenizer: Any, text: str, image_token: str) -> list[int]:
    """Ids of a text as the published code made them: piece by piece between pictures, with a slow tokenizer.

    The slow tokenizers of SentencePiece kind with `legacy: false` put one space mark in front of every piece unless it
    begins with a special token. Today's tokenizers do so only where a word begins the piece, so a space is written.

    Args:
        text: without BOS; pictures as `image_token`.
    """
    marks = _marks_only_the_beginning(tokenizer)
    special = tuple(token for token in tokenizer.special_tokens_map.values() if isinstance(token, str))
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    ids: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for number, piece in enumerate(text.split(image_token)):
        ids += [image_id] if number else []
        written = f" {piece}" if marks and piece and not piece.startswith(special) else piece
        ids += tokenizer.encode(written, add_special_tokens=False)
    return ids


def _marks_only_the_beginning(tokenizer: Any) -> bool:
    """Whether a word at the beginning of a text gets a space mark that it does not get behind a special token."""
    behind = tokenizer.eos_token or tokenizer.all_special_tokens[0]
    alone = tokenizer.encode("word", add_special_tokens=False)
    return tokenizer.encode(f"{behind}word", add_special_tokens=False)[1:] != alone
