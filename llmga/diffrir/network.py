"""DiffRIR: the restoration network of both training phases, at three scales, with or without the reference input."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from llmga.diffrir.blocks import Norm
from llmga.diffrir.generator import LEVELS, Generator
from llmga.diffrir.prior import Denoiser, PriorDiffusion, PriorEncoder
from llmga.diffrir.reference import SCALES, InputError

Phase = Literal["prior", "diffusion"]

GRID = 4  # the generator works on a quarter of the output's height and width
MULTIPLE_PX = 32  # of the output's height and width: the grid is halved three times
WEIGHTS_NAME = "model.safetensors"


class RestorerError(ValueError):
    """A network that cannot be built or loaded as asked; the sentence says what it is and what was expected."""


class Restoration(NamedTuple):
    """What one pass gives.

    Attributes:
        image: (B, 3, H, W) not clamped and not composed; None when only the prior was asked for.
        prior: (B, prior_width), what steered the generator.
        prior_steps: the reverse chain, whose last element is `prior`; in phase "prior" that one alone.
    """

    image: Tensor | None
    prior: Tensor
    prior_steps: list[Tensor]


class DiffRIR(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="llmga",
    license="apache-2.0",
    tags=["image-restoration", "inpainting", "outpainting"],
):
    """Restore a picture whose masked region was generated, so that it matches the kept pixels.

    Phase "prior" trains generator and encoder: the encoder sees the ground truth, and is the teacher afterwards. Phase
    "diffusion" (also the adversarial phase, and use) replaces that encoder by one without ground truth, whose vector
    conditions a short diffusion that predicts the prior. The defaults are the published network; every size that
    depends on the scale is derived.

    Args:
        scale: output side over input side, 1, 2 or 4.
        phase: "prior" or "diffusion".
        reference: whether the input holds the kept pixels (`concat_reference`); without, this is DiffIR.
        dim: channels of the first level.
        num_blocks, num_refinement_blocks, heads, ffn_expansion_factor, bias, norm: see `Generator`.
        prior_width: length of the prior vector, a multiple of 4.
        num_prior_blocks: residual blocks of the prior encoder.
        num_denoiser_layers: hidden layers of the denoiser.
        timesteps, linear_start, linear_end: see `PriorDiffusion`.
    Raises:
        RestorerError: sizes that do not go together.
    Source: LLMGA (arXiv 2311.16500); DiffIR (arXiv 2303.09472). Equality with the published network is shown in
        tests/parity/test_diffrir.py.
    """

    def __init__(
        self,
        scale: int = 1,
        phase: Phase = "diffusion",
        reference: bool = True,
        dim: int = 64,
        num_blocks: Sequence[int] = (13, 1, 1, 1),
        num_refinement_blocks: int = 13,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.2,
        bias: bool = False,
        norm: Norm = "bias_free",
        prior_width: int = 256,
        num_prior_blocks: int = 9,
        num_denoiser_layers: int = 1,
        timesteps: int = 4,
        linear_start: float = 0.1,
        linear_end: float = 0.99,
    ) -> None:
        super().__init__()
        _check_settings(scale, phase, dim, num_blocks, heads, norm, prior_width)
        self.scale, self.phase, self.reference, self.prior_width = scale, phase, reference, prior_width
        self.in_channels = 3 + 3 * scale**2 if reference else 3
        folded_channels = self.in_channels * (GRID // scale) ** 2
        self.generator = Generator(
            folded_channels,
            dim,
            num_blocks,
            num_refinement_blocks,
            heads,
            ffn_expansion_factor,
            bias,
            norm,
            prior_width,
        )
        truth_channels = 3 * GRID**2 if phase == "prior" else 0
        self.prior_encoder = PriorEncoder(folded_channels + truth_channels, num_prior_blocks, prior_width)
        self.denoiser = Denoiser(prior_width, num_denoiser_layers) if phase == "diffusion" else None
        self.diffusion = PriorDiffusion(timesteps, linear_start, linear_end)

    def forward(
        self,
        inputs: Tensor,
        ground_truth: Tensor | None = None,
        *,
        teacher_prior: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        prior_only: bool = False,
    ) -> Restoration:
        """Encode or predict the prior, then restore. Training calls this too, through any data-parallel wrapper.

        Args:
            inputs: (B, in_channels, H/s, W/s) from `concat_reference`, in [0, 1]; H and W are multiples of 32.
            ground_truth: (B, 3, H, W), needed in phase "prior" and refused in phase "diffusion".
            teacher_prior: (B, prior_width) to start the diffusion from in training, taken as constant; without it the
                chain starts from noise, as in use.
            noise: (B, prior_width) standard normal, the only randomness; drawn when left out.
            generator: what draws it.
            prior_only: leave the generator out (`image` is None), as the first part of the diffusion phase does.
        Raises:
            InputError: tensors that do not fit this network.
        """
        self._check(inputs, ground_truth, teacher_prior, noise)
        folded = self.fold(inputs)
        if self.phase == "prior":
            steps = [self._encode(folded, ground_truth)]
        else:
            steps = self._predict_prior(self._encode(folded), teacher_prior, noise, generator)
        image = None if prior_only else self.restore_with(inputs, steps[-1])
        return Restoration(image, steps[-1], steps)

    def encode_prior(self, inputs: Tensor, ground_truth: Tensor | None = None) -> Tensor:
        """The encoder alone, (B, prior_width): the teacher's prior in phase "prior", else the diffusion's condition.

        Raises:
            InputError: as `forward`.
        """
        self._check(inputs, ground_truth)
        return self._encode(self.fold(inputs), ground_truth)

    def predict_prior(
        self, condition: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The prior from its condition, as in use: (B, prior_width) both; phase "diffusion" only."""
        return self._predict_prior(condition, None, noise, generator)[-1]

    def restore_with(self, inputs: Tensor, prior: Tensor) -> Tensor:
        """The restored picture for a prior that is known, of these inputs or of the picture that they are cut from."""
        return self.generator(self.fold(inputs), prior) + self._enlarge(inputs[:, :3])

    def fold(self, inputs: Tensor) -> Tensor:
        """Inputs on the quarter grid: (B, in_channels, H/s, W/s) to (B, in_channels * (4/s)^2, H/4, W/4)."""
        return F.pixel_unshuffle(inputs, GRID // self.scale)

    def use_checkpointing(self, enabled: bool = True) -> None:
        """Trade time for memory in training: the widest blocks' activations are computed again in the backward pass."""
        for level in (self.generator.decoders[0], self.generator.refinement):
            level.checkpointed = enabled

    def prior_parameters(self) -> Iterator[nn.Parameter]:
        """Everything but the generator: what the first part of the diffusion phase trains."""
        return (value for name, value in self.named_parameters() if not name.startswith("generator."))

    def _encode(self, folded: Tensor, ground_truth: Tensor | None = None) -> Tensor:
        if ground_truth is not None:
            folded = torch.cat([folded, F.pixel_unshuffle(ground_truth, GRID)], dim=1)
        return self.prior_encoder(folded)

    def _predict_prior(
        self, condition: Tensor, teacher_prior: Tensor | None, noise: Tensor | None, generator: torch.Generator | None
    ) -> list[Tensor]:
        """The reverse chain, in float32 whatever autocast says."""
        assert self.denoiser is not None
        with torch.autocast(condition.device.type, enabled=False):
            condition = condition.to(self.denoiser.layers[0].weight.dtype)
            if noise is None:
                device = generator.device if generator is not None else condition.device
                noise = torch.randn(condition.shape, generator=generator, device=device)
            x_T = noise.to(condition)
            if teacher_prior is not None:
                x_T = self.diffusion.add_noise(teacher_prior.detach().to(condition), x_T)
            return self.diffusion.denoise(self.denoiser, condition, x_T)

    def _enlarge(self, low_quality: Tensor) -> Tensor:
        return F.interpolate(low_quality, scale_factor=self.scale, mode="nearest") if self.scale > 1 else low_quality

    def _check(
        self,
        inputs: Tensor,
        ground_truth: Tensor | None,
        teacher_prior: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> None:
        """Raise where tensors do not fit this network."""
        multiple = MULTIPLE_PX // self.scale
        batch, channels, height, width = inputs.shape if inputs.ndim == 4 else (0, 0, 0, 0)
        if channels != self.in_channels:
            raise InputError(
                f"inputs are {tuple(inputs.shape)}; this network ({self.describe()}) expects (B, {self.in_channels}, "
                f"H/{self.scale}, W/{self.scale})" + (" as concat_reference makes them" if self.reference else "")
            )
        if height % multiple or width % multiple or not height * width:
            raise InputError(
                f"inputs are {height} x {width}; at scale {self.scale} both sides have to be multiples of {multiple}; "
                "pad them (llmga.diffrir.restore.pad_inputs)"
            )
        if (ground_truth is None) == (self.phase == "prior"):
            given = "without" if ground_truth is None else "with"
            raise InputError(f"{given} ground_truth; phase prior needs it, phase diffusion must not see it")
        truth_shape = (batch, 3, height * self.scale, width * self.scale)
        if ground_truth is not None and ground_truth.shape != truth_shape:
            raise InputError(
                f"ground_truth is {tuple(ground_truth.shape)} and inputs are {tuple(inputs.shape)}; "
                f"expected ground_truth {truth_shape}"
            )
        for name, value in (("teacher_prior", teacher_prior), ("noise", noise)):
            if value is not None and value.shape != (batch, self.prior_width):
                raise InputError(f"{name} is {tuple(value.shape)}; expected {(batch, self.prior_width)}")

    def describe(self) -> str:
        """Scale, phase and reference in words, for messages."""
        return f"scale {self.scale}, phase {self.phase}, {'with' if self.reference else 'without'} reference"

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str = "cpu",
        **model_kwargs: Any,
    ) -> Self:
        """What `from_pretrained` does after reading config.json; the mixin's own ignores missing weights and prints."""
        path = Path(model_id) / WEIGHTS_NAME
        if not Path(model_id).is_dir():
            downloaded = hf_hub_download(
                model_id,
                WEIGHTS_NAME,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
            path = Path(str(downloaded))
        if not path.is_file():
            raise RestorerError(f"{path} does not exist; expected a folder that save_pretrained wrote")
        model = cls(**model_kwargs)
        try:
            model.load_state_dict(load_file(path, device=map_location))
        except RuntimeError as error:
            raise RestorerError(f"{path} does not fit its config.json ({model.describe()}): {error}") from error
        return model.to(map_location).eval()


def load_restorer(
    path: str | Path, scale: int | None = None, phase: Phase | None = None, device: str | torch.device = "cpu"
) -> DiffRIR:
    """Load a restorer's folder and check that it is what was asked for.

    Args:
        path: a folder that `save_pretrained` wrote.
        scale, phase: what is needed; None takes any.
    Raises:
        RestorerError: no such folder, weights that do not fit, or another scale or phase than asked for.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise RestorerError(
            f"{path} holds no config.json; expected a restorer's folder (a released .pth is converted "
            "by llmga.diffrir.convert.convert_restorer)"
        )
    model = DiffRIR.from_pretrained(path)
    check_kind(model, str(path), scale, phase)
    return model.to(device)


def check_kind(model: DiffRIR, source: str, scale: int | None, phase: Phase | None) -> None:
    """Raise `RestorerError` when a restorer is of another scale or phase than needed (None: any)."""
    if (scale is not None and scale != model.scale) or (phase is not None and phase != model.phase):
        wanted = ", ".join(
            f"{name} {value}" for name, value in (("scale", scale), ("phase", phase)) if value is not None
        )
        raise RestorerError(f"{source} is a restorer of {model.describe()}; expected {wanted}")


def _check_settings(
    scale: int,
    phase: str,
    dim: int,
    num_blocks: Sequence[int],
    heads: Sequence[int],
    norm: str,
    prior_width: int,
) -> None:
    """Raise on sizes that do not go together."""
    if scale not in SCALES:
        raise RestorerError(f"scale is {scale}; expected 1, 2 or 4")
    if phase not in get_args(Phase):
        raise RestorerError(f"phase is {phase!r}; expected 'prior' or 'diffusion' (also for adversarial training)")
    if norm not in get_args(Norm):
        raise RestorerError(f"norm is {norm!r}; expected 'bias_free' or 'with_bias'")
    if len(num_blocks) != LEVELS or len(heads) != LEVELS:
        raise RestorerError(f"num_blocks is {list(num_blocks)} and heads {list(heads)}; expected 4 numbers each")
    if prior_width < 4 or prior_width % 4:
        raise RestorerError(f"prior_width is {prior_width}; expected a multiple of 4")
    widths = [dim, 2 * dim, 4 * dim, 8 * dim]
    if dim < 2 or dim % 2 or any(width % count for width, count in zip(widths, heads, strict=True)):
        raise RestorerError(
            f"dim is {dim} and heads {list(heads)}; expected an even dim, and levels of {widths} channels "
            "that their heads divide"
        )
