"""What a process tells about itself: its files, its packages, its disk.

Run: pytest tests/unit/test_facts.py
"""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmga.config import load_config
from llmga.nodes import facts
from llmga.nodes.facts import describe, disk, flat_settings, gather_facts, input_paths, parameters_in, versions
from llmga.runtime import Ranks, RuntimeSetupError, device_index
from llmga.stage1.config import Stage1Config
from tests.toy import toy_mllm_folder

CONFIG = Path(__file__).parents[2] / "configs" / "stage1" / "photos.yaml"


def settings(folder: Path, *overrides: str) -> Stage1Config:
    return load_config(Stage1Config, CONFIG, [f"run.output_dir={folder}", *overrides], check_machine=False)


def test_facts_are_plain_values_and_name_every_path_that_is_read(tmp_path: Path) -> None:
    cfg = settings(tmp_path / "run", "run.deepspeed=configs/deepspeed/zero2.json")
    told = json.loads(json.dumps(gather_facts(cfg, Ranks(3, 0, 4))))
    assert (told["rank"], told["settings"]["run.deepspeed"]) == (3, "configs/deepspeed/zero2.json")
    assert told["inputs"].keys() == {str(path) for path in input_paths(cfg)}
    named = set(input_paths(cfg))
    assert cfg.run.deepspeed in named and cfg.run.output_dir not in named
    assert {source.path for source in [*cfg.data.sources, *cfg.data.validation]} <= named
    assert told["versions"]["torch"] == torch.__version__.split("+")[0] and "LLMGA" in versions()


def test_every_setting_has_a_dotted_key(tmp_path: Path) -> None:
    flat = flat_settings(settings(tmp_path, "optim.betas=[0.8, 0.9]"))
    assert (flat["optim.betas.0"], flat["optim.betas.1"], flat["run.output_dir"]) == (0.8, 0.9, str(tmp_path))


def test_copies_that_differ_are_told_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "rows.jsonl").write_text("same\n")
    assert describe(one / "rows.jsonl") == describe(two / "rows.jsonl")
    assert describe(one) == describe(two)
    (two / "rows.jsonl").write_text("Same\n")
    assert describe(one / "rows.jsonl") != describe(two / "rows.jsonl")
    (two / "rows.jsonl").write_text("same\nmore\n")
    assert "a file of 10 bytes" in describe(two / "rows.jsonl")
    assert describe(one) != describe(two)
    assert describe(tmp_path / "three") == "missing (No such file or directory)"


def test_a_folder_of_pictures_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_MOST_ENTRIES", 3)
    for number in range(5):
        (tmp_path / f"{number}.png").touch()
    assert describe(tmp_path) == "a folder of more than 3 files"


def test_a_checkpoint_is_estimated_from_the_weights_and_then_measured(tmp_path: Path) -> None:
    model = toy_mllm_folder(tmp_path / "model")
    count = parameters_in(model)
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, model / "more.safetensors")
    assert parameters_in(model) == count + 16 and count > 10_000
    cfg = settings(tmp_path / "runs" / "new", f"model.path={model}", "run.keep_last=4")
    told = disk(cfg)
    assert told["checkpoint"] * 1e9 == pytest.approx(12 * (count + 16))
    assert (told["folder"], told["more"]) == (str(tmp_path), 5)  # where the run folder will be made
    assert told["free"] > 0 and not told["measured"]


def test_the_limit_of_open_files_is_lifted() -> None:
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, former[1]))
        lifted = facts.raise_open_files()
        assert lifted == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)


def test_more_processes_than_gpus_on_a_machine() -> None:
    assert device_index(Ranks(9, 1, 16), visible=8) == 1
    with pytest.raises(RuntimeSetupError, match=r"rank 11 on \S+ is process 4 of this machine, .* 2 GPUs; .* NPROC=2"):
        device_index(Ranks(11, 3, 16), visible=2)
