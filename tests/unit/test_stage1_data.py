"""Guards what the model is fed: the same examples at every resume, none cut, none lost in silence, no rank alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llmga.bad_samples import BAD_SAMPLES_FILE, BadSampleBudget
from llmga.config import RunConfig
from llmga.records import Record, write_manifest
from llmga.stage1.config import DataConfig, ModelConfig, SourceConfig, Stage1Config
from llmga.stage1.data import MAX_NEIGHBOURS, Collator, SampleError, build_datasets
from llmga.stage1.feed import make_feed
from llmga.stage1.sources import SourceError, open_sources
from llmga.tokens import IGNORE_INDEX
from tests.toy import IMAGE_SIZE_PX, NUM_IMAGE_TOKENS, toy_llava, toy_processor

NUM_ROWS = 12
QA = ({"role": "user", "content": "why?"}, {"role": "assistant", "content": "because."})


@pytest.fixture(scope="module")
def processor():
    return toy_processor()


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two manifests: `pictures.jsonl` (similar image, inpainting, vqa) and `texts.jsonl` (qa, prompt refinement)."""
    rng = np.random.default_rng(0)
    pictures, texts = [], []
    for i in range(NUM_ROWS):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        image, caption = f"{i}.png", f"the long caption of picture {i}"
        kind = ("similar_image", "inpainting", "vqa")[i % 3]
        given = {"messages": QA} if kind == "vqa" else {"caption": caption}
        pictures.append(Record(id=f"p{i}", task=kind, image=image, **given))
        if i % 2:
            texts.append(Record(id=f"t{i}", task="qa", messages=QA))
        else:
            texts.append(Record(id=f"t{i}", task="prompt_refinement", short_caption=f"picture {i}", caption=caption))
    write_manifest(tmp_path / "pictures.jsonl", pictures)
    write_manifest(tmp_path / "texts.jsonl", texts)
    return tmp_path


def config(world: Path, seed: int = 0, run: dict | None = None, **data) -> Stage1Config:
    defaults = {
        "sources": [SourceConfig(path=world / "pictures.jsonl"), SourceConfig(path=world / "texts.jsonl", weight=6)],
        "picture_size": IMAGE_SIZE_PX,
    }
    return Stage1Config(
        model=ModelConfig(path=world, tag_name="gen_img"),
        data=DataConfig(**{**defaults, **data}),
        run=RunConfig(output_dir=world / "run", seed=seed, **(run or {})),
    )


def train_set(world, processor, total=60, log=None, seed=0, **data):
    return build_datasets(config(world, seed, **data), processor, total, log)[0]


def only(world: Path, name: str) -> dict:
    return {"sources": [SourceConfig(path=world / name)]}


def same(first: dict, second: dict) -> bool:
    pixels = first["pixel_values"], second["pixel_values"]
    return (
        {**first, "pixel_values": 0} == {**second, "pixel_values": 0}
        and (pixels[0] is None) == (pixels[1] is None)
        and (pixels[0] is None or np.array_equal(*pixels))
    )


# ---------------------------------------------------------------- rows of bounded length


def test_an_example_without_room_is_named_and_counted_or_stops_the_run(world, processor):
    log = world / BAD_SAMPLES_FILE
    bounds = {"packing": True, "max_tokens": 400, "max_length": 400}
    dataset = train_set(world, processor, log=log, **bounds)
    feed = make_feed(config(world, run={"batch_size": 30}, **bounds), dataset, 30)
    drawn = [feed.data[index] for index in range(30)]
    taken = [example["sample_id"] for example in feed.choose(drawn)]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert 2 <= len(taken) < 30 and sorted([*taken, *(line["index"] for line in lines)]) == list(range(30))
    assert feed.collate(feed.choose(drawn))["input_ids"].shape[1] <= 400
    first = lines[0]
    number, row, _ = dataset.order[first["index"]]
    assert (first["kind"], first["row"], first["set"]) == ("no_room", row, "train")
    assert first["id"] == dataset.sources[number][row].id and "of data.max_tokens = 400" in first["reason"]
    budget = BadSampleBudget(log, 0, 60)
    budget.check(30)  # pictures alone end a run
    assert budget.counts(30) == {"no_room": 30 - len(taken)}
    strict = train_set(world, processor, too_long="error", **bounds)
    choose = make_feed(config(world, run={"batch_size": 30}, too_long="error", **bounds), strict, 30).choose
    with pytest.raises(SampleError, match=r"record '.*': .* data.max_tokens = 400; raise data.max_tokens, or set data"):
        choose(drawn)


