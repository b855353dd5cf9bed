"""Clean pictures to degraded ones: two rounds of blur, resizing, noise and JPEG; contrast and brightness a little off.

Chance and arithmetic are apart: `draw_degradation` decides everything, from a seed; `degrade` does it, in batches and
on any device. Shapes change together: what decides them (factors, resizing, order) is shared by a batch, and a
`PairPool` mixes batches. All else is drawn for each picture, whose result does not depend on those beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llmga.diffrir.blur import KernelKind, blur_kernel, filter_batch, identity_kernel, pad_kernel, sinc_kernel
from llmga.diffrir.jpeg import compress
from llmga.diffrir.noise import add_gaussian_noise, add_poisson_noise, gaussian_field
from llmga.diffrir.reference import SCALES, InputError

Range = tuple[float, float]
KERNEL_SIZES = tuple(range(7, 22, 2))
KERNEL_PX = KERNEL_SIZES[-1]
RESIZE_MODES = ("area", "bilinear", "bicubic")

_KINDS: dict[KernelKind, float] = {
    "iso": 0.45,
    "aniso": 0.25,
    "generalized_iso": 0.12,
    "generalized_aniso": 0.03,
    "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}
_SINC_PROBABILITY = 0.1  # of the two blurs
_BETA: dict[str, Range] = {"generalized": (0.5, 4), "plateau": (1, 2)}
_GRAY_PROBABILITY = 0.4
_GAUSSIAN_PROBABILITY = 0.5
_MIN_SIDE_PX = 8  # shrunk by the smallest factors, one pixel has to be left


# ---------------------------------------------------------------- what may happen


@dataclass(frozen=True)
class Round:
    """One pass of blur, resizing, noise and JPEG; ranges are uniform.

    Attributes:
        blur_probability: of the blur, shared by a batch.
        sigma: of the kernels, pixels.
        resize: probabilities of enlarging, shrinking and keeping.
        factor: smallest and largest factor of the resize.
        gaussian: sigma in grey levels of 255.
        poisson: factor on the noise.
        quality: of JPEG.
    """

    blur_probability: float
    sigma: Range
    resize: tuple[float, float, float]
    factor: Range
    gaussian: Range
    poisson: Range
    quality: Range = (30, 95)


@dataclass(frozen=True)
class DegradationSettings:
    """The published pipeline.

    Attributes:
        first, second: the two rounds.
        sinc_probability: of a ringing low-pass at the end.
        gain: the largest change of contrast; published: 0.06 (prior phase, and adversarial at scale 1) or 0.08.
        bias: the largest change of brightness, in [0, 1].
        colour_order: whether contrast and brightness change after the pipeline, as published, or before it.
    Source: Real-ESRGAN (arXiv 2107.10833) and LLMGA (arXiv 2311.16500).
    """

    first: Round = Round(1.0, (0.2, 3), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3))
    second: Round = Round(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5))
    sinc_probability: float = 0.8
    gain: float = 0.08
    bias: float = 0.05
    colour_order: Literal["after", "before"] = "after"


def scaled(strength: float, **changes: Any) -> DegradationSettings:
    """The published pipeline with milder ranges, for pictures too small for it.

    Args:
        strength: 1 is as published; at 0 blur, resizing, noise and JPEG do next to nothing.
        changes: of `DegradationSettings`, such as gain.
    """
    published = DegradationSettings()

    def milder(part: Round) -> Round:
        (low, high), (worst, best) = part.factor, part.quality
        return replace(
            part,
            blur_probability=part.blur_probability * strength,
            sigma=(part.sigma[0], part.sigma[0] + (part.sigma[1] - part.sigma[0]) * strength),
            factor=(1 - (1 - low) * strength, 1 + (high - 1) * strength),
            gaussian=(part.gaussian[0] * strength, part.gaussian[1] * strength),
            poisson=(part.poisson[0] * strength, part.poisson[1] * strength),
            quality=(min(99, 100 - (100 - worst) * strength), min(99, 100 - (100 - best) * strength)),
        )

    rounds: dict[str, Any] = (
        {"first": milder(published.first), "second": milder(published.second)} if strength < 1 else {}
    )
    return replace(published, **rounds, sinc_probability=published.sinc_probability * strength, **changes)


# ---------------------------------------------------------------- what does happen


@dataclass(frozen=True, eq=False)
class RoundDraw:
    """One round as it was drawn.

    Attributes:
        kinds, kernels: family of each blur, and (B, 21, 21); `blurred` says whether they are used.
        factor, mode: of the resize.
        gaussian: Gaussian noise, else Poisson.
        strength, gray, seeds: (B,) of the noise.
        quality: (B,) of JPEG.
    """

    kinds: tuple[KernelKind, ...]
    kernels: Tensor
    blurred: bool
    factor: float
    mode: str
    gaussian: bool
    strength: Tensor
    gray: Tensor
    seeds: tuple[int, ...]
    quality: Tensor

    def select(self, index: int) -> "RoundDraw":
        """The same for one picture alone."""
        tensors = {name: getattr(self, name)[index : index + 1] for name in ("kernels", "strength", "gray", "quality")}
        return replace(self, kinds=self.kinds[index : index + 1], seeds=self.seeds[index : index + 1], **tensors)


@dataclass(frozen=True, eq=False)
class Degradation:
    """All of a batch's draws.

    Attributes:
        first, second: the two rounds.
        sinc_first: whether the last resize and low-pass come before the last JPEG.
        mode: of the last resize.
        sinc_kernels: (B, 21, 21), the identity where there is none.
        gain, bias: (B,) of contrast and brightness.
        colour_order: see `DegradationSettings`.
    """

    first: RoundDraw
    second: RoundDraw
    sinc_first: bool
    mode: str
    sinc_kernels: Tensor
    gain: Tensor
    bias: Tensor
    colour_order: str = field(default="after")

    def select(self, index: int) -> "Degradation":
        """The draws of one picture, which it would get the same result from alone."""
        tensors = {name: getattr(self, name)[index : index + 1] for name in ("sinc_kernels", "gain", "bias")}
        return replace(self, first=self.first.select(index), second=self.second.select(index), **tensors)


def draw_degradation(
    seed: int | Sequence[int], batch_size: int, settings: DegradationSettings | None = None
) -> Degradation:
    """Decide what happens to a batch.

    Args:
        seed: one or more numbers, such as (seed, step); equal ones give equal draws, on every machine and device.
        batch_size: pictures; the draws of picture i are the same in a batch of any size.
        settings: None is the published pipeline.
    """
    settings = settings or DegradationSettings()
    numbers = [seed] if isinstance(seed, int) else list(seed)
    shared = np.random.default_rng([*numbers, 0])
    each = [np.random.default_rng([*numbers, 1, index]) for index in range(batch_size)]
    first, second = (_draw_round(part, shared, each) for part in (settings.first, settings.second))
    sinc_first, mode = bool(shared.random() < 0.5), str(shared.choice(RESIZE_MODES))
    sinc = [_draw_last_kernel(rng, settings.sinc_probability) for rng in each]
    gain = [1 + rng.uniform(-1, 1) * settings.gain for rng in each]
    bias = [rng.uniform(-1, 1) * settings.bias for rng in each]
    return Degradation(first, second, sinc_first, mode, _stack(sinc), _stack(gain), _stack(bias), settings.colour_order)


def _draw_round(part: Round, shared: np.random.Generator, each: Sequence[np.random.Generator]) -> RoundDraw:
    blurs = [_draw_blur(rng, part.sigma) for rng in each]
    up, down = part.resize[:2]
    chance = shared.random()
    low, high = part.factor
    factor = shared.uniform(1, high) if chance < up else shared.uniform(low, 1) if chance < up + down else 1.0
    gaussian = bool(shared.random() < _GAUSSIAN_PROBABILITY)
    strength = part.gaussian if gaussian else part.poisson
    return RoundDraw(
        kinds=tuple(kind for kind, _ in blurs),
        kernels=_stack([kernel for _, kernel in blurs]),
        blurred=bool(shared.random() < part.blur_probability),
        factor=float(factor),
        mode=str(shared.choice(RESIZE_MODES)),
        gaussian=gaussian,
        strength=_stack([rng.uniform(*strength) for rng in each]),
        gray=torch.tensor([bool(rng.random() < _GRAY_PROBABILITY) for rng in each]),
        seeds=tuple(int(rng.integers(2**62)) for rng in each),
        quality=_stack([rng.uniform(*part.quality) for rng in each]),
    )


def _draw_blur(rng: np.random.Generator, sigma: Range) -> tuple[KernelKind, np.ndarray]:
    size = int(rng.choice(KERNEL_SIZES))
    if rng.random() < _SINC_PROBABILITY:
        cutoff = rng.uniform(np.pi / (3 if size < 13 else 5), np.pi)
        return "sinc", pad_kernel(sinc_kernel(size, cutoff), KERNEL_PX)
    kinds = list(_KINDS)
    kind = kinds[rng.choice(len(kinds), p=list(_KINDS.values()))]
    low, high = _BETA.get(kind.split("_")[0], (1, 1))
    beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    sigma_x, sigma_y, rotation = rng.uniform(*sigma), rng.uniform(*sigma), rng.uniform(-np.pi, np.pi)
    return kind, pad_kernel(blur_kernel(kind, size, sigma_x, sigma_y, rotation, beta), KERNEL_PX)


def _draw_last_kernel(rng: np.random.Generator, probability: float) -> np.ndarray:
    size, cutoff = int(rng.choice(KERNEL_SIZES)), rng.uniform(np.pi / 3, np.pi)
    if rng.random() < probability:
        return pad_kernel(sinc_kernel(size, cutoff), KERNEL_PX)
    return identity_kernel(KERNEL_PX)


def _stack(values: Sequence[float] | Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(values)).float()


# ---------------------------------------------------------------- doing it


@torch.no_grad()
def degrade(ground_truth: Tensor, draw: Degradation, scale: int = 1) -> Tensor:
    """Degrade the whole frame of clean pictures.

    Args:
        ground_truth: (B, 3, H, W) float in [0, 1]; H and W are multiples of the scale.
        draw: from `draw_degradation`, for B pictures.
        scale: 1, 2 or 4.
    Returns:
        (B, 3, H/s, W/s) in [0, 1], rounded to 8-bit levels, on the same device.
    Raises:
        InputError: sizes that do not go together.
    """
    _check(ground_truth, draw, scale)
    size = ground_truth.shape[-2] // scale, ground_truth.shape[-1] // scale
    x = ground_truth
    if draw.colour_order == "before":
        x = perturb_colour(x, draw.gain, draw.bias)
    first, second = draw.first, draw.second
    if first.blurred:
        x = filter_batch(x, first.kernels)
    x = F.interpolate(x, scale_factor=first.factor, mode=first.mode)
    x = compress(_add_noise(x, first).clamp(0, 1), first.quality)
    if second.blurred:
        x = filter_batch(x, second.kernels)
    between = [max(1, int(side * second.factor)) for side in size]
    x = _add_noise(F.interpolate(x, size=between, mode=second.mode), second)
    if draw.sinc_first:
        x = filter_batch(F.interpolate(x, size=size, mode=draw.mode), draw.sinc_kernels)
        x = compress(x.clamp(0, 1), second.quality)
    else:
        x = compress(x.clamp(0, 1), second.quality)
        x = filter_batch(F.interpolate(x, size=size, mode=draw.mode), draw.sinc_kernels)
    if draw.colour_order == "after":
        x = perturb_colour(x, draw.gain, draw.bias)
    return round_to_8_bits(x)


def perturb_colour(images: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """clamp(gain * images + bias), the same for all channels of a picture: contrast and brightness that are off.

    Args:
        images: (B, 3, H, W) in [0, 1].
        gain: (B,), published from 0.94 to 1.06 or from 0.92 to 1.08.
        bias: (B,), published from -0.05 to 0.05.
    """
    gain, bias = (values.to(images)[:, None, None, None] for values in (gain, bias))
    return (gain * images + bias).clamp(0, 1)


def round_to_8_bits(images: Tensor) -> Tensor:
    """Floats in [0, 1] at the nearest of the 256 levels."""
    return (images.clamp(0, 1) * 255).round() / 255


def _add_noise(images: Tensor, part: RoundDraw) -> Tensor:
    generators = [torch.Generator(images.device).manual_seed(seed) for seed in part.seeds]
    if part.gaussian:
        return add_gaussian_noise(images, part.strength, gaussian_field(images, part.gray, generators))
    return add_poisson_noise(images, part.strength, part.gray, generators)


def _check(ground_truth: Tensor, draw: Degradation, scale: int) -> None:
    """Raise where a batch cannot be degraded as drawn."""
    shape = tuple(ground_truth.shape)
    if len(shape) != 4 or shape[1] != 3 or not ground_truth.is_floating_point():
        raise InputError(f"ground_truth is {shape} {ground_truth.dtype}; expected (B, 3, H, W) floats in [0, 1]")
    if shape[0] != len(draw.gain):
        raise InputError(f"ground_truth holds {shape[0]} pictures and draw is for {len(draw.gain)}; expected as many")
    if scale not in SCALES or shape[2] % scale or shape[3] % scale or min(shape[2:]) < _MIN_SIDE_PX * scale:
        raise InputError(
            f"ground_truth is {shape[2]} x {shape[3]} and scale {scale}; expected scale 1, 2 or 4, and sides that are "
            f"multiples of it and at least {_MIN_SIDE_PX} times as long"
        )
