"""Inception and DINO against the libraries they come from, with random weights.

Run: pytest tests/parity/test_metric_networks.py
"""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision import transforms

from llmga.metrics.dino import Dino
from llmga.metrics.features import MetricError
from llmga.metrics.inception import Inception


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(1)).byte()


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in torch-fidelity's file format."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.manual_seed(0)
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:  # its constructor insists on a file
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(inception_weights: Path) -> None:
    theirs = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    ours = Inception(inception_weights, "tf1")
    shown = pictures(2, 48, 70)
    features, logits = theirs(shown)
    found = ours.features(shown)
    assert found.shape == (2, ours.dim) and ours.preprocessing == "tf1-299"
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.logits(found), logits, rtol=1e-4, atol=1e-5)
    clean = Inception(inception_weights).features(shown)
    assert (clean - found).abs().max() > 1e-3 * found.abs().max()  # the rule matters


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(
        MetricError, match=r"other.pth does not hold weights of torch-fidelity's Inception .*fetch them"
    ):
        Inception(path)


def test_dino_is_timms_behind_the_published_preprocessing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch16_224.dino", num_classes=0).eval()
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    published = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    shown = pictures(2, 100, 131)
    with torch.no_grad():
        expected = network(
            torch.stack([published(Image.fromarray(picture.permute(1, 2, 0).numpy())) for picture in shown])
        )
    ours = Dino("dino-s16", path)
    torch.testing.assert_close(ours.features(shown), expected, rtol=1e-4, atol=1e-4)
    assert (ours.dim, ours.preprocessing) == (384, "bicubic-256-crop-224")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(MetricError, match="does not hold the weights of dino-s16"):
        Dino("dino-s16", path)
    with pytest.raises(MetricError, match="DINO 'dino' is unknown; expected one of dino-s16, dinov2-l14"):
        Dino("dino", path)
