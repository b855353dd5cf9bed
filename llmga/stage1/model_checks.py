"""What is wrong with a model folder, in one sentence and before anything is trained on it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from llmga.files import HEAD_BYTES, what_it_is
from llmga.strict_json import read_object

if TYPE_CHECKING:
    from llmga.stage1.model import Mllm


ADAPTER_CONFIG = "adapter_config.json"  # peft's


class ModelError(ValueError):
    """A model folder that cannot be used; the sentence says what was found and what to do."""


def read_settings(folder: Path) -> dict[str, Any]:
    """What the config.json of a model folder says.

    Raises:
        ModelError: it is no JSON, or no JSON object.
    """
    return read_object(folder / "config.json", ModelError, "save or download the model again")


def read_model_config(folder: Path) -> Any:
    """transformers' config of a model folder; nothing of the folder's own code is run.

    Raises:
        ModelError: the file is no JSON object, names a model that transformers does not have, or a value is no value.
    """
    read_settings(folder)  # transformers would blame the network for what is no JSON
    try:
        return AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        reason, way_out = f"({first_sentence(error)})", "save or download the model again"
    except (ValueError, KeyError) as error:
        reason = f"without code from outside ({first_sentence(error)})"
        way_out = "choose a model that transformers itself implements"
    raise ModelError(f"{folder}/config.json: transformers cannot read it {reason}; {way_out}")


def refuse_misfit(path: Path, config: Any, info: Mapping[str, Any], may_be_left_over: bool = False) -> None:
    """Raise unless every weight of a model came from its folder.

    Args:
        config: of the model; its text config is asked where there is one.
        info: what `from_pretrained(output_loading_info=True)` returned.
        may_be_left_over: the folder may hold more than this model.
    Raises:
        ModelError: with the way out where the cause can be told.
    """
    problems = {
        kind: sorted(map(str, names))
        for kind, names in info.items()
        if names and not (may_be_left_over and kind == "unexpected_keys")
    }
    if not problems:
        return
    found = "; ".join(f"{len(names)} {kind}, first {names[0]}" for kind, names in problems.items())
    text = config.get_text_config()
    kind = repr(config.model_type) + (f" with {text.model_type!r} in it" if text is not config else "")
    way_out = "convert or download the folder again"
    if "missing_keys" in problems and all(name.endswith("lm_head.weight") for name in problems["missing_keys"]):
        way_out = "if head and embedding are one in this model, set tie_word_embeddings to true there"
    resized = [item for item in info.get("mismatched_keys", ()) if "embed_tokens" in item[0] or "lm_head" in item[0]]
    if resized and len(resized) == len(problems.get("mismatched_keys", ())):
        way_out = f"the weights have {resized[0][1][0]} rows, so set vocab_size (now {text.vocab_size}) to that there"
    raise ModelError(f"{path}: the weights do not fit config.json, which says model_type {kind} ({found}); {way_out}")


def check_head(path: Path, model: Any) -> None:
    """A head that a config calls the embedding, but that has weights of its own, would be lost when it is saved."""
    if model.config.tie_word_embeddings and model.get_output_embeddings().weight is not (
        model.get_input_embeddings().weight
    ):
        raise ModelError(
            f"{path}/config.json: tie_word_embeddings is true, but the weights hold a head that differs from the "
            "embedding; set it to false there"
        )


@contextmanager
def reading_processor(folder: Path) -> Iterator[None]:
    """Let transformers load tokenizer and image processor, and say in one sentence what it says at length.

    Raises:
        ModelError: they are missing or damaged.
    """
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}: tokenizer and image processor cannot be loaded ({first_sentence(error)}); "
            "save or download the model again, with tokenizer.json and processor_config.json"
        ) from error


@contextmanager
def reading_weights(folder: Path) -> Iterator[None]:
    """Let a library load weights: without its table of keys, which is `refuse_misfit`'s to tell, and in one sentence
    where they are missing, cut short or still to be fetched, which each library says in its own way.

    Raises:
        ModelError: they cannot be read.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (OSError, SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        reason = _stand_in(folder) or _why_unread(error)
        raise ModelError(f"{folder}: the weights cannot be read ({reason}); copy or download them again") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _stand_in(folder: Path) -> str | None:
    """A file that stands where weights should, such as a Git LFS pointer; None if there is none."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with suppress(OSError), path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            if path.suffix == ".bin" and head.startswith(b"PK"):  # torch's own files are zip archives
                continue
            if found := what_it_is(head):
                return f"{path.name} is {found}"
    return None


def _why_unread(error: Exception) -> str:
    """The reason in a few words; torch's own would have files read without care."""
    if isinstance(error, UnpicklingError):
        return "a .bin file asks for more than tensors, which may be an attack; nothing of it was executed"
    return first_sentence(error) or "a file of weights ends too early"


def first_sentence(error: Exception) -> str:
    """Libraries say a lot; lines and spaces are made one."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".:")


@contextmanager
def explaining_attention(path: Path, attention: str | None) -> Iterator[None]:
    """Attention that a machine or a model lacks (Gemma 2 knows the plain one alone); transformers says so at length."""
    try:
        yield
    except ImportError as error:
        if attention is None or not attention.startswith("flash"):
            raise
        reason = str(error).rpartition("error: ")[2].split(". ")[0].rstrip(".")
        raise ModelError(f"{attention} cannot be used here ({reason}); set model.attention to sdpa") from error
    except ValueError as error:
        if attention is None or "attention implementation" not in str(error):
            raise
        raise ModelError(
            f"{path}: this model cannot compute {attention} attention; set model.attention to eager"
        ) from error


def check_placeholder(mllm: "Mllm", path: Path) -> None:
    """`LlavaProcessor` takes the first piece of `<image>` for the placeholder, silently, when it is no token."""
    token, rows = mllm.processor.image_token, mllm.model.config.text_config.vocab_size
    pieces = mllm.tokenizer.encode(token, add_special_tokens=False)
    if pieces != [mllm.image_token_id] or mllm.tokenizer.convert_tokens_to_ids(token) != pieces[0]:
        raise ModelError(
            f"{path}: the tokenizer reads {token} as ids {pieces}, expected the one id {mllm.image_token_id} of "
            "config.json (image_token_index); add it to the tokenizer as a special token"
        )
    if pieces[0] >= rows:
        raise ModelError(f"{path}: {token} has id {pieces[0]}, but the embedding has {rows} rows; resize it first")


def has_class_token(vision_tower: nn.Module) -> bool:
    """Whether a tower speaks with one token more than it has patches, as CLIP does and SigLIP does not."""
    config = vision_tower.config
    patches = (config.image_size // config.patch_size) ** 2
    return vision_tower.embeddings.position_embedding.num_embeddings > patches


def check_picture_tokens(mllm: "Mllm", path: Path) -> None:
    """The processor writes as many placeholders as the model makes features."""
    config = mllm.model.config
    tower, strategy = config.vision_config, config.vision_feature_select_strategy
    with_cls = int(has_class_token(mllm.model.model.vision_tower))
    wanted = {
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": with_cls,
    }
    if strategy == "default" and not with_cls:
        raise ModelError(
            f"{path}/config.json: vision_feature_select_strategy is 'default', which drops the first feature of a "
            "picture, but this vision tower has no class token in front; set it to 'full'"
        )
    found = {name: getattr(mllm.processor, name, None) for name in wanted}
    if found != wanted:
        raise ModelError(
            f"{path}/processor_config.json: found {json.dumps(found)}, but the vision tower of config.json needs "
            f"{json.dumps(wanted)}; set them so there"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()
