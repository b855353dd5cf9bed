"""The multimodal LLM as one thing: load it whole, give it the tags, choose what trains, save it for plain transformers.

`LlavaForConditionalGeneration` is used as it is: a subclass of it loses the rename of `lm_head` while loading
(transformers 5.23) and starts from a random head with only a log line. `load_mllm` refuses a load that left a key over.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llmga.checkpoint import write_folder_atomically
from llmga.images import PictureMode
from llmga.provenance import write_provenance
from llmga.runtime import without_zero3
from llmga.stage1.added_tokens import add_tag_tokens
from llmga.stage1.model_checks import (
    ModelError,
    check_head,
    check_picture_tokens,
    check_placeholder,
    explaining_attention,
    is_adapter,
    read_model_config,
    read_settings,
    reading_processor,
    reading_weights,
    refuse_misfit,
)
from llmga.stage1.pixels import num_image_tokens
from llmga.stage1.projector import PROJECTOR_FILE, projector_weights
from llmga.tokens import GEN_IMG, TAGS, GenerationTags

VISION_SHARD = "vision_tower.safetensors"
MAX_SHARD_SIZE = "5GB"

# What one parameter is called in transformers' folders, older ones, folders saved after ZeRO-3 and wrapped modules.
_IN_MEMORY_NAMES = (
    (re.compile(r"^(?:module\.|_orig_mod\.)+"), ""),
    (re.compile(r"^(?:language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\.(?:model\.)?"), "model.language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
)


@dataclass
class Mllm:
    """A vision tower, projector and LLM with what turns text and pictures into their input."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    tags: GenerationTags

    def __post_init__(self) -> None:
        self.write_tags(self.tags)

    def write_tags(self, tags: GenerationTags) -> None:
        """Make `tags` the pair this model writes, in its config too, so that saved folders know it."""
        self.tags = tags
        self.model.config.generation_tags = tag_name(tags)

    def write_picture_shape(self, size: int, mode: PictureMode) -> None:
        """Note in the config how training makes pictures square, so that saved folders know it."""
        self.model.config.picture_size, self.model.config.picture_mode = size, mode

    @property
    def picture_shape(self) -> tuple[int | None, PictureMode]:
        """How pictures are made square before the processor sees them, see `read_picture_shape`."""
        return _picture_shape(self.model.config)

    @property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer, chat template included."""
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        """Id of the picture placeholder."""
        return self.model.config.image_token_id

    @property
    def num_image_tokens(self) -> int:
        """How many placeholders one picture takes (576 for LLaVA-1.5)."""
        side = self.model.config.vision_config.image_size
        return num_image_tokens(self.processor, (3, side, side))

    @property
    def tags_are_tokens(self) -> bool:
        """True when each tag is one token of its own, False when tags are spelled in word pieces."""
        return not {self.tags.open, self.tags.close} - set(self.tokenizer.get_added_vocab())


def load_mllm(
    path: str | Path,
    tags: GenerationTags | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: Literal["none", "nf4"] = "none",
) -> Mllm:
    """Load a LLaVA folder in transformers' format, or fail: nothing is ever left at its random initialisation.

    Args:
        path: folder with config, weights, tokenizer and processor; or of an adapter, which is merged into its base.
        tags: the pair this model writes; None takes the pair the folder was saved with, else `<gen_img>`.
        attention: transformers' `attn_implementation`; None takes sdpa, or eager where a part knows no sdpa.
        dtype: of every weight; training keeps float32 and lets autocast or DeepSpeed lower it.
        quantize: the LLM's linear layers in 4 bits, to be trained through adapters only.
    Raises:
        ModelError: not a LLaVA folder, weights that cannot be read or do not fit the config, attention that the model
            or this machine lacks, or a placeholder that is no token.
    """
    path = Path(path)
    if is_adapter(path):
        from llmga.stage1.lora import load_adapter  # which loads its base by this function

        return load_adapter(path, tags, attention, dtype)
    config, processor = read_config(path), load_processor(path)
    with reading_weights(path), explaining_attention(path, attention):
        model, info = LlavaForConditionalGeneration.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=nf4_settings(dtype) if quantize == "nf4" else None,
            ignore_mismatched_sizes=True,  # they are told below, with the rest
            output_loading_info=True,
        )
    refuse_misfit(path, config, info)
    check_head(path, model)
    mllm = Mllm(model, processor, tags or stored_tags(config))
    check_placeholder(mllm, path)
    check_picture_tokens(mllm, path)
    return mllm


def nf4_settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation, of the LLM alone.

    The names need their `model.` prefix: without it nothing is left out, tower and projector included.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.multi_modal_projector", "model.vision_tower", "lm_head"],
    )


def set_trainable(model: LlavaForConditionalGeneration, what: Literal["projector", "projector+llm"]) -> None:
    """Choose what learns; the vision tower never does: it stays in eval mode and keeps nothing for a backward pass."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if what == "projector+llm":
        for module in (model.model.language_model, model.lm_head):
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.is_floating_point())  # 4-bit weights only learn through adapters
    vision_tower = model.model.vision_tower.eval()
    if _enter_tower not in vision_tower._forward_pre_hooks.values():
        vision_tower.register_forward_pre_hook(_enter_tower)
        vision_tower.register_forward_hook(_leave_tower, always_call=True)


