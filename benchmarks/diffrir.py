"""The restoration network beside the published arithmetic written plainly, with the same weights and in one run.

    python benchmarks/diffrir.py

Both are the released configuration (25 million parameters) on one picture of 256 x 256, in float32 and on one thread.
They take turns, and the processor time of each pass is counted, so that other work on the machine changes the ratios
little; it is named in the result. Memory is what autograd keeps for the backward pass of one picture. The result goes
to benchmarks/results/diffrir.json.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmga.diffrir.blocks import ModulatedProjection, TransformerBlock
from llmga.diffrir.generator import Level
from llmga.diffrir.loss import pixel_loss
from llmga.diffrir.network import DiffRIR
from llmga.machine import machine_in_words

RESULT = Path(__file__).parent / "results" / "diffrir.json"


class PlainBlock(nn.Module):
    """`TransformerBlock` as the papers write it: one operation after the other on (B, C, H, W)."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        """Attention, then feed-forward."""
        x = x.contiguous()
        x = x + self._attention(x, prior)
        return x + self._feed_forward(x, prior)

    def _attention(self, x: Tensor, prior: Tensor) -> Tensor:
        part = self.block.attention
        qkv = depthwise(
            pointwise(modulated_norm(x, prior, part.project_in), part.project_in.projection), part.depthwise
        )
        heads = part.temperature.shape[0]
        query, key, value = (each.reshape(len(x), heads, -1, x.shape[2] * x.shape[3]) for each in qkv.chunk(3, dim=1))
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        attention = (query @ key.transpose(-2, -1) * part.temperature).softmax(dim=-1)
        return pointwise((attention @ value).reshape(x.shape), part.project_out)

    def _feed_forward(self, x: Tensor, prior: Tensor) -> Tensor:
        part = self.block.feed_forward
        both = depthwise(
            pointwise(modulated_norm(x, prior, part.project_in), part.project_in.projection), part.depthwise
        )
        gate, value = both.chunk(2, dim=1)
        return pointwise(F.gelu(gate) * value, part.project_out)


def modulated_norm(x: Tensor, prior: Tensor, part: ModulatedProjection) -> Tensor:
    """Pixels as rows, divided by the deviation of their channels; back to a picture; times k1, plus k2."""
    batch, channels, height, width = x.shape
    rows = x.flatten(2).transpose(1, 2).contiguous()
    rows = rows / torch.sqrt(rows.var(-1, keepdim=True, unbiased=False) + 1e-5) * part.gain
    x = rows.transpose(1, 2).contiguous().view(batch, channels, height, width)
    k1, k2 = part.modulation(prior).view(batch, 2 * channels, 1, 1).chunk(2, dim=1)
    return x * k1 + k2


def pointwise(x: Tensor, linear: nn.Linear) -> Tensor:
    """A 1x1 convolution."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution of each channel."""
    return F.conv2d(x, conv.weight, conv.bias, padding=1, groups=conv.groups)


def plain_twin(model: DiffRIR) -> DiffRIR:
    """The same network with plain blocks and copies of the weights."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Level):
            for index, block in enumerate(list(module)):
                module[index] = PlainBlock(block)
    return twin


def training_step(model: DiffRIR, inputs: Tensor, ground_truth: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward and Adam on the pixel loss of the prior phase."""
    optimizer.zero_grad(set_to_none=True)
    pixel_loss(model(inputs, ground_truth).image, ground_truth).backward()
    optimizer.step()


def cpu_seconds(run: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def take_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor seconds of each, run one after the other `repeats` times after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            seconds = cpu_seconds(run)
            if turn:
                times[name].append(seconds)
    return {name: round(median(values), 4) for name, values in times.items()}


def kept_for_backward(model: DiffRIR, inputs: Tensor, ground_truth: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, parameters not counted."""
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = pixel_loss(model(inputs, ground_truth).image, ground_truth)
    assert loss.requires_grad
    return sum(kept.values())


def differences(model: DiffRIR, twin: DiffRIR, inputs: Tensor, ground_truth: Tensor) -> dict[str, float]:
    """Largest difference between the pictures, and the norm of the gradients' difference over that of the gradient."""
    images, gradients = [], []
    for network in (model, twin):
        image = network(inputs, ground_truth).image
        pixel_loss(image, ground_truth).backward()
        images.append(image.detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
        network.zero_grad(set_to_none=True)
    return {
        "image_max_abs": (images[0] - images[1]).abs().max().item(),
        "gradient_relative": ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item(),
    }


def compare(size: int, repeats: int) -> dict[str, Any]:
    """Every measurement."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    load = [os.getloadavg()[0]]
    model = DiffRIR(scale=1, phase="prior")
    twin = plain_twin(model)
    inputs, ground_truth = torch.rand(1, 6, size, size), torch.rand(1, 3, size, size)
    same = differences(model, twin, inputs, ground_truth)
    with torch.no_grad():
        forward = take_turns(
            {"ours": lambda: model(inputs, ground_truth), "plain": lambda: twin(inputs, ground_truth)}, repeats
        )
    kept = {
        "plain": kept_for_backward(twin, inputs, ground_truth),
        "ours": kept_for_backward(model, inputs, ground_truth),
    }
    model.use_checkpointing()
    kept["ours_checkpointed"] = kept_for_backward(model, inputs, ground_truth)
    model.use_checkpointing(False)
    ours, plain = (torch.optim.Adam(network.parameters(), lr=2e-4) for network in (model, twin))
    step = take_turns(
        {
            "ours": lambda: training_step(model, inputs, ground_truth, ours),
            "plain": lambda: training_step(twin, inputs, ground_truth, plain),
        },
        repeats,
    )
    load.append(os.getloadavg()[0])
    return {
        "command": "python benchmarks/diffrir.py",
        "machine": machine_in_words(
            "torch", threads=1, note=f"other work beside it: load average {load[0]:.1f} to {load[1]:.1f}"
        ),
        "picture": f"1 x {size} x {size}, released configuration at scale 1, phase prior, float32",
        "repeats": repeats,
        "differences": same,
        "forward_cpu_s": forward,
        "forward_times_faster": round(forward["plain"] / forward["ours"], 2),
        "training_step_cpu_s": step,
        "training_step_times_faster": round(step["plain"] / step["ours"], 2),
        "kept_for_backward_mib": {name: round(count / 2**20) for name, count in kept.items()},
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side of the picture, a multiple of 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = compare(args.size, args.repeats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
