"""Clean pictures to training pairs: functions of seed and index, whatever the picture.

The published workers repeat their random streams every epoch. Run: pytest tests/unit/test_diffrir_data.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llmga.diffrir.config import SourceConfig as Pictures
from llmga.diffrir.data import PairSettings, RestorationDataset, SourceError, list_pictures, make_pair, read_pixels
from llmga.diffrir.degradation import DegradationSettings, degrade, draw_degradation, scaled
from tests.toy_restoration import make_pictures

MILD = PairSettings(1, 32, 32, scaled(0.2))


def test_an_example_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    pictures = sorted(make_pictures(tmp_path).glob("*.png"))
    one, again = (RestorationDataset([pictures], [None], 12, 3, MILD) for _ in range(2))
    other = RestorationDataset([pictures], [None], 12, 4, MILD)
    first = {index: one[index] for index in (5, 0)}
    assert all(torch.equal(again[5][name], first[5][name]) for name in ("low_quality", "ground_truth", "edit_mask"))
    assert not torch.equal(other[5]["low_quality"], first[5]["low_quality"])
    assert sorted(one[index]["sample_ids"] for index in range(6)) == [str(path) for path in pictures]
    twice = [index for index in range(12) if one[index]["sample_ids"] == one[0]["sample_ids"]]
    assert len(twice) == 2 and not torch.equal(one[twice[0]]["edit_mask"], one[twice[1]]["edit_mask"])


@pytest.mark.parametrize(("scale", "height", "width"), [(1, 20, 90), (2, 64, 64), (4, 100, 33)])
def test_pairs_of_any_picture_fit_the_network(scale: int, height: int, width: int) -> None:
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    pair = make_pair(pixels, (0,), PairSettings(scale, 64, 32, scaled(0.5), sharpened=True))
    assert {name: tuple(values.shape) for name, values in pair.items()} == {
        "low_quality": (3, 32 // scale, 32 // scale),
        "ground_truth": (3, 32, 32),
        "edit_mask": (1, 32, 32),
        "target": (3, 32, 32),
    }


def test_sharpened_targets_are_cut_from_the_same_place() -> None:
    """On a picture with nothing to sharpen, target and truth agree, wherever the crop was."""
    ramp = torch.linspace(0, 255, 64).round().byte().expand(3, 64, 64)
    pair = make_pair(ramp, (0,), PairSettings(1, 64, 32, scaled(0.2), sharpened=True))
    torch.testing.assert_close(pair["target"], pair["ground_truth"], atol=0.02, rtol=0)


def test_milder_degradation_ends_at_none() -> None:
    assert scaled(1) == DegradationSettings()
    picture = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    losses = []
    for strength in (0.0, 0.3, 1.0):
        draws = [draw_degradation(seed, 1, scaled(strength, gain=0.0, bias=0.0)) for seed in range(8)]
        losses.append(np.mean([float((degrade(picture, draw) - picture).abs().mean()) for draw in draws]))
    assert losses[0] < 0.006 < losses[1] < losses[2]


def test_lists_and_folders_of_pictures(tmp_path: Path) -> None:
    make_pictures(tmp_path / "sub", 2)
    listing = tmp_path / "list.txt"
    listing.write_text("sub/picture1.png (400,400,3)\n\nsub/picture0.png\n")
    assert [path.name for path in list_pictures(Pictures(listing))] == ["picture1.png", "picture0.png"]
    assert [path.name for path in list_pictures(Pictures(tmp_path))] == ["picture0.png", "picture1.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty holds no pictures \(\.png, .*check data\.sources"):
        list_pictures(Pictures(tmp_path / "empty"))


def test_a_picture_that_cannot_be_read_is_replaced_and_written_down(tmp_path: Path) -> None:
    pictures = sorted(make_pictures(tmp_path, 3).glob("*.png"))
    pictures[1].write_text("not a picture")
    log = tmp_path / "bad.jsonl"
    data = RestorationDataset([pictures], [None], 3, 0, MILD, log)
    assert {data[index]["sample_ids"] for index in range(3)} == {str(pictures[0]), str(pictures[2])}
    [entry] = [json.loads(line) for line in log.read_text().splitlines()]
    assert entry["picture"] == str(pictures[1]) and "not a picture" in entry["reason"]
    with pytest.raises(SourceError, match="and 9 pictures before it cannot be read"):
        RestorationDataset([[pictures[1]]], [None], 1, 0, MILD)[0]


def test_pixels_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    assert read_pixels(path)[:, 0, 1].tolist() == [3, 4, 5]
