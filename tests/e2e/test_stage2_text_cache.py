"""Prompts encoded ahead of training: the same losses in every layout, and no stale, damaged or foreign state is used.

Run: pytest tests/e2e/test_stage2_text_cache.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmga.config import ConfigError
from llmga.records import open_manifest, write_manifest
from llmga.runtime import Ranks
from llmga.stage2.cache import CacheError
from llmga.stage2.make_cache import make_cache
from llmga.stage2.plan_cache import plan_cache
from llmga.stage2.prompt_encoder import LongPromptEncoder
from llmga.stage2.sources import open_sources
from llmga.stage2.text_cache import open_texts
from llmga.stage2.train import train
from tests.toy_loop import losses
from tests.toy_stage2 import load, make_inputs

ALL_TEXTS = ("data.prompt_dropout=0.25", "data.short_caption_share=0.35")
TRAINING_ALONE = ("data.validation=[]", "run.save_every_steps=0")


def overrides_of(folder: Path, *more: str) -> tuple[str, ...]:
    return (f"cache.path={folder}", "cache.text=true", "cache.rows_per_shard=5", "cache.precision=fp32", *more)


def opened(cfg: Any) -> Any:
    return open_texts(cfg, open_sources(cfg.data.sources, "data.sources"))


@pytest.fixture
def encoding_is_refused(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def refuse(self: LongPromptEncoder, batch: object) -> None:
        raise AssertionError("a prompt was encoded while training")

    monkeypatch.setattr(LongPromptEncoder, "encode_windows", refuse)
    return monkeypatch


@pytest.mark.parametrize(("sdxl", "layout"), [(False, "masked"), (False, "published_keep"), (True, "masked_mean")])
def test_losses_are_those_of_prompts_encoded_while_training(
    tmp_path: Path, request: pytest.FixtureRequest, sdxl: bool, layout: str
) -> None:
    settings = make_inputs(tmp_path, sdxl=sdxl)
    overrides = overrides_of(tmp_path / "cache", f"model.layout={layout}", *ALL_TEXTS, *TRAINING_ALONE)
    for rank in (1, 0):
        make_cache(load(settings, *overrides), Ranks(rank, rank, 2))
    live = train(load(settings, f"run.output_dir={tmp_path / 'live'}", *overrides, "cache.text=false")).parent
    request.getfixturevalue("encoding_is_refused")
    cached = train(load(settings, f"run.output_dir={tmp_path / 'cached'}", *overrides)).parent
    assert losses(cached) == pytest.approx(losses(live), abs=1e-6) and len(losses(cached)) == 4


def test_half_precision_is_close(tmp_path: Path) -> None:
    settings = make_inputs(tmp_path)
    half = (*overrides_of(tmp_path / "half"), "cache.precision=fp16", *TRAINING_ALONE)
    make_cache(load(settings, *half), Ranks())
    made = train(load(settings, *half)).parent
    other = (f"run.output_dir={tmp_path / 'live'}", "cache.text=false")
    live = train(load(settings, *half, *other)).parent
    assert losses(made) != losses(live) and losses(made) == pytest.approx(losses(live), abs=1e-3)


def test_what_changed_is_named_and_only_that_is_made_again(tmp_path: Path) -> None:
    settings = make_inputs(tmp_path)
    cfg = load(settings, *overrides_of(tmp_path / "cache"))
    latents_alone = load(settings, *overrides_of(tmp_path / "cache"), "cache.text=false")
    make_cache(latents_alone, Ranks())
    with pytest.raises(CacheError, match=r"holds no hidden states of prompts; make it with .*or set cache.text=false"):
        opened(cfg)
    make_cache(cfg, Ranks())
    shards = sorted((tmp_path / "cache").glob("source-0/*.safetensors"))
    assert [path.name.split("-")[0] for path in shards] == ["shard"] * 3 + ["text"] * 3
    made = {path: path.stat().st_mtime_ns for path in shards}
    [cache] = opened(cfg)
    windows = cache.read(1, cache.shards.texts(1)[0])
    assert [states.shape for states, _ in windows] == [(3, 77, 32)]  # the empty text's, then two chunks

    manifest = list(open_manifest(tmp_path / "train.jsonl"))
    manifest[7] = replace(manifest[7], prompt="another prompt")
    write_manifest(tmp_path / "train.jsonl", manifest)
    with pytest.raises(CacheError, match=r"1 of 3 .*text-00001.*the prompt of row 7 \(id 'train7'\) has changed since"):
        opened(cfg)
    assert [(plan.what, plan.to_make) for plan in plan_cache(cfg).sources] == [("pictures", 0), ("prompts", 5)]
    content = bytearray(shards[5].read_bytes())
    content[-3] ^= 1
    shards[5].write_bytes(content)
    with pytest.raises(CacheError, match=r"2 of 3 shards"):
        opened(cfg)
    make_cache(cfg, Ranks())
    opened(cfg)
    assert [path.stat().st_mtime_ns == made[path] for path in shards] == [True, True, True, True, False, False]


def test_another_text_encoder_or_layout_is_refused(tmp_path: Path) -> None:
    settings = make_inputs(tmp_path)
    overrides = overrides_of(tmp_path / "cache", "data.sources.0.max_rows=2")
    cfg = load(settings, *overrides)
    make_cache(cfg, Ranks())
    with pytest.raises(CacheError, match="was made with max_chunks 2, this run has 1"):
        opened(load(settings, *overrides, "model.max_chunks=1"))
    with pytest.raises(CacheError, match="was made with layout 'masked', this run has 'published'"):
        opened(load(settings, *overrides, "model.layout=published"))
    config = tmp_path / "pipeline" / "text_encoder" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CacheError, match=r"was made with text_encoders '[0-9a-f]{16}', this run has"):
        opened(cfg)
    make_cache(cfg, Ranks(), anew=True)
    opened(cfg)
    with pytest.raises(ConfigError, match="encoded prompts lie beside the latents; set cache"):
        load(settings, "cache.text=true")
