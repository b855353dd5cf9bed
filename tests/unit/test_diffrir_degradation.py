"""Degradation: a seed decides everything, pictures do not see those beside them, and masks stay with their picture.

Run: pytest tests/unit/test_diffrir_degradation.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from llmga.diffrir.blur import filter_batch, identity_kernel, pad_kernel, sharpen
from llmga.diffrir.degradation import (
    KERNEL_PX,
    RESIZE_MODES,
    Degradation,
    DegradationSettings,
    degrade,
    draw_degradation,
    perturb_colour,
)
from llmga.diffrir.gallery import describe_degradation, write_gallery
from llmga.diffrir.jpeg import compress
from llmga.diffrir.noise import add_poisson_noise, gaussian_field
from llmga.diffrir.pairs import PairPool, Pairs, random_crop
from llmga.diffrir.reference import InputError
from llmga.images import open_picture
from llmga.masks import RESTORATION, random_mask

PICTURES = Path(__file__).parents[1] / "fixtures" / "llmga-datasetv2-mini" / "llmga-imgs"
PHOTOGRAPH = PICTURES / "COCO" / "train2017" / "000000000001.jpg"


def photograph(size: int = 64) -> Tensor:
    """(1, 3, size, size) from the middle of a photograph."""
    pixels = torch.from_numpy(np.array(open_picture(PHOTOGRAPH))).permute(2, 0, 1)[None].float() / 255
    return pixels[:, :, 200 : 200 + size, 200 : 200 + size]


def photographs(size: int = 64) -> Tensor:
    """Three different ones: as it is, mirrored, and upside down with dark colours."""
    image = photograph(size)
    return torch.cat([image, image.flip(3), image.flip(2) * 0.5])


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


# ---------------------------------------------------------------- the whole pipeline


def test_seeds_below_reach_every_branch() -> None:
    draws = [draw_degradation(seed, 3) for seed in range(12)]
    parts = [part for draw in draws for part in (draw.first, draw.second)]
    assert {part.gaussian for part in parts} == {part.blurred for part in parts} == {True, False}
    assert {draw.sinc_first for draw in draws} == {True, False}
    assert {part.mode for part in parts} == set(RESIZE_MODES)
    assert any(part.factor > 1 for part in parts) and any(part.factor < 1 for part in parts)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scale", [1, 2])
def test_a_batch_equals_its_pictures_one_by_one(seed: int, scale: int) -> None:
    clean, draw = photographs(48), draw_degradation(seed, 3)
    together = degrade(clean, draw, scale)
    assert together.shape == (3, 3, 48 // scale, 48 // scale)
    for index in range(3):
        alone = degrade(clean[index : index + 1], draw.select(index), scale)
        # One grey level where a rounding in JPEG or at the end falls the other way.
        assert ((together[index] - alone[0]).abs() > 1e-6).float().mean() < 0.02


def test_draws_of_a_picture_do_not_depend_on_the_batch() -> None:
    small, large = draw_degradation((7, 3), 1), draw_degradation((7, 3), 5)
    assert torch.equal(small.first.kernels[0], large.first.kernels[0])
    assert small.second.seeds[0] == large.second.seeds[0] and small.gain[0] == large.gain[0]
    assert (small.first.factor, small.mode) == (large.first.factor, large.mode)


def test_the_seed_decides_everything() -> None:
    clean = photographs()
    torch.manual_seed(0)
    first = degrade(clean, draw_degradation((1, 2), 3))
    torch.manual_seed(1)
    assert torch.equal(degrade(clean, draw_degradation((1, 2), 3)), first)
    assert not torch.equal(degrade(clean, draw_degradation((1, 3), 3)), first)
    assert torch.equal(first, (first * 255).round() / 255) and first.min() >= 0 and first.max() <= 1


def test_draws_keep_to_the_published_ranges() -> None:
    draws = [draw_degradation(seed, 4) for seed in range(80)]

    def values(name: str, part: str | None = None) -> Tensor:
        return torch.cat([getattr(getattr(draw, part) if part else draw, name) for draw in draws])

    for name, low, high in (("gain", 0.92, 1.08), ("bias", -0.05, 0.05)):
        found = values(name)
        assert (
            found.min() >= low and found.max() <= high and found.std() == pytest.approx((high - low) / 12**0.5, rel=0.1)
        )
    assert values("quality", "first").min() >= 30 and values("quality", "second").max() <= 95
    assert values("gray", "first").float().mean() == pytest.approx(0.4, abs=0.05)
    kinds = [kind for draw in draws for kind in draw.first.kinds]
    assert kinds.count("sinc") / len(kinds) == pytest.approx(0.1, abs=0.05)
    assert kinds.count("iso") / len(kinds) == pytest.approx(0.9 * 0.45, abs=0.05)
    identity = torch.from_numpy(identity_kernel(KERNEL_PX)).float()
    sinc = values("sinc_kernels")
    assert (sinc == identity).all(dim=(1, 2)).float().mean() == pytest.approx(0.2, abs=0.04)
    torch.testing.assert_close(sinc.sum(dim=(1, 2)), torch.ones(len(sinc)))
    factors = [draw.first.factor for draw in draws]
    assert min(factors) >= 0.15 and max(factors) <= 1.5 and factors.count(1.0) / len(factors) < 0.25


def test_colour_may_change_before_the_pipeline() -> None:
    """Before, the shift is blurred and coded with the picture; after, it is the last thing done."""
    clean = photographs()
    after, before = (
        draw_degradation(3, 3, DegradationSettings(gain=0, bias=0.05, colour_order=order))
        for order in ("after", "before")
    )
    plain = degrade(clean, draw_degradation(3, 3, DegradationSettings(gain=0, bias=0)))
    shifted = degrade(clean, after)
    torch.testing.assert_close(shifted, (plain + after.bias[:, None, None, None]).clamp(0, 1), rtol=0, atol=1.01 / 255)
    assert not torch.equal(degrade(clean, before), shifted)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(6))
def test_a_gpu_does_the_same_but_for_its_noise(seed: int) -> None:
    clean, draw = photographs(), draw_degradation(seed, 3)
    on_cpu, on_gpu = degrade(clean, draw), degrade(clean.cuda(), draw)
    assert on_gpu.is_cuda and torch.equal(on_gpu, degrade(clean.cuda(), draw))
    assert (on_gpu.cpu() - on_cpu).abs().mean() < 0.1
    quality = draw.first.quality
    difference = (compress(clean.cuda(), quality).cpu() - compress(clean, quality)).abs()
    assert (difference > 1e-4).float().mean() < 0.01


@pytest.mark.parametrize(
    ("shape", "size", "scale", "message"),
    [
        ((2, 3, 32, 32), 3, 1, "ground_truth holds 2 pictures and draw is for 3"),
        ((1, 1, 32, 32), 1, 1, r"ground_truth is \(1, 1, 32, 32\) torch.float32; expected \(B, 3, H, W\)"),
        ((1, 3, 30, 32), 1, 4, "ground_truth is 30 x 32 and scale 4"),
        ((1, 3, 8, 8), 1, 2, "at least 8 times as long"),
        ((1, 3, 32, 32), 1, 3, "expected scale 1, 2 or 4"),
    ],
)
def test_batches_that_cannot_be_degraded(shape: tuple[int, ...], size: int, scale: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        degrade(torch.zeros(shape), draw_degradation(0, size), scale)


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize("quality", [30, 60])
def test_jpeg_loses_what_a_real_codec_loses(quality: int) -> None:
    """Beside torchvision's codec: as far from the picture, and nearer to the codec than to the picture. (At highest
    qualities the codec's smoother enlargement of chroma shows.)"""
    image = photograph(128)
    levels = (image[0] * 255).round().to(torch.uint8)
    real = decode_jpeg(encode_jpeg(levels, quality)).float() / 255
    ours = compress(image, torch.tensor([float(quality)]))[0]
    lost, lost_by_codec = ((other - image[0]).square().mean().sqrt().item() for other in (ours, real))
    assert lost == pytest.approx(lost_by_codec, rel=0.15)
    assert (ours - real).square().mean().sqrt() < 0.8 * lost


