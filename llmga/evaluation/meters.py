"""The ways in which pictures are measured, each a `Meter`."""

from collections.abc import Mapping, Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llmga.evaluation.bench import Columns, Meter, Score
from llmga.evaluation.config import ClipConfig, ExtractorConfig
from llmga.images import open_picture
from llmga.metrics.clip import Clip, load_clip
from llmga.metrics.clip_score import ClipScores, score_features
from llmga.metrics.extractors import Extractor, build_extractor, protocol_of
from llmga.metrics.features import MetricError
from llmga.metrics.picture_files import read_pictures
from llmga.toyworld.parse import SIDE, ParsedScene, parse_batch
from llmga.toyworld.picture_scores import (
    REQUEST_SCORES,
    TEXT_SCORES,
    THEME_SCORES,
    score_requests,
    score_texts,
    score_themes,
)

Texts = Mapping[str, str]
COSINE, RATE = Score("cosine"), Score("share")


def build_features(config: ExtractorConfig, device: torch.device) -> Extractor:
    """The network of the settings; errors as `build_extractor`."""
    return build_extractor(config.name, config.weights, config.rule, device, config.allow_random)


def build_clip(config: ClipConfig, device: torch.device) -> Clip:
    """The CLIP of the settings; errors as `load_clip`."""
    return load_clip(config.name, config.weights, device)


def texts_hash(texts: Texts) -> str:
    """What tells one list of ids and texts from another."""
    return sha256("\0".join(f"{id}\0{text}" for id, text in texts.items()).encode()).hexdigest()


def file_meter(side: int | None = None) -> Meter:
    """Hash and size of each file: `sha256` (N, 32) and `size` (N, 2), width and height.

    Args:
        side: pictures are brought to a square of it, whatever their size is.
    """

    def measure(files: Mapping[str, Path]) -> Columns:
        hashes, sizes = [], []
        for path in files.values():
            sizes.append(open_picture(path).size if side is None else (side, side))
            with path.open("rb") as file:
                hashes.append(np.frombuffer(file_digest(file, "sha256").digest(), np.uint8))
        return {"sha256": np.stack(hashes), "size": np.array(sizes)}

    return Meter("files", {}, measure)


def feature_meter(extractor: Extractor, side: int | None = None) -> Meter:
    """Features for distances of sets: `features` (N, D).

    Args:
        side: pictures are brought to a square of it first.
    """

    def measure(files: Mapping[str, Path]) -> Columns:
        return {"features": features_of(extractor, read_pictures(files, side), files)}

    return Meter("features", {**protocol_of(extractor), "side": side}, measure)


def features_of(extractor: Extractor, pictures: Tensor, files: Mapping[str, Path]) -> np.ndarray:
    """(N, D) float32.

    Raises:
        MetricError: those of a picture are not finite; it names the file.
    """
    features = extractor.features(pictures).cpu().numpy()
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        path = list(files.values())[int(bad.argmax())]
        raise MetricError(
            f"{path}: its features by {extractor.name} are not finite; look at the picture and the weights"
        )
    return features


def clip_meter(clip: Clip, texts: Mapping[str, Texts], side: int | None = None) -> Meter:
    """CLIP score against several texts for each picture.

    Args:
        texts: name -> id -> text; the columns are `clip_<name>`, of long texts the mean over windows, and
            `clip_<name>_lowest` and `clip_<name>_windows`.
    """

    def measure(files: Mapping[str, Path]) -> Columns:
        features = clip.features(read_pictures(files, side))
        columns: Columns = {}
        for name, of in texts.items():
            found = score_features(clip, features, [of[id] for id in files])
            columns |= clip_columns(f"clip_{name}", found)
        return columns

    scores = {key: COSINE for name in texts for key in (f"clip_{name}", f"clip_{name}_lowest")}
    scores |= {f"clip_{name}_long": Score("share", None) for name in texts}
    return Meter("clip", {**clip_protocol(clip), **_hashes(texts), "side": side}, measure, scores)


def clip_columns(name: str, found: ClipScores) -> Columns:
    """Scores of one text for each picture, as columns; `_long` is the share of texts over one window."""
    long = np.stack([found.windows > 1, np.ones_like(found.windows)], axis=1).astype(np.int64)
    return {name: found.mean, f"{name}_lowest": found.lowest, f"{name}_long": long}


def clip_protocol(clip: Clip) -> dict[str, Any]:
    """What a CLIP score has to say of how it was made."""
    return {**protocol_of(clip), "window_tokens": clip.window_tokens, "long_texts": "windows"}


def world_meter(preset: str, texts: Texts | None = None, requests: Texts | None = None) -> Meter:
    """What pictures of the toy world show, against long texts and brief requests; see `toyworld.picture_scores`."""

    def measure(files: Mapping[str, Path]) -> Columns:
        scenes = read_scenes(files, preset)
        columns = score_themes(scenes)
        if texts is not None:
            columns |= score_texts(scenes, [texts[id] for id in files])
        if requests is not None:
            columns |= score_requests(scenes, [requests[id] for id in files])
        return columns

    names: Sequence[str] = THEME_SCORES
    names = (*names, *(TEXT_SCORES if texts is not None else ()), *(REQUEST_SCORES if requests is not None else ()))
    hashed = _hashes({name: of for name, of in (("texts", texts), ("requests", requests)) if of is not None})
    return Meter("world", {"preset": preset, **hashed}, measure, dict.fromkeys(names, RATE))


def read_scenes(files: Mapping[str, Path], preset: str) -> list[ParsedScene]:
    """Pictures read by the toy world's parser, at its size."""
    return parse_batch(world_pictures(files), preset)


def world_pictures(files: Mapping[str, Path]) -> np.ndarray:
    """(N, 64, 64, 3) uint8, larger and smaller pictures resized."""
    pictures = [open_picture(path) for path in files.values()]
    fitted = [p if p.size == (SIDE, SIDE) else p.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for p in pictures]
    return np.stack([np.asarray(picture) for picture in fitted])


def unit_range(pictures: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return pictures.float() / 255


def _hashes(texts: Mapping[str, Texts]) -> dict[str, str]:
    return {f"{name}_sha256": texts_hash(of) for name, of in texts.items()}
