"""Make the Trainer resume with the weights it saved.

transformers 5.23 saves a checkpoint under the names of published folders, but loads it back by the names in memory. For
LLaVA no name agrees: the run would go on with the weights it started from, and say so only in a warning.
"""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from llmga.run_folder import ResumeError
from llmga.stage1.lora import complete_adapter
from llmga.stage1.model import standard_names
from llmga.stage1.model_checks import ADAPTER_CONFIG, is_adapter


def accept_saved_names(model: nn.Module) -> None:
    """Let `load_state_dict` take the names of any saved folder, and refuse when a weight is missing or left over.

    Works through torch's public hooks, so it holds for whoever loads: the Trainer or DeepSpeed.
    """
    if isinstance(model, PeftModel):  # adapters are saved and loaded by peft, under the names in memory
        model.register_load_state_dict_post_hook(_check_adapter)
        return
    model.register_load_state_dict_pre_hook(_rename)
    model.register_load_state_dict_post_hook(_check)


def check_same_adapter(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a checkpoint of other adapters than the run's, or of whole weights where the run trains adapters.

    Raises:
        ResumeError: with what the checkpoint holds and what the run trains.
    """
    saved = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8")) if is_adapter(checkpoint) else None
    before = "whole weights" if saved is None else _described(saved["r"], saved["target_modules"])
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    now = "whole weights" if config is None else _described(config.r, config.target_modules)
    if before != now:
        raise ResumeError(
            f"{checkpoint} holds {before}, this run trains {now}; set model.lora as it was, or start anew with "
            "run.resume=false"
        )


def complete_checkpoint(checkpoint: Path, model: nn.Module) -> None:
    """Refuse to call a checkpoint complete whose adapter reads back otherwise; all ranks call together.

    Whole weights are compared when the run is finished: here that would take minutes for each checkpoint.

    Raises:
        ModelError, RunFailed: as for `complete_adapter`.
    """
    if isinstance(model, PeftModel):
        complete_adapter(checkpoint, model)


def _described(rank: int, target: str) -> str:
    return f"adapters of rank {rank} on {target}"


def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Pre-hook: rename in place."""
    if prefix:
        return
    renamed = standard_names(state_dict)
    state_dict.clear()
    state_dict.update(renamed)


def _check(module: nn.Module, keys: Any) -> None:
    """Post-hook: a tied head is not saved; everything else must have been."""
    tied = {"lm_head.weight"} if module.config.tie_word_embeddings else set()
    missing, unexpected = sorted(set(keys.missing_keys) - tied), sorted(keys.unexpected_keys)
    _refuse(missing, unexpected)


def _check_adapter(module: nn.Module, keys: Any) -> None:
    """Post-hook: what learns must have been saved; the frozen weights are not."""
    learns = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    _refuse(sorted(learns & set(keys.missing_keys)), sorted(keys.unexpected_keys))


def _refuse(missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        raise ResumeError(
            f"the checkpoint's weights do not fit the model: {len(missing)} missing, {len(unexpected)} unknown, first "
            f"{(missing + unexpected)[0]}; were settings of model changed? Start anew with run.resume=false"
        )
