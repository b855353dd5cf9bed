"""Restoration training: settings, pairs that depend on their index alone, what each phase moves, and exact resuming.

The published code leaves the teacher unfrozen, starts its average from other weights than it trains, and cannot start
its adversarial phase. Run: pytest tests/integration/test_diffrir_train.py
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import vgg19

from llmga.config import ConfigError, load_config
from llmga.diffrir import train as train_module
from llmga.diffrir.config import DiffRIRConfig, LossConfig
from llmga.diffrir.data import (
    PairSettings,
    collate,
    held_out_pairs,
    list_pictures,
)
from llmga.diffrir.degradation import scaled
from llmga.diffrir.discriminator import Discriminator
from llmga.diffrir.held_out import measure, validate
from llmga.diffrir.network import DiffRIR, RestorerError, load_restorer
from llmga.diffrir.perceptual import LAYER_WEIGHTS, PerceptualError, PerceptualLoss, load_perceptual
from llmga.diffrir.phases import DiscriminatorLoss, PredictionLoss, PriorLoss
from llmga.diffrir.train import train
from llmga.runtime import Interrupted, Ranks, RunFailed
from tests.toy import toy_restorer
from tests.toy_restoration import STEPS, make_pictures, settings, with_phase

REPOSITORY = Path(__file__).parents[2]
MILD = PairSettings(1, 32, 32, scaled(0.2))
LOSSES_ALONE = {"eval_every_steps": 0, "sample_every_steps": 0, "save_every_steps": 0}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_published_recipes(scale: int) -> None:
    cfg = load_config(DiffRIRConfig, REPOSITORY / f"configs/diffrir/x{scale}.yaml", check_machine=False)
    steps, marks = (400_000, [200_000, 300_000]) if scale == 1 else (1_000_000, [500_000, 700_000])
    prior, encoder, joint, gan = cfg.phases
    assert (prior.steps, prior.milestones, prior.decay, prior.contrast) == (steps, marks, 0.5, 0.06)
    assert (encoder.steps, encoder.milestones, encoder.decay) == (99_999, [60_000], 0.1)
    assert (encoder.steps + joint.steps, joint.milestones, joint.contrast) == (1_000_000, [600_000], 0.08)
    assert (gan.steps, gan.lr, gan.milestones, gan.border) == (400_000, 1e-4, [300_000], 4)
    assert gan.contrast == (0.06 if scale == 1 else 0.08) and gan.discriminator_lr == 1e-4
    assert {phase.lr for phase in (prior, encoder, joint)} == {2e-4} and joint.ema == gan.ema == 0.999
    assert (cfg.optim.betas, cfg.optim.weight_decay, cfg.data.picture_size, cfg.data.crop) == ((0.9, 0.99), 0, 400, 256)
    sharp = load_config(DiffRIRConfig, REPOSITORY / f"configs/diffrir/x{scale}_v2.yaml", check_machine=False)
    assert [phase.name for phase in sharp.phases] == ["gan"] and sharp.phases[0].sharpened
    assert cfg.model.scale == sharp.model.scale == scale
    with torch.device("meta"):
        DiffRIR(**{**vars(cfg.model), "phase": "diffusion"})


def test_toy_recipe_loads() -> None:
    cfg = load_config(DiffRIRConfig, REPOSITORY / "configs/diffrir/toy.yaml", check_machine=False)
    assert [phase.name for phase in cfg.phases] == ["prior", "encoder", "joint"]


def test_the_toy_recipe_holds_two_photographs_out() -> None:
    cfg = load_config(DiffRIRConfig, REPOSITORY / "configs/diffrir/toy.yaml", check_machine=False)
    trained, held_out = (
        [
            path.resolve()
            for source in sources
            if "photos" in source.path.name
            for path in list_pictures(replace(source, path=REPOSITORY / source.path))
        ]
        for sources in (cfg.data.sources, cfg.data.validation)
    )
    photographs = REPOSITORY / "tests/fixtures/llmga-datasetv2-mini/llmga-imgs"
    assert len(held_out) == 2 and not set(trained) & set(held_out)
    assert sorted([*trained, *held_out]) == sorted(path for path in photographs.rglob("*") if path.is_file())


def test_wandb_receives_the_picture_strips_each_phase_in_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    train(settings(tmp_path, "prior", "encoder", trackers="[wandb]", eval_every_steps=0, save_every_steps=0))
    wandb.teardown()
    shots = list((tmp_path / "run").rglob("media/images/*.png"))
    assert {shot.relative_to(tmp_path / "run").parts[0] for shot in shots} == {"prior", "encoder"}
    assert len(shots) == 6  # a row of the strip for each held-out picture
    assert {Image.open(shot).size for shot in shots} == {(5 * 32 + 4 * 2, 32)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["phases=[{name: joint, steps: 1}, {name: prior, steps: 1}]"], "expected some of prior, encoder, joint, gan"),
        (["phases=[]"], "found an empty list, expected some of prior, encoder, joint, gan, once each"),
        (["phases=[{name: joint, steps: 1}]"], "joint learns from a phase-prior restorer; give teacher"),
        (["phases=[{name: gan, steps: 1}]", "teacher=x"], "gan goes on from a phase-joint restorer; give restorer"),
        (["phases.0.milestones=[3, 9]"], r"found \[3, 9\] in a phase of 4 steps; expected rising numbers below it"),
        (["data.crop=40"], "found a crop of 40 and a picture of 32; expected a crop that is a multiple of 32"),
        (["run.max_steps=7"], "the phases say how long they are; remove run.max_steps"),
        (["data.validation=[]"], "need at least one source under data.validation"),
        (["data.sources.0.path=nowhere"], "nowhere does not exist"),
        (["teacher=nowhere"], r"nowhere holds no config\.json; expected a restorer's folder, such as final/"),
        (["model.scale=3"], r"model\.scale .*: found 3, expected 1, 2 or 4"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, overrides=tuple(overrides))


def test_the_adversarial_phase_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    missing = r"VGG19's ImageNet weights, which are not at .*vgg19-dcbb9e9d\.pth.*phases\.3\.loss\.perceptual=0"
    with pytest.raises(ConfigError, match=missing):
        settings(tmp_path, overrides=("phases.3.loss.perceptual=1",))


# ---------------------------------------------------------------- what each phase moves


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pictures = sorted(make_pictures(tmp_path_factory.mktemp("pictures")).glob("*.png"))
    return collate(held_out_pairs(pictures[:2], MILD))


def moved(module: nn.Module) -> set[str]:
    """First parts of the names of parameters that received a gradient."""
    return {name.split(".")[0] for name, value in module.named_parameters() if value.grad is not None}


def test_the_prior_phase_moves_generator_and_encoder(batch: dict[str, Any]) -> None:
    model = toy_restorer(phase="prior")
    loss, _ = PriorLoss(True, LossConfig())(model, batch)
    loss.backward()
    assert moved(model) == {"generator", "prior_encoder"}


def test_the_encoder_phase_leaves_generator_and_teacher_alone(batch: dict[str, Any]) -> None:
    teacher, model = toy_restorer(phase="prior"), toy_restorer(seed=1)
    model.generator.register_forward_hook(lambda *_: pytest.fail("the generator was run"))
    loss, figures = PredictionLoss(teacher, "encoder", LossConfig())(model, batch)
    loss.backward()
    assert moved(model) == {"prior_encoder", "denoiser"} and moved(teacher) == set()
    assert float(loss.detach()) == float(figures["loss_prior"].detach())


def test_the_joint_phase_sees_the_hole_alone_at_scale_1(batch: dict[str, Any]) -> None:
    teacher, model = toy_restorer(phase="prior"), toy_restorer(seed=1)
    whole = {**batch, "edit_mask": torch.zeros_like(batch["edit_mask"])}
    figures = PredictionLoss(teacher, "joint", LossConfig())(model, whole)[1]
    assert float(figures["loss_pixel"].detach()) == 0
    loss, figures = PredictionLoss(teacher, "joint", LossConfig())(model, batch)
    loss.backward()
    assert moved(model) == {"generator", "prior_encoder", "denoiser"} and moved(teacher) == set()
    torch.manual_seed(0)  # the chain starts from noise
    over_all = PredictionLoss(teacher, "joint", LossConfig())(model, batch)[1]["loss_pixel"]
    torch.manual_seed(0)
    over_hole = PredictionLoss(teacher, "joint", LossConfig(hole_average=True))(model, batch)[1]["loss_pixel"]
    assert float((over_hole * batch["edit_mask"].mean()).detach()) == pytest.approx(float(over_all.detach()), rel=1e-4)


def test_the_adversarial_phase_judges_what_it_made_against_unsharpened_truth(batch: dict[str, Any]) -> None:
    teacher, model, judge = toy_restorer(phase="prior"), toy_restorer(seed=1), Discriminator(8)
    sharpened = {**batch, "target": batch["ground_truth"] * 0.5}
    restorer_loss = PredictionLoss(teacher, "gan", LossConfig(), None, judge)
    loss, figures = restorer_loss(model, sharpened)
    assert set(figures) == {"loss_prior", "divergence", "loss_pixel", "loss_adversarial"}
    expected = figures["loss_prior"] + figures["loss_pixel"] + figures["loss_adversarial"]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    seen: list[Tensor] = []
    judge.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    DiscriminatorLoss(restorer_loss)(judge, sharpened)[0].backward()
    assert torch.equal(seen[0][:2], batch["ground_truth"]) and torch.equal(seen[0][2:], restorer_loss.restored)
    assert moved(model) == set() and "conv9" in moved(judge)


def test_perceptual_loss_compares_five_layers_before_their_relu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "vgg19.safetensors"
    with torch.device("meta"):  # its own initialisation takes seconds, most of them for layers not needed here
        features = vgg19().features
    features = features.to_empty(device="cpu")
    for parameter in features.parameters():
        nn.init.normal_(parameter, std=0.02)
    save_file({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    loss = load_perceptual(path)
    images, targets = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    normalised = [(x - loss.mean) / loss.deviation for x in (images, targets)]
    expected = sum(
        weight * (features[: layer + 1](normalised[0]) - features[: layer + 1](normalised[1])).abs().mean()
        for layer, weight in LAYER_WEIGHTS.items()
    )
    found = loss(images, targets)
    assert float(found) == pytest.approx(float(expected), rel=1e-5) and float(loss(targets, targets)) == 0
    found.backward()
    assert images.grad is not None and not any(p.requires_grad for p in loss.parameters())
    assert all(isinstance(features[layer], nn.Conv2d) for layer in LAYER_WEIGHTS)
    save_file({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(PerceptualError, match="does not hold VGG19's weights as torchvision saves them"):
        load_perceptual(path)
    with pytest.raises(PerceptualError, match=r"VGG19's weights: .* does not exist"):
        load_perceptual(tmp_path / "nothing.pth")
    assert isinstance(loss, PerceptualLoss)


# ---------------------------------------------------------------- held-out figures


def test_figures_of_the_truth_and_of_a_colour_error(batch: dict[str, Any]) -> None:
    perfect = measure(batch, batch["ground_truth"])
    assert perfect["psnr"].tolist() == [100, 100] and perfect["hole_psnr"].min() > 50
    off = measure(batch, (batch["ground_truth"] * 0.9 + 0.05).clamp(0, 1))
    assert off["gain_error"].numpy() == pytest.approx(0.1, abs=0.02)
    assert off["bias_error"].numpy() == pytest.approx(0.05, abs=0.015)
    assert (off["psnr"] < 60).all() and (off["hole_psnr"] < off["psnr"]).all()


def test_ranks_share_the_held_out_pictures(batch: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    pairs = held_out_pairs(sorted(make_pictures(tmp_path).glob("*.png"))[:3], MILD)
    model = toy_restorer(phase="prior")
    alone = validate(model, pairs, 2, Ranks())
    sums: list[list[float]] = []

    def of_both(values: list[float]) -> list[float]:
        sums.append(list(values))
        return [a + b for a, b in zip(sums[0], sums[-1], strict=True)] if len(sums) == 2 else list(values)

    monkeypatch.setattr("llmga.diffrir.held_out.sum_over_ranks", of_both)
    validate(model, pairs, 2, Ranks(0, 0, 2))
    assert validate(model, pairs, 2, Ranks(1, 1, 2)) == pytest.approx(alone)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through all phases."""
    return train(settings(tmp_path_factory.mktemp("restoration"))).parent


