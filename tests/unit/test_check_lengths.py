"""Prompt lengths. Hazards: a window counted wrong at its border, an LLM's tokens counted with its template, and the
claim that one histogram stands for SD1.5 and both encoders of SDXL.

python -m pytest tests/unit/test_check_lengths.py
"""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmga.check.lengths import LengthCounter, load_tokenizer, summarise_clip
from llmga.check.row_check import merge_lengths
from llmga.check.settings import CheckError
from llmga.records import Record
from llmga.tokens import clip_length, clip_tokenizer
from tests.check_data import check, data_set, photo, row
from tests.toy import toy_tokenizer

CAPTIONS = [
    record["caption"]
    for record in json.loads(
        (Path(__file__).parents[1] / "fixtures/llmga-datasetv2-mini/jsons/llmga-data/SG/train.json").read_text()
    )
]


def open_clip_tokenizer() -> Any:
    """Loaded from its file: importing the package would import every model as well."""
    [folder] = importlib.util.find_spec("open_clip").submodule_search_locations  # type: ignore[union-attr, misc]
    spec = importlib.util.spec_from_file_location("reference_tokenizer", Path(folder) / "tokenizer.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_both_of_sdxls_tokenizers_cut_text_as_sd15s_does_and_pad_otherwise() -> None:
    """open_clip's own tokenizer is that of SDXL's second encoder; transformers' is that of SD1.5 and SDXL's first."""
    second, first = open_clip_tokenizer(), clip_tokenizer()
    for caption in [*CAPTIONS, "It's 3 o'clock -- a caf\u00e9, \u98ce\u7b5d!"]:
        assert second.encode(caption) == first(caption, add_special_tokens=False).input_ids
        assert clip_length(caption) == len(second.encode(caption))
    padded = second("a kite")[0].tolist()
    ids = first("a kite", padding="max_length").input_ids
    length = 2 + len(second.encode("a kite"))
    assert padded[:length] == ids[:length] and len(padded) == len(ids) == 77
    assert set(padded[length:]) == {0} and set(ids[length:]) == {first.eos_token_id}


def counted(*captions: str, max_chunks: int = 4) -> dict[str, object]:
    counter = LengthCounter(max_chunks)
    for caption in captions:
        counter.count(Record("1", "similar_image", image="a", caption=caption))
    summary = summarise_clip(merge_lengths([counter.taken()]), max_chunks)
    assert summary is not None
    return summary


@pytest.mark.parametrize(
    ("words", "windows", "lost"),
    [(1, 1, (0, 0)), (75, 1, (0, 0)), (76, 2, (1, 0)), (150, 2, (75, 0)), (300, 4, (225, 0)), (303, 5, (228, 3))],
)
def test_windows_and_lost_words_at_the_borders(words: int, windows: int, lost: tuple[int, int]) -> None:
    summary = counted("kite " * words)
    assert summary["max"] == words and summary["windows_needed"] == {str(windows): 1}
    assert (summary["words_lost_in_one_window"], summary["words_lost_in_max_chunks"]) == lost
    assert summary["share_past_77"] == float(words > 75) and summary["share_past_max_chunks"] == float(words > 300)


def test_a_word_that_is_cut_in_the_middle_is_lost() -> None:
    assert clip_length("xylophonists") > 1
    assert counted("kite " * 74 + "xylophonists")["words_lost_in_one_window"] == 1


def test_quantiles_and_bins_are_those_of_the_list() -> None:
    summary = counted(*("kite " * words for words in range(1, 101)))
    assert (summary["mean"], summary["median"], summary["p90"], summary["p99"]) == (50.5, 50, 90, 99)
    assert summary["histogram"] == [[0, 24], [25, 25], [50, 25], [75, 25], [100, 1]]
    assert summary["share_past_77"] == 0.25


def test_histograms_of_ranges_add_up() -> None:
    counter, parts = LengthCounter(), []
    for caption in CAPTIONS:
        counter.count(Record("1", "similar_image", image="a", caption=caption))
        parts.append(json.loads(json.dumps(counter.taken())))  # as they come back from the store
    assert merge_lengths(parts)["clip"] == Counter(map(clip_length, CAPTIONS))


def test_llm_tokens_are_those_of_the_texts(tmp_path: Path) -> None:
    toy_tokenizer().save_pretrained(tmp_path / "llm")
    caption = "caf\u00e9 " * 10  # the toy tokenizer has one token per byte
    manifest = data_set(tmp_path, row("a.jpg", caption=caption), pictures={"a.jpg": photo()})
    for tokenizer in (tmp_path / "llm", tmp_path / "llm" / "tokenizer.json"):
        result = check(manifest, tmp_path / "out", tokenizer=tokenizer, max_length=59)
        llm = result.report["lengths"]["llm"]
        assert (llm["rows"], llm["max"], llm["share_past_max_length"]) == (1, len(caption.encode()), 1.0)
        assert [finding["detail"] for finding in result.of("too_long")] == [
            "its texts have 60 LLM tokens, 59 are allowed"
        ]
    assert check(manifest, tmp_path / "out").report["lengths"]["llm"] is None


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
