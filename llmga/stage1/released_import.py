"""LLaVA's folder -> transformers' folder: look at everything first, then write tensor by tensor."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig, LlavaProcessor

from llmga.stage1.families import Family, fitting_family
from llmga.stage1.model import load_processor, standard_name
from llmga.stage1.model_checks import first_sentence
from llmga.stage1.released_config import check_fits, find_tower, from_released_config, read_json
from llmga.stage1.released_projector import multiplied, scaled_layer
from llmga.stage1.released_tokenizer import (
    TOKENIZER_FILES,
    Placeholder,
    add_placeholder,
    choose_template,
    has_tokenizer,
    load_tokenizer,
    sample_messages,
    set_special_tokens,
)
from llmga.stage1.released_weights import (
    ConvertError,
    ShardWriter,
    StoredWeights,
    is_buffer,
    released_name,
    transformers_name,
)

# The source's small files as they were, for the way back.
ORIGINALS = "released"
GENERATION_CONFIG = "generation_config.json"
ORIGINAL_FILES = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_RELEASED_HEAD, _RELEASED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_RELEASED_TOWER = "model.vision_tower."
_OTHER_HALF_OF_CLIP = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user may say about a conversion; see `convert_checkpoint`."""

    system_prompt: Path | None
    vision_tower: Path | None
    image_token: str | None
    image_token_id: int | None
    needs_tokenizer: bool
    shard_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What `llmga convert` tells."""

    family: str
    found: Mapping[str, Any]
    wrote: Mapping[str, Any]
    warnings: Sequence[str]


class ReleasedCheckpoint:
    """A LLaVA-style folder that was looked at and fits; `with` closes its files.

    Raises:
        ConvertError: whatever does not fit, before anything is written.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any], candidates: Sequence[Family], wishes: Wishes) -> None:
        self.folder, self.source, self.wishes = folder, source, wishes
        self.warnings: list[str] = []
        generation = folder / GENERATION_CONFIG
        self.generation = read_json(generation) if generation.is_file() else {}
        self.tokenizer = self._load_tokenizer()
        self.family = self._choose_family(candidates)
        self.tower = find_tower(source, folder, wishes.vision_tower)
        self.config = from_released_config(source, self.family, self.tower, folder / "config.json")
        self._stack = ExitStack()
        try:
            self.weights = self._stack.enter_context(StoredWeights(folder))
            self.tower_weights = self._open_tower()
            self.dtype = self.weights.dtypes()[0]
            self._check_tied_head()
            self._check_weights()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "ReleasedCheckpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    def tensors(self, rows: int) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name in transformers' folders, with embedding and head grown to `rows` by zeros."""
        factor = self.config.text_config.hidden_size**0.5 if self.family.scales_inputs else 1.0
        for released in self.weights.names:
            if is_buffer(released) or (self.tied and released == _RELEASED_HEAD):
                continue
            tensor, name = self.weights.read(released), str(transformers_name(released))
            if name in (EMBEDDING, HEAD) and len(tensor) < rows:
                tensor = torch.cat([tensor, tensor.new_zeros(rows - len(tensor), tensor.shape[1])])
            elif factor != 1.0 and name.startswith("multi_modal_projector.") and scaled_layer(name):
                tensor = multiplied(tensor, factor)
            yield name, tensor
        if self.tower_weights is not None:
            for name in self.tower_weights.names:
                if (ours := _tower_name(name)) is not None:
                    yield ours, self.tower_weights.read(name).to(self.dtype)

    def _load_tokenizer(self) -> Any:
        if has_tokenizer(self.folder):
            return load_tokenizer(self.folder)
        if self.wishes.needs_tokenizer:
            raise ConvertError(
                f"{self.folder} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json); "
                "download it too, or convert the weights alone with --no-tokenizer"
            )
        self.warnings.append(
            "no tokenizer in the source: weights and config alone were written, no processor, no template"
        )
        return None

    def _choose_family(self, candidates: Sequence[Family]) -> Family:
        if self.tokenizer is None:
            return candidates[0]
        family = fitting_family(candidates, self.tokenizer.get_vocab().keys())
        if family is None:
            wanted = " or ".join(f"{row.stop_tokens[0]} ({row.name})" for row in candidates)
            raise ConvertError(f"{self.folder}: the tokenizer lacks the token that ends an answer, expected {wanted}")
        return family

    def _open_tower(self) -> StoredWeights | None:
        """The tower's own weights, where the checkpoint does not bring them."""
        if any(name.startswith(_RELEASED_TOWER) for name in self.weights.names):
            return None
        if self.tower.folder is None:
            raise ConvertError(
                f"{self.folder} holds no vision tower (the released weights of some families leave it out); name the "
                f"folder of {self.source.get('mm_vision_tower')} with --vision-tower"
            )
        return self._stack.enter_context(StoredWeights(self.tower.folder))

    def _check_tied_head(self) -> None:
        if not self.tied or _RELEASED_HEAD not in self.weights.names:
            return
        if not torch.equal(self.weights.read(_RELEASED_HEAD), self.weights.read(_RELEASED_EMBEDDING)):
            raise ConvertError(
                f"{self.folder}: lm_head.weight differs from the embedding although tie_word_embeddings is true; set "
                "it to false in config.json if the head was trained"
            )

    def _check_weights(self) -> None:
        given: dict[str, tuple[int, ...]] = {}
        for name in self.weights.names:
            if is_buffer(name) or (self.tied and name == _RELEASED_HEAD):
                continue
            ours = transformers_name(name)
            if ours is None:
                raise ConvertError(f"{self.folder}: {name} is no tensor of a LLaVA model; is this a folder of LLaVA's?")
            given[standard_name(ours)] = self.weights.shape(name)
        if self.tower_weights is not None:
            for name in self.tower_weights.names:
                if (tower_name := _tower_name(name)) is not None:
                    given[standard_name(tower_name)] = self.tower_weights.shape(name)
        check_fits(given, self.config, self.folder, released_name)
        dtypes = self.weights.dtypes()
        if len(dtypes) > 1:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            self.warnings.append(f"weights of several precisions ({names}); transformers loads them all as the first")


