"""A file of settings is an object, or one sentence that says what it is instead.

Run: pytest tests/unit/test_strict_json.py
"""

from pathlib import Path

import pytest

from llmga.strict_json import read_object


class Broken(ValueError):
    """What the caller wants raised."""


def test_settings_are_read_as_other_libraries_write_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"limits": [0.0, Infinity], "name": "Bär"}', encoding="utf-8")
    read = read_object(tmp_path / "config.json", ValueError, "mend it")
    assert read == {"limits": [0.0, float("inf")], "name": "Bär"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": 1', r"config.json cannot be read as JSON (.*column 8.*); mend it"),
        (b'{"a": "\xe9"}', r"config.json cannot be read as JSON (.*position 7.*); mend it"),
        (b"", r"config.json cannot be read as JSON (.*); mend it"),
        (b"[1]", "config.json holds a list, expected an object; mend it"),
        (b"<html>404</html>", "config.json is a web page or XML, .*: fetch the file again"),
        (b"version https://git-lfs.github.com/spec/v1", "config.json is a Git LFS pointer .*`git lfs pull`"),
    ],
)
def test_anything_else_is_one_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Broken, match=sentence):
        read_object(tmp_path / "config.json", Broken, "mend it")


def test_a_missing_file_is_told_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Broken, match=r"confg.json does not exist; did you mean .*config.json\?"):
        read_object(tmp_path / "confg.json", Broken, "mend it")
