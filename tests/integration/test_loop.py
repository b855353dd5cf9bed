"""The loop that Stable Diffusion and DiffRIR are trained by: exact resuming, signals, bad batches, two networks.

Resuming once restored everything but the generators, or logged a mean over half an interval. Run: pytest
tests/integration/test_loop.py
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmga.checkpoint import is_complete, latest_checkpoint
from llmga.config import OptimConfig, RunConfig
from llmga.learner import Learner, fused_adamw, lr_factor
from llmga.memory import memory_advice
from llmga.non_finite import NonFiniteLossError
from llmga.run_folder import ResumeError
from llmga.runtime import Interrupted, RunFailed
from tests.toy_loop import ToyLoopConfig, lines, losses, train


def settings(folder: Path, **changes: Any) -> ToyLoopConfig:
    own = {key: changes.pop(key) for key in list(changes) if key in ToyLoopConfig.__dataclass_fields__}
    run = {
        "output_dir": folder,
        "max_steps": 8,
        "batch_size": 2,
        "accumulation_steps": 2,
        "precision": "fp32",
        "num_workers": 0,
        "log_every_steps": 3,
        "save_every_steps": 2,
    }
    return ToyLoopConfig(RunConfig(**run | changes), OptimConfig(lr=0.05, warmup=2), **own)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(tmp_path_factory.mktemp("loop") / "run")).parent


def test_a_run_writes_its_figures_checkpoints_and_result(unbroken: Path) -> None:
    assert sorted(losses(unbroken)) == [1, 3, 6, 8]  # the first, each third and the last
    assert losses(unbroken, "half") == {step: pytest.approx(loss / 2) for step, loss in losses(unbroken).items()}
    last = next(line for line in lines(unbroken) if line["step"] == 8 and "loss" in line)
    assert last["samples"] == 32 and last["epoch"] == 2.0 and last["eta_s"] == 0.0
    assert last["samples_per_s"] > 0 and 0 <= last["loader_wait"] <= 1 and last["grad_norm"] > 0
    assert list(losses(unbroken, "eval_loss")) == [8]
    assert [path.name for path in sorted(unbroken.glob("checkpoint-*"))] == ["checkpoint-6", "checkpoint-8"]
    provenance = json.loads((unbroken / "final" / "provenance.json").read_text())
    assert provenance["stage"] == "toy" and provenance["steps"] == 8 and provenance["samples"] == 32
    assert provenance["config"]["optim"]["lr"] == 0.05
    exported = torch.load(unbroken / "final" / "net.pt", weights_only=True)
    saved = load_file(unbroken / "checkpoint-8" / "net.safetensors")
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)


@pytest.mark.parametrize("steps_before", [3, 5])
def test_a_run_stopped_by_a_signal_goes_on_exactly(unbroken: Path, tmp_path: Path, steps_before: int) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {steps_before} of 8; .*checkpoint"):
        train(settings(folder, term_at=4 * steps_before - 1))
    latest = latest_checkpoint(folder)
    assert latest is not None and latest.name == f"checkpoint-{steps_before}"
    train(settings(folder))
    assert losses(folder) == losses(unbroken)
    assert losses(folder, "eval_loss") == losses(unbroken, "eval_loss")
    for name in ("net.safetensors", "net.ema.safetensors"):
        made, wanted = (load_file(f / "checkpoint-8" / name) for f in (folder, unbroken))
        assert all(torch.equal(made[key], wanted[key]) for key in wanted)


def test_loading_workers_change_nothing(unbroken: Path, tmp_path: Path) -> None:
    folder = train(settings(tmp_path / "run", num_workers=2)).parent
    assert losses(folder) == losses(unbroken)


def test_a_run_may_follow_one_of_another_precision(unbroken: Path, tmp_path: Path) -> None:
    train(settings(tmp_path / "half", precision="bf16"))
    assert losses(train(settings(tmp_path / "run")).parent) == losses(unbroken) != losses(tmp_path / "half")


def test_accumulation_sums_up_to_the_larger_batch(tmp_path: Path) -> None:
    one = train(settings(tmp_path / "one", batch_size=4, accumulation_steps=1, max_steps=1, ema=False)).parent
    weights = load_file(one / "checkpoint-1" / "net.safetensors")
    assert losses(one)[1] > 0 and all(value.isfinite().all() for value in weights.values())
    assert not (one / "checkpoint-1" / "net.ema.safetensors").exists()


def test_a_bad_batch_stops_the_run_before_its_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step 5: the loss is nan\. The weights were not touched"):
        train(settings(tmp_path / "run", bad_example=18))
    report = json.loads((tmp_path / "run" / "non_finite" / "step-5" / "rank0.json").read_text())
    assert [batch["sample_ids"] for batch in report["batches"]] == [["row16", "row17"], ["row18", "row19"]]
    batch = load_file(tmp_path / "run" / "non_finite" / "step-5" / "rank0-batch1.safetensors")
    assert batch["answer"].isnan().tolist() == [True, False]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_too_little_memory_names_the_setting_that_fits(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"out of memory .*run.batch_size=1 run.accumulation_steps=4 \(same batch"):
        train(settings(tmp_path / "run", memory_at=5))
    run = RunConfig(tmp_path, batch_size=3, precision="bf16", gradient_checkpointing=True)
    assert memory_advice(run).startswith("run.batch_size=1 run.accumulation_steps=3 (same batch per step)")


def test_two_networks_learn_in_turn_and_resume(tmp_path: Path) -> None:
    whole = train(settings(tmp_path / "whole", adversary=True)).parent
    assert set(losses(whole, "loss_judge")) == {1, 3, 6, 8} and losses(whole, "grad_norm_judge")
    judge = load_file(whole / "checkpoint-8" / "judge.safetensors")
    assert not torch.equal(judge["weight"], load_file(whole / "checkpoint-6" / "judge.safetensors")["weight"])
    with pytest.raises(Interrupted):
        train(settings(tmp_path / "broken", adversary=True, term_at=11))
    broken = train(settings(tmp_path / "broken", adversary=True)).parent
    for name in ("loss", "loss_judge", "grad_norm_judge"):
        assert losses(broken, name) == losses(whole, name)
    assert torch.equal(load_file(broken / "checkpoint-8" / "judge.safetensors")["weight"], judge["weight"])


def test_a_finished_run_is_not_repeated_and_a_changed_network_is_refused(unbroken: Path, tmp_path: Path) -> None:
    written = (unbroken / "metrics.jsonl").read_bytes()
    assert train(settings(unbroken)) == unbroken / "final"
    assert (unbroken / "metrics.jsonl").read_bytes() == written
    with pytest.raises(Interrupted):
        train(settings(tmp_path / "run", term_at=5, ema=False))
    with pytest.raises(ResumeError, match=r"holds no running average of net; keep it off as it was"):
        train(settings(tmp_path / "run"))
    with pytest.raises(ResumeError, match=r"4 examples per step, this run has 2"):
        train(settings(tmp_path / "run", batch_size=1, ema=False))


def test_pictures_are_shown_when_due_and_at_the_end(tmp_path: Path) -> None:
    folder = train(settings(tmp_path / "run", sample_every_steps=3, eval_every_steps=4)).parent
    assert sorted(path.name for path in folder.glob("shown-*")) == ["shown-3", "shown-6", "shown-8"]
    assert list(losses(folder, "eval_loss")) == [4, 8]
    assert is_complete(folder / "checkpoint-8")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule: Any) -> None:
    from transformers import get_scheduler

    optim = OptimConfig(lr=1.0, warmup=3, schedule=schedule)
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)
    factor = lr_factor(optim, 10)
    for done in range(10):
        assert factor(done) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert lr_factor(OptimConfig(warmup=0.25), 10)(2) == pytest.approx(2 / 3)  # a quarter of ten, rounded up


def test_the_average_follows_the_published_decay() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    learner = Learner(
        "net", net, fused_adamw(net.parameters(), OptimConfig()), lambda m, b: m.weight.sum(), lambda s: 1.0, 0, 0.9999
    )
    expected = 0.0
    for step in range(1, 6):
        with torch.no_grad():
            net.weight.fill_(float(step))
        learner.ema.step()
        decay = 0.0 if step == 1 else min(0.9999, step / (9 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(learner.ema.values["weight"]) == pytest.approx(expected)
    with learner.averaged() as averaged:
        assert averaged.weight.item() == pytest.approx(expected) and not averaged.training
    assert net.weight.item() == 5.0 and net.training
    with pytest.raises(ValueError, match="no parameter of net requires a gradient"):
        Learner("net", net.requires_grad_(False), learner.optimizer, learner.loss, math.sqrt)
