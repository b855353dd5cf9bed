"""Guards what a model is asked to fill in: a mask generator that drifts changes the task without any error.

Run: pytest tests/integration/test_masks.py
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from llmga.masks import (
    MEDIUM,
    NARROW,
    OUTPAINTING_NARROW,
    OUTPAINTING_WIDE,
    STAGE1,
    STAGE2,
    WIDE,
    Mask,
    MaskMixture,
    Strips,
    Strokes,
    _fill_capsules,
    box_mask,
    irregular_mask,
    outpainting_mask,
    random_mask,
)

MIXTURES = {
    "stage1": STAGE1,
    "stage2": STAGE2,
    "narrow": NARROW,
    "medium": MEDIUM,
    "wide": WIDE,
    "outpainting_narrow": OUTPAINTING_NARROW,
    "outpainting_wide": OUTPAINTING_WIDE,
}


def draw_coverages(draw: Callable[[np.random.Generator], Mask], count: int = 200) -> np.ndarray:
    return np.array([draw(np.random.default_rng([11, index])).coverage for index in range(count)])


# Measured with the published generators at 512 px; bands hold three standard errors.
@pytest.mark.parametrize(
    ("draw", "count", "mean", "band", "quantiles"),
    [
        (irregular_mask, 200, 0.182, 0.02, (0.03, 0.357)),
        (box_mask, 400, 0.088, 0.008, (0.021, 0.172)),
        (outpainting_mask, 800, 0.628, 0.02, (0.355, 0.927)),
    ],
)
@pytest.mark.parametrize("size", [64, 128])
def test_coverage_is_the_published_one_at_any_size(draw, count, mean, band, quantiles, size) -> None:  # type: ignore[no-untyped-def]
    coverages = draw_coverages(lambda rng: draw(rng, size, size), count)
    assert coverages.mean() == pytest.approx(mean, abs=band)
    np.testing.assert_allclose(np.quantile(coverages, (0.05, 0.95)), quantiles, atol=0.035)


@pytest.mark.parametrize(
    ("name", "size", "mean", "band"),
    [
        ("narrow", 512, 0.29, 0.03),
        ("medium", 128, 0.27, 0.03),
        ("wide", 128, 0.25, 0.03),
        ("narrow", 64, 0.30, 0.03),
        ("wide", 64, 0.27, 0.03),
        ("outpainting_narrow", 128, 0.37, 0.03),
        ("outpainting_wide", 128, 0.63, 0.035),
        ("stage2", 128, 0.51, 0.06),
    ],
)
def test_mixtures_cover_what_the_protocol_says(name: str, size: int, mean: float, band: float) -> None:
    coverages = draw_coverages(lambda rng: random_mask(rng, size, size, MIXTURES[name]), 50 if size == 512 else 200)
    assert coverages.mean() == pytest.approx(mean, abs=band)
    assert coverages.max() <= MIXTURES[name].max_coverage


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        (STAGE1, {"irregular": 0.25, "box": 0.25, "outpainting": 0.5}),
        (STAGE2, {"full": 0.25, "irregular": 0.1875, "box": 0.1875, "outpainting": 0.375}),
    ],
)
def test_kinds_come_in_their_shares(mixture: MaskMixture, shares: dict[str, float]) -> None:
    kinds = Counter(random_mask(np.random.default_rng([5, index]), 16, 16, mixture).kind for index in range(1500))
    for kind, share in shares.items():
        assert kinds[kind] / 1500 == pytest.approx(share, abs=0.035)  # three standard errors
    assert set(kinds) == set(shares)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (8, 8), (3, 200), (64, 64), (48, 96)])
def test_any_size_works_and_equal_seeds_give_equal_masks(mixture: MaskMixture, shape: tuple[int, int]) -> None:
    for index in range(5):
        mask, again = (random_mask(np.random.default_rng([3, index]), *shape, mixture) for _ in range(2))
        assert mask.hole.shape == shape and mask.hole.dtype == np.uint8
        assert set(np.unique(mask.hole)) <= {0, 1} and mask.hole.any()
        assert mask.kind == again.kind and np.array_equal(mask.hole, again.hole)


def test_different_seeds_give_different_masks() -> None:
    masks = {irregular_mask(np.random.default_rng(seed), 64, 64).hole.tobytes() for seed in range(50)}
    assert len(masks) == 50


def test_a_size_below_one_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="mask of 0 x 5 pixels"):
        random_mask(np.random.default_rng(0), 0, 5)


def test_strips_are_measured_by_their_own_side() -> None:
    """300 high, 1000 wide: the published code would make the left strip 105 to 119 pixels wide, not 350 to 398."""
    seen = set()
    for seed in range(60):
        hole = outpainting_mask(np.random.default_rng(seed), 300, 1000).hole
        kept_rows, kept_columns = np.flatnonzero(~hole.all(axis=1)), np.flatnonzero(~hole.all(axis=0))
        left, right = kept_columns[0], 999 - kept_columns[-1]
        top, bottom = kept_rows[0], 299 - kept_rows[-1]
        assert not hole[top : 300 - bottom, left : 1000 - right].any()  # what is kept is one full rectangle
        for depth, side in ((left, 1000), (right, 1000), (top, 300), (bottom, 300)):
            assert depth == 0 or 179 / 512 * side - 1 <= depth <= 203 / 512 * side + 1
        seen.add((left > 0, top > 0, right > 0, bottom > 0))
    assert len(seen) == 15  # every choice of sides but none


def test_only_strips_count_as_outpainting() -> None:
    rng = np.random.default_rng(0)
    assert outpainting_mask(rng, 8, 8).is_outpaint
    assert not irregular_mask(rng, 8, 8).is_outpaint and not box_mask(rng, 8, 8).is_outpaint


def test_boxes_keep_their_margin_and_sides() -> None:
    for seed in range(50):
        hole = box_mask(np.random.default_rng(seed), 512, 700).hole
        inside = hole[10:-10, 10:-10]
        assert inside.sum() == hole.sum()
        runs = inside.any(axis=1).sum(), inside.any(axis=0).sum()
        assert all(35 <= run <= 4 * 160 for run in runs)


def test_strokes_are_solid_lines_with_round_ends() -> None:
    """Against the definition: a pixel is set when its centre lies within the radius of a line."""
    rng = np.random.default_rng(0)
    for case in range(200):
        height, width = rng.integers(1, 40, 2)
        lines = rng.integers(0, [width + 1, height + 1, width + 1, height + 1], (3, 4)).astype(float)
        if case % 3 == 0:
            lines[:, 3] = lines[:, 1]  # level
        if case % 5 == 0:
            lines[:, 2] = lines[:, 0]  # upright, or a point
        radii = rng.integers(1, 16, 3) / 2
        y, x = np.mgrid[:height, :width]
        expected = np.zeros((height, width), bool)
        for (start_x, start_y, end_x, end_y), radius in zip(lines, radii, strict=True):
            step = np.array([end_x - start_x, end_y - start_y])
            along = ((x - start_x) * step[0] + (y - start_y) * step[1]) / max(step @ step, 1)
            along = along.clip(0, 1)
            expected |= (x - start_x - along * step[0]) ** 2 + (y - start_y - along * step[1]) ** 2 <= radius**2 + 1e-6
        np.testing.assert_array_equal(_fill_capsules(lines, radii, height, width), expected)


def test_a_stroke_of_one_segment_has_the_area_of_its_length_and_width() -> None:
    thin = Strokes(count=(1, 1), segments=(1, 1), length=(100, 100), width=(20, 20))
    areas = [irregular_mask(np.random.default_rng(seed), 512, 512, thin).hole.sum() for seed in range(200)]
    assert max(areas) == pytest.approx(100 * 21 + np.pi * 10**2, rel=0.05)  # no stroke is larger than an unclipped one
    assert np.median(areas) > 2000


def test_depth_may_be_a_single_value() -> None:
    assert outpainting_mask(np.random.default_rng(0), 64, 64, Strips(depth=(0.5, 0.5))).coverage >= 0.5