def test_a_text_that_no_bounded_row_has_room_for_is_replaced(world, processor):
    texts = only(world, "texts.jsonl")
    free = train_set(world, processor, **texts)
    lengths = [len(free[index]["input_ids"]) for index in range(60)]
    bounds = {"packing": True, "max_tokens": max(lengths), "max_length": max(lengths)}
    log = world / BAD_SAMPLES_FILE
    dataset = train_set(world, processor, log=log, **bounds, **texts)
    feed = make_feed(config(world, run={"batch_size": 1}, **bounds, **texts), dataset, 1)
    rows = [feed.choose([feed.data[index]]) for index in range(60)]
    assert all(feed.collate(row)["input_ids"].shape[1] <= max(lengths) for row in rows) and all(rows)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    room = max(lengths) - NUM_IMAGE_TOKENS
    assert {line["index"] for line in lines} == {index for index in range(60) if lengths[index] > room}
    assert {line["kind"] for line in lines} == {"too_long"}
    assert f"more than data.max_tokens = {max(lengths)} has room for beside the 4 of the black" in lines[0]["reason"]
    strict = train_set(world, processor, too_long="error", **bounds, **texts)
    with pytest.raises(SampleError, match=r"beside the 4 of the black picture .*; raise it, or set data.too_long=drop"):
        strict[lines[0]["index"]]


# ---------------------------------------------------------------- the same examples, always


def test_an_example_is_a_function_of_seed_and_index_alone(world, processor):
    forwards, backwards = train_set(world, processor), train_set(world, processor, total=90)  # in a longer run, too
    expected = [forwards[i] for i in range(60)]
    assert all(same(backwards[i], expected[i]) for i in reversed(range(60)))
    assert [example["sample_id"] for example in expected] == list(range(60))
    other = train_set(world, processor, seed=1)
    assert sum(same(other[i], expected[i]) for i in range(60)) < 6


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_examples(world, processor, num_workers):
    dataset = train_set(world, processor, total=24)
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    assert all(same(example, dataset[i]) for i, example in enumerate(loader))


def test_a_row_is_told_anew_in_each_epoch(world, processor):
    dataset = train_set(world, processor, total=NUM_ROWS * 8, **only(world, "pictures.jsonl"))
    first_row = [dataset.sample(i) for i in range(len(dataset)) if dataset.order[i][1] == 1]  # an inpainting row
    assert [sample.epoch for sample in first_row] == list(range(8))
    assert len({sample.example.mask.hole.tobytes() for sample in first_row}) == 8
    assert len({sample.example.messages[0].content for sample in first_row}) > 2


def test_pixels_are_the_masked_picture_through_the_image_processor(world, processor):
    dataset = train_set(world, processor, **only(world, "pictures.jsonl"), picture_size=2 * IMAGE_SIZE_PX)
    samples = [dataset.sample(i) for i in range(NUM_ROWS)]
    assert any(sample.example.mask is not None for sample in samples)
    for sample in samples:
        assert sample.example.picture.size == (2 * IMAGE_SIZE_PX,) * 2
        expected = processor.image_processor(sample.example.picture, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(sample.pixel_values, expected)


def test_labels_train_answers_only_and_pictures_keep_all_their_tokens(world, processor):
    dataset = train_set(world, processor)
    image_id = processor.image_token_id
    for i in range(60):
        example = dataset[i]
        placeholders = [k for k, token in enumerate(example["input_ids"]) if token == image_id]
        assert len(placeholders) == (0 if example["pixel_values"] is None else NUM_IMAGE_TOKENS)
        assert all(example["labels"][k] == IGNORE_INDEX for k in placeholders)
        trained = processor.tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX])
        assert trained.endswith("<|end|>") and ("caption" in trained or trained == "because.<|end|>")


def test_a_question_that_is_only_a_picture_trains_its_answer(processor, world, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMGA_CACHE_DIR", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a kite"}]
    (world / "llava.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    source = SourceConfig(path=world / "llava.json", format="llava")
    example = train_set(world, processor, total=1, sources=[source])[0]
    assert example["input_ids"].count(processor.image_token_id) == NUM_IMAGE_TOKENS
    trained = processor.tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX])
    assert trained == "a kite<|end|>"
    assert example["pixel_values"].shape == (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)


# ---------------------------------------------------------------- which rows


def test_one_epoch_takes_every_row_once(world, processor):
    rows = [SourceConfig(path=world / name) for name in ("pictures.jsonl", "texts.jsonl")]
    dataset, _ = build_datasets(config(world, sources=rows), processor)
    assert len(dataset) == 2 * NUM_ROWS
    assert {dataset.sample(i).record.id for i in range(len(dataset))} == {
        f"{letter}{i}" for letter in "pt" for i in range(NUM_ROWS)
    }


