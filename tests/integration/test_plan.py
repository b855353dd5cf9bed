"""A plan must be right before a GPU is taken: memory beside real allocations, all else beside sums made by hand.

Run: pytest tests/integration/test_plan.py
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaForConditionalGeneration
from typer.testing import CliRunner

from llmga.cli import app
from llmga.config import EXIT_BAD_INPUT, EXIT_OK, RunConfig, load_config, save_config
from llmga.muon import Muon
from llmga.records import Record, write_manifest
from llmga.stage1.config import DataConfig, LoraConfig, ModelConfig, SourceConfig, Stage1Config
from llmga.stage1.cross_entropy import use_chunked_cross_entropy
from llmga.stage1.data import Collator, build_datasets
from llmga.stage1.model import is_in_llm_block, set_trainable
from llmga.stage1.packing import PackingCollator
from llmga.stage1.plan.architecture import Counts, UnknownArchitecture, published, read_architecture
from llmga.stage1.plan.disk import disk_use
from llmga.stage1.plan.examples import plan_data
from llmga.stage1.plan.live_bytes import ACTIVATIONS, GRADIENTS, LOSS
from llmga.stage1.plan.memory import MemoryModel
from llmga.stage1.plan.plan import largest_allowed
from llmga.stage1.plan.rehearsal import BatchShape, HowToStep, rehearse_muon, rehearse_step
from llmga.stage1.plan.speed import (
    CARDS,
    SpeedError,
    flops_per_token,
    named_card,
    speed_from_share,
    speed_of_run,
)
from llmga.stage1.plan.states import BUFFERS, OPTIMIZER, WEIGHTS, Engine, standing_states
from llmga.stage1.start import start_model
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        output = model(input_ids=input_ids, labels=labels, attention_mask=mask, pixel_values=pictures, use_cache=False)
        loss = output.loss
        del output
        loss.backward()
    return most_held(recorded)


def most_held(recorded: profile) -> int:
    """The most bytes above the start, of a profile with memory."""
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
    assert predicted == pytest.approx(measured, rel=0.02)


def test_gradients_that_stay_are_counted_with_everything_else() -> None:
    def rehearsed(gradients: str) -> dict[str, int]:
        with torch.device("meta"):
            model = small_llava()
        set_trainable(model, "projector+llm")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == 74_112 + 1_771_200 + 4096 * 192
        return rehearse_step(model, BatchShape(2, 64, 2, 128), HowToStep(gradients=gradients))

    stay, leave = rehearsed("stay"), rehearsed("leave")
    assert stay[GRADIENTS] == 4 * (74_112 + 1_771_200 + 4096 * 192) and leave[GRADIENTS] == 0
    assert stay[ACTIVATIONS] + stay[LOSS] >= leave[ACTIVATIONS] + leave[LOSS] > 0


def test_muon_keeps_one_momentum_of_a_matrix_and_needs_room_for_its_step(tmp_path: Path) -> None:
    model = small_llava()
    set_trainable(model, "projector+llm")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer = Muon(model, is_in_llm_block, lr=2e-5, matrix_lr=1e-3)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        optimizer.step()
    work = rehearse_muon(model)
    assert work == pytest.approx(most_held(recorded), rel=0.05)
    kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    cfg = settings(tmp_path)
    adamw = MemoryModel(cfg, read_architecture(cfg.model))
    cfg.optim.matrix_lr = 1e-3
    muon = MemoryModel(cfg, read_architecture(cfg.model))
    matrices = 4 * (4 * 192 * 192 + 3 * 192 * 512)
    assert (adamw.matrices, muon.matrices) == (0, matrices)
    others = muon.trained - matrices + (4096 - model_vocabulary()) * 192  # small_llava's embedding is wider
    assert kept == 8 * others + 4 * matrices
    tiny, large = BatchShape(1, 40, 1, 8), BatchShape(8, 256, 8, 8 * 200)
    assert adamw.at(large).parts[OPTIMIZER] - muon.at(large).parts[OPTIMIZER] == 4 * matrices
    stepping = muon.at(tiny)
    assert stepping.moment == "optimizer step"
    assert stepping.parts[OPTIMIZER] == 8 * muon.trained - 4 * matrices + work
    assert disk_use(cfg, adamw).checkpoint - disk_use(cfg, muon).checkpoint == 4 * matrices


def model_vocabulary() -> int:
    return int(AutoConfig.from_pretrained(BASE).text_config.vocab_size)


def test_packed_rows_need_no_more_attention_than_their_segments() -> None:
    """One long conversation and four short ones of the same tokens: without a mask, both take the same."""

    def rehearsed(segments: int) -> int:
        with torch.device("meta"):
            model = small_llava()
        set_trainable(model, "projector+llm")
        return sum(rehearse_step(model, BatchShape(1, 512, 1, 512, packed=segments), HowToStep(chunked=True)).values())

    with torch.device("meta"):
        model = small_llava()
    set_trainable(model, "projector+llm")
    padded = sum(rehearse_step(model, BatchShape(1, 512, 1, 512), HowToStep(chunked=True)).values())
    one = rehearsed(1)
    assert rehearsed(4) == pytest.approx(one, rel=0.15)
    assert one < padded  # which keeps a mask of 512 x 512


# ---------------------------------------------------------------- what stays from step to step


def engine(stage: int | None, devices: int = 8, compute_bytes: int = 2, **zero) -> Engine:
    return Engine(stage, devices, compute_bytes, zero)


def test_states_are_shared_out_as_the_stage_says() -> None:
    trained, frozen, hidden = 8_000_000_000, 800_000_000, 4096
    weights = 2 * (trained + frozen)
    plain = standing_states(engine(None, 1, 4), trained, frozen, hidden, 4 * (trained + frozen))
    assert plain.parts == {WEIGHTS: 35_200_000_000, OPTIMIZER: 64_000_000_000, BUFFERS: 0}
    ddp = standing_states(engine(None, 8, 4), trained, frozen, hidden, 4 * (trained + frozen))
    assert ddp.parts[BUFFERS] == 32_000_000_000
    two = standing_states(engine(2, reduce_bucket_size="auto", overlap_comm=True), trained, frozen, hidden, weights)
    assert two.parts == {
        WEIGHTS: 17_600_000_000,
        OPTIMIZER: 12_000_000_000,
        GRADIENTS: 2_000_000_000,
        BUFFERS: 2 * 2 * 4096**2,
    }
    assert two.step_extra == 6_000_000_000
    three = standing_states(engine(3, reduce_bucket_size="auto", overlap_comm=False), trained, frozen, hidden, weights)
    assert (three.parts[WEIGHTS], three.parts[OPTIMIZER]) == (2_200_000_000, 12_000_000_000)
    assert three.parts[BUFFERS] == 2 * (500_000_000 + 50_000_000 + 4096**2)
    cpu = {"device": "cpu"}
    offloaded = standing_states(
        engine(3, 1, offload_optimizer=cpu, offload_param=cpu), trained, frozen, hidden, weights
    )
    assert offloaded.parts[WEIGHTS] == 0 and OPTIMIZER not in offloaded.parts
    assert offloaded.host == 17_600_000_000 + 18 * trained
    kept = standing_states(engine(2, 1, offload_optimizer=cpu), trained, frozen, hidden, weights)
    assert (kept.parts[WEIGHTS], kept.parts[GRADIENTS], kept.parts[OPTIMIZER]) == (17_600_000_000, 0, 0)
    assert kept.host == 18 * trained


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", published("llms"))
def test_published_llms_have_the_parameters_that_are_published(name: str) -> None:
    row = published("llms")[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**row["config"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == row["parameters"]


@pytest.mark.parametrize("name", published("vision_towers"))
def test_published_towers_have_the_parameters_that_are_published(name: str) -> None:
    row = published("vision_towers")[name]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**row["config"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == row["parameters"]


def test_parts_that_are_not_here_have_published_sizes_and_say_so(tmp_path: Path) -> None:
    parts = ModelConfig(llm=tmp_path / "gemma-2b-it", vision_tower=tmp_path / "siglip-so400m-patch14-384")
    found = read_architecture(parts)
    assert "not here: sizes as published in google/gemma-2b-it" in found.sources[0]
    assert found.config.vision_feature_select_strategy == "full"  # SigLIP has no class token to drop
    counts = MemoryModel(settings(tmp_path, parts), found).counts
    assert counts["vision tower"] == Counts(0, 412_987_248)
    assert counts["projector"].trained == 1152 * 2048 + 2048 + 2048 * 2048 + 2048
    assert counts["embeddings and head"].trained == 256_000 * 2048  # one for both


@pytest.mark.parametrize("name", ["toy_base", "toy_tuned"])
def test_a_toy_model_that_is_not_made_yet_has_the_sizes_of_the_shipped_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = load_config(Stage1Config, REPOSITORY / f"configs/stage1/{name}.yaml", [], check_machine=False).model.path
    found = read_architecture(ModelConfig(path=path))
    assert found.sources == [f"{path} is not made yet: sizes of the shipped toy base model"]
    model = MemoryModel(settings(tmp_path), found)
    assert (model.trained, model.trained + model.frozen) == (2_140_224, 3_626_496)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ({"llm": "x/my-own-7b", "vision_tower": BASE}, "my-own-7b.*no published model of the table .vicuna-7b-v1.5"),
        ({"path": "x/llava"}, "x/llava is not here"),
    ],
)
def test_a_model_that_nobody_knows(model: dict, complaint: str) -> None:
    with pytest.raises(UnknownArchitecture, match=complaint):
        read_architecture(ModelConfig(**model))


def test_adapters_leave_the_base_frozen_and_in_half_precision(tmp_path: Path) -> None:
    lora = settings(tmp_path, ModelConfig(path=BASE, lora=LoraConfig(rank=8)), precision="bf16")
    model = MemoryModel(lora, read_architecture(lora.model))
    assert model.counts["adapters"].trained == 4 * 8 * (4 * (192 + 192) + 2 * (192 + 512) + (512 + 192))
    assert model.counts["LLM layers"].trained == 0
    assert model.counts["projector"] == Counts(74_112, 0)  # peft's untouched copy is memory, and no parameter
    memory = model.at(BatchShape(1, 64, 1, 64))
    frozen, trained = 3_626_496, model.trained
    assert model.frozen == frozen - 74_112
    assert memory.parts[WEIGHTS] == 2 * frozen + 4 * trained
    assert memory.parts[OPTIMIZER] == 8 * trained
    four_bits = settings(tmp_path, ModelConfig(path=BASE, lora=LoraConfig(rank=8), quantize="nf4"), precision="bf16")
    smaller = MemoryModel(four_bits, read_architecture(four_bits.model)).at(BatchShape(1, 64, 1, 64))
    matrices = 4 * (4 * 192 * 192 + 3 * 192 * 512)
    assert memory.parts[WEIGHTS] - smaller.parts[WEIGHTS] == pytest.approx((2 - 0.51587) * matrices, rel=1e-4)


def test_projector_runs_leave_everything_else_in_half_precision(tmp_path: Path) -> None:
    cfg = settings(tmp_path, ModelConfig(path=BASE, trainable="projector"), precision="bf16")
    model = MemoryModel(cfg, read_architecture(cfg.model))
    assert (model.trained, model.trained + model.frozen) == (74_112, 3_626_496)
    memory = model.at(BatchShape(1, 64, 1, 64))
    assert memory.parts[WEIGHTS] == 2 * model.frozen + 4 * model.trained
    start = start_model(cfg, tmp_path / "base").trained
    assert {p.dtype for p in start.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in start.parameters() if not p.requires_grad} == {torch.bfloat16}


# ---------------------------------------------------------------- time and disk


def test_flops_of_a_token_by_hand(tmp_path: Path) -> None:
    cfg = settings(
        tmp_path, ModelConfig(llm=tmp_path / "vicuna-7b-v1.5", vision_tower=tmp_path / "clip-vit-large-patch14-336")
    )
    found = read_architecture(cfg.model)
    counts = MemoryModel(cfg, found).counts
    layers, head = 6_738_415_616 - 2 * 32_000 * 4096, 32_000 * 4096
    attention = 2 * 32 * 4096 * 1000  # forward, of 1,000 tokens of context, causal
    full = flops_per_token(cfg, found.config, counts, tokens=1000, pictures=0)
    assert full == 6 * (layers + head) + 3 * attention
    chunked = flops_per_token(cfg, found.config, counts, tokens=1000, pictures=0, trained_share=0.25)
    assert chunked == 6 * layers + 6 * head / 4 + 3 * attention
    cfg.model.cross_entropy = "full"
    assert flops_per_token(cfg, found.config, counts, 1000, 0, trained_share=0.25) == full
    cfg.model.cross_entropy = "chunked"
    cfg.run.gradient_checkpointing = True
    assert flops_per_token(cfg, found.config, counts, 1000, 0) == full + 2 * layers + attention
    picture = flops_per_token(cfg, found.config, counts, 1000, 1) - flops_per_token(cfg, found.config, counts, 1000, 0)
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert picture == pytest.approx(576 * (2 * 303_507_456 + 6 * projector) / 1000, rel=1e-6)


def test_a_share_of_the_peak_says_which() -> None:
    assumed = speed_from_share(1e9, "A100-80GB", 2, None)
    assert assumed.tokens_per_s == pytest.approx(0.4 * 312e12 * 2 / 1e9)
    assert assumed.basis.startswith("assumed: 40% of 312 TFLOP/s (bf16 peak of A100-80GB, by its maker) on 2 devices")
    assert speed_from_share(1e9, "H100", 1, 0.5).basis.startswith("given: 50% of 989")
    with pytest.raises(SpeedError, match="card 'GTX' is not in the table; expected one of RTX-3090"):
        speed_from_share(1e9, "GTX", 1, None)


def test_the_throughput_of_a_former_run_is_its_median_without_the_first_log(tmp_path: Path) -> None:
    logs = [{"step": i, "tokens_per_s": speed} for i, speed in enumerate([5, 100, 300, 200])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*logs, {"step": 4, "eval_loss": 1}])) + "\n")
    cfg = settings(tmp_path, batch_size=8)
    speed = speed_of_run(tmp_path, cfg, 1)
    assert speed.tokens_per_s == 200 and "measured: median of 3 logs of" in speed.basis
    save_config(settings(tmp_path, batch_size=4), tmp_path / "config.yaml")
    (tmp_path / "environment.json").write_text(json.dumps({"starts": [{"world_size": 1}, {"world_size": 2}]}))
    scaled = speed_of_run(tmp_path, cfg, 8)
    assert scaled.tokens_per_s == 800
    assert scaled.basis.endswith("from 2 to 8 devices in proportion; that run had another run.batch_size")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SpeedError, match="holds no tokens_per_s"):
        speed_of_run(tmp_path, cfg, 1)
    with pytest.raises(SpeedError, match="cannot be read as the metrics of a run"):
        speed_of_run(tmp_path / "nowhere", cfg, 1)


@pytest.mark.parametrize(
    ("name", "memory_gib", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.1, "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX-4090"),
        ("NVIDIA A10", 22.2, "A10"),
        ("Some other card", 8, None),
    ],
)
def test_cards_by_the_names_that_drivers_give(name: str, memory_gib: float, row: str | None) -> None:
    assert named_card(name, memory_gib) == row and (row is None or row in CARDS)


def test_disk_for_the_checkpoints_that_are_kept_and_the_one_being_written(tmp_path: Path) -> None:
    cfg = settings(tmp_path, save_every_steps=10, keep_last=2)
    disk = disk_use(cfg, MemoryModel(cfg, read_architecture(cfg.model)))
    trained, everything = 2_140_224, 2_140_224 + 1_486_272
    assert (disk.checkpoint, disk.count) == (4 * everything + 8 * trained, 3)
    assert disk.total == 3 * disk.checkpoint + 2 * everything  # bf16
    cfg.run.save_every_steps = 0
    assert disk_use(cfg, MemoryModel(cfg, read_architecture(cfg.model))).count == 1


# ---------------------------------------------------------------- data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two sources of text."""
    folder = tmp_path_factory.mktemp("plan")
    toy_mllm_folder(folder / "model")
    for name, rows in (("long", 6), ("short", 3)):
        text = "a sentence of some length " * (4 if name == "long" else 1)
        chat = ({"role": "user", "content": "why?"}, {"role": "assistant", "content": text})
        write_manifest(folder / f"{name}.jsonl", [Record(f"{name}{i}", "qa", messages=chat) for i in range(rows)])
    (folder / "settings.yaml").write_text(
        f"""
model: {{path: {folder}/model, tags: text}}
data: {{max_length: 300, sources: [{{path: {folder}/long.jsonl}}, {{path: {folder}/short.jsonl, weight: 6}}]}}
run: {{output_dir: {folder}/run, max_steps: 5, batch_size: 2, accumulation_steps: 2, precision: fp32}}
"""
    )
    return folder


