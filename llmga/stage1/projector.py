"""The projector alone as a file: what a run that trains nothing else hands to the next one."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

PROJECTOR_FILE = "projector.safetensors"
_PREFIX = "multi_modal_projector."


class ProjectorError(ValueError):
    """A file that holds no projector, or one of other sizes."""


def projector_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projector's tensors out of a model's, under the names of a projector file."""
    found = {}
    for name, tensor in state_dict.items():
        _, prefix, rest = name.partition(_PREFIX)
        if prefix:
            found[prefix + rest] = tensor.detach().cpu().contiguous()
    return found


def read_projector(path: Path) -> dict[str, Tensor]:
    """Read a projector file, or the one in a finished run's folder, by the names in `LlavaMultiModalProjector`.

    Raises:
        ProjectorError: no such file, or it holds no projector.
    """
    file = path / PROJECTOR_FILE if path.is_dir() else path
    if not file.is_file():
        raise ProjectorError(f"{path}: no {PROJECTOR_FILE} there; give the file, or final/ of a run with a trained one")
    if file.suffix != ".safetensors":
        raise ProjectorError(f"{file}: expected a .safetensors file, such as the {PROJECTOR_FILE} of a finished run")
    weights = {n.removeprefix(_PREFIX): tensor for n, tensor in load_file(file).items() if n.startswith(_PREFIX)}
    if not weights:
        raise ProjectorError(f"{file}: no weight there is named {_PREFIX}...; give a file that holds a projector")
    return weights
