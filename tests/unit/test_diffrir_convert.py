"""Released restoration checkpoints: every size is read off the shapes, and whatever does not fit is named.

Run: pytest tests/unit/test_diffrir_convert.py
"""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmga.diffrir.convert import (
    CheckpointError,
    convert_restorer,
    discriminator_from_reference_state_dict,
    discriminator_to_reference_state_dict,
    export_restorer,
    from_reference_state_dict,
    to_reference_state_dict,
)
from llmga.diffrir.discriminator import Discriminator
from llmga.diffrir.network import RestorerError, load_restorer
from tests.toy import toy_restorer

Weights = dict[str, Tensor]


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 1, "phase": "prior"},
        {"scale": 2, "reference": False},
        {"scale": 4, "num_blocks": (2, 1, 2, 1), "num_refinement_blocks": 3, "heads": (2, 1, 4, 2)},
        {"bias": True, "norm": "with_bias", "num_prior_blocks": 0, "prior_width": 32},
        {
            "num_denoiser_layers": 2,
            "timesteps": 6,
            "linear_start": 0.2,
            "linear_end": 0.9,
            "ffn_expansion_factor": 2.66,
        },
    ],
)
def test_every_setting_is_read_off_the_weights(settings: dict[str, Any]) -> None:
    model = toy_restorer(**settings)
    released = to_reference_state_dict(model)
    returned = from_reference_state_dict(released)
    assert returned.describe() == model.describe()
    for name in ("timesteps", "linear_start", "linear_end"):
        assert getattr(returned.diffusion, name) == getattr(model.diffusion, name)
    state = model.state_dict()
    assert returned.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in returned.state_dict().items())
    again = to_reference_state_dict(returned)
    assert again.keys() == released.keys() and all(torch.equal(again[key], released[key]) for key in released)


def test_file_to_folder_and_back(tmp_path: Path) -> None:
    model = toy_restorer(scale=2)
    export_restorer(model, tmp_path / "net.pth")
    convert_restorer(tmp_path / "net.pth", tmp_path / "folder", scale=2)
    loaded = load_restorer(tmp_path / "folder")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    provenance = json.loads((tmp_path / "folder" / "provenance.json").read_text())
    assert provenance["weights"] == "ema" and "torch" in provenance["versions"]
    assert len(provenance["inputs"][0]["sha256"]) == 64 and "net.pth" in str(provenance["inputs"][0])
    with pytest.raises(FileExistsError, match="exists already"):
        convert_restorer(tmp_path / "net.pth", tmp_path / "folder")


def test_averaged_or_last_weights(tmp_path: Path) -> None:
    last, averaged = (to_reference_state_dict(toy_restorer(seed)) for seed in (1, 2))
    content = {"params": {f"module.{key}": value for key, value in last.items()}, "params_ema": averaged}

    def first(content: dict[str, Any], ema: bool) -> Tensor:
        return from_reference_state_dict(content, ema=ema).generator.embed.weight

    assert torch.equal(first(content, ema=True), averaged["G.patch_embed.proj.weight"])
    assert torch.equal(first(content, ema=False), last["G.patch_embed.proj.weight"])
    del content["params_ema"]
    assert torch.equal(first(content, ema=True), last["G.patch_embed.proj.weight"])


def test_checkpoint_without_schedule_has_the_published_one() -> None:
    released = to_reference_state_dict(toy_restorer())
    stripped = {key: value for key, value in released.items() if not re.fullmatch(r"diffusion\.[a-z0-9_]+", key)}
    assert len(released) - len(stripped) == 12
    assert from_reference_state_dict(stripped).diffusion.timesteps == 4


@pytest.mark.parametrize(
    ("phase", "expected", "message"),
    [
        ("prior", {"phase": "diffusion"}, "this checkpoint is a restorer of scale 1, phase prior, with reference; "),
        ("diffusion", {"scale": 4}, "this checkpoint is a restorer of scale 1, .*; expected scale 4"),
    ],
)
def test_another_scale_or_phase_says_which_it_is(phase: str, expected: dict[str, Any], message: str) -> None:
    with pytest.raises(RestorerError, match=message):
        from_reference_state_dict(to_reference_state_dict(toy_restorer(phase=phase)), **expected)