def _tower_name(name: str) -> str | None:
    """A tensor of a CLIP folder -> its name in LLaVA's folder by transformers; None for what no tower needs."""
    if is_buffer(name) or name.startswith(_OTHER_HALF_OF_CLIP):
        return None
    return "vision_tower." + name.removeprefix("vision_model.")


def write_transformers(checkpoint: ReleasedCheckpoint, folder: Path) -> Facts:
    """Fill an empty folder with weights, config, processor and the source's small files."""
    rows = checkpoint.config.text_config.vocab_size
    placeholder, template_facts = _text_side(checkpoint, rows)
    config = _finished_config(checkpoint, placeholder, rows, template_facts)
    generation_config = _generation_config(checkpoint, placeholder, rows)
    writer = ShardWriter(folder, checkpoint.wishes.shard_bytes)
    for name, tensor in checkpoint.tensors(placeholder.rows):
        writer.add(name, tensor)
    files = writer.close()
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    if checkpoint.tokenizer is not None:
        _save_processor(checkpoint, placeholder, folder)
    else:
        checkpoint.tower.image_processor.save_pretrained(folder)
    (folder / ORIGINALS).mkdir()
    for name in ORIGINAL_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / ORIGINALS / name)
    return Facts(
        family=checkpoint.family.name,
        found=_found(checkpoint),
        wrote={
            "weights": ", ".join(files),
            "tensors": writer.num_tensors,
            "parameters": writer.num_parameters,
            "picture token": f"{placeholder.token} = {placeholder.id}",
            "vocabulary": f"{rows} rows" if placeholder.rows == rows else f"{rows} rows grown to {placeholder.rows}",
            **template_facts,
        },
        warnings=checkpoint.warnings,
    )


def _found(checkpoint: ReleasedCheckpoint) -> dict[str, Any]:
    weights, tower, tokenizer = checkpoint.weights, checkpoint.tower, checkpoint.tokenizer
    inside = checkpoint.tower_weights is None
    num_files = len(weights.files)
    return {
        "weights": weights.files[0].name if num_files == 1 else f"{num_files} shards ({weights.files[0].suffix})",
        "tensors": len(weights.names),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "language model": checkpoint.family.text_model_type,
        "tied head": checkpoint.tied,
        "vision tower": "inside" if inside else f"outside, read from {tower.folder}",
        "tokenizer": "none" if tokenizer is None else f"{type(tokenizer).__name__}, {len(tokenizer)} tokens",
        "quirks": "; ".join(checkpoint.family.quirks) or "none",
    }


def _text_side(checkpoint: ReleasedCheckpoint, rows: int) -> tuple[Placeholder, dict[str, Any]]:
    """The placeholder and the chat template; the tokenizer gets both."""
    family, tokenizer, wishes = checkpoint.family, checkpoint.tokenizer, checkpoint.wishes
    if tokenizer is None:
        # Nobody knows which row is free, so none is added: the shapes stay, and the last row is the least frequent.
        number = rows - 1 if wishes.image_token_id is None else wishes.image_token_id
        if not 0 <= number < rows:
            raise ConvertError(f"--image-token-id is {number}, expected a row of the embedding, 0 to {rows - 1}")
        checkpoint.warnings.append(f"row {number} of the embedding stands for pictures; text must not use it")
        return Placeholder(family.image_token, number, rows), {}
    if wishes.image_token_id is not None:
        raise ConvertError(
            "--image-token-id is for folders without a tokenizer; this one has one, so name a token with --image-token"
        )
    checkpoint.warnings += set_special_tokens(tokenizer, family)
    placeholder = add_placeholder(tokenizer, wishes.image_token or family.image_token, rows)
    system_text, told = _system_text(checkpoint)
    tokenizer.chat_template, space_mark = choose_template(tokenizer, family, system_text, placeholder.token)
    return placeholder, {
        "template": f"{family.template}, {'with' if space_mark else 'without'} space marks",
        "system text": told,
    }