def lines(folder: Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def test_all_phases_hand_over_and_the_result_restores(whole: Path) -> None:
    prior, encoder, joint, gan = (
        load_file(whole / name / "final/model.safetensors") for name in ("prior", "encoder", "joint", "gan")
    )
    generator = [name for name in prior if name.startswith("generator.")]
    assert all(torch.equal(prior[name], encoder[name]) for name in generator)
    assert any(not torch.equal(encoder[name], joint[name]) for name in generator)
    assert gan.keys() == joint.keys() and any(not torch.equal(gan[name], joint[name]) for name in gan)
    assert load_file(whole / "final/model.safetensors").keys() == gan.keys()
    assert load_restorer(whole / "final", scale=1, phase="diffusion").prior_width == 16
    assert (whole / "gan/final/discriminator.safetensors").is_file()
    assert (whole / "joint/samples/step-4.png").is_file() and "step-4.png" in (
        whole / "joint/samples/index.html"
    ).read_text()
    assert len(lines(whole / "joint", "eval_psnr")) == 2 and len(lines(whole / "joint", "eval_seam")) == 2
    facts = json.loads((whole / "joint/final/provenance.json").read_text())
    assert facts["phase"] == "joint" and len(facts["inputs"]) >= 4


def test_the_average_follows_the_trained_weights(whole: Path) -> None:
    """Exported weights lie near those at the end, which an average started elsewhere would not."""
    last = load_file(whole / f"joint/checkpoint-{STEPS}/restorer.safetensors")
    averaged = load_file(whole / f"joint/checkpoint-{STEPS}/restorer.ema.safetensors")
    exported = load_file(whole / "joint/final/model.safetensors")
    name = "prior_encoder.head.weight"
    assert torch.equal(exported[name], averaged[name]) and not torch.equal(exported[name], last[name])
    assert (exported[name] - last[name]).abs().max() < STEPS * 1e-2  # as far as Adam can go


@pytest.mark.parametrize("phase", ["encoder", "gan"])
def test_a_stopped_phase_goes_on_to_the_same_weights(whole: Path, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("prior", "encoder", "joint", "gan")
    before = "joint" if phase == "gan" else None
    starts = [f"teacher={whole / 'prior/final'}", *([f"restorer={whole / before / 'final'}"] if before else [])]
    cfg = settings(whole.parent, phase, output_dir=f"again-{phase}", overrides=tuple(starts))
    calls: list[int] = []
    real = PredictionLoss.__call__

    def stopping(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(PredictionLoss, "__call__", stopping)
    with pytest.raises(Interrupted, match="after step 3 of 4"):
        train(cfg)
    again = train(cfg)
    expected = load_file(whole / phase / "final/model.safetensors")
    found = load_file(again / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected) and phase in names
    assert lines(whole.parent / f"again-{phase}" / phase, "loss") == lines(whole / phase, "loss")


@pytest.mark.parametrize(("scale", "reference"), [(2, True), (4, True), (1, False)])
def test_other_scales_and_the_network_without_reference_train_too(tmp_path: Path, scale: int, reference: bool) -> None:
    words = (f"model.scale={scale}", f"model.reference={str(reference).lower()}", "phases.1.sharpened=true")
    made = load_restorer(
        train(settings(tmp_path, "prior", "joint", overrides=words, **LOSSES_ALONE)), scale, "diffusion"
    )
    prior = load_file(tmp_path / "run/prior/final/model.safetensors")["generator.embed.weight"]
    assert made.reference is reference and prior.shape == made.generator.embed.weight.shape
    assert (prior - made.generator.embed.weight).abs().max() < STEPS * 1e-2 + 1e-6  # went on from there


def test_checkpointing_keeps_less_and_changes_nothing(whole: Path) -> None:
    again = train(settings(whole.parent, "prior", output_dir="checkpointing", gradient_checkpointing=True))
    found, expected = (load_file(folder / "model.safetensors") for folder in (again, whole / "prior/final"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    kept = []
    for enabled in (False, True):
        model = toy_restorer(phase="prior", num_blocks=(4, 1, 1, 1), num_refinement_blocks=4)
        model.use_checkpointing(enabled)
        kept.append(0)
        hooks = (lambda value: kept.__setitem__(-1, kept[-1] + value.nbytes) or value, lambda value: value)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            model(torch.rand(1, 6, 64, 64), torch.rand(1, 3, 64, 64))
    assert kept[1] < kept[0] / 2


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    written = {
        path: path.stat().st_mtime_ns for path in [*whole.glob("*/checkpoint-*/complete"), *whole.glob("final/*")]
    }
    assert train(settings(whole.parent)) == whole / "final"
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_loss_that_is_not_finite_stops_and_names_the_pictures(tmp_path: Path, monkeypatch: Any) -> None:
    real = PriorLoss.__call__
    calls: list[int] = []

    def broken(self: Any, *args: Any) -> Any:
        calls.append(1)
        loss, figures = real(self, *args)
        return (loss * float("nan") if len(calls) == 2 else loss), figures

    monkeypatch.setattr(PriorLoss, "__call__", broken)
    with pytest.raises(RunFailed, match="step 2: the loss is nan"):
        train(settings(tmp_path, "prior"))
    assert "picture" in next((tmp_path / "run/prior/non_finite").rglob("*.json")).read_text()


def test_folders_that_do_not_fit_the_settings(whole: Path) -> None:
    teacher = f"teacher={whole / 'prior/final'}"
    with pytest.raises(RestorerError, match="scale 1, phase prior, with reference; expected scale 2, phase prior"):
        train(settings(whole.parent, "encoder", output_dir="x2", overrides=(teacher, "model.scale=2")))
    with pytest.raises(RestorerError, match="phase prior, with reference; expected scale 1, phase diffusion"):
        wrong = f"restorer={whole / 'prior/final'}"
        train(settings(whole.parent, "joint", output_dir="phase", overrides=(teacher, wrong)))
    with pytest.raises(
        RestorerError, match=r"does not fit the settings of the model .*set model\.\* as it was trained"
    ):
        train(settings(whole.parent, "encoder", output_dir="dim", overrides=(teacher, "model.dim=16")))


def test_one_batch_is_overfitted_in_every_phase(tmp_path: Path) -> None:
    """Fixed pairs, more steps: the loss of each phase falls."""
    make_pictures(tmp_path / "pictures", 2, 32)
    cfg = settings(tmp_path, "prior", "encoder", "joint", **LOSSES_ALONE)
    for index in range(3):
        cfg = with_phase(cfg, index, steps=14, lr=3e-3)
    folder = train(cfg).parent
    for name in ("prior", "encoder", "joint"):
        losses = lines(folder / name, "loss")
        assert np.mean(losses[-4:]) < np.mean(losses[:4]), name


def test_the_learning_rate_falls_at_each_milestone() -> None:
    assert [train_module._falling([2, 4], 0.5, done) for done in range(5)] == [1, 1, 0.5, 0.5, 0.25]
