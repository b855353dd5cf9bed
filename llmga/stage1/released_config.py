"""config.json of released checkpoints <-> `LlavaConfig`, and the vision tower that it names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llmga.stage1.families import FAMILIES, Family, families_of
from llmga.stage1.released_weights import ConvertError
from llmga.strict_json import read_object

# What a released config.json says beside the LLM: the reader below takes what matters, the rest is about training.
_NOT_OF_THE_LLM = ("mm_", "tune_", "freeze_", "unfreeze_", "pretrain_", "tokenizer_", "use_mm_", "image_", "vision_")
_NOT_OF_THE_MODEL = {"architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "torch_dtype"}
_CHANGES = ("vocab_size", "torch_dtype")
_SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_PROJECTOR = "mlp2x_gelu"

# Towers known by name, so that a folder with its tower inside needs no second one. Figures of OpenAI's CLIP.
_KNOWN_TOWERS: Mapping[str, Mapping[str, int]] = {
    "clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
}


@dataclass(frozen=True, slots=True)
class Tower:
    """A CLIP vision tower: its config, what prepares its pictures, and the folder they came from, if any."""

    config: CLIPVisionConfig
    image_processor: CLIPImageProcessorPil
    folder: Path | None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConvertError: the file is missing, damaged or holds something else.
    """
    return read_object(path, ConvertError, "download it again")


def candidate_families(source: Mapping[str, Any], path: Path) -> list[Family]:
    """The rows that a released config.json may belong to; the tokenizer decides between Vicuna and Llama 3.

    Raises:
        ConvertError: the config is of another architecture.
    """
    model_type = str(source.get("model_type"))
    if "text_config" in source:
        raise ConvertError(
            f"{path}: model_type {model_type!r} with a text_config is transformers' own format already; "
            "convert it back with --to llava, or use it as it is"
        )
    candidates = families_of(model_type)
    if not candidates:
        known = ", ".join(sorted({name for row in FAMILIES.values() for name in row.model_types}))
        raise ConvertError(f"{path}: model_type is {model_type!r}, expected one of {known} (capitals do not matter)")
    if "mm_hidden_size" not in source and "mm_vision_tower" not in source:
        raise ConvertError(
            f"{path}: found neither mm_vision_tower nor mm_hidden_size, so this LLM was never given a vision tower; "
            "name the folder of the fine-tuned checkpoint"
        )
    _refuse_other_designs(source, path)
    return candidates


def _refuse_other_designs(source: Mapping[str, Any], path: Path) -> None:
    """What LLaVA's code can also build and transformers' LLaVA cannot."""
    wanted: tuple[tuple[str, Any, tuple[Any, ...], str], ...] = (
        ("mm_projector_type", _PROJECTOR, (_PROJECTOR,), "a projector of two layers with a GELU between them"),
        ("mm_patch_merge_type", "flat", ("flat",), "one row of features per picture"),
        ("mm_use_im_start_end", False, (False, None), "no tokens around a picture"),
        ("mm_use_im_patch_token", False, (False, None), "no token per patch"),
        ("mm_vision_select_feature", "patch", tuple(_SELECT_STRATEGIES), "patches with or without CLS"),
    )
    for key, default, allowed, meaning in wanted:
        found = source.get(key, default)
        if found not in allowed:
            expected = " or ".join(repr(value) for value in allowed if value is not None)
            raise ConvertError(
                f"{path}: {key} is {found!r}, expected {expected} ({meaning}): "
                "transformers' LLaVA cannot run what was trained here"
            )


def find_tower(source: Mapping[str, Any], folder: Path, given: Path | None) -> Tower:
    """The tower that `mm_vision_tower` names, from the folder given, from one beside the checkpoint, or by its name.

    Raises:
        ConvertError: nothing is known about the tower, or it is no CLIP.
    """
    name = str(source.get("mm_vision_tower") or source.get("vision_tower") or "")
    places = [given] if given else [folder / name, Path(name)] if name else []
    place = next((place for place in places if (place / "config.json").is_file()), None)
    if place is not None:
        config = AutoConfig.for_model(**_vision_settings(place))
        size = config.image_size
        if (place / "preprocessor_config.json").is_file():
            image_processor = AutoImageProcessor.from_pretrained(place, backend="pil")
            size = image_processor.crop_size["height"]
        else:
            image_processor = _clip_pictures(size)
        if size != config.image_size:
            raise ConvertError(
                f"{place}: preprocessor_config.json crops to {size} px, config.json expects {config.image_size} px"
            )
        return Tower(config, image_processor, place)
    if given:
        raise ConvertError(f"{given}: no config.json there; --vision-tower names the folder of a CLIP vision tower")
    known = _KNOWN_TOWERS.get(Path(name).name)
    if known is None:
        raise ConvertError(
            f"{folder}/config.json: the vision tower {name!r} is no folder here and not known by name "
            f"({', '.join(_KNOWN_TOWERS)}); name its folder with --vision-tower"
        )
    return Tower(CLIPVisionConfig(**known), _clip_pictures(known["image_size"]), None)


