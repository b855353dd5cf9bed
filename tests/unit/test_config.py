"""A mistake in the settings must be told, with all others, before anything heavy is imported.

Run: pytest tests/unit/test_config.py
"""

import json
import os
import subprocess
import sys
from dataclasses import field
from pathlib import Path
from typing import Annotated, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import (
    EXIT_BAD_INPUT,
    STRICT,
    ConfigError,
    OptimConfig,
    RunConfig,
    combination,
    dump_config,
    load_config,
    load_config_or_exit,
    save_config,
)
from llmga.records import TASKS
from llmga.stage1.config import Stage1Config, Task

REPOSITORY = Path(__file__).parents[2]


@dataclass(config=STRICT)
class PartConfig:
    path: Path
    weight: float | None = None


@dataclass(config=STRICT)
class WholeConfig:
    run: RunConfig
    parts: list[PartConfig] = field(default_factory=list)
    main: PartConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    size: Annotated[int, Limits(ge=1)] = 64
    colour: str = "red"
    shuffled: bool = True

    @combination("size", "optim.lr")
    def _small_and_slow(self) -> str | None:
        return "too small to learn that slowly" if self.size < 8 and self.optim.lr < 1e-6 else None


def load(text: str, *overrides: str, tmp_path: Path) -> WholeConfig:
    path = tmp_path / "whole.yaml"
    path.write_text(text)
    return load_config(WholeConfig, path, overrides)


def mistakes(text: str, *overrides: str, tmp_path: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides, tmp_path=tmp_path)
    return caught.value.mistakes


RUN = "run: {output_dir: runs/x}\n"


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    text = RUN + "optim:\n  lr: 2e-5\n  eps: 1e-6\nparts:\n  - path: a\n  - path: b\n    weight: 3\n"
    cfg = load(text, "optim.lr=5e-4", "parts.1.weight=1e1", "run.trackers=[wandb]", tmp_path=tmp_path)
    assert (cfg.optim.lr, cfg.optim.eps, cfg.optim.betas) == (5e-4, 1e-6, (0.9, 0.999))
    assert [(part.path, part.weight) for part in cfg.parts] == [(Path("a"), None), (Path("b"), 10.0)]
    assert cfg.run.trackers == ["wandb"]
    assert cfg.run.output_dir == Path("runs/x")


def test_overrides_alone_make_a_config_and_its_sections() -> None:
    cfg = load_config(WholeConfig, None, ["run.output_dir=runs/y", "main.path=p"])
    assert (cfg.run.output_dir, cfg.main) == (Path("runs/y"), PartConfig(Path("p")))


@pytest.mark.parametrize(
    ("text", "value"), [("2e-5", 2e-5), ("1E-3", 1e-3), (".5e-2", 5e-3), ("3", 3.0), ("1e0", 1.0), ("2.5e+1", 25.0)]
)
def test_numbers_that_yaml_would_read_as_text(text: str, value: float, tmp_path: Path) -> None:
    assert load(f"{RUN}optim:\n  lr: {text}", tmp_path=tmp_path).optim.lr == value


def test_a_count_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    assert load(RUN, "run.max_steps=1e5", tmp_path=tmp_path).run.max_steps == 100_000


