"""How chunks of a prompt become one sequence, by name; the name travels with the weights that were trained so.

A pipeline folder carries `prompt_layout.json` beside its `model_index.json`, and the same under a private key of the
UNet's config. Stock diffusers loads both without a word and keeps the key when it saves.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from llmga.files import written_aside

LAYOUT_FILE = "prompt_layout.json"
UNET_KEY = "_prompt_layout"  # diffusers warns of keys it does not know unless they begin with an underscore
DEFAULT_MAX_CHUNKS = 4


class LayoutError(ValueError):
    """A layout that does not exist or a folder that contradicts itself; the message says what to change."""


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """The rules by which a prompt's chunks are built and joined.

    Attributes:
        name: key of `LAYOUTS`.
        own_chunks: each prompt has as many chunks as it fills, and an attention mask hides the padding behind shorter
            ones; else the longest prompt of a batch decides for all, without a mask.
        eos_after_text: EOS follows the text and padding follows EOS, as CLIP was trained; else padding comes before
            EOS. The two differ where padding is not EOS: in SDXL's second encoder.
        keep_middle: chunks keep the EOS and BOS between them.
        pooled: chunk whose pooled vector stands for the prompt (SDXL); "mean": average over chunks with text.
        max_chunks: chunks of 75 tokens that a prompt may have; what is longer is cut.
    """

    name: str
    own_chunks: bool
    eos_after_text: bool
    keep_middle: bool
    pooled: Literal["first", "last", "mean"]
    max_chunks: int = DEFAULT_MAX_CHUNKS


LAYOUTS = {
    layout.name: layout
    for layout in (
        # Ours. A prompt's result depends on no other prompt; prompts of one chunk are encoded as stock pipelines do.
        PromptLayout("masked", own_chunks=True, eos_after_text=True, keep_middle=False, pooled="first"),
        PromptLayout("masked_mean", own_chunks=True, eos_after_text=True, keep_middle=False, pooled="mean"),
        # The published code: in all training and for SDXL; and, against what was trained, when SD1.5 paints.
        PromptLayout("published", own_chunks=False, eos_after_text=False, keep_middle=False, pooled="last"),
        PromptLayout("published_keep", own_chunks=False, eos_after_text=False, keep_middle=True, pooled="last"),
    )
}
DEFAULT_LAYOUT = "masked"


def prompt_layout(name: str = DEFAULT_LAYOUT, max_chunks: int = DEFAULT_MAX_CHUNKS) -> PromptLayout:
    """The layout of this name with this many chunks.

    Raises:
        LayoutError: there is no such name, or `max_chunks` is not 1 or more.
    """
    if name not in LAYOUTS:
        close = get_close_matches(str(name), LAYOUTS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise LayoutError(f"prompt layout {name!r} does not exist, expected one of {', '.join(LAYOUTS)}{hint}")
    if not isinstance(max_chunks, int) or isinstance(max_chunks, bool) or max_chunks < 1:
        raise LayoutError(f"max_chunks is {max_chunks!r}, expected a whole number of 1 or more")
    return replace(LAYOUTS[name], max_chunks=max_chunks)


def stamp_layout(unet: Any, layout: PromptLayout) -> None:
    """Write the layout into the config of a UNet in memory, so that every way of saving it carries the layout."""
    unet.register_to_config(**{UNET_KEY: _facts(layout)})


def layout_of(unet_config: Mapping[str, Any], source: str = "the UNet's config") -> PromptLayout | None:
    """The layout that a UNet's config names, or None if it names none.

    Raises:
        LayoutError: what stands there is no layout.
    """
    return _read(unet_config[UNET_KEY], f"{source}, key {UNET_KEY!r},") if UNET_KEY in unet_config else None


def save_layout(folder: Path, layout: PromptLayout) -> None:
    """Record the layout in a saved pipeline: in its own file, and in the UNet's config.

    Args:
        folder: what a diffusers pipeline's `save_pretrained` wrote.
    Raises:
        LayoutError: the folder holds no pipeline with a UNet.
    """
    config_path = Path(folder) / "unet" / "config.json"
    if not config_path.is_file():
        raise LayoutError(f"{folder} has no unet/config.json; expected the folder of a saved diffusers pipeline")
    _write_json(config_path, _load_json(config_path) | {UNET_KEY: _facts(layout)})
    _write_json(Path(folder) / LAYOUT_FILE, _facts(layout))


def load_layout(folder: Path) -> PromptLayout | None:
    """The layout that a saved pipeline was trained with; None if it says nothing.

    Stock pipelines and the released weights say nothing. Stock ones are at home in "masked", which encodes a prompt of
    one chunk as they do; the released ones in "published".

    Raises:
        LayoutError: a file is no valid JSON or names no layout, or the two places disagree.
    """
    layout_path, config_path = Path(folder) / LAYOUT_FILE, Path(folder) / "unet" / "config.json"
    beside = _read(_load_json(layout_path), str(layout_path)) if layout_path.is_file() else None
    inside = layout_of(_load_json(config_path), str(config_path)) if config_path.is_file() else None
    if beside and inside and beside != inside:
        raise LayoutError(
            f"{layout_path} says {beside.name} with {beside.max_chunks} chunks, unet/config.json says {inside.name} "
            f"with {inside.max_chunks}: the UNet was trained with the latter; correct the file, or put its UNet back"
        )
    return inside or beside


def _facts(layout: PromptLayout) -> dict[str, Any]:
    return {"layout": layout.name, "max_chunks": layout.max_chunks}


def _read(facts: Any, source: str) -> PromptLayout:
    """The layout that these facts name; `source` says where they stand."""
    if not isinstance(facts, Mapping) or set(facts) != {"layout", "max_chunks"}:
        raise LayoutError(
            f'{source} holds {facts!r:.120}, expected {{"layout": "{DEFAULT_LAYOUT}", '
            f'"max_chunks": {DEFAULT_MAX_CHUNKS}}}'
        )
    try:
        return prompt_layout(facts["layout"], facts["max_chunks"])
    except LayoutError as problem:
        raise LayoutError(f"{source}: {problem}") from None


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise LayoutError(f"{path} is not valid JSON: {problem}") from None
    if not isinstance(content, dict):
        raise LayoutError(f"{path} holds {content!r:.60}, expected a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
