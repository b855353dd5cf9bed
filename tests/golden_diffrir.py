"""The frozen cases of the published restoration network: arrays, facts, and the formula of their weights.

A case is `<name>.safetensors` (arrays) and `<name>.json` (settings, parameter shapes, numbers) in tests/golden/diffrir.
"""

import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmga.diffrir.convert import from_reference_state_dict
from llmga.diffrir.network import DiffRIR

GOLDENS = Path(__file__).parent / "golden" / "diffrir"


class Case(NamedTuple):
    """One golden: what its json says, and its arrays with pictures as floats."""

    facts: dict[str, Any]
    arrays: dict[str, Tensor]

    def picture(self, name: str) -> Tensor:
        """An 8-bit array in [0, 1]."""
        return self.arrays[name].float() / 255

    def network(self, seed_key: str = "seed", params_key: str = "params") -> DiffRIR:
        """The network of the case, built by the converter from released keys alone."""
        return from_reference_state_dict(golden_weights(self.facts[seed_key], self.facts[params_key]))


@cache
def golden_case(name: str) -> Case:
    """Read a case; callers leave it as it is."""
    facts = json.loads((GOLDENS / f"{name}.json").read_text())
    return Case(facts, load_file(GOLDENS / f"{name}.safetensors"))


def golden_weights(seed: int, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Released key to weight: each a function of seed, key and shape, and exact in float16.

    Modulations are eight times a default start, so that a wrong prior or a wrong block shows in the picture.
    """
    return {key: _golden_weight(seed, key, tuple(shape)) for key, shape in shapes.items()}


def _golden_weight(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    random = np.random.RandomState(zlib.crc32(f"{seed}/{key}".encode()))
    values = random.random_sample(int(np.prod(shape))) * 2.0 - 1.0
    if key.endswith("temperature"):
        values = 1.0 + 0.5 * values
    elif len(shape) == 1:
        values = 1.0 + 0.2 * values if key.endswith("body.weight") else 0.1 * values
    else:
        gain = 8.0 if key.endswith("kernel.0.weight") else 1.0
        values = gain * values * np.sqrt(3.0 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float16).astype(np.float32).reshape(shape))
