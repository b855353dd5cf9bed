"""Guards that released restoration weights do here what they did in the published code, in use and in training.

The goldens were written by the published network on one CPU in float32; networks are built by the converter.
Run: pytest tests/parity/test_diffrir.py
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmga.diffrir.convert import from_reference_state_dict, to_reference_state_dict
from llmga.diffrir.loss import distillation_loss, pixel_loss
from llmga.diffrir.network import DiffRIR
from llmga.diffrir.prior import PriorDiffusion, diffusion_schedule
from llmga.diffrir.reference import compose, concat_reference
from llmga.diffrir.released_names import released_names
from llmga.diffrir.restore import pad_inputs, restore_batch, to_uint8
from llmga.metrics.pictures import psnr_luma
from tests.golden_diffrir import Case, golden_case, golden_weights

PRIOR_CASES = ("s1_x1", "s1_x2", "s1_x4")
DIFFUSION_CASES = ("s2_x1", "s2_x2", "s2_x4", "s2_x1_full_width")
STEP_CASES = ("train_step_x1", "train_step_x4")
ON_IMAGES, ELSEWHERE = 1e-4, 1e-5  # float32 sums in another order; one wrong percent in one weight moves images by 1e-4
ON_GRADIENT_NORMS = 1e-4


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = ELSEWHERE) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def inputs_of(case: Case) -> Tensor:
    return concat_reference(case.picture("lq"), case.picture("gt"), case.arrays["mask"])


def assert_gradient_norms(model: DiffRIR, expected: dict[str, float]) -> None:
    """L2 norm of every parameter's gradient, by released name; those not listed have none."""
    parameters = dict(model.named_parameters())
    found = {
        name: parameters[own].grad.norm().item()
        for own, name in released_names(model).items()
        if own in parameters and parameters[own].grad is not None
    }
    assert found == {name: pytest.approx(norm, rel=ON_GRADIENT_NORMS) for name, norm in expected.items()}


def record_stages(model: DiffRIR, case: Case) -> dict[str, Tensor]:
    """Outputs of the generator's parts under their published names, filled by the next pass."""
    g = model.generator
    parts = {"patch_embed": g.embed, "latent": g.latent, "refinement": g.refinement, "tail": g.tail}
    parts |= {f"encoder_level{i + 1}": module for i, module in enumerate(g.encoders)}
    parts |= {f"decoder_level{i + 1}": module for i, module in enumerate(g.decoders)}
    parts |= {f"down{i + 1}_{i + 2}": module for i, module in enumerate(g.downs)}
    parts |= {f"up{i + 2}_{i + 1}": module for i, module in enumerate(g.ups)}
    parts |= {f"reduce_chan_level{i + 2}": module for i, module in enumerate(g.reducers)}
    assert {f"stage.{name}" for name in parts} == {name for name in case.arrays if name.startswith("stage.")}
    seen: dict[str, Tensor] = {}
    for name, module in parts.items():
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(f"stage.{name}", output))
    return seen


@pytest.mark.parametrize("name", [*PRIOR_CASES, *DIFFUSION_CASES, "infer_x1"])
def test_weights_of_the_recipe(name: str) -> None:
    facts = golden_case(name).facts
    weights = golden_weights(facts["seed"], facts["params"])
    for group, expected in facts["checksum"].items():
        own = torch.cat([value.flatten().double() for key, value in weights.items() if key.startswith(f"{group}.")])
        assert (own.sum().item(), own.abs().sum().item(), len(own)) == (
            pytest.approx(expected["sum"]),
            pytest.approx(expected["abs_sum"]),
            expected["count"],
        )


@pytest.mark.parametrize("name", PRIOR_CASES)
def test_prior_phase(name: str) -> None:
    case = golden_case(name)
    model = case.network()
    assert (model.phase, model.scale) == ("prior", case.facts["scale"])
    inputs = inputs_of(case)
    assert torch.equal(inputs, case.arrays["net_in"])
    stages = record_stages(model, case) if name == "s1_x1" else {}
    ground_truth = case.picture("gt")
    restored = model(inputs, ground_truth)
    assert_close(restored.prior, case.arrays["ipr"])
    assert_close(restored.image, case.arrays["sr"], ON_IMAGES)
    for stage, output in stages.items():
        assert_close(output, case.arrays[stage], ON_IMAGES)

    loss = pixel_loss(restored.image, ground_truth)
    loss.backward()
    assert loss.item() == pytest.approx(case.facts["l1_loss"], rel=ELSEWHERE)
    assert_gradient_norms(model, case.facts["grad_norm"])


