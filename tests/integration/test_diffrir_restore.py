"""Whole pictures: tiles without visible joins, kept pixels bit for bit, files and folders, and inputs that do not fit.

Run: pytest tests/integration/test_diffrir_restore.py
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from llmga.cli import app
from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK
from llmga.diffrir.folders import find_tasks, restore_files
from llmga.diffrir.inputs import RestorationInputs, read_inputs
from llmga.diffrir.network import RestorerError
from llmga.diffrir.reference import InputError, concat_reference
from llmga.diffrir.restore import restore_arrays
from llmga.diffrir.tiles import Canvas, Tiling, blending_weights, encode_in_tiles
from llmga.images import PictureError
from tests.toy import toy_restorer

SMALL = Tiling(size=64, overlap=32, batch_size=3)


def picture_of(height: int, width: int, scale: int = 1, seed: int = 0) -> RestorationInputs:
    """Smooth colours with some grain, and a hole on the left."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : height * scale, 0 : width * scale] / 40
    colours = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2) * 80 + 128
    known = (colours + rng.normal(0, 5, colours.shape)).clip(0, 255).astype(np.uint8)
    hole = np.zeros(known.shape[:2], bool)
    hole[:, : max(1, width * scale // 2)] = True
    return RestorationInputs(np.ascontiguousarray(known[::scale, ::scale]), known, hole)


def write(folder: Path, inputs: RestorationInputs, name: str = "picture") -> tuple[Path, Path, Path]:
    """The three files, each in a folder of its own."""
    paths = []
    for kind, pixels in (("generated", inputs.generated), ("mask", inputs.hole), ("known", inputs.known)):
        path = folder / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint8) * 255).save(path)
        paths.append(path)
    return paths[0], paths[1], paths[2]


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize(("side", "size", "overlap"), [(32, 64, 32), (64, 64, 32), (96, 64, 32), (1024, 256, 96)])
def test_tiles_cover_a_side_and_their_weights_add_up(side: int, size: int, overlap: int) -> None:
    tiling = Tiling(size, overlap)
    starts = tiling.starts(side)
    tile = min(size, side)
    assert starts[0] == 0 and starts[-1] + tile == side and all(start % 32 == 0 for start in starts)
    assert all(second - first <= tile - overlap for first, second in pairwise(starts))
    total = np.zeros(side)
    for start, weights in zip(starts, blending_weights(side, starts, tile, overlap), strict=True):
        total[start : start + tile] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("numbers", [(100, 32, 1), (64, 0, 1), (64, 64, 1), (64, 32, 0)])
