"""What a folder holds that can be released, and what stands in the way of releasing it."""

from pathlib import Path
from typing import Any, Literal

from llmga.strict_json import read_object

Kind = Literal["mllm", "adapter", "pipeline", "restorer"]

NAMES: dict[Kind, str] = {
    "mllm": "multimodal LLM",
    "adapter": "LoRA adapter",
    "pipeline": "diffusers pipeline",
    "restorer": "DiffRIR restorer",
}


class ReleaseError(ValueError):
    """A folder that cannot be released, or a repository that cannot be used; the sentence says what to do."""


def kind_of(folder: Path) -> Kind:
    """Which kind of model a folder holds.

    Raises:
        ReleaseError: none of the four.
    """
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if (folder / "config.json").is_file():
        settings = read_json(folder / "config.json")
        if settings.get("model_type") == "llava":
            return "mllm"
        if {"scale", "phase", "prior_width"} <= settings.keys():
            return "restorer"
        raise ReleaseError(
            f"{folder}/config.json describes neither a LLaVA (model_type {settings.get('model_type')!r}) nor a "
            "restorer; `llmga convert` makes a LLaVA folder of a published checkpoint"
        )
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise ReleaseError(
        f"{folder} holds no config.json, adapter_config.json or model_index.json but {inside}; "
        "expected a model's folder, such as final/ of a run"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ReleaseError: the file is damaged or holds something else.
    """
    return read_object(path, ReleaseError, "save the model again")
