"""A step of a deep model, told from the same step of two models that have few of its layers.

Layers of one kind make the same tensors. So at one stage of a step (the forward or the backward pass of one layer,
counted from the nearer end of its stack, or the work beside the layers) every layer more that a stack has adds the same
to what lives of its making: the tensors it keeps for the backward pass, its gradients, or nothing. What the second
model holds more than the first tells how much, and what lives at full depth follows exactly.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmga.stage1.plan.live_bytes import LiveBytes, Peaks, Stage

LLM, TOWER = "LLM", "vision tower"  # the stacks of layers


def peaks_at_full_depth(model: nn.Module, rehearse: Callable[[nn.Module], Peaks]) -> Peaks:
    """Peaks by stage of a whole model.

    Args:
        model: a LLaVA on the meta device; it stays as it is.
        rehearse: gives the peaks of a step of a copy, whose layers say where they are (`mark_stages`).
    """
    stacks = _stacks(model)
    few, periods = _few_layers(model)
    peaks = rehearse(_copy(model, few))
    times = {name: (len(stack) - few[name]) // periods[name] for name, stack in stacks.items()}
    if not any(times.values()):
        return peaks
    more = rehearse(_copy(model, {name: few[name] + periods[name] for name in stacks}))
    for stage, live in peaks.items():
        for maker, part in more[stage]:
            live[maker, part] += times.get(maker, 0) * (more[stage][maker, part] - live[maker, part])
    return peaks


def mark_stages(model: nn.Module, live: LiveBytes) -> None:
    """Let each layer tell `live` when it is at work, by its place from below or, in the upper half, from above."""
    for name, stack in _stacks(model).items():
        for index, layer in enumerate(stack):
            place = index if index < len(stack) // 2 else index - len(stack)
            layer.register_forward_pre_hook(_entering(live, (name, place, "forward")))
            layer.register_forward_hook(partial(_await_gradient, live, (name, place, "backward")))
    _parts(model)[TOWER].register_forward_hook(_entering(live, ("projector",)))


def _entering(live: LiveBytes, stage: Stage) -> Callable[..., None]:
    return lambda *_: live.enter(stage)


def _await_gradient(live: LiveBytes, stage: Stage, layer: nn.Module, args: Any, output: Any) -> None:
    """Hook: the backward pass of a layer begins when the gradient of its output is there."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    if states.requires_grad:
        states.register_hook(_entering(live, stage))


def _parts(model: Any) -> dict[str, Any]:
    return {LLM: model.model.language_model, TOWER: model.model.vision_tower}


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The layers of LLM and vision tower: the outermost list of modules in each."""
    return {
        name: next((module for module in part.modules() if isinstance(module, nn.ModuleList)), nn.ModuleList())
        for name, part in _parts(model).items()
    }


def _few_layers(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """How many layers of each stack tell about all, and after how many its kinds of layers come again.

    Few are two whole periods and what the full depth has beside whole ones, so that both ends are as in the model; or
    all, where few would not be less work.
    """
    stacks, feature = _stacks(model), model.config.vision_feature_layer
    whole = {name: len(stack) for name, stack in stacks.items()}
    periods = {name: _period(stack, _parts(model)[name].config) for name, stack in stacks.items()}
    least = {name: 2 * period for name, period in periods.items()}
    from_above = -feature if isinstance(feature, int) else 0  # layers of the tower from the one whose output is taken
    least[TOWER] = max(least[TOWER], 2 * from_above - 1)
    few = {name: least[name] + (whole[name] - least[name]) % periods[name] for name in stacks}
    is_less = 2 * few[LLM] + periods[LLM] < whole[LLM] and few[TOWER] < whole[TOWER]
    return (few if is_less and from_above > 0 else whole), periods


def _period(stack: nn.ModuleList, config: Any) -> int:
    """1 for layers all alike, 2 for two kinds in turn; the whole length where nothing comes again.

    Layers differ by their parameters, and by settings that are lists with one value for each layer.
    """
    settings = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == len(stack)]
    kinds = [
        [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
        + [setting[index] for setting in settings]
        for index, layer in enumerate(stack)
    ]
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), max(len(kinds), 1))


def _copy(model: nn.Module, depths: Mapping[str, int]) -> nn.Module:
    """A model of as many layers, from below, with parameters of its own."""
    left_out = {id(layer): None for name, stack in _stacks(model).items() for layer in stack[depths[name] :]}
    short: nn.Module = copy.deepcopy(model, left_out)  # what is in the memo is not copied
    for name, stack in _stacks(short).items():
        del stack[depths[name] :]
        _parts(short)[name].config.num_hidden_layers = depths[name]
    return short