def is_in_llm_block(name: str) -> bool:
    """Whether a parameter of a LLaVA model belongs to a layer of its LLM, or of its vision tower."""
    return ".layers." in name and "projector" not in name


def learn_in_float32(model: nn.Module) -> None:
    """Make what learns float32 whatever the rest has; DeepSpeed's shards keep float32 copies of their own."""
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of frozen parameters."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())  # ds_numel: a ZeRO-3 shard
        packed = getattr(parameter, "quant_state", None)  # two 4-bit weights to a byte
        counts[parameter.requires_grad] += numel if packed is None else packed.shape.numel()
    return counts[True], counts[False]


def save_mllm(
    mllm: Mllm,
    state_dict: Mapping[str, Tensor] | None,
    folder: str | Path,
    provenance: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    split_vision: bool = False,
    projector_file: bool = False,
) -> Path:
    """Write a folder that plain transformers loads, and prove it: reloaded, it equals the weights given, bit for bit.

    Whatever the names in `state_dict` (a wrapped module, a folder saved after ZeRO-3), the weights go through a model
    built from the config, so the folder has transformers' own names. Called on one rank, with gathered weights.

    Args:
        mllm: config, generation config, processor and tags come from here; its weights when `state_dict` is None.
        state_dict: the weights, complete.
        folder: new or empty; it appears when everything was written and checked, not before.
        provenance: goes to provenance.json; inputs with hashes, config, commit, versions.
        dtype: of the weights on disk; None keeps theirs.
        split_vision: put the vision tower in `vision_tower.safetensors` alone, so that folders tuned from one base
            can share that file by a symlink.
        projector_file: write the projector a second time, alone, for `model.projector` of another run.
    Raises:
        ModelError: weights are missing, unknown or of another shape, or the folder read back differs.
        FileExistsError: the folder holds something.
    """
    folder = Path(folder)
    with without_zero3(), write_folder_atomically(folder) as temporary:
        model = _standard_model(mllm.model, state_dict if state_dict is not None else mllm.model.state_dict(), dtype)
        model.save_pretrained(temporary, max_shard_size=MAX_SHARD_SIZE)
        mllm.processor.save_pretrained(temporary)
        if split_vision:
            _split_vision(temporary)
        if projector_file:
            save_file(projector_weights(model.state_dict()), temporary / PROJECTOR_FILE, metadata={"format": "pt"})
        write_provenance(temporary, provenance)
        _check_saved(temporary, model, mllm)
    return folder


def tag_name(tags: GenerationTags) -> str:
    """What configs call a pair."""
    return next(name for name, pair in TAGS.items() if pair == tags)


def choose_tags(name: str | None, path: Path | None) -> GenerationTags:
    """The pair that a run writes: the named one, else the one its model folder was saved with, else `<gen_img>`.

    Raises:
        ModelError: `path` is no LLaVA folder.
    """
    if name is not None:
        return TAGS[name]
    return GEN_IMG if path is None else stored_tags(read_config(path))


def stored_tags(config: LlavaConfig) -> GenerationTags:
    """The pair that a model's config names, `<gen_img>` if none."""
    return TAGS.get(getattr(config, "generation_tags", None) or "", GEN_IMG)


def read_picture_shape(path: str | Path) -> tuple[int | None, PictureMode]:
    """How the training of a model folder made pictures square, without loading its weights.

    Returns:
        `data.picture_size` and `data.picture_mode`; None and "squash" for a folder that does not say.
    Raises:
        ModelError: not a LLaVA folder.
    """
    return _picture_shape(read_config(Path(path)))


def _picture_shape(config: LlavaConfig) -> tuple[int | None, PictureMode]:
    return getattr(config, "picture_size", None), getattr(config, "picture_mode", "squash")


