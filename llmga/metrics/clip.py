"""CLIP, as open_clip has it: pictures and windows of text to features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmga.metrics.features import MetricError
from llmga.metrics.resizing import resize_and_crop
from llmga.metrics.weights import find_weights, hub_file, weight_hash

_TEXTS_AT_ONCE = 256
_CONFIG_FILE = "open_clip_config.json"
_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class _Published:
    """OpenAI's weights of an architecture; the plain names of open_clip have another activation than they need."""

    architecture: str
    repository: str
    file: str

    @property
    def fetch(self) -> str:
        return f"python -c \"import open_clip; open_clip.create_model('{self.architecture}', 'openai')\""

    @property
    def places(self) -> list[Path]:
        return [hub_file(self.repository, _WEIGHT_FILES), Path.home() / ".cache" / "clip" / self.file]


MODELS = {
    "clip-l14": _Published("ViT-L-14-quickgelu", "timm/vit_large_patch14_clip_224.openai", "ViT-L-14.pt"),
    "clip-b32": _Published("ViT-B-32-quickgelu", "timm/vit_base_patch32_clip_224.openai", "ViT-B-32.pt"),
}


class Clip:
    """An image-text model of open_clip; as an extractor it gives the features of pictures.

    Args:
        network: a CLIP of open_clip, in float32.
        tokenizer: open_clip's own for it; those of other libraries cut long texts before anybody can see it.
        name, weight_hash: for the protocol.
        device: where it runs; pictures are moved there.
    Raises:
        MetricError: another kind of tokenizer.
    """

    def __init__(
        self, network: Any, tokenizer: Any, name: str, weight_hash: str, device: torch.device | str = "cpu"
    ) -> None:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        from open_clip.tokenizer import SimpleTokenizer

        if not isinstance(tokenizer, SimpleTokenizer):
            raise MetricError(f"{name} has a {type(tokenizer).__name__}; expected open_clip's SimpleTokenizer")
        self.name, self.weight_hash, self.tokenizer = name, weight_hash, tokenizer
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)
        side = network.visual.image_size
        self._side = side if isinstance(side, int) else side[0]
        self.dim = network.visual.output_dim
        self.preprocessing = f"bicubic-crop-{self._side}"
        self._mean, self._std = (
            torch.tensor(getattr(network.visual, part, default), device=self._device)[:, None, None]
            for part, default in (("image_mean", OPENAI_DATASET_MEAN), ("image_std", OPENAI_DATASET_STD))
        )

    @property
    def window_tokens(self) -> int:
        """Tokens of text that one window holds, 75 where it has 77 positions."""
        return self.tokenizer.context_length - 2

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, D) float32, of any length."""
        pixels = resize_and_crop(images, self._side, self._side).to(self._device).float() / 255
        return self._network.encode_image((pixels - self._mean) / self._std).float()

    @torch.no_grad()
    def window_features(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Windows of token ids, without BOS and EOS, to (W, D) float32.

        Raises:
            MetricError: a window is longer than the model can read.
        """
        longest = max(map(len, windows), default=0)
        if longest > self.window_tokens:
            raise MetricError(f"a window has {longest} tokens; {self.name} reads {self.window_tokens} at once")
        ids = torch.zeros(len(windows), self.tokenizer.context_length, dtype=torch.long)
        for row, window in zip(ids, windows, strict=True):
            framed = (self.tokenizer.sot_token_id, *window, self.tokenizer.eot_token_id)
            row[: len(framed)] = torch.tensor(framed)
        parts = ids.to(self._device).split(_TEXTS_AT_ONCE)
        return torch.cat([self._network.encode_text(part).float() for part in parts])


def load_clip(source: str | Path, weights: Path | None = None, device: torch.device | str = "cpu") -> Clip:
    """A published CLIP, or one in a folder as open_clip saves them.

    Args:
        source: a key of `MODELS`, or a folder with open_clip_config.json and the weights.
        weights: a file for a published one; None: the one in the Hugging Face cache or in ~/.cache/clip.
    Raises:
        MissingWeights: no weights.
        MetricError: an unknown name, a folder without config, or weights that do not fit.
    """
    import open_clip

    if (published := MODELS.get(str(source))) is not None:
        path = find_weights(str(source), weights, published.places, published.fetch)
        arguments: dict[str, Any] = {"model_name": published.architecture, "pretrained": str(path)}
    else:
        folder = Path(source)
        if not (folder / _CONFIG_FILE).is_file():
            raise MetricError(
                f"CLIP {str(source)!r} is unknown; expected one of {', '.join(MODELS)}, or a folder with {_CONFIG_FILE}"
            )
        found = [folder / name for name in _WEIGHT_FILES]
        path = find_weights(str(source), weights, found, "open_clip.push_to_hf_hub writes such a folder")
        arguments = {"model_name": f"local-dir:{folder}"}
    try:
        network = open_clip.create_model(**arguments, precision="fp32", require_pretrained=True)
    except (RuntimeError, ValueError) as error:
        raise MetricError(f"{path} does not hold the weights of {source} ({error})") from error
    tokenizer = open_clip.get_tokenizer(arguments["model_name"])
    return Clip(network, tokenizer, Path(source).name, weight_hash(path), device)
