"""Seam, gain and bias of a hole, against what was done to it on purpose. Run: pytest tests/unit/test_hole_metrics.py"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llmga.masks import OUTPAINTING_WIDE, random_mask
from llmga.metrics.holes import colour_fit, hole_l1, hole_psnr, preserved_l1, preserved_psnr, seam_excess
from llmga.metrics.lpips import Lpips, missing_for_lpips
from llmga.metrics.pictures import luma, ssim_luma
from llmga.toyworld.render import render
from llmga.toyworld.scene import sample_scene


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, Tensor]:
    """Toy scenes and wide outpainting masks."""
    pictures = np.stack([render(sample_scene(seed)) for seed in range(60)])
    holes = [random_mask(np.random.default_rng(seed), 64, 64, OUTPAINTING_WIDE).hole for seed in range(60)]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(np.stack(holes))[:, None]


@pytest.mark.parametrize(
    ("gain", "bias", "seam"), [(1.0, 0.02, 0.019), (1.0, 0.05, 0.048), (1.06, 0.0, 0.013), (0.94, -0.03, None)]
)
def test_what_was_done_to_the_hole_is_found(
    scenes: tuple[Tensor, Tensor], gain: float, bias: float, seam: float | None
) -> None:
    """The published calibration of these figures, on scenes of the toy world."""
    targets, holes = scenes
    images = torch.where(holes.bool(), gain * targets + bias, targets)
    fit = colour_fit(images, targets, holes)
    torch.testing.assert_close(fit.gain, torch.full((60,), gain).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(fit.bias, torch.full((60,), bias).double(), atol=1e-5, rtol=0)
    if seam is not None:
        assert float(seam_excess(images, targets, holes).mean()) == pytest.approx(seam, abs=0.006)


def test_the_truth_has_no_seam_and_outside_pixels_do_not_count(scenes: tuple[Tensor, Tensor]) -> None:
    targets, holes = scenes
    assert seam_excess(targets, targets, holes).tolist() == [0.0] * 60
    noisy = torch.where(holes.bool(), targets, torch.rand_like(targets))
    assert colour_fit(noisy, targets, holes).gain.sub(1).abs().max() < 1e-9
    assert hole_psnr(noisy, targets, holes).tolist() == [math.inf] * 60


def test_a_seam_counted_by_hand() -> None:
    images, targets = torch.zeros(1, 3, 2, 3), torch.zeros(1, 3, 2, 3)
    holes = torch.tensor([[[[1, 0, 0], [1, 1, 0]]]])
    images[..., 0, 0], images[..., 1, 0], images[..., 1, 1] = 0.3, 0.6, 0.9
    # Neighbours across the border: 0.3 | 0, 0.9 | 0 in rows; 0 over 0.9 in columns.
    assert float(seam_excess(images, targets, holes)) == pytest.approx((0.3 + 0.9 + 0.9) / 3)
    assert float(hole_psnr(images, targets, holes)) == pytest.approx(-10 * math.log10((0.09 + 0.36 + 0.81) / 3))


def test_errors_inside_and_outside_are_told_apart() -> None:
    targets = torch.full((3, 3, 4, 4), 0.5)
    holes = torch.zeros(3, 1, 4, 4)
    holes[:2, :, :2], holes[2] = 1, 1
    images = targets.clone()
    images[0, :, :2] += 0.25  # the hole alone is off
    images[1, :, 2:] -= 0.1  # what should have stayed is off
    images[1, 0, 2:] += 0.1  # in two channels of three
    assert hole_l1(images, targets, holes)[:2].tolist() == pytest.approx([0.25, 0])
    assert preserved_l1(images, targets, holes)[:2].tolist() == pytest.approx([0, 0.2 / 3])
    assert preserved_psnr(images, targets, holes)[:2].tolist() == pytest.approx(
        [math.inf, -10 * math.log10(0.02 / 3)], rel=1e-5
    )
    assert preserved_l1(images, targets, holes).isnan().tolist() == [False, False, True]  # nothing is kept


def test_holes_in_which_nothing_can_be_measured() -> None:
    targets = torch.full((2, 3, 8, 8), 0.5)
    holes = torch.zeros(2, 1, 8, 8)
    holes[0, :, :4] = 1
    fit = colour_fit(targets + 0.1, targets, holes)
    assert fit.gain.isnan().all() and fit.bias.isnan().all()  # flat; empty
    assert seam_excess(targets, targets, holes).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"holes \(2, 8, 8\); expected \(B, 3, H, W\) twice and \(B, 1, H, W\)"):
        seam_excess(targets, targets, holes[:, 0])


def test_ssim_agrees_with_its_definition_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(1, 3, 15, 13, generator=generator), torch.rand(1, 3, 15, 13, generator=generator)
    x, y = luma(images)[0].numpy(), luma(targets)[0].numpy()
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(5):
        for left in range(3):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 2.55**2, 7.65**2
            numerator = (2 * mean_a * mean_b + c1) * (2 * both + c2)
            values.append(numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    assert float(ssim_luma(images, targets)) == pytest.approx(np.mean(values), abs=1e-10)
    assert float(ssim_luma(images, images)) == pytest.approx(1)


def test_ssim_of_flat_pictures_has_a_closed_form() -> None:
    black, grey = torch.zeros(1, 3, 12, 12), torch.full((1, 3, 12, 12), 0.5)
    a, b, c1 = 16.0, float(luma(grey)[0, 0, 0]), 2.55**2
    assert float(ssim_luma(black, grey)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    with pytest.raises(ValueError, match="border 1; expected equal shapes, with 11 pixels or more a side inside"):
        ssim_luma(black, grey, border=1)


def test_lpips_says_what_it_lacks(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    problem = missing_for_lpips()
    assert problem is not None and ("pip install lpips" in problem or "VGG16 at" in problem)
    with pytest.raises(ValueError, match="LPIPS needs the"):
        Lpips()
