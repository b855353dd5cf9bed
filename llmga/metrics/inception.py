"""The Inception network that FID, KID and the Inception score are published with; torch-fidelity enters here."""

from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor, nn

from llmga.metrics.features import MetricError
from llmga.metrics.resizing import Resize, resize
from llmga.metrics.weights import find_weights, torch_cache, weight_hash

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
FETCH = (
    'python -c "from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network; '
    "Network('a', ['2048'])\""
)
_SIDE = 299


class Inception:
    """Inception of 2015 as TensorFlow ran it, 2048 features behind the last pooling.

    Args:
        weights: a file as torch-fidelity has it; None: the one in torch's cache.
        rule: how pictures are brought to 299 x 299.
        device: where it runs; pictures are moved there.
    Raises:
        MissingWeights: no such file.
        MetricError: the file is damaged, or is not of this network.
    """

    name = "inception-tf"
    dim = 2048

    def __init__(self, weights: Path | None = None, rule: Resize = "clean", device: torch.device | str = "cpu") -> None:
        path = find_weights(self.name, weights, [torch_cache() / WEIGHTS_FILE], FETCH)
        self.weight_hash = weight_hash(path)
        self.preprocessing = f"{rule}-{_SIDE}"
        self._rule, self._device = rule, torch.device(device)
        network = _load(path)
        # Its children stand in the order in which they run; its own forward would resize by its own rule.
        children = dict(network.named_children())
        self._classes = children.pop("fc").weight.to(self._device)
        self._trunk = nn.Sequential(*children.values()).to(self._device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, 2048) float32."""
        pixels = resize(images.to(self._device), _SIDE, self._rule)
        return self._trunk((pixels - 128) / 128).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """(N, 1008) logits without the bias of the last layer, which the Inception score is published with."""
        return features.to(self._device) @ self._classes.T


def _load(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity's own reading would run any code in it
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # unpickling and loading raise errors of a dozen kinds
        problem = shorten(str(error), 160, placeholder=" ...")  # hundreds of names of layers
        raise MetricError(
            f"{path} does not hold weights of torch-fidelity's Inception ({problem}); fetch them with: {FETCH}"
        ) from error