def test_jpeg_of_any_size_and_quality_of_each() -> None:
    images = photographs(48)[..., :37, :45]
    quality = torch.tensor([30.0, 60.0, 95.0])
    together = compress(images, quality)
    assert together.shape == images.shape
    for index in range(3):
        alone = compress(images[index : index + 1], quality[index : index + 1])[0]
        assert ((together[index] - alone).abs() > 1e-4).float().mean() < 0.01


def test_identity_kernel_and_padding_leave_pictures_alone() -> None:
    images = photographs(32)
    kernels = torch.from_numpy(np.stack([pad_kernel(identity_kernel(7), 21)] * 3)).float()
    assert torch.equal(filter_batch(images, kernels), images)
    assert filter_batch(images[..., :5, :3], kernels).shape == (3, 3, 5, 3)  # smaller than the kernel's border


def test_filtering_takes_each_kernel_to_its_own_picture() -> None:
    image = photograph(32).expand(2, -1, -1, -1)
    shift = np.zeros((3, 3))
    shift[1, 2] = 1  # correlation: the right neighbour
    kernels = torch.from_numpy(np.stack([identity_kernel(3), shift])).float()
    filtered = filter_batch(image, kernels)
    assert torch.equal(filtered[0], image[0]) and torch.equal(filtered[1, :, :, :-1], image[0, :, :, 1:])


