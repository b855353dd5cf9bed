"""The projector alone as a file: what a run that trains nothing else hands to the next one."""

from collections.abc import Mapping

from torch import Tensor

PROJECTOR_FILE = "projector.safetensors"
_PREFIX = "multi_modal_projector."


def projector_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projector's tensors out of a model's, under the names of a projector file."""
    found = {}
    for name, tensor in state_dict.items():
        _, prefix, rest = name.partition(_PREFIX)
        if prefix:
            found[prefix + rest] = tensor.detach().cpu().contiguous()
    return found
