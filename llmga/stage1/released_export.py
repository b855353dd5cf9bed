"""transformers' LLaVA folder -> LLaVA's: the inverse of `released_import`, bit for bit where that wrote the folder."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlavaConfig

from llmga.stage1.families import FAMILIES, Family, fitting_family
from llmga.stage1.model import standard_name
from llmga.stage1.released_config import check_fits, read_json, released_config
from llmga.stage1.released_import import ORIGINAL_FILES, ORIGINALS, Facts
from llmga.stage1.released_projector import divided, scaled_layer
from llmga.stage1.released_tokenizer import has_tokenizer, load_tokenizer
from llmga.stage1.released_weights import ConvertError, ShardWriter, StoredWeights, is_buffer, released_name

_EMBEDDING, _HEAD, _TOWER = "model.language_model.embed_tokens.weight", "lm_head.weight", "model.vision_tower."
_SCALED = "model.multi_modal_projector."


class TransformersCheckpoint:
    """A LLaVA folder by transformers that LLaVA's code can express; `with` closes its files.

    Raises:
        ConvertError: whatever does not fit, before anything is written.
    """

    def __init__(self, folder: Path, family: Family | None, needs_tokenizer: bool) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self.config = _read_config(folder)
        self.released: Mapping[str, Any] = getattr(self.config, "released", None) or {}
        self.tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
        if self.tokenizer is None and needs_tokenizer:
            raise ConvertError(
                f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json); "
                "convert the weights alone with --no-tokenizer"
            )
        self.family = family or self._choose_family()
        self.added = self._tokens_added_since()
        rows = self.config.text_config.vocab_size
        self.rows = rows if self.added else self.released.get("vocab_size", rows)
        self.weights = StoredWeights(folder)
        try:
            self.names = {standard_name(name): name for name in self.weights.names if not is_buffer(name)}
            given = {ours: self.weights.shape(name) for ours, name in self.names.items()}
            if self.config.tie_word_embeddings:
                given.pop(_HEAD, None)
            check_fits(given, self.config, folder, lambda name: self.names.get(name, name))
            self.dtype = self.weights.dtypes()[0]
        except BaseException:
            self.weights.__exit__()
            raise

    def __enter__(self) -> "TransformersCheckpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.weights.__exit__()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under LLaVA's name, rows that the conversion added cut off, the projector's factor taken out."""
        factor = self.config.text_config.hidden_size**0.5 if self.family.scales_inputs else 1.0
        tied = self.config.tie_word_embeddings
        for ours, name in self.names.items():
            if (tied and ours == _HEAD) or (ours.startswith(_TOWER) and not self.released.get("tower_inside", True)):
                continue
            tensor = self.weights.read(name)
            if ours in (_EMBEDDING, _HEAD):
                tensor = tensor[: self.rows].clone()
            elif factor != 1.0 and ours.startswith(_SCALED) and scaled_layer(ours):
                tensor = divided(tensor, factor, self.dtype)
            yield str(released_name(ours)), tensor
            if ours == _EMBEDDING and tied and self.released.get("tied_head_stored"):
                yield str(released_name(_HEAD)), tensor.clone()

    def _choose_family(self) -> Family:
        if "family" in self.released:
            row = FAMILIES.get(self.released["family"])
            if row is None:
                raise ConvertError(f"{self.folder}/config.json: unknown family {self.released['family']!r}")
            return row
        text_type = self.config.text_config.model_type
        rows = [row for row in FAMILIES.values() if row.text_model_type == text_type]
        if not rows:
            known = ", ".join(sorted({row.text_model_type for row in FAMILIES.values()}))
            raise ConvertError(
                f"{self.folder}/config.json: LLaVA's code has no {text_type!r} language model, expected one of {known}"
            )
        vocabulary = () if self.tokenizer is None else self.tokenizer.get_vocab().keys()
        return fitting_family(rows, vocabulary) or rows[0]

    def _tokens_added_since(self) -> list[str]:
        """Tokens behind the released vocabulary that are not the placeholder, such as generation tags."""
        if self.tokenizer is None or "vocab_size" not in self.released:
            return []
        first = self.released["vocab_size"]
        vocabulary = self.tokenizer.get_vocab()
        return sorted(
            token for token, number in vocabulary.items() if number >= first and number != self.config.image_token_id
        )


