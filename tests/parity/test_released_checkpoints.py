"""Released-style checkpoints of the published code, converted, give its logits, loss and replies.

The goldens were written by the published stage-1 code under transformers 4.41.2 (CPU, float32): one tiny random model
per LLM family with its CLIP tower inside, cut into two shards here. `input_ids` has -200 for a picture, which becomes
16 features; 0 pads on the right. A wrong name, rope type, tied head or Gemma factor moves the logits by 0.1 and more.

    .venv/bin/python -m pytest tests/parity/test_released_checkpoints.py
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llmga.stage1.convert import convert_checkpoint
from llmga.tokens import IGNORE_INDEX

GOLDENS = Path(__file__).parents[1] / "golden" / "stage1_checkpoints"
FAMILIES = ("llama", "mistral", "qwen2", "phi3", "gemma")
NUM_IMAGE_TOKENS, PICTURE, PAD = 16, -200, 0
TOLERANCE = 1e-5  # float32 across library versions; 1.8e-6 was met


class Converted(NamedTuple):
    folder: Path
    model: Any
    golden: dict[str, Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """One family, converted and loaded by plain transformers with nothing missing."""
    folder = tmp_path_factory.mktemp("converted") / request.param
    convert_checkpoint(GOLDENS / request.param, folder)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return Converted(folder, model.eval(), load_file(GOLDENS / request.param / "golden.safetensors"))


def expanded(values: list[int], row: list[int], picture_value: int) -> list[int]:
    """Values of one row without its padding, those of a picture repeated once per feature."""
    length = max(position for position, token in enumerate(row) if token != PAD) + 1
    return [
        value
        for token, given in zip(row[:length], values[:length], strict=True)
        for value in ([picture_value] * NUM_IMAGE_TOKENS if token == PICTURE else [given])
    ]


def padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def batch(golden: dict[str, Tensor], image_token_id: int) -> dict[str, Tensor]:
    """The golden's rows as transformers' LLaVA takes them; the third row has no picture."""
    ids = golden["input_ids"].tolist()
    input_rows = [expanded(row, row, image_token_id) for row in ids]
    labels = [expanded(values, row, IGNORE_INDEX) for values, row in zip(golden["labels"].tolist(), ids, strict=True)]
    return {
        "input_ids": padded(input_rows, PAD),
        "attention_mask": padded([[1] * len(row) for row in input_rows], 0),
        "labels": padded(labels, IGNORE_INDEX),
        "pixel_values": golden["pixel_values"][:2],
    }


def test_logits_loss_labels_and_masks(converted: Converted) -> None:
    inputs = batch(converted.golden, converted.model.config.image_token_id)
    assert torch.equal(inputs["labels"], converted.golden["expanded_labels"].long())
    assert torch.equal(inputs["attention_mask"], converted.golden["expanded_attention_mask"].long())
    with torch.no_grad():
        output = converted.model(**inputs)
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.logits[shown], converted.golden["logits"][shown], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(output.loss, converted.golden["loss"][0], rtol=0, atol=TOLERANCE)


def test_greedy_tokens(converted: Converted) -> None:
    inputs = batch(converted.golden, converted.model.config.image_token_id)
    length = int(inputs["attention_mask"][0].sum())
    assert converted.model.generation_config.suppress_tokens == [converted.model.config.image_token_id]
    written = converted.model.generate(
        input_ids=inputs["input_ids"][:1, :length],
        attention_mask=inputs["attention_mask"][:1, :length],
        pixel_values=inputs["pixel_values"][:1],
        max_new_tokens=20,
        do_sample=False,
    )
    assert torch.equal(written[:, length:], converted.golden["greedy_tokens"].long())


def test_names_are_those_that_transformers_writes(converted: Converted, tmp_path: Path) -> None:
    converted.model.save_pretrained(tmp_path)
    ours, theirs = load_file(converted.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_way_back_gives_the_same_bits(converted: Converted, tmp_path: Path) -> None:
    source, back = GOLDENS / converted.folder.name, tmp_path / "back"
    convert_checkpoint(converted.folder, back, to="llava")
    released = {}
    for shard in sorted(source.glob("model-*.safetensors")):
        released |= load_file(shard)
    again = load_file(back / "model.safetensors")
    assert again.keys() == released.keys()
    for name, tensor in released.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_an_untouched_embedding_row_stands_for_pictures_wherever_it_lies(converted: Converted, tmp_path: Path) -> None:
    convert_checkpoint(GOLDENS / converted.folder.name, tmp_path / "other", image_token_id=3)
    other = LlavaForConditionalGeneration.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        logits = [
            model(**batch(converted.golden, model.config.image_token_id)).logits for model in (other, converted.model)
        ]
    assert torch.equal(*logits)


def test_without_the_factor_gemma_reads_other_pictures(tmp_path: Path) -> None:
    convert_checkpoint(GOLDENS / "gemma", tmp_path / "gemma")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "gemma")
    golden = load_file(GOLDENS / "gemma" / "golden.safetensors")
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.linear_2.parameters():
            parameter /= model.config.text_config.hidden_size**0.5
        inputs = batch(golden, model.config.image_token_id)
        logits = model(**inputs).logits
    shown = inputs["attention_mask"].bool()
    assert (logits - golden["logits"]).abs()[shown].max() > 1
