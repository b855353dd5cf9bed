"""Stage 1 in one process, from the settings to a finished folder, with everything that can go wrong on the way.

Whatever interrupts a run (kill -9, SIGTERM, a full disk), running it again must end in the same weights, bit for bit.
Run: pytest tests/e2e/test_stage1_train.py
"""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llmga.bad_samples import TooManyBadSamples
from llmga.checkpoint import is_complete, latest_checkpoint
from llmga.config import EXIT_FAILED, load_config
from llmga.run_folder import ResumeError
from llmga.runtime import RunFailed
from llmga.stage1.config import Stage1Config
from llmga.stage1.model import read_picture_shape
from llmga.stage1.train import train
from tests.e2e.stage1_run import PATIENCE, lines, losses, make_inputs, sample_ids, start, wait_for, weights
from tests.toy import IMAGE_SIZE_PX

pytestmark = pytest.mark.e2e


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step_4(happens: Callable[[], None]) -> None:
    make_step, steps = torch.optim.AdamW.step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            happens()
        return make_step(self, *args, **kwargs)

    torch.optim.AdamW.step = step


def die_in_step_4() -> None:
    in_step_4(die)


def die_while_saving_step_4() -> None:
    torch_save = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        torch_save(value, path, *args, **kwargs)
        if str(path).endswith("checkpoint-4/optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = save


def die_before_the_marker_of_step_4() -> None:
    replace = os.replace
    os.replace = lambda source, target: die() if str(target).endswith("-4/complete") else replace(source, target)


def die_before_the_result_appears() -> None:
    replace = os.replace
    os.replace = lambda source, target: die() if str(target).endswith("/final") else replace(source, target)


def slow_down() -> None:
    make_step = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return make_step(self, *args, **kwargs)

    torch.optim.AdamW.step = step


def train_here(settings: Path, *overrides: str) -> Path:
    return train(load_config(Stage1Config, settings, overrides))


def run_dir(settings: Path, *overrides: str) -> Path:
    return Path(load_config(Stage1Config, settings, overrides).run.output_dir)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("stage1"))


@pytest.fixture(scope="module")
def unbroken(settings: Path) -> Path:
    """The run folder of a run that nothing happened to."""
    return train_here(settings, "run.sample_every_steps=3", "run.keep_last=1").parent


@pytest.fixture
def elsewhere(tmp_path: Path) -> str:
    """Override for a run folder of the test's own."""
    return f"run.output_dir={tmp_path / 'run'}"


def assert_same_result(folder: Path, reference: Path) -> None:
    assert sample_ids(folder) == sample_ids(reference) == {step: [2 * step - 2, 2 * step - 1] for step in range(1, 7)}
    assert losses(folder) == losses(reference)
    made, expected = weights(folder / "final"), weights(reference / "final")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- what a run leaves


def test_a_run_writes_exactly_these_files(unbroken: Path) -> None:
    top = {path.name for path in unbroken.iterdir()}
    assert top == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples",
        "samples-rank0.jsonl",
        "checkpoint-6",
        "final",
    }
    assert {path.name for path in (unbroken / "samples").iterdir()} == {
        "index.html",
        "step-3.html",
        "step-6.html",
        "replies.jsonl",
    }
    assert is_complete(unbroken / "checkpoint-6")
    resolved = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert (resolved["run"]["max_steps"], resolved["optim"]["weight_decay"]) == (6, 0.0)
    start = json.loads((unbroken / "environment.json").read_text())["starts"][0]
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]