def test_sharpening_leaves_flat_pictures_alone() -> None:
    flat = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(sharpen(flat), flat)
    assert sharpen(photograph()).std() > photograph().std()


def test_poisson_noise_grows_with_light_and_shrinks_with_levels() -> None:
    images = torch.full((2, 3, 200, 200), 0.2)
    images[0, :, 100:] = 0.8
    noise = add_poisson_noise(images, torch.ones(2), torch.tensor([False, True]), generators(2)) - images
    # Two levels: V = 2, variance x / V.
    dark, light = noise[0, :, :100], noise[0, :, 100:]
    assert dark.mean().abs() < 0.02 and dark.var() == pytest.approx(0.2 / 2, rel=0.35)  # clamped at 0 and 1
    assert light.min() < -0.25
    assert torch.equal(noise[1, 0], noise[1, 1]) and not torch.equal(noise[0, 0], noise[0, 1])


def test_grey_noise_is_one_pattern_per_picture() -> None:
    field = gaussian_field(torch.zeros(3, 3, 16, 16), torch.tensor([True, True, False]), generators(3))
    assert torch.equal(field[0, 0], field[0, 2]) and not torch.equal(field[0, 0], field[1, 0])
    assert not torch.equal(field[2, 0], field[2, 1])


def test_colour_is_one_gain_and_bias_per_picture() -> None:
    images = photographs(16)
    gain, bias = torch.tensor([1.08, 0.92, 1.0]), torch.tensor([0.05, 0.0, -0.05])
    perturbed = perturb_colour(images, gain, bias)
    for index in range(3):
        assert torch.equal(perturbed[index], (images[index] * gain[index] + bias[index]).clamp(0, 1))


# ---------------------------------------------------------------- pairs


def marked_pairs(count: int, scale: int, size: int = 32, first: int = 0) -> Pairs:
    """Pairs whose every pixel tells its place: rows in red, columns in green, the pair in blue and in the mask."""
    axis = torch.arange(size).float()
    truth = torch.zeros(count, 3, size, size)
    truth[:, 0], truth[:, 1] = axis[:, None], axis
    truth[:, 2] = (first + torch.arange(count).float())[:, None, None]
    mask = ((truth[:, :1] + truth[:, 1:2] + truth[:, 2:]) % 3 == 0).float()
    return Pairs(truth[..., ::scale, ::scale].clone(), truth, mask)


def assert_together(pairs: Pairs, scale: int) -> None:
    low_quality, truth, mask = pairs
    assert torch.equal(low_quality, truth[..., ::scale, ::scale])
    assert torch.equal(mask, ((truth[:, :1] + truth[:, 1:2] + truth[:, 2:]) % 3 == 0).float())


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_crops_keep_mask_and_pictures_aligned(scale: int) -> None:
    rngs = [np.random.default_rng(seed) for seed in range(6)]
    cropped = random_crop(marked_pairs(6, scale), 16, rngs)
    assert cropped.ground_truth.shape == (6, 3, 16, 16) and cropped.edit_mask.shape == (6, 1, 16, 16)
    assert_together(cropped, scale)
    corners = {tuple(corner) for corner in cropped.ground_truth[:, :2, 0, 0].int().tolist()}
    assert len(corners) > 1 and all(value % scale == 0 for corner in corners for value in corner)