def standard_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under the names of an in-memory `LlavaForConditionalGeneration`."""
    return {standard_name(name): tensor for name, tensor in state_dict.items()}


def standard_name(name: str) -> str:
    """What `standard_names` does to one name."""
    for pattern, replacement in _IN_MEMORY_NAMES:
        name = pattern.sub(replacement, name)
    return name


def read_config(path: Path) -> LlavaConfig:
    """The config of a LLaVA folder.

    Raises:
        ModelError: it is no such folder.
    """
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json there; model.path must be a LLaVA folder in transformers' format")
    settings = read_settings(path)
    model_type, lacks = settings.get("model_type"), {"text_config", "vision_config"} - settings.keys()
    if model_type != "llava" or lacks:  # where one is missing, transformers takes the sizes of a 7B model
        without = f" without {min(lacks)}" if lacks else ""
        raise ModelError(
            f"{path}/config.json: model_type is {model_type!r}{without}, expected 'llava' by transformers; "
            "convert original LLaVA and LLMGA checkpoints to its format first; a plain LLM goes to model.llm"
        )
    return read_model_config(path)


def load_processor(path: str | Path, added_tags: GenerationTags | None = None) -> LlavaProcessor:
    """Load tokenizer and image processor of a model folder, without the model.

    The image processor has the PIL backend, which the published models were trained with.

    Args:
        added_tags: made tokens of their own, as `add_generation_tags` does; None leaves the tokenizer as it is.
    Raises:
        ModelError: tokenizer or image processor are missing or damaged.
    """
    with reading_processor(Path(path)):
        processor = AutoProcessor.from_pretrained(path)
        # A saved processor names the class without its backend and comes back as the torchvision one, up to 2/255 off.
        # `backend` is not given to AutoProcessor: it would also be stored as the *tokenizer's* backend.
        processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    if added_tags is not None:
        add_tag_tokens(processor.tokenizer, added_tags)
    return processor


def _enter_tower(tower: Any, args: Any) -> None:
    """Forward pre-hook: what reaches a frozen tower beside the rest of the model is kept from it.

    `model.train()` would turn on its dropout. Gradient checkpointing makes the output of every input embedding require
    gradients: the tower would keep the activations of all its layers and go backward through them for nothing.
    """
    tower.eval()
    tower.gradients_outside = torch.is_grad_enabled()
    learns = any(parameter.requires_grad for parameter in tower.parameters())
    torch.set_grad_enabled(learns and tower.gradients_outside)


def _leave_tower(tower: Any, args: Any, output: Any) -> None:
    torch.set_grad_enabled(tower.gradients_outside)


def _standard_model(
    source: LlavaForConditionalGeneration, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None
) -> LlavaForConditionalGeneration:
    """Build a model from the config alone and fill it, without a second copy of the weights."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(source.config)
    expected, given = model.state_dict(), standard_names(state_dict)
    if source.config.tie_word_embeddings:  # some savers write the tied head, some leave it out
        given["lm_head.weight"] = given.get("model.language_model.embed_tokens.weight", torch.empty(0))
    problems = [f"{name} is missing" for name in expected.keys() - given.keys()]
    problems += [f"{name} is unknown" for name in given.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & given.keys()
        if given[name].shape != expected[name].shape
    ]
    if problems:
        raise ModelError(f"cannot save: {len(problems)} weights do not fit the config, first {sorted(problems)[0]}")
    # One dtype for all: mixed ones come back as the first one's.
    dtype = dtype or given["model.language_model.embed_tokens.weight"].dtype
    model.load_state_dict({name: tensor.detach().cpu().to(dtype) for name, tensor in given.items()}, assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    return model


def _split_vision(folder: Path) -> None:
    """Rewrite the shards of a saved folder so that the vision tower's tensors lie in a file of their own."""
    shards = sorted(folder.glob("model*.safetensors"))
    vision: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, start=1):
        with safe_open(shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        vision |= {name: tensor for name, tensor in tensors.items() if name.startswith("vision_tower.")}
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_tower.")}
        shard.unlink()
        if rest:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(rest, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(rest, name)
    save_file(vision, folder / VISION_SHARD, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(vision, VISION_SHARD)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_saved(folder: Path, model: LlavaForConditionalGeneration, mllm: Mllm) -> None:
    reloaded = load_mllm(folder, dtype=model.dtype)
    weights = model.state_dict()
    for name, tensor in reloaded.model.state_dict().items():
        if not torch.equal(tensor, weights[name]):
            raise ModelError(f"{folder}: {name} read back differs from what was saved (or is not finite)")
    kept, given = ((each.tags, each.tokenizer.chat_template, each.picture_shape) for each in (reloaded, mllm))
    if kept != given:
        raise ModelError(f"{folder}: tags, chat template or picture shape read back differ from what was saved")
