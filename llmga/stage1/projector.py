"""The projector alone as a file: what a run that trains nothing else hands to the next one."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from llmga.stage1.families import FAMILIES
from llmga.stage1.released_projector import find_projector, read_projector

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


def fill_projector(projector: nn.Module, path: Path, text_model_type: str) -> None:
    """Load trained weights into a `LlavaMultiModalProjector`.

    Args:
        path: a file in transformers' or LLaVA's names (`mm_projector.bin`), or a folder with one, such as `final/` of
            a run that trained it.
        text_model_type: of the LLM; LLaVA's names hold other numbers for some (`Family.scales_inputs`).
    Raises:
        ProjectorError: no such file, or a projector between other models.
        ConvertError: a file of another kind.
    """
    own = path / PROJECTOR_FILE
    file = own if own.is_file() else find_projector(path)
    if file is None:
        raise ProjectorError(
            f"{path}: no projector there; give {PROJECTOR_FILE} of a run that trained one, or its folder"
        )
    row = next((row for row in FAMILIES.values() if row.text_model_type == text_model_type), None)
    given, expected = read_projector(file, row), projector.state_dict()
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            into, out_of = expected["linear_1.weight"].shape
            raise ProjectorError(
                f"{file}: {name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}, for the vision tower "
                f"has {out_of} channels and the LLM {into}; give a projector that was trained between these two"
            )
    projector.load_state_dict(given)