def _read_config(folder: Path) -> LlavaConfig:
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != "llava" or "text_config" not in settings:
        raise ConvertError(
            f"{folder}/config.json: model_type is {settings.get('model_type')!r}"
            f"{'' if 'text_config' in settings else ' without a text_config'}, expected transformers' 'llava'; "
            "LLaVA's own folders are converted with --to hf"
        )
    config = LlavaConfig.from_dict(settings)
    if config.vision_config.model_type != "clip_vision_model":
        raise ConvertError(
            f"{folder}/config.json: the vision tower is {config.vision_config.model_type!r}, expected "
            "'clip_vision_model', the only one that the published code runs"
        )
    if not isinstance(config.vision_feature_layer, int) or not config.multimodal_projector_bias:
        raise ConvertError(
            f"{folder}/config.json: features of several layers, or a projector without bias, is more than LLaVA's code "
            "can express; expected one vision_feature_layer and multimodal_projector_bias true"
        )
    return config


def write_released(checkpoint: TransformersCheckpoint, folder: Path, shard_bytes: int) -> Facts:
    """Fill an empty folder with weights, config and tokenizer as LLaVA's code reads them."""
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in checkpoint.tensors():
        writer.add(name, tensor)
    files = writer.close()
    originals = checkpoint.folder / ORIGINALS
    original = read_json(originals / "config.json") if (originals / "config.json").is_file() else None
    checkpoint.config.text_config.vocab_size = checkpoint.rows
    checkpoint.config.dtype = checkpoint.dtype
    config = released_config(checkpoint.config, checkpoint.family, original)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    told = _write_tokenizer(checkpoint, originals, folder)
    return Facts(
        family=checkpoint.family.name,
        found={
            "weights": ", ".join(file.name for file in checkpoint.weights.files[:2]),
            "tensors": len(checkpoint.names),
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
            "language model": checkpoint.config.text_config.model_type,
            "converted before": bool(checkpoint.released),
        },
        wrote={
            "weights": ", ".join(files),
            "tensors": writer.num_tensors,
            "parameters": writer.num_parameters,
            "vocabulary": f"{checkpoint.rows} rows",
            "tokenizer": told,
        },
        warnings=checkpoint.warnings,
    )


def _write_tokenizer(checkpoint: TransformersCheckpoint, originals: Path, folder: Path) -> str:
    """The released files as they were where nothing was added since; else the present ones without the placeholder."""
    kept = [name for name in ORIGINAL_FILES if name != "config.json" and (originals / name).is_file()]
    if not checkpoint.added and kept:
        for name in kept:
            shutil.copyfile(originals / name, folder / name)
        return "the released files"
    if checkpoint.tokenizer is None:
        return "none"
    checkpoint.tokenizer.chat_template = None
    checkpoint.tokenizer.save_pretrained(folder)
    _drop_placeholder(folder, checkpoint.config.image_token_id)
    if checkpoint.added:
        checkpoint.warnings.append(
            f"{len(checkpoint.added)} tokens were added since the release ({', '.join(checkpoint.added[:3])}); the "
            "embedding keeps its rows, and LLaVA's code needs this folder's tokenizer"
        )
    return "saved by this version of transformers"


def _drop_placeholder(folder: Path, token_id: int) -> None:
    """Take the placeholder out where it is the last token; elsewhere it stays, because the ids behind it count on.

    LLaVA's code splits a text at its pictures before it tokenizes, so a placeholder that stays is never met.
    """
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    added = tokenizer["added_tokens"]
    if added and token_id == max(token["id"] for token in added):
        tokenizer["added_tokens"] = [token for token in added if token["id"] != token_id]
        path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