def test_tiles_that_cannot_be(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"tiles of \d+ with an overlap of .* expected multiples of 32, an overlap of"):
        Tiling(*numbers)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_the_prior_of_a_picture_in_pieces_is_that_of_the_whole(scale: int) -> None:
    model, inputs = toy_restorer(scale=scale), picture_of(160 // scale, 288 // scale, scale)
    canvas = Canvas.padded(inputs.generated, inputs.known, inputs.hole, scale)
    low, known = (torch.from_numpy(p).permute(2, 0, 1)[None].float() / 255 for p in (canvas.generated, canvas.known))
    whole = model.encode_prior(concat_reference(low, known, torch.from_numpy(canvas.hole)[None, None]))
    torch.testing.assert_close(encode_in_tiles(model, canvas, 64), whole, rtol=1e-5, atol=1e-6)


def test_joins_of_tiles_do_not_show() -> None:
    """Across a join, neighbouring pixels differ no more from each other than in the picture that was restored whole."""
    model, inputs = toy_restorer(), picture_of(192, 256)
    noise = torch.zeros(1, model.prior_width)
    whole = restore_arrays(model, [inputs], noise, Tiling(256, 64), composed=False)[0].astype(float)
    tiled = restore_arrays(model, [inputs], noise, Tiling(128, 64), composed=False)[0].astype(float)
    steps = np.abs(np.diff(tiled, axis=1)).mean(axis=(0, 2))
    expected = np.abs(np.diff(whole, axis=1)).mean(axis=(0, 2))
    assert np.abs(steps - expected).max() < 0.35  # of 255; a hard cut between tiles makes more, as shown below
    hard = whole.copy()
    hard[:, 128:] = tiled[:, 128:] + 2
    assert np.abs(np.abs(np.diff(hard, axis=1)).mean(axis=(0, 2)) - expected).max() > 0.35


def test_tiles_without_a_hole_are_left_out() -> None:
    model, inputs = toy_restorer(), picture_of(64, 320)
    inputs.hole[:] = False
    inputs.hole[:, 300:] = True
    seen: list[int] = []
    model.generator.register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
    noise = torch.zeros(1, model.prior_width)
    [some] = restore_arrays(model, [inputs], noise, SMALL)
    assert sum(seen) == 1
    [every] = restore_arrays(model, [inputs], noise, SMALL, composed=False)
    assert np.array_equal(some[:, 300:], every[:, 300:])
    assert np.array_equal(some[:, :300], inputs.known[:, :300])


def test_memory_does_not_grow_with_the_picture() -> None:
    """The network never sees more than a batch of tiles, or a tile with its margin, however large the picture."""
    model, inputs = toy_restorer(), picture_of(512, 640)
    seen: list[int] = []
    for module in (model.generator, model.prior_encoder.head):
        module.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[0] * given[0][0, 0].numel()))
    restore_arrays(model, [inputs], torch.zeros(1, model.prior_width), SMALL)
    margin = 2 * model.prior_encoder.reach
    assert max(seen) <= max(SMALL.batch_size * (SMALL.size // 4) ** 2, (SMALL.size // 4 + margin) ** 2)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 50), (70, 33)])
def test_any_size_keeps_known_pixels_and_depends_on_its_own_noise(scale: int, height: int, width: int) -> None:
    model = toy_restorer(scale=scale)
    first, second = picture_of(height, width, scale), picture_of(height, width, scale, seed=1)
    noise = torch.randn(2, model.prior_width)
    together = restore_arrays(model, [first, second], noise, SMALL)
    for index, inputs in enumerate((first, second)):
        assert together[index].shape == inputs.known.shape and together[index].dtype == np.uint8
        assert np.array_equal(together[index][~inputs.hole], inputs.known[~inputs.hole])
        [alone] = restore_arrays(model, [inputs], noise[index : index + 1], SMALL)
        assert np.abs(alone.astype(int) - together[index]).max() <= 1


def test_without_hole_nothing_changes_and_all_hole_is_restored() -> None:
    model, inputs = toy_restorer(), picture_of(40, 40)
    noise = torch.zeros(1, model.prior_width)
    inputs.hole[:] = False
    assert np.array_equal(restore_arrays(model, [inputs], noise)[0], inputs.known)
    inputs.hole[:] = True
    raw = restore_arrays(model, [inputs], noise, composed=False)[0]
    assert np.array_equal(restore_arrays(model, [inputs], noise)[0], raw) and not np.array_equal(raw, inputs.known)


def test_arrays_that_do_not_fit() -> None:
    model, inputs = toy_restorer(scale=2), picture_of(16, 16)
    noise = torch.zeros(1, model.prior_width)
    names = r"generated is \(16, 16, 3\) uint8, known is \(16, 16, 3\) uint8, hole is \(16, 16\) bool"
    with pytest.raises(InputError, match=names + "; expected known and hole 2 times as high and wide as generated"):
        restore_arrays(model, [inputs], noise)
    floats = RestorationInputs(inputs.generated / 255, inputs.known, inputs.hole)
    with pytest.raises(InputError, match=r"generated is \(16, 16, 3\) float64, .* expected \(h, w, 3\) uint8"):
        restore_arrays(toy_restorer(), [floats], noise)
    with pytest.raises(RestorerError, match="scale 1, phase prior, with reference; only phase diffusion works without"):
        restore_arrays(toy_restorer(phase="prior"), [inputs], noise)


# ---------------------------------------------------------------- files


def test_sizes_that_do_not_fit_name_all_three_files(tmp_path: Path) -> None:
    generated, mask, known = write(tmp_path, picture_of(20, 30))
    expected = re.escape(
        f"generated {generated} (30 x 20, RGB), mask {mask} (30 x 20, L), known {known} (30 x 20, RGB)"
    )
    with pytest.raises(InputError, match=expected + "; this restorer is of scale 4: mask and known .* 120 x 80"):
        read_inputs(generated, mask, known, 4)
    Image.new("L", (30, 21)).save(mask)
    with pytest.raises(InputError, match=r"\(30 x 21, L\).* scale 1: mask and known should be as large as generated"):
        read_inputs(generated, mask, known, 1)


@pytest.mark.parametrize(
    ("pixels", "holes", "remark"),
    [
        ([[0, 0], [0, 0]], 0, "has no hole .* nothing is to be restored"),
        ([[255, 255], [255, 255]], 4, "is all hole: no pixel is known"),
        ([[100, 127], [128, 255]], 2, "has 75 % grey pixels; from half brightness on they are hole"),
        ([[0, 1], [1, 0]], 2, None),
    ],
)
def test_masks_of_every_kind(tmp_path: Path, pixels: list[list[int]], holes: int, remark: str | None) -> None:
    generated, mask, known = write(tmp_path, picture_of(2, 2))
    Image.fromarray(np.array(pixels, np.uint8)).save(mask)
    inputs = read_inputs(generated, mask, known, 1)
    assert inputs.hole.sum() == holes
    assert bool(inputs.remarks) == (remark is not None)
    if remark:
        assert re.search(remark, inputs.remarks[0])


def test_transparent_pixels_count_where_they_are_looked_at(tmp_path: Path) -> None:
    inputs = picture_of(8, 8)
    generated, mask, known = write(tmp_path, inputs)
    alpha = np.where(inputs.hole, 0, 255).astype(np.uint8)[..., None]
    Image.fromarray(np.concatenate([inputs.known, alpha], axis=2)).save(known)
    assert np.array_equal(read_inputs(generated, mask, known, 1).known[~inputs.hole], inputs.known[~inputs.hole])
    Image.fromarray(np.concatenate([inputs.known, 255 - alpha], axis=2)).save(known)
    with pytest.raises(InputError, match=r"known .* \(8 x 8, RGBA\); known has 50\.0 % transparent pixels outside the"):
        read_inputs(generated, mask, known, 1)


def test_sixteen_bits_are_told(tmp_path: Path) -> None:
    generated, mask, known = write(tmp_path, picture_of(8, 8))
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(known)
    inputs = read_inputs(generated, mask, known, 1)
    assert (inputs.known == round(40_000 / 257)).all()
    assert inputs.remarks == (f"{known} has 16 bits a channel; it is restored, and kept, at 8",)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    generated, mask, known = write(tmp_path, picture_of(8, 8))
    mask.write_text("no picture")
    with pytest.raises(PictureError, match="not a picture"):
        read_inputs(generated, mask, known, 1)


def test_folders_are_matched_by_name(tmp_path: Path) -> None:
    for name in ("a", "sub/b"):
        write(tmp_path, picture_of(8, 8), name)
    (tmp_path / "mask/a.png").rename(tmp_path / "mask/a_mask000.png")
    folders = tmp_path / "generated", tmp_path / "mask", tmp_path / "known"
    tasks = find_tasks(*folders, tmp_path / "out")
    assert [task.out.relative_to(tmp_path).as_posix() for task in tasks] == ["out/a.png", "out/sub/b.png"]
    assert tasks[0].mask.name == "a_mask000.png"
    (tmp_path / "known/sub/b.png").unlink()
    with pytest.raises(InputError, match=r"1 pictures of .* lack a partner of the same name: sub/b in .*known"):
        find_tasks(*folders, tmp_path / "out")
    with pytest.raises(
        InputError, match=r"mask .* is a folder, known .* is missing; expected three files or three folders"
    ):
        find_tasks(folders[0], folders[1], tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(InputError, match=r"expected a file that keeps every pixel: \.png"):
        find_tasks(*(folder / "a.png" for folder in folders), tmp_path / "out.jpg")


def test_a_result_depends_on_seed_and_name_and_on_nothing_beside_it(tmp_path: Path) -> None:
    model = toy_restorer()
    for index, name in enumerate(("a", "b", "c")):
        write(tmp_path, picture_of(24 + 8 * (index == 2), 24, seed=index), name)
    folders = tmp_path / "generated", tmp_path / "mask", tmp_path / "known"

    def restored(out: str, **how: Any) -> list[np.ndarray]:
        tasks = find_tasks(*folders, tmp_path / out)
        assert restore_files(model, tasks, shown=False, **how) == []
        return [np.asarray(Image.open(task.out)).astype(int) for task in tasks]

    alone, together = restored("alone", batch_size=1), restored("together", batch_size=3)
    assert max(np.abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 1
    before = (tmp_path / "alone/a.png").stat().st_mtime_ns
    restored("alone", seed=5)
    assert (tmp_path / "alone/a.png").stat().st_mtime_ns == before  # what is there stays
    restored("alone", seed=5, overwrite=True)
    assert (tmp_path / "alone/a.png").stat().st_mtime_ns != before


# ---------------------------------------------------------------- the command


def test_the_command_restores_a_folder_and_tells_what_failed(tmp_path: Path) -> None:
    toy_restorer().save_pretrained(tmp_path / "model")
    for name in ("a", "b"):
        inputs = picture_of(16, 16)
        write(tmp_path, inputs, name)
    Image.new("RGB", (5, 5)).save(tmp_path / "known/b.png")
    words = [f"--{kind}={tmp_path / kind}" for kind in ("generated", "mask", "known", "out", "model")]
    result = CliRunner().invoke(app, ["restore", *words])
    assert result.exit_code == EXIT_FAILED and "1 of 2 restored" in result.stdout
    assert "this restorer is of scale 1: mask and known should be as large as generated, 16 x 16" in result.stderr
    pixels = np.asarray(Image.open(tmp_path / "out/a.png"))
    assert np.array_equal(pixels[~inputs.hole], inputs.known[~inputs.hole])
    (tmp_path / "known/b.png").unlink()
    write(tmp_path, picture_of(16, 16), "b")
    assert CliRunner().invoke(app, ["restore", *words]).exit_code == EXIT_OK


def test_the_command_says_which_phase_a_checkpoint_is_of(tmp_path: Path) -> None:
    toy_restorer(phase="prior", scale=2).save_pretrained(tmp_path / "model")
    paths = write(tmp_path, picture_of(16, 16))
    words = [f"--{kind}={path}" for kind, path in zip(("generated", "mask", "known"), paths, strict=True)]
    result = CliRunner().invoke(
        app, ["restore", *words, f"--out={tmp_path / 'o.png'}", f"--model={tmp_path / 'model'}"]
    )
    assert result.exit_code == EXIT_BAD_INPUT
    assert "is a restorer of scale 2, phase prior, with reference; expected phase diffusion" in result.stderr
