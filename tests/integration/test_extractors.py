"""Pictures to features: one interface, exact rules, no silent random network.

Run: pytest tests/integration/test_extractors.py
"""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llmga.metrics.extractors import Classifier, build_extractor, extract, protocol_of
from llmga.metrics.features import MetricError
from llmga.metrics.frechet import FrechetReference, feature_frechet_distance
from llmga.metrics.inception_score import inception_score
from llmga.metrics.moments import Moments, merge_moments
from llmga.metrics.resizing import resize, resize_and_crop
from llmga.metrics.weights import MissingWeights, torch_cache, weight_hash
from llmga.toyworld.render import render
from llmga.toyworld.scene import sample_scene


def scenes(first: int, count: int) -> Tensor:
    drawn = np.stack([render(sample_scene(seed)) for seed in range(first, first + count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2)


def test_features_to_distance_whatever_the_order_and_the_shards() -> None:
    extractor = build_extractor("seeded-conv", allow_random=True)
    a, b = scenes(0, 90), scenes(500, 80)
    features, reference = extract(extractor, a.split(32)), extract(extractor, [b])
    assert features.shape == (90, extractor.dim) == (90, 64) and features.dtype == np.float32
    np.testing.assert_allclose(features, extract(extractor, a.split(7)), rtol=1e-5, atol=1e-6)
    whole = feature_frechet_distance(features, reference)
    trace = np.trace(np.cov(features, rowvar=False))
    assert feature_frechet_distance(features, features) < 1e-6 * trace < 0.01 * whole
    shards = []
    for part in np.array_split(np.random.default_rng(0).permutation(features), 4):
        shards.append(Moments(64))
        shards[-1].update(part)
    merged = merge_moments(shards)
    assert FrechetReference.from_features(reference).distance(merged.mean, merged.covariance) == pytest.approx(whole)
    assert isinstance(extractor, Classifier)
    assert inception_score(extractor.logits(torch.from_numpy(features)), splits=3).mean > 1


def test_a_random_network_is_refused_and_marked() -> None:
    with pytest.raises(MetricError, match="seeded-conv is a random network: its numbers say nothing of pictures"):
        build_extractor("seeded-conv")
    first, second = (build_extractor("seeded-conv", allow_random=True) for _ in range(2))
    assert torch.equal(first.features(scenes(0, 2)), second.features(scenes(0, 2)))
    assert protocol_of(first) == {
        "extractor": "seeded-conv",
        "weight_hash": "random, seed 0",
        "dim": 64,
        "preprocessing": "none",
    }


@pytest.mark.parametrize("name", ["inception-tf", "clip-l14", "clip-b32", "dino-s16", "dinov2-l14"])
def test_missing_weights_are_one_error_with_the_way_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    with pytest.raises(MissingWeights) as caught:
        build_extractor(name)
    message = str(caught.value)
    assert f"the weights of {name} are missing; expected them at {tmp_path}" in message
    assert "Where there is a network, run: python -c" in message
    with pytest.raises(MissingWeights, match=f"weights of {name}: .*mine.pth is not a file"):
        build_extractor(name, tmp_path / "mine.pth")


def test_names_and_pictures_that_do_not_fit() -> None:
    with pytest.raises(MetricError, match="extractor 'inception' is unknown; expected one of inception-tf, clip-l14"):
        build_extractor("inception")
    extractor = build_extractor("seeded-conv", allow_random=True)
    with pytest.raises(MetricError, match=r"pictures are \(2, 3, 64, 64\) float32; expected \(N, 3, H, W\) uint8"):
        extractor.features(scenes(0, 2).float())
    with pytest.raises(MetricError, match=r"pictures are \(2, 64, 64, 3\) uint8"):
        extractor.features(scenes(0, 2).permute(0, 2, 3, 1))
    with pytest.raises(MetricError, match="there are no pictures to extract features of"):
        extract(extractor, [])


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    content = b"weights"
    digest = sha256(content).hexdigest()
    fine, broken, plain = (tmp_path / name for name in (f"net-{digest[:8]}.pth", "net-0badc0de.pth", "net.pth"))
    for path in (fine, broken, plain):
        path.write_bytes(content)
    assert weight_hash(fine) == weight_hash(plain) == digest
    with pytest.raises(MetricError, match=f"should begin its SHA-256 with 0badc0de, .* but has {digest[:8]}; the down"):
        weight_hash(broken)


def test_torch_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    monkeypatch.delenv("TORCH_HOME", raising=False)
    assert torch_cache() == Path("/shared/torch/hub/checkpoints")
    monkeypatch.setenv("TORCH_HOME", "/own")
    assert torch_cache() == Path("/own/hub/checkpoints")


def test_clean_resizing_is_pillows_bicubic_in_floating_point() -> None:
    images = scenes(3, 2)
    found = resize(images, 99, "clean")
    assert found.shape == (2, 3, 99, 99) and found.dtype == torch.float32
    channel = Image.fromarray(images[1, 2].numpy().astype(np.float32)).resize((99, 99), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found[1, 2].numpy(), np.asarray(channel).clip(0, 255))
    in_8_bits = Image.fromarray(images[1].permute(1, 2, 0).numpy()).resize((99, 99), Image.Resampling.BICUBIC)
    off = (found[1] - torch.from_numpy(np.array(in_8_bits)).permute(2, 0, 1)).abs().max()
    assert 0.1 < off < 64  # the same picture; Pillow's 8 bits are rounded and clipped between its two passes
    with pytest.raises(MetricError, match="resize rule 'lanczos' is unknown; expected one of clean, tf1"):
        resize(images, 99, "lanczos")  # type: ignore[arg-type]


def test_crops_keep_the_middle() -> None:
    wide = torch.zeros(1, 3, 40, 80, dtype=torch.uint8)
    wide[..., 10:70] = 200
    assert resize_and_crop(wide, 20, 20).unique().tolist() == [200]
    assert resize_and_crop(wide, 20, 10).shape == (1, 3, 10, 10)