def test_one_report_holds_every_mistake(tmp_path: Path) -> None:
    text = """
lr: 2e-5
run:
  output_dri: runs/x
  max_steps: 10
  epochs: 2
  num_workers: 2.5
parts:
  - path: 3
  - weight: heavy
optim:
  schedule: cosin
  betas: [0.9]
"""
    assert mistakes(text, "size=0", "nonsense", "run.trackers=[wandbb]", tmp_path=tmp_path) == (
        "nonsense: an override is written key=value, such as optim.lr=1e-5",
        "lr (line 2): unknown key, found 2e-05; did you mean optim.lr?",
        'run.output_dri (line 4): unknown key, found "runs/x"; did you mean run.output_dir?',
        "run.num_workers (line 7): found 2.5, expected a whole number",
        "run.trackers.0 (command line): found \"wandbb\", expected 'wandb' or 'tensorboard'; did you mean 'wandb'?",
        "run.max_steps (line 5), run.epochs (line 6): found 10 and 2.0, expected one of the two; remove one, or set it "
        "to null",
        "parts.0.path (line 9): found 3, expected text",
        "parts.1.path (line 10): missing, and it has no default",
        'parts.1.weight (line 10): found "heavy", expected a number',
        "optim.betas.1 (line 13): found [0.9], expected one more item",
        "optim.schedule (line 12): found \"cosin\", expected 'cosine', 'linear' or 'constant'; did you mean 'cosine'?",
        "size (command line): found 0, expected greater than or equal to 1",
    )


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optim.learning_rate=1", "optim.lr"),
        ("run.lr=1", "optim.lr"),
        ("batchsize=1", "run.batch_size"),
        ("run.num_train_epochs=1", "run.epochs"),
        ("per_device_train_batch_size=1", "run.batch_size"),
        ("optim.warmup_ratio=0.1", "optim.warmup"),
        ("parts.1.wieght=1", "parts.1.weight"),
        ("optm.lr=1", "optim"),
        ("weight=1", "parts.0.weight"),
    ],
)
def test_the_key_probably_meant(override: str, meant: str, tmp_path: Path) -> None:
    (line,) = mistakes(RUN + "parts: [{path: a}, {path: b}]", override, tmp_path=tmp_path)
    assert line.endswith(f"; did you mean {meant}?")


def test_a_misspelt_key_is_not_missing_too(tmp_path: Path) -> None:
    for text in ("run: {output_dri: x}", RUN + "parts: [{pth: a}]", "rnu: {output_dir: x}"):
        assert len(mistakes(text, tmp_path=tmp_path)) == 1
    both = mistakes(RUN + "parts: [{pth: a, weight: heavy}, {weight: 1}]", tmp_path=tmp_path)
    assert [line.partition(" ")[0] for line in both] == ["parts.0.pth", "parts.0.weight", "parts.1.path"]


def test_nothing_is_suggested_for_a_key_like_no_other(tmp_path: Path) -> None:
    (line,) = mistakes(RUN, "zebra=1", tmp_path=tmp_path)
    assert line == "zebra (command line): unknown key, found 1"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("size: true", "size (line 2): found true, expected a whole number"),
        ("size: '12'", 'size (line 2): found "12", expected a whole number'),
        ("shuffled: 1", "shuffled (line 2): found 1, expected true or false"),
        ("colour: no", "colour (line 2): found false, expected text"),
        ("optim: {lr: .inf}", "optim.lr (line 2): found Infinity, expected a finite number"),
        ("optim: {lr: 0}", "optim.lr (line 2): found 0, expected greater than 0"),
        ("optim: 3", "optim (line 2): found 3, expected a section with the keys lr, weight_decay"),
        ("parts: a", 'parts (line 2): found "a", expected a list'),
        ("parts: [3]", "parts.0 (line 2): found 3, expected a section with the keys path, weight"),
        ("optim: {warmup: 1.5}", "optim.warmup (line 2): found 1.5, expected a share below 1 or a whole number"),
        ("size: 1\nsize: 2", "size (line 3): given twice, on line 2 and line 3; keep one"),
    ],
)
def test_wrong_values(text: str, complaint: str, tmp_path: Path) -> None:
    (line,) = mistakes(RUN + text, tmp_path=tmp_path)
    assert line.startswith(complaint.replace("size (line 3): given", "size: given"))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("parts.7.weight=1", "parts is a list of 1; name an item by its index, from 0"),
        ("parts.first.weight=1", "parts is a list of 1; name an item by its index, from 0"),
        ("size.x=1", "size is 8 and has no parts"),
        ("optim..lr=1", "an override is written key=value"),
        ("optim.lr", "an override is written key=value"),
        ("optim.betas=[1", "not YAML"),
    ],
)
def test_overrides_that_cannot_be_set(override: str, complaint: str, tmp_path: Path) -> None:
    (line,) = mistakes(RUN + "size: 8\nparts: [{path: a}]", override, tmp_path=tmp_path)
    assert complaint in line


