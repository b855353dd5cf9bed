"""Adapters (LoRA) on the LLM, saved with the projector in one folder that plain peft loads, and merged back.

Only linear layers of the LLM's blocks are adapted. They are named in full: `q_proj` alone would match the vision
tower's as well. Tags that are tokens of their own have their rows trained and saved beside the adapters.
"""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llmga.checkpoint import write_folder_atomically
from llmga.files import atomic_write
from llmga.provenance import read_provenance, write_provenance
from llmga.runtime import on_main, whole, without_zero3
from llmga.stage1 import config as settings
from llmga.stage1.arithmetic import has_liger
from llmga.stage1.conversation import Turn, encode_prompt
from llmga.stage1.model import Mllm, ModelError, learn_in_float32, load_mllm, load_processor, read_config, save_mllm
from llmga.stage1.model_checks import ADAPTER_CONFIG, is_adapter, reading_weights
from llmga.strict_json import read_object
from llmga.tokens import TAGS, GenerationTags

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROJECTOR = "multi_modal_projector"
_MAX_MERGE_ERROR = 1e-4  # of the largest logit; rounding stays far below it
# Of the largest logit, between two devices or attentions, by the dtype of the base.
_MAX_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
logger = logging.getLogger(__name__)


def target_pattern(model: LlavaForConditionalGeneration, target: Literal["all", "attention", "mlp"] = "all") -> str:
    """A pattern for the full names of the linear layers in the LLM's blocks, whatever the family calls them."""
    inner: dict[str, set[str]] = defaultdict(set)  # list of blocks -> names within one block
    for name, module in model.model.language_model.named_modules():
        blocks, number, layer = re.match(r"(?:(.*?)\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
        if number and isinstance(module, nn.Linear) and target in ("all", "attention" if "attn" in layer else "mlp"):
            inner[blocks].add(layer)
    alternatives = [
        rf"{re.escape(at)}\.\d+\.({'|'.join(map(re.escape, sorted(names)))})" for at, names in inner.items()
    ]
    if not alternatives:
        raise ModelError(f"this LLM has no linear layers that model.lora.target={target} could adapt; set it to all")
    return rf"model\.language_model\.({'|'.join(alternatives)})"


def add_adapter(mllm: Mllm, lora: settings.LoraConfig, base: Path) -> PeftModel:
    """Put fresh adapters into a model; they and the projector learn, everything else is frozen.

    Args:
        base: the folder the model came from; the adapter's config will name it.
    Returns:
        peft's wrapper, to be trained. `mllm.model` is the same model inside and answers with the adapters.
    """
    tag_ids = mllm.tokenizer.convert_tokens_to_ids([mllm.tags.open, mllm.tags.close]) if mllm.tags_are_tokens else None
    rows = {"model.language_model.embed_tokens": tag_ids}
    if not mllm.model.config.tie_word_embeddings:
        rows["lm_head"] = tag_ids
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=target_pattern(mllm.model, lora.target),
        modules_to_save=[PROJECTOR],
        trainable_token_indices=rows if tag_ids else None,
    )
    mllm.model.requires_grad_(False)
    # No task type: its wrapper would call the model's `forward` past the hooks that stand at its door.
    model = PeftModel(mllm.model, config)
    config.base_model_name_or_path = str(base)
    learn_in_float32(model)
    return model


