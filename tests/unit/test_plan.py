"""A plan must be right before a GPU is taken: memory beside real allocations, and everything else beside hand-made sums.

Run: pytest tests/unit/test_plan.py
"""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaForConditionalGeneration
from typer.testing import CliRunner

from llmga.cli import app
from llmga.config import EXIT_BAD_INPUT, EXIT_OK, RunConfig
from llmga.records import Record, write_manifest
from llmga.stage1.config import DataConfig, LoraConfig, ModelConfig, SourceConfig, Stage1Config
from llmga.stage1.cross_entropy import use_chunked_cross_entropy
from llmga.stage1.data import build_datasets
from llmga.stage1.model import set_trainable
from llmga.stage1.plan.architecture import Counts, UnknownArchitecture, published, read_architecture
from llmga.stage1.plan.disk import disk_use
from llmga.stage1.plan.examples import plan_data
from llmga.stage1.plan.memory import MemoryModel
from llmga.stage1.plan.rehearsal import ACTIVATIONS, GRADIENTS, LOSS, BatchShape, HowToStep, rehearse_step
from llmga.stage1.plan.speed import (
    CARDS,
    SpeedError,
    flops_per_token,
    named_card,
    speed_from_share,
    speed_of_run,
)
from llmga.stage1.plan.states import BUFFERS, OPTIMIZER, WEIGHTS, Engine, standing_states
from llmga.tokens import IGNORE_INDEX
from tests.toy import NUM_IMAGE_TOKENS, toy_mllm_folder, toy_processor

REPOSITORY = Path(__file__).parents[2]
BASE = REPOSITORY / "llmga/toyworld/checkpoints/base/mllm"
ZERO3 = REPOSITORY / "configs/deepspeed/zero3.json"


def settings(folder: Path, model: ModelConfig | None = None, **run) -> Stage1Config:
    return Stage1Config(
        model=model or ModelConfig(path=BASE),
        data=DataConfig(sources=[SourceConfig(path=folder / "train.jsonl")], max_length=256),
        run=RunConfig(output_dir=folder / "run", **run),
    )


# ---------------------------------------------------------------- the rehearsal against the real thing


def small_llava():
    """The toy base model, wide enough for its tensors to outweigh everything else."""
    config = AutoConfig.from_pretrained(BASE)
    config.text_config.vocab_size = 4096
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def really_allocated(model, batch: BatchShape, how: HowToStep) -> int:
    """The most that torch's allocator held above the start while a real batch went forward and backward."""
    shape = (batch.rows, batch.tokens)
    placeholders = batch.pictures // batch.rows * 16
    input_ids = torch.full(shape, 7)
    input_ids[:, :placeholders] = model.config.image_token_id
    labels = torch.full(shape, IGNORE_INDEX)
    labels.view(-1)[-batch.trained :] = 7
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, -1] = 0  # padded, so that there is a mask
    pictures = torch.zeros(batch.pictures, 3, 64, 64)
    model.train()
    set_trainable(model, "projector+llm")
    if how.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if how.chunked:
        use_chunked_cross_entropy(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        output = model(input_ids=input_ids, labels=labels, attention_mask=mask, pixel_values=pictures, use_cache=False)
        loss = output.loss
        del output
        loss.backward()
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "how",
    [HowToStep(), HowToStep(chunked=True), HowToStep(checkpointing=True, chunked=True)],
    ids=["all logits", "chunked", "checkpointing"],
)
def test_a_rehearsed_step_allocates_what_a_real_one_does(how: HowToStep) -> None:
    batch = BatchShape(rows=4, tokens=128, pictures=4, trained=200)
    measured = really_allocated(small_llava(), batch, how)
    with torch.device("meta"):
        model = small_llava()
    set_trainable(model, "projector+llm")
    predicted = sum(rehearse_step(model, batch, how).values())
    assert predicted == pytest.approx(measured, rel=0.03)