def test_metrics_tell_what_was_trained_on_and_how_fast(unbroken: Path) -> None:
    training = [line for line in lines(unbroken / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    for line in training:
        assert {"lr", "grad_norm", "tokens_per_s", "samples_per_s", "memory_gb", "epoch", "eta_s"} <= line.keys()
    assert training[-1]["epoch"] == 0.5  # 12 of 24 rows
    assert [line["lr"] for line in training[:3]] == pytest.approx([0, 0.005, 0.01])  # two steps of warm-up
    batches = [json.loads(line)["ids"] for line in (unbroken / "samples-rank0.jsonl").read_text().splitlines()]
    assert batches == [[[2 * i, 2 * i + 1]] for i in range(6)]


def test_held_out_loss_is_the_mean_over_tokens_of_each_source(settings: Path, unbroken: Path) -> None:
    from llmga.stage1.data import Collator, build_datasets
    from llmga.stage1.model import load_mllm

    written = next(line for line in lines(unbroken / "metrics.jsonl") if "eval_pictures_loss" in line)
    mllm = load_mllm(unbroken / "final")
    _, held_out = build_datasets(load_config(Stage1Config, settings), mllm.processor, 2)
    batch = Collator.of(held_out["pictures"])([held_out["pictures"][i] for i in range(4)])  # one batch instead of two
    with torch.no_grad():
        assert written["eval_pictures_loss"] == pytest.approx(float(mllm.model(**batch).loss), rel=1e-5)
    assert any("eval_texts_loss" in line for line in lines(unbroken / "metrics.jsonl"))


def test_the_result_loads_in_plain_transformers_and_knows_its_origin(settings: Path, unbroken: Path) -> None:
    final = unbroken / "final"
    model, info = LlavaForConditionalGeneration.from_pretrained(final, output_loading_info=True)
    assert not any(info.values())
    assert (
        AutoProcessor.from_pretrained(final).tokenizer.convert_tokens_to_ids("<gen_img>")
        < model.config.text_config.vocab_size
    )
    assert json.loads((final / "config.json").read_text()).get("use_cache", True) is True
    assert read_picture_shape(final) == (IMAGE_SIZE_PX, "squash")  # for whoever asks it something
    before = LlavaForConditionalGeneration.from_pretrained(settings.parent / "model").state_dict()
    after = model.state_dict()
    for name in before:
        frozen = "vision_tower" in name
        same = torch.equal(before[name], after[name][: before[name].shape[0]])
        assert same == frozen, name
    provenance = json.loads((final / "provenance.json").read_text())
    assert provenance["steps"] == 6
    assert provenance["chat_template"] == "the tokenizer's own"
    assert provenance["trained_tokens"] == lines(unbroken / "metrics.jsonl")[-3]["trained_tokens"]
    hashed = {Path(entry["path"]).name: entry["sha256"] for entry in provenance["inputs"]}
    assert {"train.jsonl", "model.safetensors"} <= hashed.keys()


def test_sample_pages_show_question_picture_reply_and_expected_answer(unbroken: Path) -> None:
    page = (unbroken / "samples" / "index.html").read_text()
    assert page.count("<article>") == 2
    assert "data:image/png;base64," in page and "no picture" in page
    assert "reply after step 3" in page and "reply after step 6" in page
    assert "<b>&lt;gen_img&gt;</b>" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched


def test_a_finished_run_started_again_does_nothing(
    settings: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    assert train_here(settings, f"run.output_dir={unbroken}", "optim.lr=1") == unbroken / "final"
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before
    said = capsys.readouterr().err
    assert "is finished" in said and "optim.lr" in said and "run.resume=false" in said


def test_the_same_batch_in_two_halves_gives_the_same_losses(settings: Path, unbroken: Path, elsewhere: str) -> None:
    train_here(settings, elsewhere, "run.batch_size=1", "run.accumulation_steps=2", "run.gradient_checkpointing=true")
    folder = run_dir(settings, elsewhere)
    assert sample_ids(folder) == sample_ids(unbroken)
    assert list(losses(folder).values()) == pytest.approx(list(losses(unbroken).values()), abs=2e-5)


def test_packed_it_trains_on_the_same_samples_to_the_same_losses(
    settings: Path, unbroken: Path, elsewhere: str
) -> None:
    folder = train_here(settings, elsewhere, "data.packing=true", "model.cross_entropy=full").parent
    assert sample_ids(folder) == sample_ids(unbroken)
    assert list(losses(folder).values()) == pytest.approx(list(losses(unbroken).values()), abs=5e-6)
    held_out = [
        [value for line in lines(f / "metrics.jsonl") for key, value in line.items() if key.startswith("eval_")]
        for f in (folder, unbroken)
    ]
    assert len(held_out[0]) == 2 and held_out[0] == pytest.approx(held_out[1], abs=5e-6)
    counts = [[line["trained_tokens"] for line in lines(f / "metrics.jsonl")[:6]] for f in (folder, unbroken)]
    assert counts[0] == counts[1]


def test_rows_of_bounded_length_leave_out_what_they_count(settings: Path, elsewhere: str) -> None:
    bounds = ("data.packing=true", "data.max_length=250", "data.max_tokens=250", "run.num_workers=1")
    folder = train_here(settings, elsewhere, *bounds, "run.batch_size=4").parent
    left_out = [line for line in lines(folder / "bad_samples.jsonl") if line["kind"] == "no_room"]
    seen = {index for ids in sample_ids(folder).values() for index in ids}
    missing = {line["index"] for line in left_out}
    assert missing and not seen & missing and seen | missing == set(range(24))
    logged = [line for line in lines(folder / "metrics.jsonl") if "loss" in line]
    assert logged[-1]["left_out"] == len(missing)


@pytest.mark.parametrize("optimizer", [(), ("optim.matrix_lr=1e-3",)], ids=["adamw", "muon"])
def test_packed_killed_and_run_again_ends_in_the_same_weights(
    settings: Path, tmp_path: Path, optimizer: tuple[str, ...]
) -> None:
    packed = ("data.packing=true", "run.batch_size=1", "run.accumulation_steps=2", "run.num_workers=1", *optimizer)
    whole = train_here(settings, *packed, f"run.output_dir={tmp_path / 'whole'}").parent
    overrides = (*packed, f"run.output_dir={tmp_path / 'killed'}")
    assert start(settings, *overrides, sabotage=die_in_step_4).wait() == [-signal.SIGKILL]
    train_here(settings, *overrides)
    assert_same_result(tmp_path / "killed", whole)


@pytest.mark.parametrize("cross_entropy", ["full", "chunked"])
def test_the_loss_can_be_the_mean_of_means(settings: Path, elsewhere: str, cross_entropy: str) -> None:
    from llmga.stage1.added_tokens import add_generation_tags
    from llmga.stage1.data import Collator, build_datasets
    from llmga.stage1.model import load_mllm

    overrides = (elsewhere, "run.batch_size=1", "run.accumulation_steps=3", "data.packing=true", "run.max_steps=1")
    train_here(settings, *overrides, "run.loss_average=micro_batch", f"model.cross_entropy={cross_entropy}")
    mllm = load_mllm(settings.parent / "model")
    add_generation_tags(mllm, mllm.tags)
    data, _ = build_datasets(load_config(Stage1Config, settings), mllm.processor, 12)
    with torch.no_grad():
        means = [float(mllm.model(**Collator.of(data)([data[index]])).loss) for index in range(3)]
    assert losses(run_dir(settings, elsewhere))[1] == pytest.approx(sum(means) / 3, abs=2e-6)


def test_bf16_and_epochs_and_the_projector_alone(settings: Path, unbroken: Path, elsewhere: str) -> None:
    overrides = ("run.max_steps=null", "run.epochs=0.2", "run.precision=bf16", "model.trainable=projector")
    final = train_here(settings, elsewhere, *overrides)
    steps = losses(final.parent)
    assert list(steps) == [1, 2, 3]  # 0.2 epochs of 24 rows are 4.8 examples, so 3 steps of 2
    assert steps[1] == pytest.approx(losses(unbroken)[1], abs=0.05) and steps[1] != losses(unbroken)[1]
    assert {tensor.dtype for tensor in weights(final).values()} == {torch.bfloat16}


# ---------------------------------------------------------------- interrupted, and run again


@pytest.mark.parametrize(
    ("sabotage", "workers", "kept"),
    [
        (die_in_step_4, 2, "checkpoint-2"),
        (die_while_saving_step_4, 0, "checkpoint-2"),
        (die_before_the_marker_of_step_4, 0, "checkpoint-2"),
        (die_before_the_result_appears, 0, "checkpoint-6"),
    ],
)
def test_killed_and_run_again_ends_in_the_same_weights(
    settings: Path, unbroken: Path, elsewhere: str, sabotage: Callable[[], None], workers: int, kept: str
) -> None:
    overrides = (elsewhere, f"run.num_workers={workers}")
    assert start(settings, *overrides, sabotage=sabotage).wait() == [-signal.SIGKILL]
    folder = run_dir(settings, *overrides)
    found = latest_checkpoint(folder)
    assert found is not None and found.name == kept
    assert not (folder / "final").exists()
    train_here(settings, *overrides)
    assert_same_result(folder, unbroken)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_signal_to_the_whole_group_saves_and_exits_130(settings: Path, unbroken: Path, elsewhere: str) -> None:
    overrides = (elsewhere, "run.num_workers=2", "run.save_every_steps=0")
    folder = run_dir(settings, *overrides)
    started = start(settings, *overrides, sabotage=slow_down)
    wait_for(folder / "metrics.jsonl")
    os.killpg(started.processes[0].pid, signal.SIGTERM)  # the loading workers get it too
    assert started.wait() == [130], started.said()
    said = started.said()
    saved = latest_checkpoint(folder)
    assert saved is not None
    assert f"stopped by SIGTERM after step {saved.name.split('-')[1]} of 6" in said
    assert "the same command goes on from it" in said
    train_here(settings, *overrides)
    assert_same_result(folder, unbroken)


def fill_the_disk_in_step_4() -> None:
    def let_no_file_grow() -> None:  # past what the logs need
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    in_step_4(let_no_file_grow)


def test_a_full_disk_leaves_the_previous_checkpoint(settings: Path, unbroken: Path, elsewhere: str) -> None:
    assert max(path.stat().st_size for path in (unbroken / "checkpoint-6").iterdir()) > 200_000
    started = start(settings, elsewhere, sabotage=fill_the_disk_in_step_4)
    assert started.wait() == [EXIT_FAILED], started.said()
    assert re.search(r"could not write to .* MB free now.*checkpoint-2 is complete", started.said())
    assert "Traceback" not in started.said()
    folder = run_dir(settings, elsewhere)
    assert is_complete(folder / "checkpoint-2") and not (folder / "checkpoint-4").exists()
    train_here(settings, elsewhere)
    assert_same_result(folder, unbroken)


def find_no_memory_in_step_4() -> None:
    def refuse() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    in_step_4(refuse)


def lose_a_loading_worker_in_step_4() -> None:
    def kill_and_wait() -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(PATIENCE)  # until the signal of its death

    in_step_4(kill_and_wait)


@pytest.mark.parametrize(
    ("sabotage", "workers", "sentence"),
    [
        (find_no_memory_in_step_4, 0, r"out of memory .*run\.batch_size=1 run\.accumulation_steps=2"),
        (lose_a_loading_worker_in_step_4, 1, r"a loading worker was killed.*checkpoint-2 is complete"),
    ],
)
def test_too_little_memory_is_one_sentence(
    settings: Path, elsewhere: str, sabotage: Callable[[], None], workers: int, sentence: str
) -> None:
    started = start(settings, elsewhere, f"run.num_workers={workers}", sabotage=sabotage)
    assert started.wait() == [EXIT_FAILED], started.said()
    assert re.search(sentence, started.said()) and "Traceback" not in started.said()


def test_an_incomplete_checkpoint_is_ignored_and_a_misfit_is_refused(
    settings: Path, unbroken: Path, tmp_path: Path, elsewhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder, ignore=shutil.ignore_patterns("final"))
    (folder / "checkpoint-8").mkdir()
    with pytest.raises(ResumeError, match=r"2 examples per step, this run has 6; keep run\.batch_size"):
        train_here(settings, elsewhere, "run.batch_size=6")
    assert not (folder / "checkpoint-8").exists()
    assert "removed" in capsys.readouterr().err
    with pytest.raises(ResumeError, match=r"checkpoint-6 was trained otherwise: run\.seed was 0 and is 5 now; undo"):
        train_here(settings, elsewhere, "run.seed=5")
    with pytest.raises(ResumeError, match=r"written by plain, this run uses zero2; set run\.deepspeed"):
        from llmga.run_folder import check_fits

        check_fits(folder / "checkpoint-6", examples_per_step=2, engine="zero2", world_size=1)


def test_resume_false_starts_anew_and_keeps_what_was_there(settings: Path, unbroken: Path, elsewhere: str) -> None:
    folder = run_dir(settings, elsewhere)
    shutil.copytree(unbroken, folder)
    train_here(settings, elsewhere, "run.resume=false", "run.max_steps=1", "data.validation=[]")
    assert list(losses(folder)) == [1]
    assert_same_result(folder / "previous-1", unbroken)


# ---------------------------------------------------------------- bad luck and bad input


def test_a_loss_that_is_not_finite_stops_the_run_with_the_batch_saved(settings: Path, elsewhere: str) -> None:
    overrides = (elsewhere, "optim.lr=1e30", "optim.warmup=0", "run.save_every_steps=1")
    with pytest.raises(RunFailed, match=r"step 2: the loss is (nan|inf).*weights were not touched"):
        train_here(settings, *overrides)
    folder = run_dir(settings, *overrides)
    saved = folder / "non_finite" / "step-2"
    report = json.loads((saved / "rank0.json").read_text())
    assert report["batches"][0]["sample_ids"] == [2, 3]
    assert "a scene, number" in " ".join(report["batches"][0]["texts"])
    batch = load_file(saved / report["batches"][0]["file"])
    model = LlavaForConditionalGeneration.from_pretrained(latest_checkpoint(folder))
    assert latest_checkpoint(folder) == folder / "checkpoint-1"
    assert not model(**batch).loss.isfinite()  # the weights before the step and the batch replay it


def test_a_gradient_that_is_not_finite_stops_the_run_too(
    settings: Path, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(self: torch.Tensor, *args: object, **kwargs: object) -> None:
        real_backward(self * float("nan"), *args, **kwargs)

    real_backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(RunFailed, match="step 1: the gradient is not finite although the loss is"):
        train_here(settings, elsewhere)


def test_unreadable_pictures_stop_the_run_past_the_share(settings: Path, elsewhere: str, tmp_path: Path) -> None:
    world = tmp_path / "world"
    shutil.copytree(settings.parent, world, ignore=shutil.ignore_patterns("run", "final"))
    for number in (2, 3, 6, 7):
        (world / f"train{number}.png").write_bytes(b"no picture")
    source = f"data.sources=[{{path: {world / 'train.jsonl'}}}]"
    train_here(settings, elsewhere, source, "data.max_bad_share=1", "run.max_steps=12", "data.validation=[]")
    bad = {line["index"] for line in lines(tmp_path / "run" / "bad_samples.jsonl")}
    shown = {line["step"]: line["replaced_picture"] for line in lines(tmp_path / "run" / "metrics.jsonl")}
    assert shown == {step: sum(index < 2 * step for index in bad) for step in range(1, 13)}
    assert shown[12] == 4  # of 24 rows, each met once
    with pytest.raises(TooManyBadSamples, match=r"data\.max_bad_share"):
        train_here(settings, f"run.output_dir={tmp_path / 'strict'}", source, "run.max_steps=12")


def test_a_row_that_cannot_be_trained_on_is_named_in_one_sentence(settings: Path, elsewhere: str) -> None:
    overrides = (elsewhere, "run.num_workers=1", "data.max_length=8", "data.too_long=error")
    started = start(settings, *overrides)
    assert started.wait() == [2]
    assert "Traceback" not in started.said()
    sentence = started.said().splitlines()[-1]
    assert sentence.startswith(str(settings.parent / "train.jsonl")) and "data.max_length = 8" in sentence


def test_wandb_offline_receives_our_figures(settings: Path, elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # so that what the run sets is taken back
        monkeypatch.delenv(name)
    try:
        train_here(settings, elsewhere, "run.trackers=[wandb]", "run.max_steps=2")
        assert list((run_dir(settings, elsewhere) / "wandb").glob("offline-run-*/*.wandb"))
        received = dict(wandb.run.summary)
    finally:
        wandb.finish()
    expected = {"train/loss", "train/tokens_per_s", "train/lr", "train/replaced_picture", "train/replaced_too_long"}
    assert {*expected, "eval/pictures_loss"} <= received.keys()
