"""What recipes say with --dry-run: counts that the work itself then keeps, and nothing made or asked.

Run: pytest tests/integration/test_dry_run.py
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from llmga.cli import app
from llmga.config import EXIT_BAD_INPUT, EXIT_OK, load_config
from llmga.diffrir.config import DiffRIRConfig
from llmga.diffrir.plan import make_plan, plan_text
from llmga.diffrir.train import build_restorer
from llmga.records import Record, write_manifest
from llmga.runtime import Ranks
from llmga.stage1.record.parts import PartWriter, parts_folder
from llmga.stage2.cache import CacheError
from llmga.stage2.make_cache import make_cache
from llmga.stage2.plan_cache import plan_cache
from llmga.stage2.plan_cache import plan_text as cache_text
from tests.toy_restoration import STEPS, settings
from tests.toy_stage2 import load, make_inputs

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--dry-run"])
    return int(script(name).main())


# ---------------------------------------------------------------- restoration


def test_a_restoration_plan_counts_what_each_phase_trains(tmp_path: Path) -> None:
    cfg = settings(tmp_path, batch_size=2, accumulation_steps=3)
    plan = make_plan(cfg, devices=4)
    assert plan.pictures == {str(tmp_path / "pictures"): 6} and plan.held_out == 3 and not plan.missing
    assert [phase.settings.name for phase in plan.phases] == ["prior", "encoder", "joint", "gan"]
    assert {phase.examples for phase in plan.phases} == {STEPS * 2 * 3 * 4}
    teacher, restorer = build_restorer(cfg, "prior"), build_restorer(cfg, "diffusion")
    sizes = [sum(value.numel() for value in network.parameters()) for network in (teacher, restorer)]
    prior, encoder, joint, gan = plan.phases
    assert (prior.learning, prior.frozen) == (sizes[0], 0) and prior.state_bytes == 16 * sizes[0]
    assert encoder.learning == sum(value.numel() for value in restorer.prior_parameters())
    assert encoder.learning + encoder.frozen == sizes[0] + sizes[1]
    assert (joint.learning, joint.frozen) == (sizes[1], sizes[0])
    assert joint.state_bytes == 4 * (4 * sizes[1] + sizes[0] + sizes[1])  # with the average
    assert gan.learning > joint.learning and gan.frozen == sizes[0]  # the discriminator learns, too


@pytest.mark.parametrize("path", sorted((ROOT / "configs/diffrir").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_restorer_is_planned_without_its_pictures(path: Path) -> None:
    plan = make_plan(load_config(DiffRIRConfig, path, check_machine=False), devices=8)
    *_, last = plan.phases
    assert last.learning > (1e6 if path.stem == "toy" else 25e6) and last.state_bytes > 16 * last.learning
    assert f"{last.learning:,}" in plan_text(plan) and f"{last.settings.steps:,}" in plan_text(plan)


def test_the_published_restorer_is_planned_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["plan", "configs/diffrir/x1.yaml", "--devices", "8"], prog_name="llmga")
    assert result.exit_code == EXIT_OK, result.stderr
    assert "prior      400,000   25,600,000        ?" in result.stdout
    assert "- data/restoration/train.txt" in result.stdout and "nothing was trained and nothing" in result.stdout


def test_the_recipe_tells_its_plan_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert dry_run(monkeypatch, "train_diffrir", "configs/diffrir/x2.yaml", f"run.output_dir={tmp_path}") == EXIT_OK
    assert "1 forward passes x 8 devices = 64 examples a step" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "1")
    assert dry_run(monkeypatch, "train_diffrir", "configs/diffrir/x2.yaml") == EXIT_OK
    assert not capsys.readouterr().out


# ---------------------------------------------------------------- recording


def test_a_recording_tells_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Record(f"see-{number}", "similar_image", image="a.png") for number in range(7)]
    rows.append(Record("fill", "inpainting", image="a.png"))
    rows.append(
        Record("chat", "qa", messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}))
    )
    write_manifest(tmp_path / "rows.jsonl", rows)
    (tmp_path / "c.yaml").write_text("{}\n")
    asked = (
        tmp_path / "c.yaml", f"source.path={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'out.jsonl'}",
        "endpoint.url=http://127.0.0.1:9/v1", "endpoint.model=llmga", "batch_size=4",
    )  # fmt: skip
    assert dry_run(monkeypatch, "record_prompts", *asked) == EXIT_OK
    told = capsys.readouterr().out
    assert "9 rows of" in told and "7 ask for similar_image" in told and "1 ask for inpainting" in told
    assert "8 are left: 2 batches of up to 4" in told and "by llmga at http://127.0.0.1:9/v1" in told
    assert not parts_folder(tmp_path / "out.jsonl").exists()
    with PartWriter(parts_folder(tmp_path / "out.jsonl"), 0, 1) as part:
        part.append([{"row": row, "id": f"see-{row}", "prompt": "a"} for row in range(5)])
    assert dry_run(monkeypatch, "record_prompts", *asked) == EXIT_OK
    told = capsys.readouterr().out
    assert "5 are recorded in" in told and "3 are left: 1 batches" in told


def test_a_recording_of_what_is_not_here_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert dry_run(monkeypatch, "record_prompts", "configs/record/photos_7b.yaml", "model=nowhere") == EXIT_OK
    assert "- nowhere, the model" in capsys.readouterr().out


# ---------------------------------------------------------------- caching


def test_a_cache_plan_finds_the_shards_that_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(tmp_path)
    overrides = (f"cache.path={tmp_path / 'cache'}", "cache.rows_per_shard=5", "cache.precision=fp32")
    cfg = load(inputs, *overrides)
    assert dry_run(monkeypatch, "cache_stage2", inputs, *overrides) == EXIT_OK
    told = capsys.readouterr().out
    assert "3 of 3 shards are to be made: 12 of 12 pictures" in told and "4.1 kB a picture" in told
    assert "16 x 16 px, 2 variants" in told and not (tmp_path / "cache").exists()
    make_cache(cfg, Ranks())
    [source] = plan_cache(cfg).sources
    assert (source.shards_to_make, source.to_make) == (0, 0)
    [_, second, _] = sorted((tmp_path / "cache").glob("source-0/*.safetensors"))
    picture_bytes = plan_cache(cfg).picture_bytes
    assert picture_bytes is not None and 5 * picture_bytes == pytest.approx(second.stat().st_size, rel=0.05)
    second.unlink()
    assert "1 of 3 shards are to be made: 5 of 12" in cache_text(plan_cache(cfg))
    other = load(inputs, *overrides, "data.flip_share=0")
    with pytest.raises(CacheError, match="was made with mirrored True, this run has False"):
        plan_cache(other)
    assert plan_cache(other, anew=True).sources[0].to_make == 12
    assert dry_run(monkeypatch, "cache_stage2", inputs) == EXIT_BAD_INPUT
    assert "cache.path is not set" in capsys.readouterr().err
