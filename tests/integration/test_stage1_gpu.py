"""The GPU figure's script, at a size for a CPU: a share of the peak is only worth what its arithmetic is.

Run: pytest tests/integration/test_stage1_gpu.py
"""

from pathlib import Path

import pytest
import torch

from benchmarks.stage1_gpu import main, make_batch, measure
from llmga.config import EXIT_BAD_INPUT, RunConfig
from llmga.machine import matrix_peak_tflops
from llmga.stage1.config import DataConfig, ModelConfig, SourceConfig, Stage1Config
from llmga.stage1.plan.architecture import read_architecture
from llmga.tokens import IGNORE_INDEX

BASE = Path(__file__).parents[2] / "llmga/toyworld/checkpoints/base/mllm"
CPU = torch.device("cpu")


def settings() -> Stage1Config:
    return Stage1Config(
        model=ModelConfig(path=BASE),
        data=DataConfig(sources=[SourceConfig(path=Path("rows.jsonl"))], packing=True),
        run=RunConfig(output_dir=Path("run"), batch_size=3, gradient_checkpointing=True),
    )


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--tokens", "9"]) == EXIT_BAD_INPUT and "needs a CUDA device" in capsys.readouterr().err


def test_a_tiny_model_trains_and_its_arithmetic_is_counted() -> None:
    figures = measure(settings(), CPU, tokens=40, steps=3, peak_tflops=0.5)
    assert (figures["parameters"], figures["tokens_per_step"]) == (3_626_496, 120)
    assert figures["last_loss"] < figures["first_loss"] - 0.01
    layers, width, vocabulary = 1_771_200, 192, read_architecture(ModelConfig(path=BASE)).config.text_config.vocab_size
    attention = 3 * 4 * 4 * 192 * 40 / 2
    tower = 3_626_496 - layers - 74_112 - vocabulary * width
    picture = 16 * (2 * tower + 6 * 74_112) / 40
    by_hand = 6 * layers + attention + 6 * vocabulary * width * 12 / 40 + picture
    assert figures["gflop_per_token"] == pytest.approx(by_hand / 1e9, abs=5e-4)
    share = figures["tokens_per_s"] * by_hand / 0.5e12
    assert figures["share_of_peak"] == pytest.approx(share, abs=2e-4)
    assert figures["share_with_recomputation"] > 1.2 * figures["share_of_peak"]


def test_conversations_hold_one_picture_each_and_train_their_end() -> None:
    config = read_architecture(ModelConfig(path=BASE)).config
    batch = make_batch(config, 3, 40, CPU)
    assert (batch["input_ids"] == config.image_token_id).sum() == 3 * 16
    assert batch["cu_seq_lens_q"].tolist() == [0, 40, 80, 120]
    assert [int((row != IGNORE_INDEX).sum()) for row in batch["labels"][0].split(40)] == [12, 12, 12]
    assert batch["pixel_values"].dtype == torch.bfloat16
    with pytest.raises(SystemExit, match="--tokens 19 has no room for a picture of 16; give 20 or more"):
        make_batch(config, 1, 19, CPU)


def test_the_peak_is_that_of_a_product() -> None:
    assert 0 < matrix_peak_tflops(CPU, side=64, repeats=2) < 100
