"""Latents made ahead of training: the same losses, whole after a kill, and nothing damaged or stale is trained on.

Run: pytest tests/e2e/test_stage2_cache.py
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmga.runtime import Ranks
from llmga.stage2.cache import CacheError, SourceCache, open_caches
from llmga.stage2.make_cache import make_cache
from llmga.stage2.sources import open_sources
from llmga.stage2.train import train
from tests.forks import FORKS
from tests.toy_loop import losses
from tests.toy_stage2 import load, make_inputs

SMALL = ("cache.rows_per_shard=5", "cache.precision=fp32")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def cached(settings: Path) -> tuple[str, ...]:
    """Overrides of a run with a cache that two processes have made, one after the other."""
    overrides = (f"cache.path={settings.parent / 'cache'}", *SMALL)
    cfg = load(settings, *overrides)
    make_cache(cfg, Ranks(1, 1, 2))
    assert [path.name for path in shards(cfg.cache.path)] == ["shard-00001.safetensors"]
    make_cache(cfg, Ranks(0, 0, 2))
    assert len(shards(cfg.cache.path)) == 3
    return overrides


def shards(folder: Path | None) -> list[Path]:
    assert folder is not None
    return sorted(folder.glob("source-0/*.safetensors"))


def opened(cfg: Any) -> Any:
    return open_caches(cfg, open_sources(cfg.data.sources, "data.sources"), None)


def test_training_from_a_cache_gives_the_losses_of_training_without(settings: Path, cached: tuple[str, ...]) -> None:
    plain = train(load(settings, f"run.output_dir={settings.parent / 'plain'}")).parent
    fast = train(load(settings, f"run.output_dir={settings.parent / 'fast'}", *cached)).parent
    assert losses(fast) == pytest.approx(losses(plain), abs=1e-5)


def test_a_second_pass_makes_nothing_and_one_damaged_shard_is_made_again(
    settings: Path, cached: tuple[str, ...]
) -> None:
    cfg = load(settings, *cached)
    before = [path.stat().st_mtime_ns for path in shards(cfg.cache.path)]
    make_cache(cfg, Ranks())
    assert [path.stat().st_mtime_ns for path in shards(cfg.cache.path)] == before
    first, second, third = shards(cfg.cache.path)
    content = bytearray(second.read_bytes())
    content[-3] ^= 1
    second.write_bytes(content)
    third.unlink()
    with pytest.raises(
        CacheError, match=r"2 of 3 shards .*shard-00001.safetensors is damaged.*and 1 more.*cache_stage2"
    ):
        opened(cfg)
    make_cache(cfg, Ranks())
    opened(cfg)
    assert first.stat().st_mtime_ns == before[0]


def test_changed_pictures_and_settings_are_named(settings: Path, cached: tuple[str, ...]) -> None:
    cfg = load(settings, *cached)
    picture = settings.parent / "train7.png"
    content = picture.read_bytes()
    os.utime(picture, ns=(1, 1))
    opened(cfg)  # touched, with the same bytes
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(picture)
    with pytest.raises(CacheError, match=r"train7.png has changed since"):
        opened(cfg)
    picture.write_bytes(content)
    with pytest.raises(
        CacheError, match=r"was made with precision 'fp32', this run has 'fp16'; give another cache.path"
    ):
        opened(load(settings, *cached, "cache.precision=fp16"))
    with pytest.raises(CacheError, match=r"holds no cache; make it with scripts/cache_stage2.py"):
        opened(load(settings, f"cache.path={settings.parent / 'nowhere'}"))
    weights = settings.parent / "pipeline" / "vae" / "config.json"
    text = weights.read_text()
    weights.write_text(text + " ")
    with pytest.raises(CacheError, match=r"was made with vae '[0-9a-f]{16}', this run has"):
        opened(cfg)
    weights.write_text(text)


def test_random_crops_and_mirrored_ones_are_kept_side_by_side(settings: Path) -> None:
    overrides = (f"cache.path={settings.parent / 'crops'}", "data.crop=random", "cache.crops=2", *SMALL)
    cfg = load(settings, *overrides)
    make_cache(cfg, Ranks())
    [cache] = opened(cfg)
    moments, time_ids = zip(*(cache.read(1, (crop, flip)) for crop in (0, 1) for flip in (False, True)), strict=True)
    assert moments[0].shape == (2, 4, 8, 8) and all(np.abs(moments[0] - other).max() > 1e-3 for other in moments[1:])
    assert time_ids[0][3] != time_ids[2][3] and time_ids[0][:2].tolist() == [16, 32]
    assert cache.crop_of(1, (1, True), (16, 16)).flipped
    run = train(load(settings, f"run.output_dir={settings.parent / 'run_crops'}", *overrides, "run.max_steps=2")).parent
    assert list(losses(run)) == [1, 2]


def test_cached_inpainting_opens_pictures_only_for_masks_that_keep_something(tmp_path: Path) -> None:
    settings = make_inputs(tmp_path, inpainting=True)
    overrides = (f"cache.path={tmp_path / 'cache'}", *SMALL, "data.validation=[]", "run.max_steps=2")
    make_cache(load(settings, *overrides), Ranks())
    fast = train(load(settings, *overrides)).parent
    plain = train(
        load(settings, f"run.output_dir={tmp_path / 'plain'}", "data.validation=[]", "run.max_steps=2")
    ).parent
    assert losses(fast) == pytest.approx(losses(plain), abs=1e-5)


def test_other_settings_are_refused_and_made_anew_on_request(settings: Path, tmp_path: Path) -> None:
    overrides = (f"cache.path={tmp_path / 'cache'}", *SMALL, "data.sources.0.max_rows=4")
    make_cache(load(settings, *overrides), Ranks())
    other = load(settings, *overrides, "data.flip_share=0")
    with pytest.raises(CacheError, match="was made with mirrored True, this run has False"):
        make_cache(other, Ranks())
    make_cache(other, Ranks(), anew=True)
    made = shards(tmp_path / "cache")[0].stat().st_mtime_ns
    make_cache(other, Ranks(), anew=True)  # as a process that starts a moment later
    assert shards(tmp_path / "cache")[0].stat().st_mtime_ns == made
    opened(other)


def _killed_at_the_third_shard(settings: Path, overrides: tuple[str, ...]) -> None:
    from llmga.stage2 import make_cache as module

    write, seen = module.write_shard, []

    def write_shard(*arguments: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)

    module.write_shard = write_shard
    make_cache(load(settings, *overrides), Ranks())


def test_a_kill_loses_the_shard_at_hand_and_no_other(settings: Path) -> None:
    folder = settings.parent / "killed"
    overrides = (f"cache.path={folder}", *SMALL)
    process = FORKS.Process(target=_killed_at_the_third_shard, args=(settings, overrides))
    process.start()
    process.join(240)
    assert process.exitcode == -9 and len(shards(folder)) == 2
    before = [path.stat().st_mtime_ns for path in shards(folder)]
    cfg = load(settings, *overrides)
    make_cache(cfg, Ranks())
    assert len(shards(folder)) == 3 and [path.stat().st_mtime_ns for path in shards(folder)][:2] == before
    opened(cfg)
    index = json.loads(shards(folder)[2].with_suffix(".json").read_text())
    assert [row["id"] for row in index["rows"]] == ["train10", "train11"]
    source = open_sources(cfg.data.sources, "data.sources")[0]
    assert SourceCache(cfg, source, 0, None).num_shards == 3
