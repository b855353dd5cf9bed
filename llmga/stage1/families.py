"""One row per LLM family of the released checkpoints: how their folders are told apart and what they were trained on.

What is here are wire constants: the released weights know these layouts byte for byte, with all their quirks. The
template of a row lies in `templates/<template>.jinja`. `released_template` makes it complete: in front of it stand
`released_parts.jinja`, which all share, and three variables:

    image_token     the picture placeholder
    trained_system  the system text the weights were trained with; it belongs to others, so the user brings it
    space_mark      " " where the reference's tokenizer began every piece of text with a space mark, else ""

No code asks for a family's name; what differs between families is a column.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

TEMPLATES = Path(__file__).parent / "templates"
IMAGE_TOKEN = "<image>"  # as in llmga.tokens, which settings may not import: it knows of transformers


@dataclass(frozen=True, slots=True)
class SystemText:
    """What is known of a system text that is not ours to ship: its length in characters and the hash of its UTF-8."""

    characters: int
    sha256: str

    def is_met_by(self, text: str) -> bool:
        """Whether `text` is the very text."""
        return len(text) == self.characters and sha256(text.encode()).hexdigest() == self.sha256


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of LLMs was released, and what turns it into transformers' LLaVA."""

    name: str
    model_types: tuple[str, ...]  # `model_type` in the config.json of released folders; we write the first
    architecture: str  # class in LLaVA's code, as config.json names it
    text_model_type: str  # transformers' name of the LLM
    template: str  # file in templates/, without .jinja
    stop_tokens: tuple[str, ...]  # the first ends a turn; each of them ends a reply
    pad_token: str
    system_text: SystemText | None = None  # None: trained without one
    rope_types: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # released name -> today's
    scales_inputs: bool = False  # the LLM multiplied picture features, too, by sqrt(hidden_size) in its day
    image_token: str = IMAGE_TOKEN  # added to the vocabulary where the tokenizer does not know it
    quirks: tuple[str, ...] = ()  # what a standard template of this LLM would get wrong


FAMILIES = {
    row.name: row
    for row in (
        Family(
            name="vicuna",
            model_types=("llava_llama", "llava"),
            architecture="LlavaLlamaForCausalLM",
            text_model_type="llama",
            template="released_vicuna",
            stop_tokens=("</s>",),
            pad_token="<unk>",
            system_text=SystemText(154, "1fa69e2371b762d1882b0bd98d284f312a36c27add732016e12e52586f98a9f5"),
            quirks=("no space between </s> and the next USER:",),
        ),
        Family(
            name="llama3",
            model_types=("llava_llama",),
            architecture="LlavaLlamaForCausalLM",
            text_model_type="llama",
            template="released_llama3",
            stop_tokens=("<|eot_id|>",),
            pad_token="<|reserved_special_token_0|>",
            system_text=SystemText(186, "790f4cfc05523b0eecbc061d3b2a427d84204164119832ccffb22deaae07cb29"),
            quirks=("answers stand under a header that says system instead of assistant",),
        ),
        Family(
            name="mistral",
            model_types=("llava_mistral",),
            architecture="LlavaMistralForCausalLM",
            text_model_type="mistral",
            template="released_mistral",
            stop_tokens=("</s>",),
            pad_token="<unk>",
            quirks=("an empty <<SYS>> block is always written", "answers end with a space before </s>"),
        ),
        Family(
            name="qwen2",
            model_types=("llava_Qwen2",),
            architecture="LlavaQwen2ForCausalLM",
            text_model_type="qwen2",
            template="released_qwen2",
            stop_tokens=("<|im_end|>",),
            pad_token="<|endoftext|>",
            system_text=SystemText(108, "2bc9733b97827672931e1175feb746feffe7b0e7f2afc3a734f2901d7a2d8ca0"),
            quirks=("no newline after <|im_end|>",),
        ),
        Family(
            name="phi3",
            model_types=("llava_Phi3",),
            architecture="LlavaPhi3ForCausalLM",
            text_model_type="phi3",
            template="released_phi3",
            stop_tokens=("<|end|>",),
            pad_token="<|endoftext|>",
            rope_types=MappingProxyType({"su": "longrope"}),
            quirks=("newlines after turn markers are swallowed by the tokenizer",),
        ),
        Family(
            name="gemma",
            model_types=("llava_gemma",),
            architecture="LlavaGemmaForCausalLM",
            text_model_type="gemma",
            template="released_gemma",
            stop_tokens=("<eos>", "<end_of_turn>"),
            pad_token="<pad>",
            scales_inputs=True,
            quirks=("<eos> follows every <end_of_turn>", "projector weights carry the factor sqrt(hidden_size)"),
        ),
    )
}


def families_of(model_type: str) -> list[Family]:
    """The rows whose released folders have this `model_type`, in the table's order; capitals do not matter."""
    return [row for row in FAMILIES.values() if model_type.casefold() in map(str.casefold, row.model_types)]


def fitting_family(candidates: Collection[Family], vocabulary: Collection[str]) -> Family | None:
    """The first of `candidates` all of whose stop tokens are in the vocabulary, or None."""
    return next((row for row in candidates if set(row.stop_tokens) <= set(vocabulary)), None)


def released_template(
    family: Family, system_text: str = "", space_mark: str = "", image_token: str | None = None
) -> str:
    """The chat template of released weights, complete in itself.

    Args:
        system_text: the one the weights were trained with; "" leaves the slot empty.
        space_mark: "" or " ", see the module's text; `llmga.stage1.released_tokenizer` finds out which fits.
        image_token: None takes the family's.
    """
    variables = {
        "image_token": family.image_token if image_token is None else image_token,
        "trained_system": system_text,
        "space_mark": space_mark,
    }
    header = "".join(f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in variables.items())
    parts = (TEMPLATES / f"{name}.jinja" for name in ("released_parts", family.template))
    return header + "".join(part.read_text(encoding="utf-8") for part in parts)


def _literal(text: str) -> str:
    """A string as Jinja reads it back: JSON's escapes are Python's, which Jinja understands."""
    return json.dumps(text)