@pytest.mark.parametrize("name", DIFFUSION_CASES)
@torch.no_grad()
def test_diffusion_phase_in_use(name: str) -> None:
    case = golden_case(name)
    model = case.network()
    assert (model.phase, model.scale) == ("diffusion", case.facts["scale"])
    inputs = inputs_of(case)
    stages = record_stages(model, case) if name == "s2_x1" else {}
    restored = model(inputs, noise=case.arrays["noise"])
    assert_close(model.encode_prior(inputs), case.arrays["cond"])
    assert_close(torch.stack(restored.prior_steps), case.arrays["ipr_steps"])
    assert torch.equal(restored.prior, restored.prior_steps[-1])
    assert_close(restored.image, case.arrays["sr"], ON_IMAGES)
    for stage, output in stages.items():
        assert_close(output, case.arrays[stage], ON_IMAGES)


@pytest.mark.parametrize("name", ["s2_x1", "s2_x2", "s2_x4"])
def test_diffusion_phase_in_training(name: str) -> None:
    case = golden_case(name)
    model = case.network()
    teacher, noise = case.arrays["teacher_ipr"], case.arrays["train_noise"]
    assert_close(model.diffusion.add_noise(teacher, noise), case.arrays["train_x_T"])
    restored = model(inputs_of(case), teacher_prior=teacher, noise=noise)
    assert_close(torch.stack(restored.prior_steps), case.arrays["train_ipr_steps"])
    assert_close(restored.image, case.arrays["train_sr"], ON_IMAGES)

    pixels, distillation = (
        pixel_loss(restored.image, case.picture("gt")),
        distillation_loss(restored.prior, teacher),
    )
    (pixels + distillation.absolute).backward()
    expected = case.facts["train"]
    assert pixels.item() == pytest.approx(expected["l_pix"], rel=ELSEWHERE)
    assert distillation.absolute.item() == pytest.approx(expected["l_kd_abs"], rel=ELSEWHERE)
    assert distillation.divergence.item() == pytest.approx(expected["l_kd_kl"], rel=ELSEWHERE)
    assert_gradient_norms(model, expected["grad_norm"])


@pytest.mark.parametrize("part", ["encoder", "joint"])
@pytest.mark.parametrize("name", STEP_CASES)
def test_one_optimisation_step(name: str, part: str) -> None:
    case = golden_case(name)
    expected = case.facts[part]
    model, teacher = case.network(), case.network("teacher_seed", "teacher_params")
    assert teacher.phase == "prior"
    inputs, ground_truth = inputs_of(case), case.picture("gt")
    teacher_prior = teacher.encode_prior(inputs, ground_truth)
    assert_close(teacher_prior, case.arrays["teacher_ipr"])
    restored = model(inputs, teacher_prior=teacher_prior, noise=case.arrays["noise"], prior_only=part == "encoder")
    distillation = distillation_loss(restored.prior, teacher_prior, case.facts["kd"]["temperature"])
    losses = {"l_kd_3": distillation.divergence, "l_abs_3": distillation.absolute}
    total = distillation.absolute
    if part == "joint":
        scale = case.facts["scale"]
        output = compose(restored.image, ground_truth, case.arrays["mask"]) if scale == 1 else restored.image
        assert_close(output, case.arrays["joint_output"], ON_IMAGES)
        losses["l_pix"] = pixel_loss(output, ground_truth)
        total = total + losses["l_pix"]
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected["losses"], rel=ELSEWHERE)

    adam = case.facts["adam"]
    trained = model.parameters() if part == "joint" else model.prior_parameters()
    optimizer = torch.optim.Adam(trained, lr=adam["lr"], betas=tuple(adam["betas"]))
    before = to_reference_state_dict(model)
    before = {key: value.clone() for key, value in before.items()}
    total.backward()
    assert_gradient_norms(model, expected["grad_norm"])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimizer.step()
    after = to_reference_state_dict(model)
    for prefix, norm in expected["update_l2"].items():
        keys = [key for key in before if key.startswith(prefix)]
        change = torch.cat([(after[key] - before[key]).flatten() for key in keys]).norm().item()
        # Adam's first step is lr * sign(gradient) nearly everywhere: entries whose gradient is rounding noise may flip.
        assert change == pytest.approx(norm, rel=1e-3)


