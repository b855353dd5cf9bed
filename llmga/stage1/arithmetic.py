"""How a loaded model computes: attention of packed rows, loss, fused kernels. What it computes does not change."""

import logging

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llmga.runtime import RuntimeSetupError
from llmga.stage1.config import Stage1Config
from llmga.stage1.cross_entropy import use_chunked_cross_entropy
from llmga.stage1.packed_attention import use_packed_sdpa

logger = logging.getLogger(__name__)


def set_arithmetic(model: LlavaForConditionalGeneration, cfg: Stage1Config) -> None:
    """Apply the settings of a run to its model, whose vocabulary has its final size by now.

    Raises:
        RuntimeSetupError: Liger's kernels were asked for on a machine without CUDA, or for an LLM it has none for.
    """
    if cfg.run.precision == "bf16" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32: finer than bf16 still
    if cfg.model.liger:
        use_liger(model.model.language_model)
    if cfg.data.packing and cfg.model.attention == "sdpa":
        use_packed_sdpa(model.model.language_model)
    if cfg.model.cross_entropy == "chunked":
        # Beside adapters the rows of added tags may learn in the head; then only peft knows its weights.
        if type(model.lm_head) is nn.Linear:
            use_chunked_cross_entropy(model)
        else:
            logger.info("model.cross_entropy=chunked needs a plain output head; this run computes all logits")
    # The Trainer divides by the trained tokens of a whole step when the model takes that number, else takes the mean
    # of the means of its forward passes, as the published code did.
    model.accepts_loss_kwargs = cfg.run.loss_average == "token"


def use_liger(language_model: PreTrainedModel) -> None:
    """Liger's norms, rotary embedding and MLP; its losses are left out, for they would exchange the model's forward.

    Raises:
        RuntimeSetupError: as above.
    """
    if not torch.cuda.is_available():
        raise RuntimeSetupError("model.liger needs a CUDA device and none is visible; set model.liger=false")
    from transformers.integrations.liger import apply_liger_kernel  # brings peft, which takes seconds to import

    apply_liger_kernel(language_model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    if not has_liger(language_model):  # it says so in its log alone
        kind = language_model.config.model_type
        raise RuntimeSetupError(f"Liger has no kernels for an LLM of model_type {kind!r}; set model.liger=false")


def has_liger(model: nn.Module) -> bool:
    """Whether a model computes with Liger's kernels, which do so on a GPU alone.

    Liger gives its name to modules of the model it is applied to, and its own classes to those built later.
    """
    return any(module._get_name().startswith("Liger") for module in model.modules())
