"""Folders of pictures: what is missing, strange, double or of another size is named.

Run: pytest tests/unit/test_picture_files.py
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmga.images import PictureError
from llmga.metrics.features import MetricError
from llmga.metrics.picture_files import file_name, picture_files, pictures_of, read_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "table.md").write_text("not a picture")
    return tmp_path


def test_pictures_stand_in_the_order_of_their_ids(folder: Path) -> None:
    files = pictures_of(folder, ["2", "0", "1"], "ours")
    found = read_pictures(files)
    assert found.shape == (3, 3, 4, 6) and found[:, 0, 0, 0].tolist() == [2, 0, 1]
    assert read_pictures(files, side=4).shape == (3, 3, 4, 4)


def test_ids_of_any_kind_are_names_of_files(tmp_path: Path) -> None:
    ids = ["train/0001", "a b", "ü%2F", ".."]
    for id in ids:
        Image.new("RGB", (2, 2)).save(tmp_path / file_name(id))
    assert set(picture_files(tmp_path, "ours")) == set(ids)


def test_what_does_not_pair_is_named(folder: Path) -> None:
    with pytest.raises(MetricError, match=r"ours: .* lacks 2 of 3 pictures: 8, 9; expected a file 8\.png"):
        pictures_of(folder, ["1", "8", "9"], "ours")
    with pytest.raises(MetricError, match="holds 1 pictures that are not asked for: 2"):
        pictures_of(folder, ["0"], "ours", known=["1"])
    Image.new("RGB", (6, 4)).save(folder / "1.jpg")
    with pytest.raises(MetricError, match=r"1\.jpg and 1\.png .* have one id"):
        picture_files(folder, "ours")
    with pytest.raises(MetricError, match="is not a folder"):
        picture_files(folder / "0.png", "ours")
    (folder / "empty").mkdir()
    with pytest.raises(MetricError, match="holds no pictures"):
        picture_files(folder / "empty", "ours")


def test_other_sizes_and_damaged_files_are_named(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "3.png")
    with pytest.raises(MetricError, match=r"0\.png is 6 x 4 and .*3\.png 5 x 5"):
        read_pictures(picture_files(folder, "ours"))
    (folder / "3.png").write_bytes(b"")
    with pytest.raises(PictureError, match=r"3\.png: the file is empty"):
        read_pictures(picture_files(folder, "ours"))