def without(key: str) -> Callable[[Weights], None]:
    return lambda weights: weights.__delitem__(key)


def with_one(key: str, value: Callable[[Weights], Any]) -> Callable[[Weights], None]:
    return lambda weights: weights.update({key: value(weights)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("G.tail.1.bias"), r"1 keys are missing, first G\.tail\.1\.bias"),
        (without("G.latent.0.attn.temperature"), r"has no G\.latent\.0\.attn\.temperature"),
        (
            without("G.patch_embed.proj.weight"),
            "this is no DiffRIR checkpoint: its keys begin with G, condition, denoise",
        ),
        (
            without("condition.mlp.0.bias"),
            r"diffusion\.condition\.mlp\.0\.bias has no condition\.mlp\.0\.bias beside it",
        ),
        (with_one("G.extra", lambda _: torch.ones(1)), r"1 keys are unknown, first G\.extra"),
        (with_one("epoch", lambda _: 3), "epoch is not a tensor"),
        (
            with_one("G.tail.1.bias", lambda _: torch.ones(4)),
            r"G\.tail\.1\.bias is \(4,\); expected \(3,\) for scale 1",
        ),
        (
            with_one("G.patch_embed.proj.weight", lambda _: torch.ones(8, 7, 3, 3)),
            r"takes 7 channels; expected one of 3, 12, 48, 51, 60, 96",
        ),
        (
            with_one("diffusion.model.resmlp.0.bias", lambda w: w["denoise.resmlp.0.bias"] + 1),
            r"diffusion\.model\.resmlp\.0\.bias and denoise\.resmlp\.0\.bias differ",
        ),
        (
            with_one("diffusion.posterior_mean_coef1", lambda _: torch.ones(4)),
            r"diffusion\.posterior_mean_coef1 is \[1\.0.*; its betas give",
        ),
        (
            with_one("G.latent.0.ffn.project_out.weight", lambda w: w["G.latent.0.ffn.project_out.weight"][:, :9]),
            "follow from no common expansion factor",
        ),
        (with_one("diffusion.gammas", lambda _: torch.ones(4)), r"1 keys are unknown, first diffusion\.gammas"),
    ],
)
def test_what_does_not_fit_is_named(damage: Callable[[Weights], None], message: str) -> None:
    weights = to_reference_state_dict(toy_restorer())
    damage(weights)
    with pytest.raises(CheckpointError, match=message):
        from_reference_state_dict(weights)


def test_discriminator_of_something_else() -> None:
    with pytest.raises(CheckpointError, match=r"has no conv0\.weight; expected a discriminator's"):
        discriminator_from_reference_state_dict(to_reference_state_dict(toy_restorer()))
    weights = discriminator_to_reference_state_dict(Discriminator(width=8))
    weights["conv9.bias"] = torch.ones(2)
    with pytest.raises(CheckpointError, match=r"does not fit a discriminator of width 8: (.|\n)*conv9\.bias"):
        discriminator_from_reference_state_dict(weights)


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("harm",))


def test_files_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.pth"
    with pytest.raises(CheckpointError, match=r"net\.pth does not exist"):
        convert_restorer(file, tmp_path / "folder")
    file.write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match=r"net\.pth: it cannot be read as a PyTorch file of tensors"):
        convert_restorer(file, tmp_path / "folder")
    file.write_bytes(pickle.dumps({"params": Harm()}, protocol=2))
    with pytest.raises(CheckpointError, match="it cannot be read as a PyTorch file of tensors"):
        convert_restorer(file, tmp_path / "folder")
    torch.save([torch.ones(1)], file)
    with pytest.raises(CheckpointError, match="it holds a list; expected a dict of tensors"):
        convert_restorer(file, tmp_path / "folder")
    assert "harm" not in capsys.readouterr().out and not (tmp_path / "folder").exists()