def _system_text(checkpoint: ReleasedCheckpoint) -> tuple[str, str]:
    """The text for the template's slot, and what to tell about it."""
    known, path = checkpoint.family.system_text, checkpoint.wishes.system_prompt
    if known is None:
        if path is not None:
            raise ConvertError(
                f"{path}: the {checkpoint.family.name} weights were trained without a system text; "
                "leave --system-prompt out"
            )
        return "", "none, as trained"
    if path is None:
        checkpoint.warnings.append(
            f"the {checkpoint.family.name} weights were trained with a system text of {known.characters} characters, "
            "which is not ours to ship; the slot stays empty and replies may be worse: convert again with "
            "--system-prompt FILE"
        )
        return "", "empty slot"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"--system-prompt {path} cannot be read as UTF-8 text ({error})") from None
    for candidate in (text, text.removesuffix("\n").removesuffix("\r")):
        if known.is_met_by(candidate):
            return candidate, f"{len(candidate)} characters, the trained text"
    text = text.removesuffix("\n").removesuffix("\r")
    checkpoint.warnings.append(
        f"{path} is not the text that the {checkpoint.family.name} weights were trained with: it has {len(text)} "
        f"characters, the trained one {known.characters} with SHA-256 {known.sha256[:12]}...; it is used all the same"
    )
    return text, f"{len(text)} characters, not the trained text"


def _finished_config(
    checkpoint: ReleasedCheckpoint, placeholder: Placeholder, rows: int, template_facts: Mapping[str, Any]
) -> LlavaConfig:
    """The config with the placeholder, and with what the way back and the next reader must know."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    config.image_token_id = placeholder.id
    config.text_config.vocab_size = placeholder.rows
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = config.text_config.dtype = config.vision_config.dtype = checkpoint.dtype
    if tokenizer is not None:
        config.text_config.pad_token_id = tokenizer.pad_token_id
    config.generation_tags = "gen_image"  # the spelling that the released weights write
    config.released = {
        "family": checkpoint.family.name,
        "template": checkpoint.family.template if template_facts else None,
        "vocab_size": rows,
        "tower_inside": checkpoint.tower_weights is None,
        "tied_head_stored": checkpoint.tied and _RELEASED_HEAD in checkpoint.weights.names,
    }
    return config


def _generation_config(checkpoint: ReleasedCheckpoint, placeholder: Placeholder, rows: int) -> GenerationConfig:
    """Where replies stop, and that nothing but text is ever written: neither the placeholder nor an untrained row.

    Raises:
        ConvertError: the source's own settings are none that the library would store.
    """
    given = checkpoint.generation
    kept: dict[str, Any] = {
        key: given[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample") if key in given
    }
    if given.get("do_sample"):  # elsewhere the library refuses to store them
        kept |= {key: given[key] for key in ("temperature", "top_p", "top_k") if key in given}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        kept.setdefault(key, checkpoint.source.get(key))
    if checkpoint.tokenizer is not None:
        vocabulary = checkpoint.tokenizer.get_vocab()
        stops = [vocabulary[token] for token in checkpoint.family.stop_tokens]
        kept["eos_token_id"] = stops[0] if len(stops) == 1 else stops
        kept["pad_token_id"] = checkpoint.tokenizer.pad_token_id
    config = GenerationConfig(**kept, suppress_tokens=sorted({placeholder.id, *range(rows, placeholder.rows)}))
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ConvertError(
            f"{checkpoint.folder / GENERATION_CONFIG}: these are no settings of generation ({first_sentence(error)}); "
            "correct them or download it again"
        ) from None
    return config


def _save_processor(checkpoint: ReleasedCheckpoint, placeholder: Placeholder, folder: Path) -> None:
    """Write the processor, read it back and see that it still says what was checked."""
    tokenizer, tower = checkpoint.tokenizer, checkpoint.tower.config
    processor = LlavaProcessor(
        image_processor=checkpoint.tower.image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=checkpoint.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=placeholder.token,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    reloaded = load_processor(folder)
    for messages in sample_messages(placeholder.token):
        before, after = (
            each.apply_chat_template(messages, return_dict=True)["input_ids"]
            for each in (tokenizer, reloaded.tokenizer)
        )
        if before != after or reloaded.image_token_id != placeholder.id:
            raise ConvertError(f"{checkpoint.folder}: transformers reads the tokenizer otherwise once it was saved")
