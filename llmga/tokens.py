"""Strings and tokens that have a meaning: generation tags, the ignored label, CLIP's vocabulary and its counts."""

from __future__ import annotations

import gzip
import importlib.util
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers.models import BPE
    from transformers import CLIPTokenizer

IGNORE_INDEX = -100  # label of a token that is not trained; what torch's cross-entropy skips by default
IMAGE_TOKEN = "<image>"  # stands where a picture is, in texts and in published rows


# ---------------------------------------------------------------- generation tags


@dataclass(frozen=True, slots=True)
class GenerationTags:
    """The pair of strings around a prompt that asks for a picture."""

    open: str
    close: str


GEN_IMG = GenerationTags("<gen_img>", "</gen_img>")  # the paper's spelling
GEN_IMAGE = GenerationTags("<gen_image>", "</gen_image>")  # the spelling of the published code and weights
TAGS = {"gen_img": GEN_IMG, "gen_image": GEN_IMAGE}
TAG_LITERALS = tuple(literal for tags in TAGS.values() for literal in (tags.open, tags.close))

_TAG = re.compile(r"<(?P<slash>/?)(?P<name>gen_img|gen_image)>")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a reply says and what it asks to draw.

    Attributes:
        text: everything outside the tags, the parts stripped and joined by a line break.
        prompts: the non-empty tagged spans, stripped, in order.
        well_formed: every tag is closed by its own spelling, none is nested or alone, no span is empty. A reply
            without tags is well formed, so "asks for a picture properly" is `well_formed and prompts`.
    """

    text: str
    prompts: tuple[str, ...]
    well_formed: bool


def wrap_generation_prompt(text: str, tags: GenerationTags = GEN_IMG) -> str:
    """Tag a prompt the one way it is trained: `<gen_img> text </gen_img>`, exactly one space inside each tag.

    Literal tags inside `text` are neutralised, so that a wrapped prompt always parses back as one span.

    Raises:
        ValueError: the text is empty or blank.
    """
    text = neutralise(text.strip(), TAG_LITERALS)
    if not text:
        raise ValueError("a generation prompt is empty; leave rows without a caption out of generation requests")
    return f"{tags.open} {text} {tags.close}"


def parse_reply(text: str) -> Reply:
    """Split a reply into text and prompts; never raises.

    Both spellings are read, with any whitespace inside a span. A span without a close tag ends at the next open tag
    or with the reply; a lone close tag is dropped and the text around it kept.
    """
    outside: list[str] = []
    prompts: list[str] = []
    well_formed = True
    opened: str | None = None
    start = 0
    for tag in _TAG.finditer(text):
        (outside if opened is None else prompts).append(text[start : tag.start()].strip())
        start = tag.end()
        if tag["slash"]:
            well_formed &= opened == tag["name"]
            opened = None
        else:
            well_formed &= opened is None
            opened = tag["name"]
    (outside if opened is None else prompts).append(text[start:].strip())
    return Reply(
        text="\n".join(filter(None, outside)),
        prompts=tuple(filter(None, prompts)),
        well_formed=well_formed and opened is None and all(prompts),
    )


def neutralise(text: str, literals: Iterable[str]) -> str:
    """Put a space after the first character of every control string in `text`, so that it is read as plain text.

    Leading and trailing whitespace of a literal is ignored. The result contains none of the literals.

    Args:
        literals: strings a model or parser would interpret: `<image>`, tags, a tokenizer's special tokens.
    Raises:
        ValueError: a literal is shorter than two characters and cannot be broken.
    """
    pattern = _any_of(tuple(sorted({literal.strip() for literal in literals})))
    while pattern.search(text):  # a second round where literals overlap
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


@lru_cache(maxsize=64)
def _any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds any of the strings; one that finds nothing when there are none."""
    for literal in literals:
        if len(literal) < 2:
            raise ValueError(f"control string {literal!r} is too short to neutralise; expected two characters or more")
    return re.compile("|".join(map(re.escape, literals)) if literals else r"(?!)")


# ---------------------------------------------------------------- CLIP's vocabulary

CLIP_WINDOW = 77  # positions of one CLIP text window, BOS and EOS included
CHUNK_TOKENS = CLIP_WINDOW - 2  # tokens of text in one window; longer prompts are cut into chunks of so many
_CLIP_MERGES = 49152 - 256 - 2  # the file holds more lines than CLIP's vocabulary of 49,408 entries uses
_CLIP_CONTROL = "<|"  # opens CLIP's own special tokens


