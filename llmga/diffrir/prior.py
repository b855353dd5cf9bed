"""The prior: a short vector that tells the generator what to restore, encoded in training, predicted in use.

A teacher encodes it with the ground truth at hand. A diffusion model of a few steps learns to predict it without:
its denoiser is a small MLP that looks at a condition, the same encoder's reading of the input alone.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.1


class PriorEncoder(nn.Module):
    """A picture on the quarter grid to one vector; the average over the grid includes padding.

    Args:
        in_channels: of the folded input (the teacher's ends with the folded ground truth).
        num_blocks: residual blocks.
        prior_width: length of the vector, a multiple of 4; the first layers have a quarter of it as channels.
    """

    def __init__(self, in_channels: int, num_blocks: int, prior_width: int) -> None:
        super().__init__()
        width = prior_width // 4
        self.head = _conv(in_channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
        widths = [width, 2 * width, 2 * width, 4 * width]
        self.widening = nn.ModuleList(_conv(before, after) for before, after in pairwise(widths))
        self.mlp = nn.ModuleList(nn.Linear(prior_width, prior_width) for _ in range(2))

    def forward(self, folded: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, prior_width)."""
        return self.summarise(self.features(folded).mean(dim=(2, 3)))

    @property
    def reach(self) -> int:
        """How many grid cells away an input can change a feature: one per convolution on the way."""
        return 1 + 2 * len(self.blocks) + len(self.widening)

    def features(self, folded: Tensor) -> Tensor:
        """What is averaged: (B, in_channels, h, w) to (B, prior_width, h, w)."""
        x = F.leaky_relu(self.head(folded), LEAK)
        for block in self.blocks:
            x = block(x)
        for conv in self.widening:
            x = F.leaky_relu(conv(x), LEAK)
        return x

    def summarise(self, prior: Tensor) -> Tensor:
        """The prior from the average of the features; (B, prior_width) both."""
        for linear in self.mlp:
            prior = F.leaky_relu(linear(prior), LEAK)
        return prior


class ResidualBlock(nn.Module):
    """x + conv(leaky_relu(conv(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to the same shape."""
        first, second = self.convs
        return x + second(F.leaky_relu(first(x), LEAK))


class Denoiser(nn.Module):
    """Condition, time and noisy prior to the clean prior, x_0 itself and not the noise."""

    def __init__(self, prior_width: int, num_layers: int) -> None:
        super().__init__()
        widths = [2 * prior_width + 1] + [prior_width] * (num_layers + 1)
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, condition: Tensor, time: float, x_t: Tensor) -> Tensor:
        """Two (B, prior_width) and a number to (B, prior_width)."""
        x = torch.cat([condition, torch.full_like(x_t[:, :1], time), x_t], dim=1)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), LEAK)
        return x


class PriorDiffusion:
    """A short diffusion over priors. Its reverse chain is deterministic: x_T is the only randomness.

    Args:
        timesteps: T.
        linear_start, linear_end: first and last beta.
    """

    def __init__(self, timesteps: int = 4, linear_start: float = 0.1, linear_end: float = 0.99) -> None:
        self.timesteps, self.linear_start, self.linear_end = timesteps, linear_start, linear_end
        self._numbers = _schedule(timesteps, linear_start, linear_end)

    def schedule(self) -> dict[str, Tensor]:
        """See `diffusion_schedule`."""
        return diffusion_schedule(self.timesteps, self.linear_start, self.linear_end)

    def add_noise(self, prior: Tensor, noise: Tensor) -> Tensor:
        """x_T = sqrt(abar_T) prior + sqrt(1 - abar_T) noise; training starts its chain there. All (B, prior_width)."""
        kept, added = (self._numbers[name][-1] for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
        return float(kept) * prior + float(added) * noise

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, t: int) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0), t counted from 0; there it is x_0."""
        of_x_0, of_x_t = (self._numbers[f"posterior_mean_coef{number}"][t] for number in (1, 2))
        return float(of_x_0) * x_0 + float(of_x_t) * x_t

    def denoise(self, denoiser: nn.Module, condition: Tensor, x_T: Tensor) -> list[Tensor]:
        """The reverse chain, from t = T - 1 to 0. Neither noise nor clamping; gradients pass through every step.

        Args:
            denoiser: (condition, time, x_t) -> x_0.
            condition, x_T: (B, prior_width) float32.
        Returns:
            T tensors (B, prior_width); the last one is the prior.
        """
        x, steps = x_T, []
        for t in reversed(range(self.timesteps)):
            # t / (10 T) is the published scaling of time.
            x = self.posterior_mean(denoiser(condition, t / (10 * self.timesteps), x), x, t)
            steps.append(x)
        return steps


def diffusion_schedule(timesteps: int = 4, linear_start: float = 0.1, linear_end: float = 0.99) -> dict[str, Tensor]:
    """Every number of the diffusion, (T,) float32 each, under the names of the released checkpoints.

    Raises:
        ValueError: no timestep, or betas outside (0, 1).
    """
    numbers = _schedule(timesteps, linear_start, linear_end)
    return {name: torch.from_numpy(values).float() for name, values in numbers.items()}


def _schedule(timesteps: int, linear_start: float, linear_end: float) -> dict[str, np.ndarray]:
    """`diffusion_schedule` in float64: betas are squares of evenly spaced numbers."""
    if timesteps < 1 or not (0 < linear_start < 1 and 0 < linear_end < 1):
        raise ValueError(
            f"a diffusion of {timesteps} timesteps with betas from {linear_start} to {linear_end} was asked for; "
            "expected 1 timestep or more, and betas between 0 and 1"
        )
    beta = np.linspace(math.sqrt(linear_start), math.sqrt(linear_end), timesteps) ** 2
    alpha = 1 - beta
    abar = alpha.cumprod()
    abar_prev = np.concatenate([[1.0], abar[:-1]])
    variance = beta * (1 - abar_prev) / (1 - abar)
    return {
        "betas": beta,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": abar_prev,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": beta * np.sqrt(abar_prev) / (1 - abar),
        "posterior_mean_coef2": (1 - abar_prev) * np.sqrt(alpha) / (1 - abar),
    }


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)