def save_adapter(
    mllm: Mllm, model: PeftModel, state_dict: Mapping[str, Tensor], folder: Path, provenance: Mapping[str, Any]
) -> Path:
    """Write adapters, tag rows and projector, and prove it: loaded onto the base again, they equal those given.

    The right weights still answer otherwise where the folder's config scales or places them in another way. So model
    and folder are also asked the same question, unless the base in memory is spread by ZeRO-3 or has four bits, or
    Liger's kernels, which a run puts into every model that it loads from then on, keep the CPU from answering.

    Args:
        state_dict: of `model`, gathered; it may hold the frozen weights too.
    Raises:
        ModelError: something is missing, or comes back or answers otherwise.
        FileExistsError: the folder holds something.
    """
    plain = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state_dict.items()}
    given = _adapter_weights(model, plain)
    config = model.peft_config["default"]
    with without_zero3(), write_folder_atomically(folder) as temporary:
        save_file(given, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        trained, config.inference_mode = config.inference_mode, True
        config.save_pretrained(temporary)
        config.inference_mode = trained
        _name_neighbour(temporary)
        mllm.processor.save_pretrained(temporary)
        size, mode = mllm.picture_shape
        facts = {
            **provenance,
            "generation_tags": mllm.model.config.generation_tags,
            "picture_size": size,
            "picture_mode": mode,
        }
        write_provenance(temporary, facts)
        _check_same(temporary, load_file(temporary / ADAPTER_WEIGHTS), given)
        again, reloaded = _load_unmerged(temporary, None, None, _frozen_dtype(model), None)
        _check_same(temporary, _adapter_weights(reloaded), given)
        changed = any(hasattr(p, "ds_id") or hasattr(p, "quant_state") for p in model.parameters())
        if not changed and not has_liger(again.model):
            _check_answers(temporary, again, mllm)
    return folder


def complete_adapter(folder: Path, model: PeftModel) -> None:
    """Make a checkpoint that peft wrote an adapter like ours, and compare it with the one in memory, bit for bit.

    All ranks call together: under ZeRO-3 each gives its part.

    Raises:
        ModelError: on rank 0, they differ.
        RunFailed: on the others.
    """
    with whole([parameter for parameter in model.parameters() if parameter.requires_grad]):
        on_main(lambda: _check_same(folder, load_file(folder / ADAPTER_WEIGHTS), _adapter_weights(model)))
    on_main(lambda: _name_neighbour(folder))


def _name_neighbour(folder: Path) -> None:
    """Let an adapter name its base from its own folder where both lie in one run folder, so that this may be moved.

    Only on disk: peft looks for the base's config from the working folder.
    """
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    base = Path(config["base_model_name_or_path"]).resolve()
    if base.is_relative_to(folder.parent.resolve()):
        config["base_model_name_or_path"] = os.path.relpath(base, folder.resolve())
        atomic_write(file, json.dumps(config, indent=2, sort_keys=True))


def _adapter_weights(model: PeftModel, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of what an adapter's file holds, under its names."""
    weights = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}


def _check_same(folder: Path, found: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Compare in the precision of `found`: a base of 16 bits takes a projector of 32 at its own."""
    for name in found.keys() | given.keys():
        if name in given and name in found and torch.equal(found[name], given[name].to(found[name].dtype)):
            continue
        raise ModelError(f"{folder}: {name} read back differs from what was saved (or is not finite)")


def _check_answers(folder: Path, found: Mllm, given: Mllm) -> None:
    """Compare logits, of a text alone: it is cheap for a large base, and the projector is a module like any other."""
    expected = probe_logits(given, with_picture=False)
    difference = float((probe_logits(found, with_picture=False) - expected).abs().max())
    largest = max(1.0, float(expected.abs().max()))
    if not difference <= _MAX_ROUNDING[found.model.dtype] * largest:
        raise ModelError(
            f"{folder}: read back, the adapter answers otherwise: logits of up to {largest:.3g} differ by "
            f"{difference:.3g}; {ADAPTER_CONFIG} does not say how it was trained"
        )


def _frozen_dtype(model: nn.Module) -> torch.dtype:
    """Of the weights that adapters stand on; 4-bit ones are loaded in the dtype of what is left whole."""
    return next(p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())


def load_adapter(
    folder: Path,
    tags: GenerationTags | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    base: Path | None = None,
) -> Mllm:
    """Load an adapter's base and merge the adapter into it, in memory.

    Args:
        base: the model the adapter was trained on; None for the folder that the adapter names.
    Raises:
        ModelError: the base is not there or another one, or weights are missing.
    """
    mllm, model = _load_unmerged(folder, tags, attention, dtype, base)
    mllm.model = model.merge_and_unload()
    mllm.write_tags(mllm.tags)
    return mllm


def merge_adapter(adapter: Path, folder: Path, base: Path | None = None, dtype: torch.dtype | None = None) -> float:
    """Write a whole model out of an adapter and its base, as plain transformers loads it.

    An adapter that was trained on 4-bit weights is merged into the whole ones, as is usual.

    Args:
        dtype: of the weights on disk; None takes the base's. The merging itself is done in float32.
    Returns:
        The largest difference of a logit, over a question with a picture, between adapter beside base and merged model.
    Raises:
        ModelError: the merged model answers otherwise, the folder holds something, or as for `load_adapter`.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ModelError(f"{folder} exists already and is not empty; move it away or choose another folder")
    mllm, model = _load_unmerged(adapter, None, None, torch.float32, base)
    expected = probe_logits(mllm)
    mllm.model = model.merge_and_unload()
    mllm.write_tags(mllm.tags)
    difference = float((probe_logits(mllm) - expected).abs().max())
    if not difference <= _MAX_MERGE_ERROR * max(1.0, float(expected.abs().max())):
        raise ModelError(f"{adapter}: merged, the model's logits differ by {difference:.3g}; nothing was written")
    stored = read_config(base_of(adapter, base)).dtype or torch.float32
    provenance = {"merged_from": {"adapter": str(adapter), "base": str(base_of(adapter, base))}}
    if before := read_provenance(adapter):
        provenance["adapter"] = before
    save_mllm(mllm, None, folder, provenance, dtype or stored)
    return difference


def base_of(folder: Path, base: Path | None) -> Path:
    """Where the base is: as given; or as the adapter names it, from its folder, from here, or from a folder above it.

    So the two are found when they were moved together, with the run folder or with all that a relative path names.
    """
    named = Path(_read_adapter_config(folder).base_model_name_or_path) if base is None else base
    places = [named] if base is not None else [folder / named, named, *(up / named for up in folder.resolve().parents)]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ModelError(
        f"{folder}/{ADAPTER_CONFIG}: the adapter was trained on {named}, and no model is there; "
        "put it back, or name its new place (--base)"
    )


def _read_adapter_config(folder: Path) -> PeftConfig:
    """What peft is told of an adapter."""
    read_object(folder / ADAPTER_CONFIG, ModelError, "save or download the adapter again")
    return PeftConfig.from_pretrained(folder)


def _load_unmerged(
    folder: Path, tags: GenerationTags | None, attention: str | None, dtype: torch.dtype, base: Path | None
) -> tuple[Mllm, PeftModel]:
    """A base with the adapter beside its weights."""
    if not is_adapter(folder):
        raise ModelError(
            f"{folder}: no {ADAPTER_CONFIG} there; give an adapter, such as final/ of a run with model.lora"
        )
    config, processor = _read_adapter_config(folder), load_processor(folder)
    with reading_weights(folder):
        weights = load_file(folder / ADAPTER_WEIGHTS)
    facts = read_provenance(folder)
    base = base_of(folder, base)
    mllm = load_mllm(base, tags or TAGS.get(facts.get("generation_tags", "")), attention, dtype)
    mllm.processor = processor
    if facts.get("picture_size") is not None:
        mllm.write_picture_shape(facts["picture_size"], facts["picture_mode"])
    config.inference_mode = True
    try:
        model = PeftModel(mllm.model, config)
        result = set_peft_model_state_dict(model, weights)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ModelError(
            f"{folder}: the adapter does not fit {base} ({reason}); name the base it was trained on"
        ) from error
    wanted = {name for name, _ in model.named_parameters() if _is_adapted(name)}
    missing, unknown = sorted(wanted & set(result.missing_keys)), sorted(result.unexpected_keys)
    if missing or unknown:
        raise ModelError(
            f"{folder}: the adapter does not fit {base} ({len(missing)} weights missing, {len(unknown)} unknown, first "
            f"{(missing + unknown)[0]}); name the base it was trained on"
        )
    model.eval()
    return mllm, model


def _is_adapted(name: str) -> bool:
    """Whether a parameter of a wrapped model belongs to the adapter."""
    return any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta"))


@torch.no_grad()
def probe_logits(mllm: Mllm, with_picture: bool = True) -> Tensor:
    """Logits of a question, about a picture of noise or none, (L, V) float32; leaves the model in eval mode."""
    turns = [Turn("user", "What is this?", has_picture=with_picture)]
    ids = encode_prompt(mllm.tokenizer, turns, mllm.processor.image_token, mllm.num_image_tokens)
    inputs = {"input_ids": torch.tensor([ids])}
    if with_picture:
        side = mllm.model.config.vision_config.image_size
        pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
        inputs["pixel_values"] = torch.from_numpy(pixels)
    model = mllm.model.eval()
    return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits[0].float().cpu()
