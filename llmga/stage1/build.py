"""A LLaVA from its parts: any causal LM of transformers, any CLIP or SigLIP tower, and a projector between them.

Nothing here knows a family. What differs is read from the parts themselves: whether the tower has a class token, what
picture size it takes, how many rows the embedding has, and which chat template fits the tokenizer.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llmga.stage1.added_tokens import give_rows, num_token_ids
from llmga.stage1.chat_template import set_chat_template
from llmga.stage1.families import FAMILIES
from llmga.stage1.model import Mllm
from llmga.stage1.model_checks import (
    ModelError,
    check_head,
    first_sentence,
    has_class_token,
    read_model_config,
    reading_weights,
    refuse_misfit,
)
from llmga.stage1.pixels import PixelEncoder
from llmga.stage1.projector import PROJECTOR_FILE
from llmga.stage1.released_projector import find_projector, read_projector
from llmga.stage1.released_tokenizer import ANY_TOKENIZER
from llmga.stage1.reply import stop_ids
from llmga.tokens import GEN_IMG, IMAGE_TOKEN, TAG_LITERALS, GenerationTags

_ROWS_MULTIPLE = 64  # a vocabulary of such a size keeps the head's matrix product fast
_FEATURE_LAYER = -2  # of the tower: the last layer but one, as LLaVA has it
_PROBE_TOKENS = 16
logger = logging.getLogger(__name__)


class ProjectorError(ValueError):
    """A file that holds no projector, or one of other sizes."""


def build_mllm(
    llm: Path,
    vision_tower: Path,
    projector: Path | None = None,
    chat_template: str | None = None,
    system_text: str | None = None,
    tags: GenerationTags = GEN_IMG,
) -> Mllm:
    """Put a LLaVA together; all weights have the dtype that the LLM's folder has.

    Args:
        llm: folder of a causal LM, with its tokenizer.
        vision_tower: folder of a CLIP or SigLIP model, whole or its vision half, with its image processor.
        projector: trained weights, see `fill_projector`; None draws fresh ones from torch's global generator.
        chat_template, system_text: see `set_chat_template`.
        tags: the pair the model will write; stays plain text here.
    Raises:
        ModelError, TemplateError: parts that are not what they should be, or do not fit each other.
    """
    llm_config = _llm_config(llm)
    processor = build_processor(llm, vision_tower, chat_template, system_text)  # what costs nothing fails first
    language = _load_llm(llm, llm_config)
    tower = _load_tower(vision_tower, language.dtype)
    image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    _check_vocabulary(language, processor.tokenizer, llm)

    config = llava_config(language.config, tower.config, image_token_id, has_class_token(tower))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = language.base_model, language.get_output_embeddings()
    model.model.vision_tower = tower
    model.model.multi_modal_projector = _projector(config, projector).to(language.dtype)
    model.tie_weights()
    model.generation_config = language.generation_config
    model.eval()
    _check_same_logits(language, model, llm)
    # Room for the tags as well, so that adding them changes no shape.
    rows, num_needed = language.config.get_text_config().vocab_size, num_token_ids(processor.tokenizer)
    num_known = image_token_id if image_token_id == num_needed - 1 else num_needed
    give_rows(model, num_known, num_needed + (len(TAG_LITERALS) if num_needed > rows else 0), _ROWS_MULTIPLE)
    mllm = Mllm(model, processor, tags)
    model.generation_config.eos_token_id = stop_ids(mllm)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return mllm


def llava_config(text_config: Any, vision_config: Any, image_token_id: int, class_token: bool) -> LlavaConfig:
    """The config of a LLaVA made of two models.

    Args:
        class_token: the tower has one; it is dropped, as LLaVA does.
    """
    return LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=image_token_id,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_layer=_FEATURE_LAYER,
        vision_feature_select_strategy="default" if class_token else "full",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def build_processor(
    llm: Path, vision_tower: Path, chat_template: str | None = None, system_text: str | None = None
) -> LlavaProcessor:
    """The processor of a LLaVA made of two models, without their weights.

    Raises:
        ModelError, TemplateError: as for `build_mllm`.
    """
    tokenizer = _load_tokenizer(llm)
    vision_config = _vision_config(vision_tower)
    with torch.device("meta"):
        class_token = has_class_token(AutoModel.from_config(vision_config))
    processor = LlavaProcessor(
        image_processor=_load_image_processor(vision_tower, vision_config.image_size),
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
        image_token=IMAGE_TOKEN,
    )
    set_chat_template(processor, chat_template, system_text, str(llm))
    return processor


# ---------------------------------------------------------------- the projector


def fill_projector(projector: nn.Module, path: Path, text_model_type: str) -> None:
    """Load trained weights into a `LlavaMultiModalProjector`.

    Args:
        path: a file in transformers' or LLaVA's names (`mm_projector.bin`), or a folder with one, such as `final/` of
            a run that trained it.
        text_model_type: of the LLM; LLaVA's names hold other numbers for some (`Family.scales_inputs`).
    Raises:
        ProjectorError: no such file, or a projector between other models.
        ConvertError: a file of another kind.
    """
    own = path / PROJECTOR_FILE
    file = own if own.is_file() else find_projector(path)
    if file is None:
        raise ProjectorError(
            f"{path}: no projector there; give {PROJECTOR_FILE} of a run that trained one, or its folder"
        )
    row = next((row for row in FAMILIES.values() if row.text_model_type == text_model_type), None)
    given, expected = read_projector(file, row), projector.state_dict()
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            into, out_of = expected["linear_1.weight"].shape
            raise ProjectorError(
                f"{file}: {name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}, for the vision tower "
                f"has {out_of} channels and the LLM {into}; give a projector that was trained between these two"
            )
    projector.load_state_dict(given)


def _projector(config: LlavaConfig, path: Path | None) -> nn.Module:
    projector = LlavaMultiModalProjector(config)
    if path is None:
        logger.info("the projector starts from fresh weights; model.projector would give it trained ones")
        for linear in (projector.linear_1, projector.linear_2):
            nn.init.normal_(linear.weight, std=config.get_text_config().initializer_range)
            nn.init.zeros_(linear.bias)
        return projector
    fill_projector(projector, path, config.text_config.model_type)
    return projector


# ---------------------------------------------------------------- the LLM


def _llm_config(folder: Path) -> Any:
    config = read_model_config(folder)
    if hasattr(config, "vision_config"):
        raise ModelError(
            f"{folder}/config.json: model_type {config.model_type!r} is a multimodal model, expected a causal LM; "
            "give a LLaVA folder as model.path, without parts"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"{folder}/config.json: model_type {config.model_type!r} is no causal LM; give such a folder as model.llm"
        )
    return config


def _load_llm(folder: Path, config: Any) -> Any:
    with reading_weights(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_misfit(folder, config, info)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(
            f"{folder}: the LLM's head is not one matrix, and a LLaVA has room for no other; choose another"
        )
    check_head(folder, model)
    return model.eval()


def _load_tokenizer(folder: Path) -> Any:
    """The LLM's tokenizer with a placeholder for pictures and a pad token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_sentence(error)
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({reason}); download its files again") from error
    files = {*ANY_TOKENIZER, *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in files):  # transformers would make an empty one
        raise ModelError(f"{folder}: no tokenizer there (none of {', '.join(sorted(files))}); add its files")
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: the tokenizer cannot say which characters a token stands for; add a tokenizer.json"
        )
    if tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False) != [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:  # padding is masked by position, so any token will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _check_vocabulary(language: Any, tokenizer: Any, folder: Path) -> None:
    """A tokenizer may have a few tokens more than the embedding has rows, but not words of its own."""
    rows, words = language.config.get_text_config().vocab_size, tokenizer.backend_tokenizer.get_vocab_size(False)
    if words > rows:
        raise ModelError(
            f"{folder}: the tokenizer knows {words} words, but the embedding has {rows} rows, so they belong to "
            "different models; put the model's own tokenizer files there"
        )


@torch.no_grad()
def _check_same_logits(language: Any, model: LlavaForConditionalGeneration, folder: Path) -> None:
    """On text, the LLaVA must say what its LLM says; some LLMs do more with their logits than a LLaVA can."""
    rows = language.config.get_text_config().vocab_size
    input_ids = torch.arange(_PROBE_TOKENS)[None] * 7919 % rows
    input_ids[input_ids == model.config.image_token_id] = 0
    own, ours = language(input_ids=input_ids).logits.float(), model(input_ids=input_ids).logits.float()
    difference = float((own - ours).abs().max())
    if difference > 1e-2 * float(own.abs().max().clamp(min=1e-3)):
        if not torch.equal(own.argmax(dim=-1), ours.argmax(dim=-1)):
            raise ModelError(
                f"{folder}: inside a LLaVA this LLM gives other logits, by up to {difference:.3g}, and other words; "
                "its architecture needs more than transformers' LLaVA does, choose another LLM"
            )
        logger.warning("%s: this LLM changes its logits, by up to %.3g here; a LLaVA goes without", folder, difference)


# ---------------------------------------------------------------- the vision tower


def _vision_config(folder: Path) -> Any:
    config = read_model_config(folder)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ModelError(
            f"{folder}/config.json: model_type {config.model_type!r} is no vision tower; "
            "give a CLIP or SigLIP folder as model.vision_tower"
        )
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # a LLaVA reads the layer before it
    return config


def _load_tower(folder: Path, dtype: torch.dtype) -> Any:
    config = _vision_config(folder)
    with reading_weights(folder):
        tower, info = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_misfit(folder, config, info, may_be_left_over=True)
    return tower


def _load_image_processor(folder: Path, image_size: int) -> Any:
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        reason = first_sentence(error)
        raise ModelError(f"{folder}: no image processor there ({reason}); add its preprocessor_config.json") from error
    shape = PixelEncoder(image_processor).shape
    if shape != (3, image_size, image_size):
        raise ModelError(
            f"{folder}: the image processor makes pictures of {shape[2]}x{shape[1]} px, but the tower takes "
            f"{image_size} px squares; give the preprocessor_config.json that belongs to it"
        )
    return image_processor