def test_a_combination_over_sections_is_told_with_other_mistakes_but_not_about_broken_keys(tmp_path: Path) -> None:
    tiny = RUN + "size: 4\noptim: {lr: 1e-8}\n"
    (line,) = mistakes(tiny, tmp_path=tmp_path)
    assert line == "size (line 2), optim.lr (line 3): too small to learn that slowly"
    assert len(mistakes(tiny + "zebra: 1", tmp_path=tmp_path)) == 2
    (line,) = mistakes(tiny, "size=x", tmp_path=tmp_path)
    assert line.startswith("size (command line): found")


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: 1 mistake\n.*does not exist"):
        load_config(WholeConfig, tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match=r"line 2, column 2: not YAML"):
        load("a: [1\nb: 2", tmp_path=tmp_path)
    with pytest.raises(ConfigError, match="top level: found \\[1, 2\\], expected a section with the keys run"):
        load("[1, 2]", tmp_path=tmp_path)
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        load_config(WholeConfig, tmp_path / "picture.yaml")
    with pytest.raises(ConfigError, match=r"run.output_dir: missing"):
        load("", tmp_path=tmp_path)


# ---------------------------------------------------------------- a file that builds on another


def load_with_base(base: str, text: str, *overrides: str, tmp_path: Path) -> WholeConfig:
    (tmp_path / "shared").mkdir(exist_ok=True)
    (tmp_path / "shared" / "below.yaml").write_text(base)
    return load("base: shared/below.yaml\n" + text, *overrides, tmp_path=tmp_path)


def test_a_base_gives_what_the_file_does_not_say(tmp_path: Path) -> None:
    base = (
        "run: {output_dir: a, seed: 3}\noptim: {lr: 1e-3, eps: 1e-6}\nparts: [{path: a, weight: 2}, {path: b}]\nsize: 9"
    )
    config = load_with_base(base, "optim: {lr: 1e-4}\nparts: [{path: c}]\nmain: {path: d}", "size=7", tmp_path=tmp_path)
    assert (config.run.output_dir, config.run.seed) == (Path("a"), 3)
    assert (config.optim.lr, config.optim.eps, config.size) == (1e-4, 1e-6, 7)
    assert config.parts == [PartConfig(path=Path("c"))] and config.main == PartConfig(path=Path("d"))


def test_a_mistake_is_told_with_the_file_it_stands_in(tmp_path: Path) -> None:
    base = "run: {output_dir: a}\nsize: big\nparts:\n  - path: a\n    wieght: 1\noptim:\n  lr: slow\n  eps: 0"
    with pytest.raises(ConfigError) as caught:
        load_with_base(base, "colour: 3\noptim:\n  lr: fast", tmp_path=tmp_path)
    below = tmp_path / "shared" / "below.yaml"
    found = {line.partition(": ")[0] for line in caught.value.mistakes}
    assert found == {
        f"size (line 2 of {below})",
        f"parts.0.wieght (line 5 of {below})",
        f"optim.eps (line 8 of {below})",
        "optim.lr (line 4)",
        "colour (line 2)",
    }


def test_lines_of_a_list_that_was_replaced_are_forgotten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_with_base("run: {output_dir: a}\nparts: [{path: a}]", "parts:\n  - weight: 1", tmp_path=tmp_path)
    assert caught.value.mistakes == ("parts.0.path (line 3): missing, and it has no default",)


@pytest.mark.parametrize(
    ("base", "complaint"),
    [
        (
            "base: other.yaml\nsize: 3",
            "base (line 1): .*below.yaml has a base of its own; one file may build on one other",
        ),
        ("- 1", r"base \(line 1\): .*below.yaml holds \[1\], expected sections"),
        ("size: [", "below.yaml: 1 mistake\n  line 1, column 8: not YAML"),
    ],
)
def test_a_base_that_cannot_be_one(base: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("base (line 1)", r"base \(line 1\)")):
        load_with_base(base, RUN, tmp_path=tmp_path)


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    (line,) = mistakes("base: shared/llmga.yaml\n" + RUN, tmp_path=tmp_path)
    assert line.startswith(f"base (line 1): {tmp_path}/shared/llmga.yaml does not exist")
    assert line.endswith(f"; it counts from {tmp_path}")
    (line,) = mistakes("base: 3\n" + RUN, tmp_path=tmp_path)
    assert line.startswith("base (line 1): found 3, expected a YAML file")