def test_length_follows_the_epochs_of_the_run(world, processor):
    dataset, _ = build_datasets(config(world, run={"epochs": 2.5}, **only(world, "texts.jsonl")), processor)
    assert len(dataset) == 30


def test_sources_keep_wanted_tasks_and_first_rows(world):
    path = world / "pictures.jsonl"
    source, limited, plain = open_sources(
        [
            SourceConfig(path=path, tasks=["vqa", "inpainting"]),
            SourceConfig(path=path, tasks=["vqa"], max_rows=2),
            SourceConfig(path=path, max_rows=5, name="few"),
        ]
    )
    assert [record.task for record in source] == ["inpainting", "vqa"] * 4
    assert [record.id for record in limited] == ["p2", "p5"]
    assert [record.id for record in plain] == ["p0", "p1", "p2", "p3", "p4"]
    assert [source.name, limited.name, plain.name] == ["pictures", "pictures-2", "few"]
    assert limited.place(1) == f"{path}:6"


def test_a_source_without_rows_of_the_task_is_named(world):
    with pytest.raises(SourceError, match=r"pictures.jsonl has no rows of the tasks editing"):
        open_sources([SourceConfig(path=world / "pictures.jsonl", tasks=["editing"])])


def test_held_out_sets_are_the_same_in_every_run(world, processor):
    held_out = [SourceConfig(path=world / "pictures.jsonl", max_rows=7), SourceConfig(path=world / "texts.jsonl")]
    _, sets = build_datasets(config(world, seed=0, validation=held_out), processor, 5)
    _, again = build_datasets(config(world, seed=9, validation=held_out), processor, 50)
    assert {name: len(dataset) for name, dataset in sets.items()} == {"pictures": 7, "texts": NUM_ROWS}
    assert [sets["pictures"].sample(i).record.id for i in range(7)] == [f"p{i}" for i in range(7)]
    assert all(same(sets[name][i], again[name][i]) for name in sets for i in range(len(sets[name])))


def test_real_photographs_in_the_published_format(processor, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMGA_CACHE_DIR", str(tmp_path))
    root = Path(__file__).parents[1] / "fixtures" / "llmga-datasetv2-mini"
    source = SourceConfig(
        path=root / "jsons/llmga-data/SG/train.json", format="llmga_sg", image_root=root / "llmga-imgs"
    )
    dataset = train_set(tmp_path, processor, total=6, sources=[source])
    assert all(dataset[i]["pixel_values"].shape == (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX) for i in range(6))


# ---------------------------------------------------------------- rows that cannot be used


def logged(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_unreadable_picture_is_replaced_by_a_seeded_neighbour_and_written_down(world, processor):
    intact = train_set(world, processor, total=NUM_ROWS, **only(world, "pictures.jsonl"))
    expected = [intact[i] for i in range(NUM_ROWS)]
    (world / "4.png").write_bytes((world / "4.png").read_bytes()[:200])
    log = world / BAD_SAMPLES_FILE
    dataset = train_set(world, processor, total=NUM_ROWS, log=log, **only(world, "pictures.jsonl"))
    found = [dataset[i] for i in range(NUM_ROWS)]
    at = [i for i in range(NUM_ROWS) if dataset.order[i][1] == 4]
    assert [i for i in range(NUM_ROWS) if not same(found[i], expected[i])] == at  # all others are as before
    (entry,) = logged(log)
    assert entry == {
        "set": "train",
        "index": at[0],
        "kind": "picture",
        "path": str(world / "pictures.jsonl"),
        "row": 4,
        "id": "p4",
        "picture": str((world / "4.png").resolve()),
        "reason": entry["reason"],
    }
    assert "damaged or cut short" in entry["reason"]
    again = train_set(world, processor, total=NUM_ROWS, **only(world, "pictures.jsonl"))
    assert same(again[at[0]], found[at[0]])
    assert dataset.sample(at[0]).row != 4


def test_a_source_without_usable_pictures_ends_in_one_error(world, processor):
    for picture in world.glob("*.png"):
        picture.unlink()
    dataset = train_set(world, processor, **only(world, "pictures.jsonl"))
    message = (
        rf"{MAX_NEIGHBOURS + 1} rows of .*pictures.jsonl .*image_root .*row \d+, .*\d.png: the file does not exist"
    )
    with pytest.raises(SampleError, match=message):
        dataset[0]


def test_long_examples_are_replaced_whole_or_refused(world, processor):
    long = Record(id="long", task="qa", messages=(QA[0], {"role": "assistant", "content": "on and on " * 30}))
    short = [Record(id=f"s{i}", task="qa", messages=QA) for i in range(5)]
    write_manifest(world / "mixed.jsonl", [*short, long])
    log = world / BAD_SAMPLES_FILE
    dataset = train_set(world, processor, total=6, log=log, max_length=100, **only(world, "mixed.jsonl"))
    assert all(len(dataset[i]["input_ids"]) <= 100 for i in range(6))
    (entry,) = logged(log)
    assert (entry["kind"], entry["id"], entry["picture"]) == ("too_long", "long", None)
    assert BadSampleBudget(log, max_share=0.0, total=6).counts(6) == {"too_long": 1}
    strict = train_set(world, processor, total=6, max_length=100, too_long="error", **only(world, "mixed.jsonl"))
    with pytest.raises(SampleError, match=r"mixed.jsonl:6: record 'long' has 3\d\d tokens.*data.too_long=drop"):
        [strict[i] for i in range(6)]


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (
            Record(id="mute", task="qa", messages=(QA[0], {"role": "assistant", "content": " "})),
            "record 'mute'.*trained",
        ),
        (Record(id="bare", task="similar_image", image="0.png"), "record 'bare'.*'caption'"),
    ],
)
def test_a_record_that_trains_nothing_is_an_error_with_its_place(world, processor, record, match):
    write_manifest(world / "one.jsonl", [record])
    with pytest.raises(SampleError, match=rf"one.jsonl:1: {match}"):
        train_set(world, processor, **only(world, "one.jsonl"))[0]


