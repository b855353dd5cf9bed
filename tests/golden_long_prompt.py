"""The goldens of long prompts: cases, encoders and expected tensors; tests/golden/long_prompt says what they are."""

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden" / "long_prompt"


@cache
def golden_file() -> dict[str, Any]:
    """Everything in cases.json: `encoders`, `prompts`, `cases`."""
    return json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))


def golden_cases(kind: str) -> list[dict[str, Any]]:
    """The cases of one kind: "sd", "sdxl" or "weighted"."""
    return [case for case in golden_file()["cases"] if case["kind"] == kind]


def golden_texts(case: dict[str, Any]) -> list[str]:
    """The prompts of a case, in order."""
    return [golden_file()["prompts"][name]["text"] for name in case["prompts"]]


@cache
def golden_tensors(kind: str) -> dict[str, Any]:
    """Expected tensors of a kind, named <case>.<what>."""
    from safetensors.torch import load_file

    return load_file(FOLDER / f"{kind}.safetensors")


@cache
def golden_encoder(name: str) -> Any:
    """ "encoder_1" or "encoder_2", frozen, in eval mode."""
    import torch
    import transformers
    from safetensors.torch import load_file

    values = dict(golden_file()["encoders"][name])
    kind = values.pop("class")
    model = getattr(transformers, kind)(transformers.CLIPTextConfig(**values))
    weights = load_file(FOLDER / f"{name}.safetensors")
    table = torch.zeros(values["vocab_size"], values["hidden_size"])
    table[weights.pop("token_rows.ids").long()] = weights.pop("token_rows.values")
    prefix = "text_model." if kind == "CLIPTextModelWithProjection" else ""
    model.load_state_dict({**weights, f"{prefix}embeddings.token_embedding.weight": table})
    return model.requires_grad_(False).eval()
