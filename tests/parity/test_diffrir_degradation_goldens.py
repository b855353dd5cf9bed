"""Guards that pictures are degraded, and judged, as in the published code.

Run: pytest tests/parity/test_diffrir_degradation_goldens.py
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmga.diffrir.blur import blur_kernel, filter_batch, pad_kernel, sharpen, sinc_kernel
from llmga.diffrir.convert import discriminator_from_reference_state_dict, discriminator_to_reference_state_dict
from llmga.diffrir.degradation import perturb_colour, round_to_8_bits
from llmga.diffrir.jpeg import compress
from llmga.diffrir.loss import adversarial_loss
from llmga.diffrir.noise import add_gaussian_noise
from tests.golden_diffrir import golden_case, golden_weights

DEGRADATION = golden_case("degradation")
TOLERANCE = 1e-5


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def kernel_of(facts: dict[str, Any]) -> Tensor:
    if facts["type"] == "sinc":
        kernel = sinc_kernel(facts["size"], facts["cutoff"])
    else:
        kernel = blur_kernel(
            facts["type"], facts["size"], facts["sx"], facts["sy"], facts["theta"], facts.get("beta", 1.0)
        )
    return torch.from_numpy(pad_kernel(kernel, facts.get("pad_to", facts["size"]))).float()


@pytest.mark.parametrize("name", DEGRADATION.facts["kernels"])
def test_blur_kernel(name: str) -> None:
    assert_close(kernel_of(DEGRADATION.facts["kernels"][name]), DEGRADATION.arrays[f"kernel.{name}"])


def test_filtering_with_one_kernel_per_picture() -> None:
    kernels = torch.stack([DEGRADATION.arrays[name] for name in DEGRADATION.facts["filter2d_kernels"]])
    assert_close(filter_batch(DEGRADATION.picture("img"), kernels), DEGRADATION.arrays["filter2d_per_sample"])


def test_sharpening() -> None:
    assert_close(sharpen(DEGRADATION.picture("img")), DEGRADATION.arrays["usm"])


def test_jpeg_with_one_quality_per_picture() -> None:
    quality = torch.tensor(DEGRADATION.facts["jpeg_quality"])
    assert_close(compress(DEGRADATION.picture("img"), quality), DEGRADATION.arrays["jpeg"])


def test_gaussian_noise() -> None:
    """The published draws: strengths, grey flags, one grey pattern for the batch if any flag is set, colour."""
    images = DEGRADATION.picture("img")
    torch.manual_seed(DEGRADATION.facts["seed"])
    sigma = torch.rand(len(images)) * 29 + 1
    gray = torch.rand(len(images)) < 0.4
    pattern = torch.randn(images.shape[2:]) if gray.any() else images.new_zeros(images.shape[2:])
    field = torch.where(gray[:, None, None, None], pattern, torch.randn(images.shape))
    assert_close(add_gaussian_noise(images, sigma, field), DEGRADATION.arrays["gauss"])


def test_colour_perturbation() -> None:
    case = golden_case("lumi")
    perturbed = perturb_colour(case.picture("x"), case.arrays["cof"], case.arrays["bias"])
    assert_close(perturbed, case.arrays["y"])
    assert_close(round_to_8_bits(perturbed), case.arrays["y_q"])


def test_discriminator() -> None:
    case = golden_case("disc")
    stored = {key: value for key, value in case.arrays.items() if key.startswith("conv")}
    weights = golden_weights(case.facts["seed"], case.facts["params"]) | stored
    model = discriminator_from_reference_state_dict(weights)
    assert model.width == case.facts["num_feat"]
    with torch.no_grad():
        logits = model(case.picture("x"))
    assert_close(logits, case.arrays["logits"])
    assert adversarial_loss(logits, is_real=True).item() == pytest.approx(case.facts["bce_real"], rel=TOLERANCE)
    assert adversarial_loss(logits, is_real=False).item() == pytest.approx(case.facts["bce_fake"], rel=TOLERANCE)

    returned = discriminator_to_reference_state_dict(model)
    assert returned.keys() == weights.keys()
    assert all(torch.equal(returned[key], value) for key, value in weights.items())