def test_steps_decide_when_given_else_epochs() -> None:
    def length(*overrides: str) -> tuple[int | None, float | None]:
        run = load_config(WholeConfig, None, ["run.output_dir=x", *overrides]).run
        return run.max_steps, run.epochs

    assert length() == (None, 1.0)
    assert length("run.max_steps=6") == (6, None)
    assert length("run.epochs=0.5") == (None, 0.5)
    assert length("run.epochs=null", "run.max_steps=6") == (6, None)


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-30, 1e3),
    steps=st.none() | st.integers(1, 10**9),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    weights=st.lists(st.none() | st.floats(-1e6, 1e6)),
)
def test_what_is_saved_loads_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, lr: float, steps: int | None, name: str, weights: list[float | None]
) -> None:
    parts = [PartConfig(Path(f"p{index}"), weight) for index, weight in enumerate(weights)]
    cfg = WholeConfig(RunConfig(Path("runs/é x"), max_steps=steps), parts=parts, optim=OptimConfig(lr=lr), colour=name)
    path = tmp_path_factory.mktemp("saved") / "run" / "config.yaml"
    save_config(cfg, path)
    assert load_config(WholeConfig, path) == cfg
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == dump_config(cfg)
    assert os.listdir(path.parent) == ["config.yaml"]


def test_tasks_are_those_of_the_manifest() -> None:
    assert get_args(Task) == TASKS


