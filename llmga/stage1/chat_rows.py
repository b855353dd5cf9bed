"""The table of chat templates for new runs: one row per way of writing turns.

The template of a row is `templates/<name>.jinja`; `read_template` makes it complete: in front of it stand
`parts.jinja`, which all share, and our own system text (`templates/system.txt`), which a system turn or
`model.system_prompt` replaces. Templates of released weights, quirks included, come with converted folders
(`llmga.stage1.families`).
"""

import json

from llmga.stage1.families import TEMPLATES

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


def template_names() -> list[str]:
    """What `model.chat_template` can name."""
    return sorted(MARKERS)


def read_template(name: str, system_text: str | None = None) -> str:
    """The chat template of a row, complete in itself.

    Args:
        system_text: None takes ours; the empty string writes none.
    """
    system_text = SYSTEM_TEXT_FILE.read_text(encoding="utf-8") if system_text is None else system_text
    # A JSON string is a Jinja string too, as long as what is not ASCII stays as it is.
    header = f"{{%- set default_system = {json.dumps(system_text.strip(), ensure_ascii=False)} -%}}\n"
    return header + "".join((TEMPLATES / f"{part}.jinja").read_text(encoding="utf-8") for part in ("parts", name))
