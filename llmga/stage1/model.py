"""The multimodal LLM as one thing: load it whole, give it the tags, choose what trains, save it for plain transformers.

`LlavaForConditionalGeneration` is used as it is: a subclass of it loses the rename of `lm_head` while loading
(transformers 5.23) and starts from a random head with only a log line. `load_mllm` refuses a load that left a key over.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llmga.checkpoint import write_folder_atomically
from llmga.images import PictureMode
from llmga.runtime import without_zero3
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


class ModelError(ValueError):
    """A model folder that cannot be used; the sentence says what was found and what to do."""


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
        self.model.config.generation_tags = next(name for name, pair in TAGS.items() if pair == tags)

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
        config = self.model.config
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return patches if config.vision_feature_select_strategy == "default" else patches + 1  # "full" keeps CLS

    @property
    def tags_are_tokens(self) -> bool:
        """True when each tag is one token of its own, False when tags are spelled in word pieces."""
        return not {self.tags.open, self.tags.close} - set(self.tokenizer.get_added_vocab())


def load_mllm(
    path: str | Path,
    tags: GenerationTags | None = None,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> Mllm:
    """Load a LLaVA folder in transformers' format, or fail: nothing is ever left at its random initialisation.

    Args:
        path: folder with config, weights, tokenizer and processor.
        tags: the pair this model writes; None takes the pair the folder was saved with, else `<gen_img>`.
        attention: transformers' `attn_implementation`.
        dtype: of every weight; training keeps float32 and lets autocast or DeepSpeed lower it.
    Raises:
        ModelError: not a LLaVA folder, weights that do not fit the config, or a placeholder that is no token.
    """
    path = Path(path)
    config = _read_config(path)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    left_over = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if left_over:
        found = "; ".join(f"{len(names)} {kind}, first {names[0]}" for kind, names in left_over.items())
        raise ModelError(f"{path}: the weights do not fit config.json ({found}); convert or download the folder again")
    stored = getattr(config, "generation_tags", None)
    mllm = Mllm(model, load_processor(path), tags or TAGS.get(stored or "", GEN_IMG))
    _check_placeholder(mllm, path)
    return mllm


def add_generation_tags(mllm: Mllm, tags: GenerationTags) -> int:
    """Make each of `tags` a token of its own. Without this call tags are plain text, spelled in word pieces.

    New rows start at the mean of the trained rows, in the input embedding and in the output head, so an untrained
    tag is neither likely nor out of the distribution. Rows the embedding has to spare are used before it grows.
    The tokens are not "special": decoding without special tokens keeps them in the reply.

    Returns:
        How many tokens were added: 2, or 0 when they are there already.
    """
    mllm.write_tags(tags)
    tokenizer, model = mllm.tokenizer, mllm.model
    num_known = len(tokenizer)
    added = _add_tag_tokens(tokenizer, tags)
    if not added:
        return 0
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weights = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not weights[0]:  # not tied
        weights.append(model.get_output_embeddings().weight)
    with torch.no_grad(), _whole(weights):
        for weight in weights:
            weight[num_known : len(tokenizer)] = weight[:num_known].float().mean(dim=0).to(weight.dtype)
    return added


def set_trainable(model: LlavaForConditionalGeneration, what: Literal["projector", "projector+llm"]) -> tuple[int, int]:
    """Choose what learns; the vision tower never does, and stays in eval mode when the rest is put in train mode.

    Returns:
        Numbers of trained and of frozen parameters.
    """
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if what == "projector+llm":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    vision_tower = model.model.vision_tower.eval()
    if _keep_in_eval_mode not in vision_tower._forward_pre_hooks.values():
        vision_tower.register_forward_pre_hook(_keep_in_eval_mode)
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())  # ds_numel: ZeRO-3 shard
    return counts[True], counts[False]


def save_mllm(
    mllm: Mllm,
    state_dict: Mapping[str, Tensor] | None,
    folder: str | Path,
    provenance: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    split_vision: bool = False,
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
        text = json.dumps(dict(provenance), indent=2, ensure_ascii=False, default=str)
        (temporary / "provenance.json").write_text(text + "\n", encoding="utf-8")
        _check_saved(temporary, model, mllm)
    return folder


def read_picture_shape(path: str | Path) -> tuple[int | None, PictureMode]:
    """How the training of a model folder made pictures square, without loading its weights.

    Returns:
        `data.picture_size` and `data.picture_mode`; None and "squash" for a folder that does not say.
    Raises:
        ModelError: not a LLaVA folder.
    """
    return _picture_shape(_read_config(Path(path)))


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


def _read_config(path: Path) -> LlavaConfig:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json there; model.path must be a LLaVA folder in transformers' format")
    model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != "llava":
        raise ModelError(
            f"{path}/config.json: model_type is {model_type!r}, expected 'llava'; "
            "convert original LLaVA and LLMGA checkpoints to transformers' format first"
        )
    return AutoConfig.from_pretrained(path)


def load_processor(path: str | Path, added_tags: GenerationTags | None = None) -> LlavaProcessor:
    """Load tokenizer and image processor of a model folder, without the model.

    The image processor has the PIL backend, which the published models were trained with.

    Args:
        added_tags: made tokens of their own, as `add_generation_tags` does; None leaves the tokenizer as it is.
    """
    processor = AutoProcessor.from_pretrained(path)
    # A saved processor names the class without its backend and comes back as the torchvision one, up to 2/255 off.
    # `backend` is not given to AutoProcessor: it would also be stored as the *tokenizer's* backend.
    processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    if added_tags is not None:
        _add_tag_tokens(processor.tokenizer, added_tags)
    return processor


def _add_tag_tokens(tokenizer: Any, tags: GenerationTags) -> int:
    """Make tags tokens that are not special; returns how many the tokenizer did not know."""
    literals = [AddedToken(literal, special=False, normalized=False) for literal in (tags.open, tags.close)]
    return tokenizer.add_tokens([token for token in literals if token.content not in tokenizer.get_added_vocab()])


def _check_placeholder(mllm: Mllm, path: Path) -> None:
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


def _keep_in_eval_mode(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: `model.train()` reaches the frozen tower too, and would turn on its dropout."""
    if module.training:
        module.eval()


@contextmanager
def _whole(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has sharded; what is written to them, the same on all ranks, is kept."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    for parameter in sharded:
        parameter.all_gather()
    yield
    for parameter in sharded:
        parameter.partition(has_been_updated=True)


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
