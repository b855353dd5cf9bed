"""How near a picture is to the true one. Run: pytest tests/unit/test_picture_metrics.py"""

import math

import pytest
import torch

from llmga.metrics.pictures import l1, l2, luma, psnr, psnr_luma


def test_luma_runs_from_16_to_235() -> None:
    black_and_white = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    assert luma(black_and_white)[:, 0, 0].tolist() == pytest.approx([16, 235])


def test_psnr_of_a_known_difference() -> None:
    images, targets = torch.zeros(2, 3, 12, 12), torch.zeros(2, 3, 12, 12)
    images[0, 1, 0, 0] = 1  # green alone: luma is 128.553 off in one of 144 pixels
    expected = 10 * math.log10(255**2 * 144 / 128.553**2)
    assert psnr_luma(images, targets).tolist() == pytest.approx([expected, math.inf])
    assert psnr_luma(images, targets, border=1).tolist() == [math.inf, math.inf]
    assert psnr_luma(images + 0.4 / 255, images).tolist() == [math.inf, math.inf]  # equal in 8 bits


def test_differences_counted_by_hand() -> None:
    images, targets = torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4)
    images[0, 1, 0, 0], images[0, 2, 1, 3] = 0.5, -0.25
    assert l1(images, targets).tolist() == pytest.approx([0.75 / 24, 0])
    assert l2(images, targets).tolist() == pytest.approx([0.3125 / 24, 0])
    assert psnr(images, targets).tolist() == pytest.approx([10 * math.log10(24 / 0.3125), math.inf])
    with pytest.raises(ValueError, match=r"images are \(2, 3, 2, 4\) and targets \(2, 3, 2, 3\); expected"):
        l1(images, targets[..., :3])


@pytest.mark.parametrize(("shape", "border"), [((1, 3, 8, 8), 4), ((1, 3, 8, 9), 0)])
def test_psnr_of_what_does_not_fit(shape: tuple[int, ...], border: int) -> None:
    with pytest.raises(ValueError, match=r"targets \(1, 3, 8, 8\) and border \d; expected equal shapes"):
        psnr_luma(torch.zeros(shape), torch.zeros(1, 3, 8, 8), border)