def test_pool_keeps_pairs_together_and_mixes_batches() -> None:
    pool, rng = PairPool(8), np.random.default_rng(0)
    seen: list[float] = []
    for step in range(20):
        fresh = marked_pairs(2, 2, first=2 * step)
        taken = pool.exchange(fresh, rng)
        assert_together(taken, 2)
        ids = taken.ground_truth[:, 2, 0, 0].tolist()
        if step < 4:
            assert ids == [2 * step, 2 * step + 1]
        seen += ids if step >= 4 else []
    assert len(set(seen)) == len(seen)  # what is taken leaves the pool
    assert sum(abs(first - second) > 1 for first, second in zip(seen[::2], seen[1::2], strict=True)) > 4


def test_pool_goes_on_after_a_checkpoint() -> None:
    pools, rngs = [PairPool(4), PairPool(4)], [np.random.default_rng(1), np.random.default_rng(1)]
    for step in range(5):
        pools[0].exchange(marked_pairs(2, 1, first=2 * step), rngs[0])
    pools[1].load_state_dict(pools[0].state_dict())
    rngs[1].bit_generator.state = rngs[0].bit_generator.state
    for step in range(5, 9):
        one, other = (
            pool.exchange(marked_pairs(2, 1, first=2 * step), rng) for pool, rng in zip(pools, rngs, strict=True)
        )
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_pool_of_none_passes_batches_on() -> None:
    fresh = marked_pairs(2, 1)
    assert PairPool(0).exchange(fresh, np.random.default_rng(0)) is fresh


def test_pairs_that_do_not_fit() -> None:
    rng = np.random.default_rng(0)
    pool = PairPool(4)
    pool.exchange(marked_pairs(2, 1), rng)
    with pytest.raises(InputError, match=r"the pool holds pictures of \(3, 32, 32\), the batch of \(3, 16, 16\)"):
        pool.exchange(marked_pairs(2, 1, size=16), rng)
    with pytest.raises(InputError, match="a batch of 5 was given to a pool of 4"):
        pool.exchange(marked_pairs(5, 1), rng)
    with pytest.raises(InputError, match="the saved pool holds 2 pairs and this one 1"):
        PairPool(1).load_state_dict(pool.state_dict())
    with pytest.raises(InputError, match="a pool of -1 pairs was asked for"):
        PairPool(-1)
    with pytest.raises(InputError, match="a crop of 40 was asked of pictures of 32 x 32 at scale 2"):
        random_crop(marked_pairs(1, 2), 40, [rng])
    with pytest.raises(InputError, match="1 generators for 2 pairs"):
        random_crop(marked_pairs(2, 2), 16, [rng])


# ---------------------------------------------------------------- masks and the page


def test_masks_cover_what_is_published() -> None:
    masks = [random_mask(np.random.default_rng(seed), 100, 100, RESTORATION) for seed in range(600)]
    by_kind = {
        kind: [mask.coverage for mask in masks if mask.kind == kind] for kind in ("irregular", "box", "outpainting")
    }
    shares = {kind: len(found) / len(masks) for kind, found in by_kind.items()}
    assert shares == pytest.approx({"irregular": 0.35, "box": 0.30, "outpainting": 0.35}, abs=0.06)
    means = {kind: float(np.mean(found)) for kind, found in by_kind.items()}
    assert means == pytest.approx({"irregular": 0.26, "box": 0.13, "outpainting": 0.47}, abs=0.03)


def test_gallery_shows_each_picture_four_times(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    files = [PHOTOGRAPH, PICTURES / "JourneyDB" / "000" / "flower.jpg"]
    write_gallery(page, files, scale=2, size=64, sharpened=True)
    text = page.read_text()
    assert text.count('src="data:image/png;base64,') == 8 and "http" not in text
    for name in ("clean", "degraded", "reference", "target", "000000000001.jpg", "flower.jpg"):
        assert name in text
    write_gallery(tmp_path / "again.html", files, scale=2, size=64, sharpened=True)
    assert (tmp_path / "again.html").read_text() == text


def test_degradation_in_words() -> None:
    draw: Degradation = draw_degradation(4, 2)
    steps = describe_degradation(draw, 1)
    assert len(steps) == 10 and steps[3] == f"JPEG {draw.first.quality[1]:.0f}"
    assert steps[-1] == f"contrast x {draw.gain[1]:.3f}, brightness {draw.bias[1]:+.3f}"