def test_inference_with_padding_and_composition() -> None:
    case = golden_case("infer_x1")
    model = case.network()
    low_quality, ground_truth, mask = case.picture("im"), case.picture("gt"), case.picture("mask_raw")
    noise = case.arrays["noise"]
    padded = pad_inputs(low_quality, ground_truth, mask, model.scale)
    with torch.no_grad():
        image = model(concat_reference(*padded), noise=noise).image
    assert_close(image, case.arrays["sr_padded"], ON_IMAGES)
    restored = restore_batch(model, low_quality, ground_truth, mask, noise=noise)
    assert_close(restored, case.arrays["out"], ON_IMAGES)
    # A value that lies within the tolerance of the middle between two grey levels may be rounded the other way.
    difference = (to_uint8(restored)[0].permute(1, 2, 0).int() - case.arrays["out_u8"].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01
    for border, key in ((0, "psnr_y_crop0"), (4, "psnr_y_out_vs_gt")):
        assert psnr_luma(restored, ground_truth, border).item() == pytest.approx(case.facts[key], abs=1e-3)


def test_schedule() -> None:
    case = golden_case("schedule")
    settings = case.facts["cases"]["default"]
    arrays = {name.removeprefix("default."): value for name, value in case.arrays.items()}
    schedule = diffusion_schedule(**settings)
    for name, values in schedule.items():
        assert_close(values, arrays.pop(name))
    diffusion = PriorDiffusion(**settings)
    x_0, eps = arrays.pop("x0"), arrays.pop("eps")
    assert_close(diffusion.add_noise(x_0, eps), arrays.pop("x_T"))
    means = [diffusion.posterior_mean(x_0, eps, t) for t in range(settings["timesteps"])]
    assert_close(torch.stack(means), arrays.pop("post_mean"))
    assert not arrays


def test_distillation_losses() -> None:
    case = golden_case("kd")
    for expected in case.facts["values"]:
        student = case.arrays["s2"].clone().requires_grad_()
        teacher = case.arrays["s1"].clone().requires_grad_()
        losses = distillation_loss(student, teacher, expected["temperature"])
        assert losses.divergence.item() == pytest.approx(expected["kl"], rel=ELSEWHERE)
        assert losses.absolute.item() == pytest.approx(expected["l1"], rel=ELSEWHERE)
        (losses.divergence + losses.absolute).backward()
        assert student.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=ON_GRADIENT_NORMS)
        assert teacher.grad is None


def released_checkpoint() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The complete released form of a golden network, aliases and schedule included, and the facts of its case."""
    case = golden_case("s2_x1")
    weights = golden_weights(case.facts["seed"], case.facts["params"])
    weights |= {key.removeprefix("w."): value for key, value in case.arrays.items() if key.startswith("w.diffusion.")}
    for key, _ in case.facts["reference_state_dict_keys"]:
        for copy, original in (("diffusion.condition.", "condition."), ("diffusion.model.", "denoise.")):
            if key.startswith(copy):
                weights[key] = weights[original + key.removeprefix(copy)]
    return weights, case.facts


def test_released_checkpoint_there_and_back() -> None:
    weights, facts = released_checkpoint()
    listed = {key: tuple(shape) for key, shape in facts["reference_state_dict_keys"]}
    assert {key: tuple(value.shape) for key, value in weights.items()} == listed
    returned = to_reference_state_dict(from_reference_state_dict(weights))
    assert {key: tuple(value.shape) for key, value in returned.items()} == listed
    for key, value in weights.items():
        tolerance = 1e-6 if key.startswith("diffusion.") and key.count(".") == 1 else 0
        torch.testing.assert_close(returned[key], value, rtol=tolerance, atol=tolerance)
