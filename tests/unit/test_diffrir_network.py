"""The restoration network: sizes that follow from the scale, one source of chance, errors that name what they met.

Run: pytest tests/unit/test_diffrir_network.py
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmga.diffrir.blocks import ChannelAttention, ModulatedProjection
from llmga.diffrir.discriminator import Discriminator
from llmga.diffrir.loss import distillation_loss, pixel_loss
from llmga.diffrir.network import DiffRIR, RestorerError, load_restorer
from llmga.diffrir.padding import reflect
from llmga.diffrir.prior import diffusion_schedule
from llmga.diffrir.reference import InputError, compose, concat_reference
from llmga.diffrir.restore import restore_batch, to_uint8
from tests.toy import toy_restorer

PUBLISHED_COUNTS = {  # scale: generator, encoder of the prior phase, and of the diffusion phase
    1: (23_512_710, 1_395_904, 1_368_256),
    2: (23_491_974, 1_375_168, 1_347_520),
    4: (23_486_790, 1_369_984, 1_342_336),
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def random_inputs(scale: int, height: int = 32, width: int = 64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Low-quality picture, ground truth and mask with a hole on the left."""
    generator = torch.Generator().manual_seed(scale)
    low_quality = torch.rand(batch, 3, height // scale, width // scale, generator=generator)
    ground_truth = torch.rand(batch, 3, height, width, generator=generator)
    mask = torch.zeros(batch, 1, height, width)
    mask[..., : width // 2] = 1
    return low_quality, ground_truth, mask


@pytest.mark.parametrize("scale", PUBLISHED_COUNTS)
def test_published_sizes_are_the_defaults(scale: int) -> None:
    with torch.device("meta"):
        prior, diffusion = DiffRIR(scale=scale, phase="prior"), DiffRIR(scale=scale)
    found = count(prior.generator), count(prior.prior_encoder), count(diffusion.prior_encoder)
    assert found == PUBLISHED_COUNTS[scale]
    assert diffusion.denoiser is not None and count(diffusion.denoiser) == 197_376
    assert count(diffusion) == PUBLISHED_COUNTS[scale][0] + PUBLISHED_COUNTS[scale][2] + 197_376


def test_discriminator_has_the_published_size() -> None:
    assert count(Discriminator()) == 4_376_897


@pytest.mark.parametrize(("scale", "channels"), [(1, 48), (2, 12), (4, 3)])
def test_without_reference_it_is_diffir(scale: int, channels: int) -> None:
    model = toy_restorer(scale=scale, reference=False)
    assert model.generator.embed.in_channels == channels
    low_quality = random_inputs(scale)[0]
    assert model(low_quality).image.shape == (2, 3, 32, 64)


@pytest.mark.parametrize(("scale", "channels"), [(1, 6), (2, 15), (4, 51)])
def test_hole_content_has_no_influence(scale: int, channels: int) -> None:
    low_quality, ground_truth, mask = random_inputs(scale)
    inputs = concat_reference(low_quality, ground_truth, mask, scale)
    assert inputs.shape == (2, channels, 32 // scale, 64 // scale)
    hole = mask.bool().expand_as(ground_truth)
    changed = ground_truth.masked_fill(hole, float("nan"))
    assert torch.equal(concat_reference(low_quality, changed, mask.bool()), inputs)
    kept = torch.nn.functional.pixel_shuffle(inputs[:, 3:], scale)
    assert torch.equal(kept[~hole], ground_truth[~hole]) and not kept[hole].any()


def test_composition_keeps_known_pixels_bit_for_bit() -> None:
    _, ground_truth, mask = random_inputs(1)
    restored = torch.rand_like(ground_truth)
    composed = compose(restored, ground_truth, mask * 0.6)  # grey counts from one half
    hole = mask.bool().expand_as(ground_truth)
    assert torch.equal(composed[~hole], ground_truth[~hole]) and torch.equal(composed[hole], restored[hole])


@pytest.mark.parametrize("norm", ["bias_free", "with_bias"])
def test_folded_projection_is_norm_modulation_and_projection(norm: str) -> None:
    torch.manual_seed(0)
    part = ModulatedProjection(12, 20, True, norm, 16).double()
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    rows, prior = torch.randn(3, 7, 12).double() * 5 + 3, torch.randn(3, 16).double()
    mean, deviation = rows.mean(-1, keepdim=True), (rows.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = rows / deviation * part.gain if part.offset is None else (rows - mean) / deviation * part.gain + part.offset
    k1, k2 = (prior @ part.modulation.weight.T).chunk(2, dim=1)
    expected = part.projection(x * k1[:, None] + k2[:, None])
    torch.testing.assert_close(part(rows, prior), expected, rtol=1e-10, atol=1e-10)


def test_attention_of_a_blank_picture_is_finite() -> None:
    """Queries and keys of length zero divide by nothing, forward and backward."""
    part = ChannelAttention(8, 2, False, "bias_free", 16)
    rows = torch.zeros(1, 9, 8, requires_grad=True)
    part(rows, torch.Size((3, 3)), torch.randn(1, 16)).sum().backward()
    assert all(p.grad.isfinite().all() for p in [rows, *part.parameters()] if p.grad is not None)


def test_noise_is_the_only_chance() -> None:
    model = toy_restorer()
    inputs = concat_reference(*random_inputs(1))
    noise = torch.randn(2, 16)
    assert torch.equal(model(inputs, noise=noise).image, model(inputs, noise=noise).image)
    drawn = [model(inputs, generator=torch.Generator().manual_seed(5)).prior_steps[0] for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(model(inputs).prior_steps[0], model(inputs).prior_steps[0])


def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    model = toy_restorer()
    inputs, noise = concat_reference(*random_inputs(1)), torch.randn(2, 16)
    together = model(inputs, noise=noise).image
    alone = torch.cat([model(inputs[i : i + 1], noise=noise[i : i + 1]).image for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_condition_through_every_step_and_never_the_teacher() -> None:
    model, teacher = toy_restorer(), toy_restorer(phase="prior")
    low_quality, ground_truth, mask = random_inputs(1)
    inputs = concat_reference(low_quality, ground_truth, mask)
    teacher_prior = teacher.encode_prior(inputs, ground_truth)
    restored = model(inputs, teacher_prior=teacher_prior, noise=torch.zeros(2, 16), prior_only=True)
    assert restored.image is None and len(restored.prior_steps) == 4
    for step in restored.prior_steps[:-1]:
        step.retain_grad()
    distillation_loss(restored.prior, teacher_prior).absolute.backward()
    # At t = 0 the result is the denoiser's output, which has read every step before.
    assert all(step.grad is not None and step.grad.abs().sum() > 0 for step in restored.prior_steps[:-1])
    trained = {id(parameter) for parameter in model.prior_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained) == (not name.startswith("generator.")), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_checkpointing_changes_no_gradient() -> None:
    model = toy_restorer(phase="prior", num_refinement_blocks=2)
    low_quality, ground_truth, mask = random_inputs(1)
    inputs = concat_reference(low_quality, ground_truth, mask)
    gradients = []
    for enabled in (False, True):
        model.use_checkpointing(enabled)
        model.zero_grad()
        pixel_loss(model(inputs, ground_truth).image, ground_truth).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_lower_precision_stays_near_and_autocast_keeps_the_prior_in_float32() -> None:
    model = toy_restorer()
    inputs, noise = concat_reference(*random_inputs(1)), torch.randn(2, 16)
    exact = model(inputs, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = model(inputs, noise=noise)
    assert lower.prior.dtype == torch.float32
    torch.testing.assert_close(lower.image.float(), exact.image, rtol=0, atol=0.05)
    image = model.bfloat16()(inputs.bfloat16(), noise=noise).image
    torch.testing.assert_close(image.float(), exact.image, rtol=0, atol=0.05)


def test_pixel_loss_over_the_hole_alone() -> None:
    restored, target, mask = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., 0] = 1
    assert pixel_loss(compose(restored, target, mask), target).item() == pytest.approx(0.25)
    assert pixel_loss(restored, target, mask).item() == pytest.approx(1)
    assert pixel_loss(restored, target, mask * 0).item() == 0
    with pytest.raises(
        InputError, match=r"restored is \(1, 3, 4, 4\) and target \(1, 3, 4, 3\); expected equal shapes"
    ):
        pixel_loss(restored, target[..., :3])


# ---------------------------------------------------------------- folders


def test_saved_folder_loads_to_the_same_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toy_restorer(scale=2, heads=(1, 1, 2, 2))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    inputs, noise = concat_reference(*random_inputs(2)), torch.randn(2, 16)
    for loaded in (DiffRIR.from_pretrained(tmp_path), load_restorer(tmp_path, scale=2, phase="diffusion")):
        assert not loaded.training
        assert torch.equal(loaded(inputs, noise=noise).image, model(inputs, noise=noise).image)
    assert capsys.readouterr().out == ""


def test_folder_of_another_kind_says_which_it_is(tmp_path: Path) -> None:
    toy_restorer(scale=4, phase="prior").save_pretrained(tmp_path)
    kind = re.escape(f"{tmp_path} is a restorer of scale 4, phase prior, with reference; expected scale 1, phase")
    with pytest.raises(RestorerError, match=kind):
        load_restorer(tmp_path, scale=1, phase="diffusion")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    toy_restorer().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_refinement_blocks": 1', '"num_refinement_blocks": 2'))
    with pytest.raises(RestorerError, match=r"does not fit its config.json \(scale 1, phase diffusion"):
        load_restorer(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RestorerError, match=r"model\.safetensors does not exist"):
        load_restorer(tmp_path)
    with pytest.raises(RestorerError, match=r"nowhere holds no config\.json"):
        load_restorer(tmp_path / "nowhere")


# ---------------------------------------------------------------- whole pictures


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 40), (33, 31)])
def test_any_size_is_restored(scale: int, height: int, width: int) -> None:
    model = toy_restorer(scale=scale)
    low_quality, ground_truth = torch.rand(1, 3, height, width), torch.rand(1, 3, height * scale, width * scale)
    noise = torch.randn(1, 16)
    nothing, everything = torch.zeros_like(ground_truth[:, :1]), torch.ones_like(ground_truth[:, :1])
    assert torch.equal(restore_batch(model, low_quality, ground_truth, nothing, noise=noise), ground_truth)
    restored = restore_batch(model, low_quality, ground_truth, everything, noise=noise)
    raw = restore_batch(model, low_quality, ground_truth, everything, noise=noise, composed=False)
    assert restored.shape == ground_truth.shape and torch.equal(restored, raw) and restored.isfinite().all()


def test_padding_mirrors_back_and_forth() -> None:
    images = torch.rand(2, 3, 4, 5)
    for borders in ((0, 3, 0, 2), (1, 2, 3, 1), (9, 20, 7, 11)):
        left, right, top, bottom = borders
        expected = np.pad(images.numpy(), ((0, 0), (0, 0), (top, bottom), (left, right)), mode="reflect")
        assert np.array_equal(reflect(images, *borders).numpy(), expected)
    assert reflect(images[:1, :1, :1, :1] > 2, 0, 3, 0, 2).shape == (1, 1, 3, 4)


def test_pixels_are_rounded_and_the_input_is_left_alone() -> None:
    images = torch.tensor([-1.0, 0.0, 0.5, 0.999, 2.0])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255]
    assert images[0] == -1 and images[-1] == 2


# ---------------------------------------------------------------- what does not fit


def shaped(low: tuple[int, ...], truth: tuple[int, ...], mask: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(low), torch.zeros(truth), torch.zeros(mask)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (shaped((1, 3, 8, 8), (1, 3, 9, 8), (1, 1, 9, 8)), "1, 2 or 4 times as high and wide as low_quality"),
        (shaped((1, 3, 8, 8), (1, 3, 8, 8), (1, 1, 8, 9)), "ground_truth and edit_mask of the same height and width"),
        (shaped((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)), "expected (B, 3, H/s, W/s), (B, 3, H, W) and (B, 1, H, W)"),
        (shaped((2, 3, 8, 8), (1, 3, 8, 8), (1, 1, 8, 8)), "the same number of pictures"),
        (shaped((3, 8, 8), (3, 8, 8), (1, 8, 8)), "expected (B, 3, H/s, W/s)"),
        ((torch.zeros(1, 3, 8, 8).byte(), *shaped((), (1, 3, 8, 8), (1, 1, 8, 8))[1:]), "divide 8-bit ones by 255"),
    ],
)
def test_mismatch_names_all_three_inputs(inputs: tuple[Tensor, ...], message: str) -> None:
    low_quality, ground_truth, edit_mask = inputs
    names = (
        f"low_quality is {tuple(low_quality.shape)} {str(low_quality.dtype)[6:]}, "
        f"ground_truth {tuple(ground_truth.shape)} float32 and edit_mask {tuple(edit_mask.shape)} float32; "
    )
    with pytest.raises(InputError, match=re.escape(names) + ".*" + re.escape(message)):
        concat_reference(*inputs)


def test_scale_that_was_asked_for_is_checked() -> None:
    with pytest.raises(InputError, match="4 times as high and wide"):
        concat_reference(*shaped((1, 3, 8, 8), (1, 3, 16, 16), (1, 1, 16, 16)), scale=4)


@pytest.mark.parametrize(
    ("phase", "inputs", "more", "message"),
    [
        ("diffusion", (1, 15, 32, 32), {}, r"inputs are \(1, 15, 32, 32\); this network \(scale 1, .* expects \(B, 6,"),
        ("diffusion", (6, 32, 32), {}, r"inputs are \(6, 32, 32\)"),
        ("diffusion", (1, 6, 32, 48), {}, "inputs are 32 x 48; at scale 1 both sides have to be multiples of 32"),
        ("prior", (1, 6, 32, 32), {}, "without ground_truth; phase prior needs it"),
        ("diffusion", (1, 6, 32, 32), {"ground_truth": (1, 3, 32, 32)}, "phase diffusion must not see it"),
        ("prior", (1, 6, 32, 32), {"ground_truth": (1, 3, 64, 64)}, r"expected ground_truth \(1, 3, 32, 32\)"),
        ("diffusion", (1, 6, 32, 32), {"noise": (1, 256)}, r"noise is \(1, 256\); expected \(1, 16\)"),
        ("diffusion", (1, 6, 32, 32), {"teacher_prior": (2, 16)}, r"teacher_prior is \(2, 16\); expected \(1, 16\)"),
    ],
)
def test_tensors_that_do_not_fit_the_network(
    phase: str, inputs: tuple[int, ...], more: dict[str, tuple[int, ...]], message: str
) -> None:
    model = toy_restorer(phase=phase)
    with pytest.raises(InputError, match=message):
        model(torch.zeros(inputs), **{name: torch.zeros(shape) for name, shape in more.items()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 3}, "scale is 3; expected 1, 2 or 4"),
        ({"phase": "gan"}, "phase is 'gan'; expected 'prior' or 'diffusion'"),
        ({"norm": "none"}, "norm is 'none'"),
        ({"heads": (1, 2, 4)}, r"heads \[1, 2, 4\]; expected 4 numbers each"),
        ({"heads": (3, 2, 4, 8)}, "levels of .* channels that their heads divide"),
        ({"prior_width": 10}, "prior_width is 10; expected a multiple of 4"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RestorerError, match=message):
        toy_restorer(**settings)


def test_schedule_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"a diffusion of 0 timesteps with betas from 0\.1 to 0\.99 was asked for"):
        diffusion_schedule(timesteps=0)
