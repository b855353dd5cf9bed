"""What a run starts from: the configured model, ready to be trained."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaProcessor

from llmga.provenance import read_provenance
from llmga.runtime import on_main, seed_everything, without_zero3
from llmga.stage1.added_tokens import add_generation_tags, add_tag_tokens, num_token_ids
from llmga.stage1.build import build_mllm, build_processor
from llmga.stage1.chat_template import set_chat_template
from llmga.stage1.config import ModelConfig, Stage1Config
from llmga.stage1.model import (
    Mllm,
    ModelError,
    choose_tags,
    count_parameters,
    learn_in_float32,
    load_mllm,
    load_processor,
    read_config,
    save_mllm,
    set_trainable,
    stored_tags,
    tag_name,
)

logger = logging.getLogger(__name__)


@dataclass
class Start:
    """A model at the beginning of a run.

    Attributes:
        mllm: the model with its processor; adapters are inside it.
        trained: what the Trainer is given: the same model, or peft's wrapper around it.
        base: the folder it came from.
    """

    mllm: Mllm
    trained: nn.Module
    base: Path


def start_model(cfg: Stage1Config, base_dir: Path) -> Start:
    """Load the model of a run, with its chat template and tags, and choose what learns; all ranks call it together.

    Args:
        base_dir: in the run folder; a LLaVA folder is made there when the model comes in parts.
    Raises:
        ModelError, TemplateError: a model that cannot be used; the message says why.
    """
    settings, tags = cfg.model, choose_tags(cfg.model.tag_name, cfg.model.path)
    base = on_main(lambda: base_folder(settings, base_dir))
    # Frozen weights need no more than the precision of the arithmetic; what learns is float32 again.
    frozen_llm = settings.lora is not None or settings.trainable == "projector"
    low = frozen_llm and cfg.run.precision == "bf16"
    dtype = torch.bfloat16 if low else torch.float32
    if settings.path is not None and (stored := stored_tags(read_config(settings.path))) != tags:
        logger.info("model.tag_name: %s from now on, where %s was saved with %s", tags.open, settings.path, stored.open)
    mllm = load_mllm(base, tags, settings.attention, dtype, settings.quantize)
    if base == settings.path:
        set_chat_template(mllm.processor, settings.chat_template, _system_text(settings), str(base))
    mllm.write_picture_shape(cfg.data.picture_size, cfg.data.picture_mode)
    if settings.tags == "tokens":
        add_generation_tags(mllm, tags)
    set_trainable(mllm.model, settings.trainable)
    if low and settings.lora is None:
        learn_in_float32(mllm.model)
    seed_everything(cfg.run.seed)  # loading draws more or less from the generator: on rank 0, or under ZeRO-3
    trained: nn.Module = mllm.model
    if settings.lora is not None:
        from llmga.stage1.lora import add_adapter  # peft takes seconds to import

        trained = add_adapter(mllm, settings.lora, base)
    logger.info("%s parameters learn, %s are frozen", *(f"{count:,}" for count in count_parameters(trained)))
    return Start(mllm, trained, base)


def load_start_processor(settings: ModelConfig) -> LlavaProcessor:
    """The processor that `start_model` will give, without any weights."""
    if settings.path is None:
        assert settings.llm is not None and settings.vision_tower is not None
        processor = build_processor(settings.llm, settings.vision_tower, settings.chat_template, _system_text(settings))
    else:
        processor = load_processor(settings.path)
        set_chat_template(processor, settings.chat_template, _system_text(settings), str(settings.path))
    if settings.tags == "tokens":
        add_tag_tokens(processor.tokenizer, choose_tags(settings.tag_name, settings.path))
    return processor


def base_folder(settings: ModelConfig, folder: Path) -> Path:
    """A LLaVA folder to start from: `model.path`, or what is put together in `folder`, once.

    An adapter must fit the folder it is trained on, so a model whose embedding has no room for added tags is written
    down with the room first.

    Raises:
        ModelError: `folder` holds a model made of other parts.
    """
    tags = choose_tags(settings.tag_name, settings.path)
    needs_no_room = settings.lora is None or settings.tags == "text"
    if settings.path is not None and (needs_no_room or _has_room_for_tags(settings)):
        return settings.path
    made_from = {
        name: None if (value := getattr(settings, name)) is None else str(value)
        for name in ("path", "llm", "vision_tower", "projector", "chat_template", "system_prompt")
    } | {"tag_name": tag_name(tags)}
    if folder.is_dir():
        before = read_provenance(folder).get("made_from")
        if before == made_from:
            return folder
        changed = [name for name in made_from if not before or before.get(name) != made_from[name]]
        raise ModelError(
            f"{folder} was made from another {', '.join(f'model.{name}' for name in changed)}; "
            "give another run.output_dir, or set run.resume=false"
        )
    with without_zero3():
        if settings.path is None:
            assert settings.llm is not None and settings.vision_tower is not None
            parts = settings.llm, settings.vision_tower, settings.projector
            mllm = build_mllm(*parts, settings.chat_template, _system_text(settings), tags)
        else:
            stored = read_config(settings.path).dtype or torch.float32
            mllm = load_mllm(settings.path, tags, dtype=stored)
            set_chat_template(mllm.processor, settings.chat_template, _system_text(settings), str(settings.path))
            add_generation_tags(mllm, tags)
        return save_mllm(mllm, None, folder, {"made_from": made_from})


def _has_room_for_tags(settings: ModelConfig) -> bool:
    """Whether the embedding of `model.path` has a row for each tag, known already or not."""
    assert settings.path is not None
    processor = load_processor(settings.path, choose_tags(settings.tag_name, settings.path))
    return num_token_ids(processor.tokenizer) <= read_config(settings.path).text_config.vocab_size


def _system_text(settings: ModelConfig) -> str | None:
    if settings.system_prompt is None:
        return None
    try:
        return settings.system_prompt.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ModelError(f"{settings.system_prompt} is no UTF-8 text ({error.reason}); save it as UTF-8") from error


def save_result(
    cfg: Stage1Config, start: Start, state_dict: Mapping[str, Tensor], folder: Path, provenance: Mapping[str, Any]
) -> Path:
    """Write what a run has made: the whole model, or its adapter; a trained projector also as a file of its own.

    Args:
        state_dict: of `start.trained`, gathered.
    Raises:
        ModelError: what was written reads back otherwise.
    """
    if cfg.model.lora is not None:
        from llmga.stage1.lora import save_adapter

        return save_adapter(start.mllm, start.trained, state_dict, folder, provenance)
    dtype = torch.bfloat16 if cfg.run.precision == "bf16" else torch.float32
    return save_mllm(
        start.mllm, state_dict, folder, provenance, dtype, projector_file=cfg.model.trainable == "projector"
    )
