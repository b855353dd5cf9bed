"""A release is read back before it is pushed: every tensor, and what the model answers to one fixed input."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmga.release.contents import Weights, weights
from llmga.release.kinds import Kind, ReleaseError
from llmga.release.weights import count_same

_TOLERANCE = 1e-5  # of the largest number; same weights and same code, so only threads may round otherwise
_PROMPT = "A photo of a red boat on a lake, seen from a hill. " * 8  # past one window of CLIP
_SIDE = 64


@dataclass(frozen=True)
class Comparison:
    """What was found equal.

    Attributes:
        tensors: how many, bit for bit.
        output: what was computed from both.
        difference: the largest, in units of that output.
    """

    tensors: int
    output: str
    difference: float

    def __str__(self) -> str:
        return f"{self.tensors} tensors equal bit for bit; {self.output} differ by {self.difference:.1g} at most"


def compare(kind: Kind, source: Path, taken: Weights, released: Path, base: Path | None) -> Comparison:
    """Read a release back and compare it with the folder it was made from.

    Args:
        taken: the source's files of weights.
        base: an adapter's base model; None: where the adapter in `source` says.
    Raises:
        ReleaseError: a tensor or the output differs.
    """
    found = {at: files for at, _, files in weights(released, kind)}
    if found.keys() != {at for at, _, _ in taken}:
        raise ReleaseError(f"{released} has weights in {sorted(found)}, expected {sorted(at for at, _, _ in taken)}")
    tensors = sum(count_same(files, found[at]) for at, _, files in taken)
    if kind == "adapter" and base is None:
        from llmga.stage1.lora import base_of

        base = base_of(source, None)
    expected, given = (_output(kind, folder, base) for folder in (source, released))
    difference = float((expected.double() - given.double()).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.double().abs().max())):
        raise ReleaseError(f"{released}: {_OUTPUTS[kind]} differ by {difference:.3g} from {source}; nothing was pushed")
    return Comparison(tensors, _OUTPUTS[kind], difference)


_OUTPUTS: dict[Kind, str] = {
    "mllm": "logits of a question about a picture",
    "adapter": "logits of a question about a picture, on the base,",
    "pipeline": "pixels of a picture painted in two steps",
    "restorer": "pixels of a restored picture",
}


def _output(kind: Kind, folder: Path, base: Path | None) -> Tensor:
    if kind == "pipeline":
        return _painted(folder)
    if kind == "restorer":
        return _restored(folder)
    from llmga.stage1.lora import load_adapter, probe_logits
    from llmga.stage1.model import load_mllm

    return probe_logits(load_adapter(folder, base=base) if kind == "adapter" else load_mllm(folder))


def _painted(folder: Path) -> Tensor:
    """(H, W, 3) uint8."""
    from llmga.stage2.sample import Sampler
    from llmga.stage2.sample_inputs import Settings

    sampler = Sampler.load(folder, "cpu", torch.float32)
    side = max(_SIDE, 8 * sampler.factor)  # far below what it was trained at: cheap, and as telling
    settings = Settings(steps=2, width=side, height=side)
    if sampler.pipeline.unet.config.in_channels == 9:
        from PIL import Image

        mask = np.zeros((side, side), np.uint8)
        mask[: side // 2] = 255
        painted = sampler.inpaint(_PROMPT, Image.new("RGB", (side, side), "gray"), mask, settings=settings)
    else:
        painted = sampler.text_to_image(_PROMPT, settings=settings)
    return torch.from_numpy(np.array(painted[0].picture))


@torch.no_grad()
def _restored(folder: Path) -> Tensor:
    """(1, 3, H, W) float32."""
    from llmga.diffrir.network import load_restorer
    from llmga.diffrir.reference import concat_reference

    model = load_restorer(folder)
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.random((1, 3, _SIDE, _SIDE), np.float32))
    noise = torch.from_numpy(rng.standard_normal((1, model.prior_width), np.float32))
    low = torch.nn.functional.avg_pool2d(truth, model.scale)
    mask = torch.zeros(1, 1, _SIDE, _SIDE)
    mask[..., : _SIDE // 2] = 1
    inputs = concat_reference(low, truth, mask) if model.reference else low
    image = (model(inputs, truth) if model.phase == "prior" else model(inputs, noise=noise)).image
    assert image is not None
    return image
