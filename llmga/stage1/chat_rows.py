"""The table of chat templates: one row per way of writing turns.

The template of a row is `templates/<name>.jinja`; `read_template` makes it complete: in front of it stand
`parts.jinja`, which all share, and our own system text (`templates/system.txt`), which a system turn or
`model.system_prompt` replaces. The layouts of released weights, quirks included, are rows of their own
(`llmga.stage1.families`): converted folders bring them, and a run can name them.
"""

import json

from llmga.stage1.families import FAMILIES, TEMPLATES, Family

SYSTEM_TEXT_FILE = TEMPLATES / "system.txt"

# Template -> what its turns are made of. A row fits a tokenizer that has all of them as tokens, or whose own template
# writes all of them; the first row that fits is taken. A new family is a new row and a new file.
MARKERS: dict[str, tuple[str, ...]] = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen2": ("<|im_start|>", "<|im_end|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama2": ("[INST]", "[/INST]", "<<SYS>>"),
    "mistral": ("[INST]", "[/INST]"),
    "vicuna": ("USER:", "ASSISTANT:"),
}


# Template -> the family that was trained on it. Never taken unasked: new runs have no use for the quirks.
RELEASED: dict[str, Family] = {family.template: family for family in FAMILIES.values()}


def template_names() -> list[str]:
    """What `model.chat_template` can name."""
    return sorted([*MARKERS, *RELEASED])


def row_of(template: str | None) -> str | None:
    """The row that a tokenizer's chat template was made of, whatever its system text; None when of none."""
    if template is None:
        return None
    return next((name for name in template_names() if template.endswith(_body(name))), None)


def read_template(name: str, system_text: str | None = None) -> str:
    """The chat template of a row, complete in itself.

    Args:
        name: of a row for new runs.
        system_text: None takes ours; the empty string writes none.
    """
    system_text = SYSTEM_TEXT_FILE.read_text(encoding="utf-8") if system_text is None else system_text
    # A JSON string is a Jinja string too, as long as what is not ASCII stays as it is.
    header = f"{{%- set default_system = {json.dumps(system_text.strip(), ensure_ascii=False)} -%}}\n"
    return header + _body(name)


def _body(name: str) -> str:
    """A row's template behind the lines that set its variables."""
    parts = ("released_parts" if name in RELEASED else "parts", name)
    return "".join((TEMPLATES / f"{part}.jinja").read_text(encoding="utf-8") for part in parts)