class ClipWord(NamedTuple):
    """A word of a text as CLIP splits it: characters [start, end), and the CLIP position of its last piece."""

    start: int
    end: int
    position: int


@cache
def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of OpenAI's CLIP (and of SD1.5), built from the vocabulary file that ships inside open_clip.

    Its ids are CLIP's: 49,408 entries, BOS 49406, EOS and padding 49407. The original also repairs broken encodings,
    straightens curly quotes and resolves HTML entities before it tokenizes; the transformers class does not (and
    forgets an added normaliser when it is reloaded), so ids differ where a text needs that.
    `save_pretrained` writes the tokenizer folder of a diffusers pipeline.

    Args:
        pad_token: "!" (id 0) gives SDXL's second tokenizer, which splits "!" off as a token of its own.
    """
    from transformers import CLIPTokenizer

    vocab, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_WINDOW, pad_token=pad_token)


def clip_words(text: str) -> list[ClipWord]:
    """The words CLIP's tokenizer splits a text into, each with the CLIP position of its last piece (BOS is 0)."""
    if not text.isascii() or _CLIP_CONTROL in text:
        return _clip_words_by_tokenizer(text)
    words, position = [], 0
    for match in _ASCII_WORD.finditer(text.lower()):
        position += _count_pieces(match[0])
        words.append(ClipWord(match.start(), match.end(), position))
    return words


def clip_length(text: str) -> int:
    """Number of CLIP tokens of a text, without BOS and EOS and without any limit."""
    if not text.isascii() or _CLIP_CONTROL in text:
        return len(clip_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids)
    return sum(map(_count_pieces, _ASCII_WORD.findall(text.lower())))


def clip_positions(text: str, spans: Iterable[tuple[int, int]]) -> list[int]:
    """CLIP positions (BOS is 0) of the last word piece of each character span [start, end) of a text.

    Positions count on past CLIP's window: with 75-token chunks, position p lies in chunk (p - 1) // 75. A span that
    ends inside a word takes the whole word.

    Raises:
        ValueError: a span touches no word.
    """
    words = clip_words(text)
    starts = [word.start for word in words]
    positions = []
    for start, end in spans:
        last = bisect_left(starts, end) - 1
        if last < 0 or words[last].end <= start:
            raise ValueError(f"characters {start} to {end} of {text!r} hold no word; expected a span that touches one")
        positions.append(words[last].position)
    return positions


# CLIP's own split, for ASCII and in lower case: contractions, letters, single digits, runs of other signs.
_ASCII_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII)


@lru_cache(maxsize=65536)
def _count_pieces(word: str) -> int:
    """Number of byte-pair pieces of one word; CLIP never merges across words, so counts add up."""
    byte_characters = _byte_characters()
    return len(_clip_bpe().tokenize("".join(byte_characters[byte] for byte in word.encode())))


def _clip_words_by_tokenizer(text: str) -> list[ClipWord]:
    """`clip_words` for any text, slower: consecutive pieces of one word joined by the tokenizer's own offsets."""
    encoding = clip_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False)
    words: list[ClipWord] = []
    previous = None
    for position, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True), start=1):
        if words and word is not None and word == previous:
            words[-1] = ClipWord(words[-1].start, end, position)
        else:
            words.append(ClipWord(start, end, position))
        previous = word
    return words


@cache
def _clip_bpe() -> BPE:
    """The bare byte-pair model: words in, pieces out; needs neither torch nor transformers."""
    from tokenizers.models import BPE

    vocab, merges = _clip_vocabulary()
    return BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>")


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of OpenAI's CLIP, read from the file that open_clip bundles, without importing open_clip.

    Raises:
        FileNotFoundError: open_clip is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec("open_clip")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0] if folders else "open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    if not path.is_file():
        raise FileNotFoundError(f"CLIP's vocabulary {path} is missing; install it with: pip install open_clip_torch")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _CLIP_MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    characters = list(_byte_characters().values())
    pieces = [*characters, *(character + "</w>" for character in characters), *map("".join, merges)]
    return {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}, merges


@cache
def _byte_characters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in the vocabulary, in vocabulary order (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
