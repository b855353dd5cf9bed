"""The projector of LLaVA's code <-> transformers': two layers under other names, and a factor for scaled inputs.

Where the LLM of the reference's day multiplied all its inputs by sqrt(hidden_size) (`Family.scales_inputs`), picture
features were multiplied, too. transformers 5 multiplies token embeddings alone, so the last layer takes the factor
over. The first layer keeps its weights: only what leaves the projector is scaled.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmga.files import written_aside
from llmga.stage1.families import Family
from llmga.stage1.released_weights import ConvertError, StoredWeights

_FILES = ("mm_projector.safetensors", "mm_projector.bin")
_LAYER = re.compile(r"(?:^|.*\.)(?P<layer>0|2|linear_1|linear_2)\.(?P<kind>weight|bias)$")
_LAYERS = {"0": "linear_1", "2": "linear_2"}
_RELEASED = {ours: theirs for theirs, ours in _LAYERS.items()}
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def scaled_layer(name: str) -> bool:
    """Whether the factor belongs to a tensor, by its name in either convention."""
    match = _LAYER.match(name)
    return match is not None and _LAYERS.get(match["layer"], match["layer"]) == "linear_2"


def multiplied(tensor: Tensor, factor: float) -> Tensor:
    """`tensor * factor`, in a wider dtype where that is needed to get the very same tensor back by `divided`."""
    product = tensor.double() * factor
    rounded = product.to(tensor.dtype)
    if torch.equal(divided(rounded, factor, tensor.dtype), tensor):
        return rounded
    return product.to(_WIDER.get(tensor.dtype, torch.float64))


def divided(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """`tensor / factor` in a given dtype."""
    return (tensor.double() / factor).to(dtype)


def find_projector(place: Path) -> Path | None:
    """The file of a bare projector: `place` itself, or the one in a folder that holds no whole model."""
    if place.is_file():
        return place if place.suffix in (".bin", ".safetensors") else None
    whole = any(place.glob("model*.safetensors*")) or any(place.glob("pytorch_model*.bin*"))
    return None if whole else next((place / name for name in _FILES if (place / name).is_file()), None)


def read_projector(path: Path, family: Family | None) -> dict[str, Tensor]:
    """Weights for a `LlavaMultiModalProjector`, from a file in LLaVA's names or in transformers'.

    Args:
        path: .bin or .safetensors; names may have any prefix.
        family: of the LLM; needed for LLaVA's names, because only it knows whether a factor is missing.
    Returns:
        linear_1.weight (D, V), linear_1.bias (D,), linear_2.weight (D, D), linear_2.bias (D,), as stored.
    Raises:
        ConvertError: other names or shapes, or LLaVA's names without a family.
    """
    with StoredWeights(path) as stored:
        named = {_parts(name, path): stored.read(name) for name in stored.names}
    from_llava = {layer in _LAYERS for layer, _ in named}
    weights = {f"{_LAYERS.get(layer, layer)}.{kind}": tensor for (layer, kind), tensor in named.items()}
    expected = {f"linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    if weights.keys() != expected or len(from_llava) != 1 or len(named) != len(expected):
        raise ConvertError(f"{path} holds {sorted(weights)}, expected weight and bias of two layers (mlp2x_gelu)")
    width = weights["linear_2.weight"].shape[0]
    shapes = {name: tuple(weights[name].shape) for name in ("linear_1.bias", "linear_2.weight", "linear_2.bias")}
    wanted = {"linear_1.bias": (width,), "linear_2.weight": (width, width), "linear_2.bias": (width,)}
    if shapes != wanted or weights["linear_1.weight"].shape[0] != width:
        raise ConvertError(f"{path}: shapes {shapes} do not fit together, expected {wanted}")
    if from_llava == {True}:
        if family is None:
            raise ConvertError(f"{path} has LLaVA's names, which depend on the LLM; name it with --family")
        if family.scales_inputs:
            weights |= {name: multiplied(tensor, width**0.5) for name, tensor in weights.items() if scaled_layer(name)}
    return weights


def _parts(name: str, path: Path) -> tuple[str, str]:
    match = _LAYER.match(name)
    if match is None:
        raise ConvertError(
            f"{path}: {name} is no layer of a projector of two layers (mlp2x_gelu: 0 and 2, or linear_1 and linear_2)"
        )
    return match["layer"], match["kind"]


def write_projector(weights: Mapping[str, Tensor], path: Path, to: str, family: Family) -> None:
    """Write what `read_projector` gave, in transformers' names (`to="hf"`) or back in LLaVA's (`to="llava"`)."""
    if to == "hf":
        named = {f"multi_modal_projector.{name}": tensor for name, tensor in weights.items()}
    else:
        first = weights["linear_1.weight"]  # never scaled, so it has the dtype that was released
        factor = first.shape[0] ** 0.5 if family.scales_inputs else 1.0
        named = {}
        for name, tensor in weights.items():
            layer, kind = name.split(".")
            given_back = divided(tensor, factor, first.dtype) if scaled_layer(name) else tensor
            named[f"model.mm_projector.{_RELEASED[layer]}.{kind}"] = given_back
    with written_aside(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, aside, metadata={"format": "pt"})