# ---------------------------------------------------------------- batches


def of_task(dataset, wanted: str, count: int) -> list[dict]:
    found = (i for i in range(len(dataset)) if dataset.sample(i).record.task == wanted)
    return [dataset[i] for _, i in zip(range(count), found, strict=False)]


def test_batches_are_padded_on_the_right_and_pictures_follow_their_placeholders(world, processor):
    dataset = train_set(world, processor)
    with_picture, text = of_task(dataset, "vqa", 2), of_task(dataset, "prompt_refinement", 1)
    examples = [with_picture[0], *text, with_picture[1]]
    batch = Collator.of(dataset)(examples)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "pixel_values"}
    width = max(len(example["input_ids"]) for example in examples)
    for i, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][i].tolist() == example["input_ids"] + [processor.tokenizer.pad_token_id] * (
            width - length
        )
        assert batch["labels"][i].tolist() == example["labels"] + [IGNORE_INDEX] * (width - length)
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (width - length)
    for found, example in zip(batch["pixel_values"], with_picture, strict=True):
        assert torch.equal(found, torch.from_numpy(example["pixel_values"]))


def test_a_batch_of_texts_gets_a_picture_block_that_changes_nothing(world, processor):
    dataset = train_set(world, processor, **only(world, "texts.jsonl"))
    examples = [dataset[i] for i in range(3)]
    batch = Collator.of(dataset)(examples)
    placeholders = batch["input_ids"] == processor.image_token_id
    assert placeholders.sum() == NUM_IMAGE_TOKENS and batch["pixel_values"].shape == (
        1,
        3,
        IMAGE_SIZE_PX,
        IMAGE_SIZE_PX,
    )
    assert not batch["attention_mask"][placeholders].any() and (batch["labels"][placeholders] == IGNORE_INDEX).all()
    longest = max(len(example["input_ids"]) for example in examples)
    assert batch["input_ids"].shape[1] == longest  # the block stands behind the shortest row, where there is room

    model = toy_llava(processor.tokenizer).train()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    projector = [grad for name, grad in gradients.items() if "multi_modal_projector" in name]
    assert len(projector) == 4 and all(grad is not None and not grad.any() for grad in projector)  # run, and unmoved

    model.zero_grad()
    plain = {
        name: batch[name].where(~placeholders, fill) for name, fill in (("input_ids", 0), ("labels", IGNORE_INDEX))
    }
    without = model(**plain, attention_mask=batch["attention_mask"], use_cache=False).loss
    without.backward()
    torch.testing.assert_close(loss, without, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-6)


def test_one_long_text_alone_makes_room_for_the_block(world, processor):
    dataset = train_set(world, processor, **only(world, "texts.jsonl"))
    batch = Collator.of(dataset)([dataset[0]])
    assert batch["input_ids"].shape == (1, len(dataset[0]["input_ids"]) + NUM_IMAGE_TOKENS)


def test_a_tokenizer_without_pad_token_is_named(world, processor):
    dataset = train_set(world, toy_processor())
    dataset.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token; set tokenizer.pad_token"):
        Collator.of(dataset)