def _vision_settings(place: Path) -> dict[str, Any]:
    """The vision half of a CLIP folder's config, as `AutoConfig.for_model` takes it."""
    settings = read_json(place / "config.json")
    if settings.get("model_type") == "clip":
        settings = {**dict(settings.get("vision_config") or {}), "model_type": "clip_vision_model"}
    if settings.get("model_type") != "clip_vision_model":
        raise ConvertError(
            f"{place}/config.json: model_type is {settings.get('model_type')!r}, expected clip or clip_vision_model: "
            "the released checkpoints were trained on CLIP towers"
        )
    return {key: value for key, value in settings.items() if key not in _NOT_OF_THE_MODEL - {"model_type"}}


def _clip_pictures(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def from_released_config(source: Mapping[str, Any], family: Family, tower: Tower, path: Path) -> LlavaConfig:
    """The `LlavaConfig` of a released config.json; the placeholder's id is still to be set.

    Raises:
        ConvertError: the LLM's settings are not what its class takes.
    """
    text = {
        key: value
        for key, value in source.items()
        if key not in _NOT_OF_THE_MODEL and not key.startswith(_NOT_OF_THE_LLM)
    }
    if isinstance(text.get("rope_scaling"), Mapping):
        scaling = dict(text["rope_scaling"])
        for key in ("type", "rope_type"):
            if key in scaling:
                scaling[key] = family.rope_types.get(scaling[key], scaling[key])
        text["rope_scaling"] = scaling
    text["use_cache"] = True  # switched off while training with gradient checkpointing, and stored so
    strategy = _SELECT_STRATEGIES[source.get("mm_vision_select_feature", "patch")]
    try:
        text_config = AutoConfig.for_model(family.text_model_type, **text)
    except Exception as error:  # huggingface_hub's own classes, whose text names the field
        reason = " ".join(str(error).split())
        raise ConvertError(f"{path}: these are no settings of a {family.text_model_type} model: {reason}") from None
    if (text_config.pad_token_id or 0) >= text_config.vocab_size:  # a default of the class, for its full vocabulary
        text_config.pad_token_id = None
    num_patches = (tower.config.image_size // tower.config.patch_size) ** 2
    return LlavaConfig(
        text_config=text_config,
        vision_config=tower.config,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=source.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        image_seq_length=num_patches + (strategy == "full"),
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )


def released_config(config: LlavaConfig, family: Family, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json as LLaVA's code reads it.

    Args:
        original: the config.json this model was once converted from: what it says beside the model is taken over.
    """
    text = config.text_config.to_dict()
    rope = dict(text.pop("rope_parameters", None) or {})
    for key in _NOT_OF_THE_MODEL | {"dtype"}:
        text.pop(key, None)
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
    released_types = {today: released for released, today in family.rope_types.items()}
    rope_type = rope.pop("rope_type", "default")
    rope.pop("type", None)  # the same under its older name
    if "original_max_position_embeddings" in text:  # said once: the old code counts the keys of rope_scaling
        rope.pop("original_max_position_embeddings", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        text["partial_rotary_factor"] = dict(config.text_config.rope_parameters)["partial_rotary_factor"]
    scaled = {"type": released_types.get(rope_type, rope_type), **rope}
    text["rope_scaling"] = None if rope_type == "default" else scaled
    strategies = {ours: theirs for theirs, ours in _SELECT_STRATEGIES.items()}
    own = {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": _PROJECTOR,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": strategies[config.vision_feature_select_strategy],
        "use_mm_proj": True,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
    if original is None:
        return {**text, **own}
    # These two may have changed since: tags became tokens, weights were saved in another precision.
    return {**original, **{key: value for key, value in {**text, **own}.items() if key in original and key in _CHANGES}}


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a folder of this config holds, by its in-memory name; a tied head is left out."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_fits(
    given: Mapping[str, tuple[int, ...]], config: LlavaConfig, where: Path, spelt: Callable[[str], str | None]
) -> None:
    """Refuse weights that are not exactly those of the config.

    Args:
        given: in-memory name -> shape.
        spelt: in-memory name -> what `where` calls the tensor.
    Raises:
        ConvertError: tensors are missing, unknown or of another shape; the sentence names the first.
    """
    expected = expected_shapes(config)
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing:
        raise ConvertError(
            f"{where} lacks {len(missing)} of the {len(expected)} tensors that config.json asks for, first "
            f"{spelt(missing[0])}; download the rest, or the config that belongs to these weights"
        )
    if unknown:
        raise ConvertError(
            f"{where} holds {len(unknown)} tensors that config.json knows nothing of, first {spelt(unknown[0])}; "
            "the config belongs to other weights"
        )
    for name, shape in expected.items():
        if given[name] != shape:
            raise ConvertError(
                f"{where}: {spelt(name)} has shape {given[name]}, expected {shape} by config.json; "
                "the config belongs to other weights"
            )
