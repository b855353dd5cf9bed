"""Guards the recipes of the toy Stable Diffusion: interrupted runs, labels, readings, the inpainting twin.

Run: pytest tests/integration/test_toy_sd.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llmga.tokens import clip_tokenizer
from llmga.toyworld.autoencoder import (
    AutoencoderRecipe,
    build_autoencoder,
    decode_latents,
    draw,
    encode_pictures,
    train_autoencoder,
)
from llmga.toyworld.readings import count_right, shares
from llmga.toyworld.scene import SPLITS, sample_scene
from llmga.toyworld.text_encoder import VALUES, TextRecipe, caption_windows, said_so_far, train_text_encoder
from llmga.toyworld.tower import UNSEEN, TowerRecipe, build_tower
from llmga.toyworld.training import Schedule, fit
from llmga.toyworld.unet import (
    UnetRecipe,
    build_unet,
    inpainting_conditions,
    prepare_latents,
    train_unet,
    widen_for_inpainting,
)

TWO_STEPS = Schedule(steps=2, lr=1e-3, warmup=1)
TINY_TEXT = TextRecipe(hidden_size=16, num_layers=1, num_heads=2, num_captions=8, num_held_out=4, batch_size=4,
                       schedule=TWO_STEPS)  # fmt: skip
TINY_UNET = UnetRecipe(widths=(16, 16), num_heads=2, num_scenes=3, captions_per_scene=2, num_held_out=2, batch_size=2,
                       schedule=TWO_STEPS, inpainting=TWO_STEPS)  # fmt: skip


def test_an_interrupted_run_gives_the_weights_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmga.toyworld.training.SAVE_EVERY_SECONDS", -1.0)
    schedule = Schedule(steps=8, lr=0.1, warmup=2, ema_decay=0.5, report_every=4)

    def train(state: Path, die_at: int | None = None) -> tuple[nn.Module, list[str]]:
        torch.manual_seed(0)
        model, lines = nn.Linear(3, 1), []

        def loss_of_step(step: int) -> torch.Tensor:
            if step == die_at:
                raise KeyboardInterrupt
            return model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).square().mean()

        report = lambda now: f"weight {now.weight[0, 0]:.3f}"  # noqa: E731
        return fit("line", model, loss_of_step, schedule, state, report, lines.append), lines

    unbroken, lines = train(tmp_path / "a.pt")
    assert len(lines) == 2 and lines[1].startswith("line: step 8/8, loss ") and "weight " in lines[1]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b.pt", die_at=5)
    resumed, lines = train(tmp_path / "b.pt")
    assert torch.equal(resumed.weight, unbroken.weight) and len(lines) == 1 and not resumed.training


def test_clean_pictures_are_read_whole_and_bare_ones_not_at_all() -> None:
    scenes = [sample_scene(seed) for seed in SPLITS["test"][:4]]
    pictures = draw(SPLITS["test"][:4])
    assert set(shares(count_right(pictures, scenes)).values()) == {1.0}
    bare = np.broadcast_to(pictures[:, :1, :1], pictures.shape).copy()
    counts = count_right(bare, scenes)
    assert counts["background"] == (4, 4) and counts["colour"] == (0, sum(len(scene.objects) for scene in scenes))
    assert shares(counts)["mean"] == pytest.approx(0.2)
    asked = [{("background", None): scene.background} for scene in scenes]
    assert count_right(pictures, scenes, asked)["shape"] == (0, 0)


def test_each_token_is_labelled_with_what_its_sentence_has_said_by_then() -> None:
    text = "Top left small striped red circle. A navy background."
    encoding = clip_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False)
    said = said_so_far(text, encoding.offsets)
    place, colour, background = (
        said[:, list(VALUES).index(slot)].tolist() for slot in ("place", "colour", "background")
    )
    assert encoding.tokens[:2] == ["top</w>", "left</w>"] and len(said) == 11
    assert place == [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert colour == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert background == [0] * 8 + [1, 1, 1]


def test_windows_are_those_of_stock_pipelines() -> None:
    ids, labels = caption_windows(SPLITS["validation"][:16], TINY_TEXT)
    assert ids.shape == (16, 77) and labels.shape == (16, 77, len(VALUES))
    for row, label in zip(ids.tolist(), labels, strict=True):
        end = row.index(49407)
        assert row[0] == 49406 and set(row[end:]) == {49407}
        assert (label[0] == UNSEEN).all() and (label[end:] == UNSEEN).all() and (label[1:end] != UNSEEN).all()


def test_the_inpainting_twin_starts_as_its_base_and_sees_the_hole_in_grey() -> None:
    unet = build_unet(TINY_UNET, 16).eval()
    twin = widen_for_inpainting(unet).eval()
    noisy, extra, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8), torch.randn(2, 77, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            twin(torch.cat([noisy, extra], 1), 500, states).sample, unet(noisy, 500, states).sample
        )
    autoencoder = build_autoencoder(AutoencoderRecipe(widths=(8, 8, 8, 8))).eval()
    pictures, holes = draw(range(2)), np.zeros((2, 64, 64), np.uint8)
    holes[1] = 1
    conditions = inpainting_conditions(autoencoder, pictures, holes)
    assert conditions.shape == (2, 5, 8, 8) and conditions[:, 0].flatten(1).sum(1).tolist() == [0, 64]
    torch.testing.assert_close(conditions[0, 1:], encode_pictures(autoencoder, pictures)[0])
    grey = encode_pictures(autoencoder, np.full((1, 64, 64, 3), 128, np.uint8))
    torch.testing.assert_close(conditions[1, 1:], grey[0])


def test_every_recipe_trains_in_the_standard_formats(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    lines: list[str] = []
    tower = build_tower(TowerRecipe(hidden_size=12, num_layers=1, num_heads=2))
    recipe = AutoencoderRecipe(widths=(8, 8, 8, 8), batch_size=2, num_held_out=2, schedule=TWO_STEPS)
    autoencoder = train_autoencoder(recipe, tower, tmp_path / "a.pt", lines.append)
    latents = encode_pictures(autoencoder, draw(range(256)))
    assert latents.shape[1:] == (4, 8, 8) and 0.5 < latents.std() < 2
    autoencoder.save_pretrained(tmp_path / "vae")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    assert np.array_equal(decode_latents(loaded, latents[:2]), decode_latents(autoencoder, latents[:2]))
    text_encoder = train_text_encoder(TINY_TEXT, tmp_path / "t.pt", lines.append)
    unet = build_unet(TINY_UNET, 16)
    for inpainting in (False, True):
        prepared = prepare_latents(TINY_UNET, loaded, text_encoder, inpainting)
        assert prepared.states.shape == (3, 2, 77, 16) and (prepared.conditions is None) != inpainting
        unet = widen_for_inpainting(unet) if inpainting else unet
        unet = train_unet(unet, prepared, text_encoder, loaded, TINY_UNET, tmp_path / f"{inpainting}.pt", lines.append)
    assert [line.partition(":")[0] for line in lines] == ["autoencoder", "text encoder", "UNet", "inpainting UNet"]
    assert all("step 2/2, loss " in line and "0 s left" in line for line in lines)
