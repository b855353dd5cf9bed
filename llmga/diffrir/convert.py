"""Released DiffRIR checkpoints to our networks and back; nothing is left over, guessed at or silently dropped."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmga.checkpoint import write_folder_atomically
from llmga.diffrir.discriminator import Discriminator
from llmga.diffrir.network import DiffRIR, Phase, check_kind
from llmga.diffrir.released_names import ALIASES, is_pointwise, released_names
from llmga.diffrir.released_settings import CheckpointError, released_settings
from llmga.files import no_such_file, written_aside
from llmga.provenance import made_with, write_provenance
from llmga.run_folder import hashes

EMA_KEY, LAST_KEY = "params_ema", "params"
_BUFFER = re.compile(r"diffusion\.[a-z0-9_]+")
_SPECTRAL = {
    "parametrizations.weight.original": "weight_orig",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}
_SHOWN_KEYS = 3


def from_reference_state_dict(
    state_dict: Mapping[str, Any], *, scale: int | None = None, phase: Phase | None = None, ema: bool = True
) -> DiffRIR:
    """Build the network that a released checkpoint holds, with its weights, in eval mode.

    Scale, phase, reference and every size are read off the shapes. What the diffusion phase stores twice
    (`diffusion.condition.*`, `diffusion.model.*`) is compared and dropped; its schedule is checked.

    Args:
        state_dict: `{released key: tensor}`, or a whole file with `params` and `params_ema`; `module.` before keys is
            ignored.
        scale, phase: what is expected; None takes any. Adversarial checkpoints are of phase "diffusion".
        ema: of a whole file, take `params_ema` where there is one, else `params`.
    Raises:
        CheckpointError: keys that are missing, unknown or of a wrong shape, duplicates or a schedule that differ.
        RestorerError: another scale or phase than expected.
    """
    weights = _weights(state_dict, ema)
    schedule = {key: weights.pop(key) for key in list(weights) if _BUFFER.fullmatch(key)}
    _drop_aliases(weights)
    model = DiffRIR(**released_settings(weights, schedule))
    check_kind(model, "this checkpoint", scale, phase)
    _check_schedule(model, schedule)
    names = released_names(model)
    _check_keys(set(names.values()), set(weights))
    state = model.state_dict()
    for own, name in names.items():
        expected = _released(name, state[own])
        if weights[name].shape != expected.shape:
            raise CheckpointError(
                f"{name} is {tuple(weights[name].shape)}; expected {tuple(expected.shape)} for {model.describe()}"
            )
        state[own] = weights[name].reshape(state[own].shape).float()
    model.load_state_dict(state)
    return model.eval()


def to_reference_state_dict(model: DiffRIR) -> dict[str, Tensor]:
    """The released form of a network: its keys and shapes, duplicates and schedule included, on the CPU."""
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    released = {name: _released(name, state[own]) for own, name in released_names(model).items()}
    if model.phase == "diffusion":
        released |= {f"diffusion.{name}": values for name, values in model.diffusion.schedule().items()}
        for copy, original in ALIASES.items():
            released |= {copy + k.removeprefix(original): v for k, v in released.items() if k.startswith(original)}
    return released


def discriminator_from_reference_state_dict(state_dict: Mapping[str, Any]) -> Discriminator:
    """Build the discriminator of a released checkpoint (`net_d`), with its weights, in eval mode.

    Raises:
        CheckpointError: keys or shapes that are not a discriminator's.
    """
    weights = _weights(state_dict, ema=False)
    if "conv0.weight" not in weights:
        raise CheckpointError("this checkpoint has no conv0.weight; expected a discriminator's, with conv0 to conv9")
    model = Discriminator(width=weights["conv0.weight"].shape[0])
    names = {own: _discriminator_name(own) for own in model.state_dict()}
    _check_keys(set(names.values()), set(weights))
    try:
        model.load_state_dict({own: weights[name].float() for own, name in names.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"this checkpoint does not fit a discriminator of width {model.width}: {error}"
        ) from error
    return model.eval()


def discriminator_to_reference_state_dict(model: Discriminator) -> dict[str, Tensor]:
    """The released form of a discriminator, on the CPU."""
    return {_discriminator_name(own): value.detach().cpu() for own, value in model.state_dict().items()}


def convert_restorer(
    source: str | Path, folder: str | Path, *, scale: int | None = None, phase: Phase | None = None, ema: bool = True
) -> DiffRIR:
    """Turn a released checkpoint file into a folder that `load_restorer` and `from_pretrained` read.

    Args:
        source: a .pth file; only tensors are read from it, no code.
        folder: made; config.json, model.safetensors, README.md and provenance.json.
        scale, phase, ema: see `from_reference_state_dict`.
    Raises:
        CheckpointError, RestorerError: the file cannot be read or is not what was expected; no folder is written.
        FileExistsError: the folder is there already and not empty.
    """
    source = Path(source)
    try:
        model = from_reference_state_dict(_read(source), scale=scale, phase=phase, ema=ema)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    origin = {"inputs": hashes([source]), "weights": "ema" if ema else "last", **made_with()}
    with write_folder_atomically(Path(folder)) as aside:
        model.save_pretrained(aside)
        write_provenance(aside, origin)
    return model


def export_restorer(model: DiffRIR, path: str | Path) -> None:
    """Write a network as a released checkpoint: `params`, and in phase "diffusion" the same as `params_ema`."""
    weights = to_reference_state_dict(model)
    keys = [LAST_KEY, EMA_KEY] if model.phase == "diffusion" else [LAST_KEY]
    with written_aside(Path(path)) as aside:
        torch.save(dict.fromkeys(keys, weights), aside)


def _read(path: Path) -> Mapping[str, Any]:
    """The dict in a .pth file, tensors on the CPU."""
    if not path.is_file():
        raise CheckpointError(no_such_file(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"it cannot be read as a PyTorch file of tensors ({reason}); fetch it again") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"it holds a {type(content).__name__}; expected a dict of tensors")
    return content


def _weights(content: Mapping[str, Any], ema: bool) -> dict[str, Tensor]:
    """The parameters of a file, or of what is such parameters already."""
    for key in (EMA_KEY, LAST_KEY) if ema else (LAST_KEY, EMA_KEY):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    strange = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{_some(strange)} is not a tensor; expected released parameters, or params / params_ema")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _drop_aliases(weights: dict[str, Tensor]) -> None:
    """Remove what is stored twice, once it is seen to be equal."""
    for copy, original in ALIASES.items():
        for key in [key for key in weights if key.startswith(copy)]:
            twin = original + key.removeprefix(copy)
            value = weights.pop(key)
            if twin not in weights:
                raise CheckpointError(f"{key} has no {twin} beside it; expected both, and equal")
            if not torch.equal(value, weights[twin]):
                raise CheckpointError(f"{key} and {twin} differ; expected two copies of one parameter")


def _check_schedule(model: DiffRIR, schedule: Mapping[str, Tensor]) -> None:
    """The stored numbers of the diffusion are those that its betas give."""
    expected = {f"diffusion.{name}": values for name, values in model.diffusion.schedule().items()}
    _check_keys(set(expected) & set(schedule), set(schedule))
    for key, values in schedule.items():
        if values.shape != expected[key].shape or not torch.allclose(
            values.float(), expected[key], rtol=1e-4, atol=1e-6
        ):
            raise CheckpointError(f"{key} is {values.tolist()}; its betas give {expected[key].tolist()}")


def _check_keys(expected: set[str], found: set[str]) -> None:
    problems = [
        f"{len(keys)} keys {what}, first {_some(keys)}"
        for what, keys in (("are missing", expected - found), ("are unknown", found - expected))
        if keys
    ]
    if problems:
        raise CheckpointError("; ".join(problems))


def _some(keys: set[str] | list[str]) -> str:
    return ", ".join(sorted(keys)[:_SHOWN_KEYS])


def _released(name: str, value: Tensor) -> Tensor:
    """A parameter in its released shape."""
    return value[:, :, None, None] if is_pointwise(name) else value


def _discriminator_name(own: str) -> str:
    module, kind = own.split(".", 1)
    return f"{module}.{_SPECTRAL.get(kind, kind)}"
