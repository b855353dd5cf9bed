"""Guards that weights and the layout they were trained with stay together, and that stock diffusers does not mind.

Run: pytest tests/unit/test_prompt_layout.py
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmga.stage2.prompt_layout import (
    LAYOUTS,
    LayoutError,
    PromptLayout,
    layout_of,
    load_layout,
    prompt_layout,
    save_layout,
    stamp_layout,
)
from tests.toy_diffusion import toy_unet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_unet().save_pretrained(tmp_path / "unet")
    return tmp_path


def test_the_default_is_ours_with_four_chunks() -> None:
    layout = prompt_layout()
    assert (layout.name, layout.max_chunks, layout.own_chunks, layout.eos_after_text) == ("masked", 4, True, True)
    assert not layout.keep_middle and layout.pooled == "first"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_saved_layout_is_loaded_again(folder: Path, name: str) -> None:
    save_layout(folder, prompt_layout(name, 3))
    assert load_layout(folder) == prompt_layout(name, 3)
    assert json.loads((folder / "prompt_layout.json").read_text()) == {"layout": name, "max_chunks": 3}
    assert not list(folder.rglob("*.tmp"))


def test_stock_diffusers_loads_keeps_and_passes_on_the_layout_in_silence(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    save_layout(folder, prompt_layout("published", 2))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert "_prompt_layout" not in caplog.text and "not expected" not in caplog.text
    assert layout_of(unet.config) == prompt_layout("published", 2)
    unet.save_pretrained(folder / "again" / "unet")
    assert load_layout(folder / "again") == prompt_layout("published", 2)
    EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config).save_pretrained(folder / "ema" / "unet")
    assert load_layout(folder / "ema") == prompt_layout("published", 2)


def test_a_stamped_unet_carries_its_layout_wherever_it_is_saved(tmp_path: Path) -> None:
    unet = toy_unet()
    assert layout_of(unet.config) is None
    stamp_layout(unet, prompt_layout("masked", 3))
    assert layout_of(unet.config) == prompt_layout("masked", 3)
    unet.save_pretrained(tmp_path / "unet")
    assert load_layout(tmp_path) == prompt_layout("masked", 3)


def test_a_folder_of_others_names_no_layout(folder: Path) -> None:
    assert load_layout(folder) is None


def test_a_folder_that_contradicts_itself_is_refused(folder: Path) -> None:
    save_layout(folder, prompt_layout("masked", 4))
    (folder / "prompt_layout.json").write_text('{"layout": "published", "max_chunks": 4}')
    with pytest.raises(LayoutError, match=r"says published with 4 chunks, unet/config.json says masked with 4"):
        load_layout(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "prompt_layout.json is not valid JSON"),
        ("[]", r"prompt_layout.json holds \[\], expected a JSON object"),
        (
            '{"layout": "masked"}',
            r"holds \{'layout': 'masked'\}, expected \{\"layout\": \"masked\", \"max_chunks\": 4\}",
        ),
        ('{"layout": "maskd", "max_chunks": 4}', "prompt layout 'maskd' does not exist.*did you mean 'masked'"),
        ('{"layout": "masked", "max_chunks": 0}', "prompt_layout.json: max_chunks is 0, expected a whole number of 1"),
        ('{"layout": "masked", "max_chunks": true}', "max_chunks is True"),
        ('{"layout": null, "max_chunks": 4}', "prompt layout None does not exist"),
    ],
)
def test_a_layout_file_that_says_nothing_sensible_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / "prompt_layout.json").write_text(content)
    with pytest.raises(LayoutError, match=message):
        load_layout(folder)


def test_a_folder_without_a_unet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LayoutError, match=r"has no unet/config.json; expected the folder of a saved diffusers pipeline"
    ):
        save_layout(tmp_path, prompt_layout())


def test_a_layout_in_the_unets_config_that_is_none_is_refused() -> None:
    config: dict[str, Any] = {"_prompt_layout": "masked"}
    with pytest.raises(LayoutError, match="the UNet's config, key '_prompt_layout', holds 'masked'"):
        layout_of(config)


def test_layouts_are_known_without_a_deep_learning_library() -> None:
    code = (
        "import sys, llmga.stage2.prompt_layout;"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_and_rows_of_the_table_agree() -> None:
    assert all(isinstance(layout, PromptLayout) and layout.name == name for name, layout in LAYOUTS.items())
