"""Every shipped preset is sound, and those for the paper say where it is silent.

Run: pytest tests/unit/test_evaluation_config.py
"""

from pathlib import Path

import pytest

from llmga.config import ConfigError, load_config
from llmga.evaluation import table_configs

FOLDER = Path(__file__).parents[2] / "configs/eval"
SCHEMAS = {
    "text_to_image": table_configs.TextToImageConfig,
    "editing": table_configs.EditingConfig,
    "painting": table_configs.PaintingConfig,
    "turns": table_configs.TurnsConfig,
}


def schema_of(path: Path) -> type:
    return SCHEMAS[script_of(path)]


def script_of(path: Path) -> str:
    """A preset's name begins with the script that it is for."""
    return next(script for script in SCHEMAS if path.stem.startswith(f"{script}_"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_presets_are_sound(path: Path) -> None:
    config = load_config(schema_of(path), path, check_machine=False)
    assert f"eval/{script_of(path)}.py configs/eval/{path.name}" in path.read_text()
    is_toy = "_toy" in path.stem
    assert config.preset.name and is_toy != any("The paper" in note for note in config.preset.notes)
    assert config.measure.features.allow_random is False


def test_every_protocol_has_a_preset_of_both_scales() -> None:
    names = {path.stem.rpartition("_")[0] for path in FOLDER.glob("*_toy.yaml")}
    assert names == set(SCHEMAS) == {p.stem.rpartition("_")[0] for p in FOLDER.glob("*.yaml") if "_toy" not in p.stem}


def test_editing_is_measured_by_the_networks_it_is_published_with() -> None:
    config = load_config(table_configs.EditingConfig, FOLDER / "editing_magicbrush.yaml", check_machine=False)
    assert (config.measure.features.name, config.measure.clip.name) == ("dino-s16", "clip-b32")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("systems.0.name=a-b", "systems.0.name"),
        ("systems.0.pictures=x", "expected one of the two"),
        ("systems=[]", "expected one or more, each once"),
        ("metrics=[frechet, frechet]", "each once"),
        ("metrics=[fid]", "did you mean|expected"),
        ("paint.stpes=3", "paint.steps"),
    ],
)
def test_mistakes_are_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(
            table_configs.TextToImageConfig, FOLDER / "text_to_image_coco.yaml", [override], check_machine=False
        )
