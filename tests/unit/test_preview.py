"""Guards the page people trust before a long run: what it calls trained is trained, and nothing is left out."""

import re

import numpy as np
import pytest
from PIL import Image

from llmga.config import RunConfig
from llmga.records import Record, write_manifest
from llmga.stage1.config import DataConfig, ModelConfig, SourceConfig, Stage1Config
from llmga.stage1.data import build_datasets
from llmga.stage1.preview import PreviewError, _histogram, _Measured, token_chips, write_preview
from llmga.tokens import IGNORE_INDEX
from tests.toy import NUM_IMAGE_TOKENS, toy_processor

QA = ({"role": "user", "content": "why <b>bold</b>?"}, {"role": "assistant", "content": "because."})


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Stage1Config:
    """Two sources with four tasks, one picture that does not exist, and a model folder without weights."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    records = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        task = ("similar_image", "inpainting")[i % 2]
        records.append(Record(id=f"p{i}", task=task, image=f"{i}.png", caption=f"caption\nnumber {i}"))
    records.append(Record(id="gone", task="similar_image", image="gone.png", caption="never seen"))
    write_manifest(folder / "pictures.jsonl", records)
    write_manifest(folder / "chats.jsonl", [Record(id=f"t{i}", task="qa", messages=QA) for i in range(3)])
    toy_processor().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text("{}")
    sources = [SourceConfig(path=folder / "pictures.jsonl"), SourceConfig(path=folder / "chats.jsonl", weight=7)]
    return Stage1Config(
        model=ModelConfig(path=folder / "model", tag_name="gen_img"),
        data=DataConfig(sources=sources, picture_size=32, max_length=400),
        run=RunConfig(output_dir=folder / "run", max_steps=10, batch_size=4),
    )


@pytest.fixture(scope="module")
def page(cfg: Stage1Config) -> str:
    out = write_preview(cfg, cfg.run.output_dir.parent / "preview.html", num_examples=12)
    return out.read_text(encoding="utf-8")


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_page_is_one_file_and_the_run_folder_is_left_alone(cfg, page):
    assert not re.search(r"(src|href)=.?(https?:|//|file:)|@import|<script", page)
    assert page.count("data:image/png;base64,") >= 6
    assert not cfg.run.output_dir.exists()


@pytest.mark.parametrize(("out", "said"), [("a_file/page.html", "a_file is a file"), (".", "is a folder, expected")])
def test_a_page_that_cannot_be_written_is_told_before_anything_is_read(cfg, tmp_path, out, said):
    (tmp_path / "a_file").touch()
    with pytest.raises(PreviewError, match=f"the page cannot be written: .*{said}"):
        write_preview(cfg, tmp_path / out, processor=object())


def test_texts_by_people_are_shown_and_not_interpreted(page):
    assert "<b>bold</b>" not in page
    shown = "".join(re.findall(r'<span class="g"[^>]*>(.*?)</span>', page, re.S))
    assert "why&lt;b&gt;bold&lt;/b&gt;?" in re.sub(r"\s", "", shown)


def test_figures_are_those_of_the_first_examples(cfg, page):
    processor = toy_processor()
    processor.tokenizer.add_tokens(["<gen_img>", "</gen_img>"])
    data, _ = build_datasets(cfg, processor, total=40)
    labels = [data[i]["labels"] for i in range(40)]
    trained = sum(len(row) - row.count(IGNORE_INDEX) for row in labels) / sum(map(len, labels))
    words = text_of(page)
    assert "first 40 examples" in words and "40 examples, on one device" in words
    assert f"{trained:.1%} of the tokens are trained" in words
    assert f"{max(map(len, labels))} in the longest, 400 allowed" in words
    shares = data.order.summary()
    assert f"pictures 7 50.0% {shares[0].draws} {shares[0].epochs:.2f}" in words
    assert f"chats 3 50.0% {shares[1].draws} {shares[1].epochs:.2f}" in words


def test_every_task_is_shown_with_masks_and_counts(page):
    words = text_of(page)
    for title in ("Similar image", "Inpainting", "QA"):
        assert f"> {title} <" in page.replace("\n", " ") or f">{title}</h2>" in page
    assert re.search(r"(irregular|box|outpainting) mask, \d+% to generate", words)
    assert f"{NUM_IMAGE_TOKENS} picture" in words and f"picture x{NUM_IMAGE_TOKENS}" in words


def test_replaced_rows_are_named_with_their_reason(page):
    assert re.search(r"pictures.jsonl row 6, \S*gone.png : the file does not exist", text_of(page))


# ---------------------------------------------------------------- tokens


def test_chips_say_what_is_trained_and_lose_no_text():
    tokenizer = toy_processor().tokenizer
    ids = tokenizer.encode("naïve 😀\nend<|end|>")
    labels = [IGNORE_INDEX] * 6 + ids[6:]
    chips = token_chips(tokenizer, ids, labels, tokenizer.convert_tokens_to_ids("<image>"))
    assert "".join(chip.text for chip in chips) == "naïve 😀↵end<|end|>"
    assert [chip.text for chip in chips if chip.label == "given"] == ["n", "a", "ï", "v", "e"]
    assert [chip.text for chip in chips if chip.ends_line] == ["↵"]
    assert [chip.text for chip in chips if chip.control] == ["<|end|>"]


def test_a_picture_is_one_chip_with_its_count():
    tokenizer = toy_processor().tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    ids = [*tokenizer.encode("a"), *[image_id] * 576, *tokenizer.encode("b")]
    chips = token_chips(tokenizer, ids, [IGNORE_INDEX] * 578, image_id)
    assert [(chip.text, chip.label) for chip in chips] == [("a", "given"), ("picture x576", "picture"), ("b", "given")]


def test_spaces_of_a_sentencepiece_like_tokenizer_are_kept():
    """Such tokenizers drop the space of a token that is decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁a": 1, "▁red": 2, "▁disc": 3, "s": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    chips = token_chips(tokenizer, [1, 2, 3, 4], [IGNORE_INDEX] * 4, image_token_id=99)
    assert [chip.text for chip in chips] == ["a", " red", " disc", "s"]


# ---------------------------------------------------------------- lengths


def lengths(*tokens: int) -> list[_Measured]:
    return [_Measured(i, 0, "qa", ("chat", "generation")[i % 2], None, n, 1, 0) for i, n in enumerate(tokens)]


def test_histogram_counts_every_example_once():
    histogram = _histogram(lengths(0, 9, 10, 55, 55, 60), max_length=2048)
    assert sum(height * histogram["tallest"] for *_, height, _ in histogram["bars"]) == pytest.approx(6)
    assert all(0 <= x < 1 and 0 <= y + h <= 1.0001 for _, x, y, _, h, _ in histogram["bars"])
    assert dict(histogram["totals"]) == {"chat": 3, "generation": 3}


@pytest.mark.parametrize(("max_length", "shown"), [(60, True), (64, True), (2048, False)])
def test_the_limit_is_drawn_where_it_is_near(max_length, shown):
    limit = _histogram(lengths(12, 60), max_length)["limit"]
    assert (limit is not None) == shown
    assert limit is None or 0.9 < limit <= 1