@pytest.fixture
def stage1_files(tmp_path: Path) -> list[str]:
    """Overrides that make a sound Stage1Config of files that exist."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("")
    return [
        f"model.path={tmp_path}",
        f"data.sources=[{{path: {tmp_path}/rows.jsonl}}]",
        f"run.output_dir={tmp_path}/run",
    ]


def test_a_sound_stage1_config(stage1_files: list[str]) -> None:
    cfg = load_config(Stage1Config, None, stage1_files)
    assert (cfg.model.tags, cfg.model.tag_name, cfg.data.picture_size, cfg.data.max_length) == (
        "tokens",
        None,
        512,
        2048,
    )
    assert (cfg.samples.rows, cfg.samples.max_new_tokens, cfg.run.batch_size, cfg.run.precision) == (8, 256, 4, "bf16")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["model.attention=flash_attention_2", "run.precision=fp32"], "model.attention .*, run.precision .*bf16 only"),
        (
            ["data.packing=true", "model.attention=eager"],
            "data.packing .*, model.attention .*: eager attention cannot keep packed conversations apart; use sdpa",
        ),
        (["data.language=eng"], "data.language .*: found eng, expected a language of .*yaml: en; did you mean 'en'"),
        (["model.path=/no/where"], "model.path .*: /no/where is no such folder, expected a LLaVA model"),
        (["model.path=."], "model.path .*: . is a folder without config.json"),
        (["model.llm=."], "model.path .*, model.llm .*: found path together with llm; give a whole model"),
        (["model.path=null"], "model.path .*: found neither path nor parts, expected path, or llm and vision_tower"),
        (["model.path=null", "model.llm=."], "found llm, expected path, or llm and vision_tower"),
        (
            ["model.path=null", "model.llm=/no", "model.vision_tower=/no"],
            "model.llm .*: /no is no such folder, expected a",
        ),
        (["model.path=null", "model.llm=/no", "model.vision_tower=."], "expected a CLIP or SigLIP model saved by"),
        (["model.path=null", "model.projector=/no/p.bin"], "model.projector .*: /no/p.bin does not exist"),
        (["model.chat_template=vicunna"], "model.chat_template .*: found vicunna, expected one of .*mean 'vicuna'"),
        (["model.system_prompt=/no/where.txt"], "model.system_prompt .*: /no/where.txt does not exist"),
        (["model.lora.rank=0"], "model.lora.rank .*: found 0, expected greater than or equal to 1"),
        (
            ["model.lora.rank=8", "model.trainable=projector"],
            "model.lora.*, model.trainable .*: adapters train the LLM",
        ),
        (["model.quantize=nf4"], "model.quantize .*, model.lora.*: nf4 weights cannot be trained themselves; add lora"),
        (["data.max_tokens=9000"], "data.max_tokens .*: 9000 bounds packed rows, and packing is off; set packing"),
        (
            ["data.packing=true", "data.max_tokens=2000"],
            "data.max_tokens .*, data.packing .*: a row of 2000 tokens has no room for an example of 2048; raise",
        ),
        (["data.sources=[]"], "data.sources .*: found an empty list, expected at least one source"),
        (["data.sources.0.weight=0"], "data.sources .*: every weight is 0"),
        (["data.sources.0.weight=-1"], "data.sources.0.weight .*: found -1, expected greater than or equal to 0"),
        (["data.sources.0.path=rows.jsnl"], "data.sources.0.path .*: rows.jsnl does not exist"),
        (["data.sources.0.image_root=/no/where"], "image_root .*: found /no/where, expected a folder there"),
        (["data.sources.0.tasks=[]"], "data.sources.0.tasks .*at least 1 item"),
        (["data.picture_size=0"], "data.picture_size .*: found 0, expected greater than or equal to 1"),
        (["data.refine_generate_share=1.1"], "found 1.1, expected less than or equal to 1"),
        (["run.output_dir=LICENSE"], "run.output_dir .*: LICENSE is a file, expected a folder there, or nothing yet"),
        (["run.output_dir=LICENSE/a/b"], "run.output_dir .*: .*LICENSE is a file, expected a folder"),
        (["run.max_steps=6", "run.epochs=1"], "run.max_steps .*, run.epochs .*: found 6 and 1.0, expected one"),
        (["run.deepspeed=zero9.json"], "run.deepspeed .*: zero9.json does not exist"),
        (["run.trackers=[mlflow]"], "run.trackers.0 .*: found \"mlflow\", expected 'wandb' or 'tensorboard'"),
        (["run.eval_every_steps=5"], "run.eval_every_steps .*, data.validation: held-out loss every 5 steps needs"),
        (["run.sample_every_steps=5"], "run.sample_every_steps .*, data.validation: sample replies every 5 steps need"),
    ],
)
def test_stage1_settings_that_cannot_work(stage1_files: list[str], overrides: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(Stage1Config, None, [*stage1_files, *overrides])


def test_deepspeed_may_not_name_another_precision(stage1_files: list[str], tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    overrides = [*stage1_files, f"run.deepspeed={file}", "run.precision=fp32"]
    for content, complaint in [
        ({"bf16": {"enabled": True}}, "sets bf16.enabled to true, but precision is fp32"),
        ({"fp16": {"enabled": True}}, "sets fp16.enabled to true, but precision is fp32"),
        ({"bf16": True}, "sets bf16 to true, expected an object"),
        ([1], r"holds \[1\], expected a JSON object"),
    ]:
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=complaint):
            load_config(Stage1Config, None, overrides)
    file.write_text("{,}")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config(Stage1Config, None, overrides)
    file.write_text(json.dumps({"bf16": {"enabled": "auto"}}))
    assert load_config(Stage1Config, None, overrides).run.deepspeed == file


def test_four_bits_need_bitsandbytes(stage1_files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*stage1_files, "model.quantize=nf4", "model.lora.rank=8"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"nf4 needs the package bitsandbytes, which is not installed; pip install"):
        load_config(Stage1Config, None, overrides)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert load_config(Stage1Config, None, overrides).model.lora is not None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "model.attention=flash_attention_2",
            "needs the package flash-attn, which is not installed; sdpa needs nothing",
        ),
        ("model.liger=true", r"need the package liger-kernel, which is not installed; pip install '.\[gpu\]'"),
    ],
)
def test_kernels_need_their_packages(
    stage1_files: list[str], monkeypatch: pytest.MonkeyPatch, override: str, complaint: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=complaint):
        load_config(Stage1Config, None, [*stage1_files, override])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    load_config(Stage1Config, None, [*stage1_files, override])


def test_an_adapter_is_no_model_to_start_from(tmp_path: Path, stage1_files: list[str]) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter, expected a LLaVA model .*; `llmga merge` makes a whole"):
        load_config(Stage1Config, None, [*stage1_files, f"model.path={tmp_path / 'final'}"])


def test_what_adapters_cannot_do_under_zero3(stage1_files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    zero2, zero3 = (f"run.deepspeed={REPOSITORY / 'configs/deepspeed' / f'zero{stage}.json'}" for stage in (2, 3))
    lora = [*stage1_files, "model.lora.rank=8"]
    with pytest.raises(
        ConfigError, match=r"rows of added tags cannot be trained beside adapters under ZeRO-3; set tags"
    ):
        load_config(Stage1Config, None, [*lora, zero3])
    with pytest.raises(ConfigError, match=r"nf4 weights cannot be spread by ZeRO-3; give a DeepSpeed file of stage 2"):
        load_config(Stage1Config, None, [*lora, zero3, "model.quantize=nf4", "model.tags=text"])
    for sound in ([zero2], [zero2, "model.quantize=nf4"], [zero3, "model.tags=text"]):
        load_config(Stage1Config, None, [*lora, *sound])


STAGE1_CONFIGS = REPOSITORY / "configs/stage1"
RECIPES = sorted(path for path in STAGE1_CONFIGS.rglob("*.yaml") if path.parent.name != "shared")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(STAGE1_CONFIGS)))
def test_every_stage1_config_of_the_repository_loads(path: Path) -> None:
    load_config(Stage1Config, path, check_machine=False)
    first_line = path.read_text().splitlines()[0]
    assert "Run: make " in first_line
    assert "CONFIG=" not in first_line or f"CONFIG={path.relative_to(REPOSITORY)}" in first_line


def test_published_settings() -> None:
    """The figures of the published runs, by base model: examples a step, forward passes, and what learns."""

    def read(name: str) -> Stage1Config:
        return load_config(Stage1Config, STAGE1_CONFIGS / f"{name}.yaml", check_machine=False)

    names = [path.stem for path in (STAGE1_CONFIGS / "projector").glob("*.yaml")]
    assert len(names) == 9
    for name in names:
        tuned, projector = read(name), read(f"projector/{name}")
        smaller = name in ("llama3_8b", "qwen2_7b", "gemma_2b")
        assert (tuned.run.batch_size, tuned.run.accumulation_steps) == ((2, 8) if smaller else (4, 4))
        assert (projector.run.batch_size, projector.run.accumulation_steps) == (8, 4)
        assert (tuned.optim.lr, projector.optim.lr) == (2e-5, 1e-3)
        assert (tuned.model.trainable, projector.model.trainable) == ("projector+llm", "projector")
        assert tuned.model.llm == projector.model.llm
        assert tuned.model.projector == projector.run.output_dir / "final"
        for config in (tuned, projector):
            optim, run = config.optim, config.run
            assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.999), 1e-8, 0)
            assert (optim.schedule, optim.warmup, optim.max_grad_norm) == ("cosine", 0.03, 0)
            assert (run.epochs, run.precision, run.gradient_checkpointing) == (1, "bf16", True)
            assert run.loss_average == "micro_batch"
            assert (config.data.max_length, run.deepspeed) == (2048, Path("configs/deepspeed/zero3.json"))


@pytest.mark.parametrize("name", ["zero2.json", "zero2_offload.json", "zero3.json", "zero3_offload.json"])
def test_deepspeed_files_fit_both_precisions(name: str, stage1_files: list[str]) -> None:
    for precision in ("bf16", "fp32"):
        overrides = [f"run.deepspeed={REPOSITORY / 'configs/deepspeed' / name}", f"run.precision={precision}"]
        load_config(Stage1Config, None, [*stage1_files, *overrides])


def test_entry_points_exit_with_2_and_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_config_or_exit(WholeConfig, None, ["run.sede=3"])
    assert exit_.value.code == EXIT_BAD_INPUT
    assert "did you mean run.seed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", ["llmga.config", "llmga.records", "llmga.tokens", "llmga.stage1.config", "llmga.cli"]
)
def test_imports_no_deep_learning_library(module: str) -> None:
    heavy = ("torch", "transformers", "diffusers", "deepspeed", "accelerate", "datasets", "wandb")
    code = f"import sys, {module}; sys.exit(', '.join(sorted(set({heavy}) & set(sys.modules))) or 0)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_the_training_script_refuses_bad_settings_before_torch_is_imported() -> None:
    # A finder that refuses torch: the script can only end well-mannered if it never asks for it.
    code = """
import runpy, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, NoTorch())
sys.argv = ["train_stage1.py", "configs/stage1/toy.yaml", "optim.learning_rate=1e-4", "run.max_stps=3"]
runpy.run_path("scripts/train_stage1.py", run_name="__main__")
"""
    before = os.times().children_user
    finished = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == EXIT_BAD_INPUT, finished.stderr
    assert "did you mean optim.lr?" in finished.stderr and "did you mean run.max_steps?" in finished.stderr
    assert os.times().children_user - before < 2  # 0.4 s; importing torch alone takes longer