PACKED = ("run.batch_size=4", "data.packing=true", "data.max_length=150")


@functools.cache
def plan(world: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", str(world / "settings.yaml"), *arguments], prog_name="llmga")
    assert result.exit_code == EXIT_OK, result.stderr
    return result.stdout


def test_steps_draws_and_tokens_of_every_source(world: Path) -> None:
    cfg = Stage1Config(
        model=ModelConfig(path=world / "model", tags="text"),
        data=DataConfig(
            sources=[SourceConfig(path=world / "long.jsonl"), SourceConfig(path=world / "short.jsonl", weight=6)],
            max_length=300,
        ),
        run=RunConfig(output_dir=world / "run", max_steps=5, batch_size=2, accumulation_steps=2),
    )
    found = plan_data(cfg, devices=3)
    assert (found.steps, found.examples, found.epochs) == (5, 60, pytest.approx(60 / 9))
    data, _ = build_datasets(cfg, toy_processor(), total=60)
    assert [(s.name, s.rows, s.draws) for s in found.sources] == [
        (s.name, s.rows, s.draws) for s in data.order.summary()
    ]
    lengths = [len(data[i]["labels"]) for i in range(60)]
    trained = [len(data[i]["labels"]) - data[i]["labels"].count(IGNORE_INDEX) for i in range(60)]
    assert found.tokens == pytest.approx(sum(lengths) / 60) and found.trained == pytest.approx(sum(trained) / 60)
    longest = max(max(lengths[i : i + 2]) for i in range(0, 60, 2))
    assert found.longest is not None and found.longest.rows == 2
    assert longest <= found.longest.tokens <= longest + NUM_IMAGE_TOKENS
    by_length = {source.name: source.tokens for source in found.sources}
    assert by_length["long"] - by_length["short"] == 3 * len("a sentence of some length ")


def test_the_first_batch_is_shown_with_what_is_trained_in_brackets(world: Path) -> None:
    shown = plan(world)
    assert "5 steps: 20 examples" in shown and "2 examples x 2 forward passes x 1 device" in shown
    assert "why?<|end|><|assistant|>[[" in shown and "length <|end|>]]" in shown.replace("length<", "length <")
    assert "nothing was trained and nothing written" in shown and not (world / "run").exists()
    assert "unknown: give --card" in shown


def test_a_plan_without_data_or_model_says_what_could_not_be_read(world: Path) -> None:
    shown = plan(
        world,
        "data.sources.0.path=nowhere/rows.jsonl",
        "model.path=null",
        "model.llm=models/Qwen2-0.5B-Instruct",
        "model.vision_tower=models/clip-vit-large-patch14-336",
        "run.max_steps=null",
        *("--devices", "8", "--card", "A100-80GB", "--examples", "6400"),
    )
    assert "200 steps: 6,400 examples" in shown
    assert "data.sources.0.path (command line): nowhere/rows.jsonl does not exist" in shown
    assert "model.llm (command line): models/Qwen2-0.5B-Instruct is no such folder" in shown
    assert "sizes as published in Qwen/Qwen2-0.5B-Instruct" in shown
    assert "assumed: 40% of 312 TFLOP/s" in shown and "hours at 300 tokens an example" in shown
    assert "A100-80GB has 85.9 GB" in shown and "fits" in shown


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_largest_batch_allowed_is_the_largest_that_the_collators_make(packing: bool, tmp_path: Path) -> None:
    cfg = settings(tmp_path, batch_size=3)
    cfg.data.packing = packing
    model = MemoryModel(cfg, read_architecture(cfg.model))
    assert model.num_image_tokens == 16
    padding = Collator(0, 7, 16, (3, 64, 64))
    collate = PackingCollator(padding) if packing else padding
    with_pictures, texts = largest_allowed(cfg, 16)
    for shape, picture in ((with_pictures, np.zeros((3, 64, 64), np.float32)), (texts, None)):
        ids = [7] * 16 * (picture is not None)
        ids += [9] * (cfg.data.max_length - len(ids))
        one = {"input_ids": ids, "labels": ids, "pixel_values": picture, "sample_id": 0, "held_out": False}
        batch = collate([one] * 3)
        assert batch["input_ids"].shape == (shape.rows, shape.tokens)
        assert len(batch["pixel_values"]) == shape.pictures
        assert (len(batch["cu_seq_lens_q"]) - 1 if packing else 0) == shape.packed
    assert texts.rows * texts.tokens > with_pictures.rows * with_pictures.tokens
    cfg.data.packing, cfg.data.max_tokens = True, 600
    assert [shape.tokens for shape in largest_allowed(cfg, 16)] == [600, 600]


def test_what_fits_is_judged_on_texts_and_their_black_picture(world: Path) -> None:
    assert "2 x 304 tokens" in plan(world)


def test_bounded_rows_bound_the_memory_and_tell_what_is_left_out(world: Path) -> None:
    assert "1 x 604 tokens" in plan(world, *PACKED, "--tokens-per-s", "1000")  # texts, and a black picture's 4
    shown = plan(world, *PACKED, "data.max_tokens=160")
    assert "1 x 160 tokens" in shown and "1 x 60" not in shown
    assert "find no room in rows of data.max_tokens = 160 and would be left out; raise it, or lower" in shown


def test_a_given_throughput_is_told_as_given(world: Path) -> None:
    shown = plan(world, *PACKED, "--tokens-per-s", "1000")
    assert "1,000 tokens/s over all devices; given with --tokens-per-s" in shown
    result = CliRunner().invoke(app, ["plan", str(world / "settings.yaml"), "--card", "GTX"], prog_name="llmga")
    assert result.exit_code == EXIT_BAD_INPUT and "card 'GTX' is not in the table" in result.stderr


def test_a_dry_run_of_the_command_is_its_plan(world: Path) -> None:
    result = CliRunner().invoke(app, ["stage1", str(world / "settings.yaml"), "--dry-run"], prog_name="llmga")
    assert result.exit_code == EXIT_OK, result.stderr
    assert result.stdout == plan(world) and not (world / "run").exists()


def test_mistakes_in_the_settings_are_no_notes(world: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(world / "settings.yaml"), "run.batch_size=0"], prog_name="llmga")
    assert result.exit_code == EXIT_BAD_INPUT and "run.batch_size (command line)" in result.stderr
