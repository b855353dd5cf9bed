"""Our settings as the Trainer's."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from llmga.engine import deepspeed_settings
from llmga.stage1.config import Stage1Config
from llmga.trackers import export_wandb_run, tracker_names

_NEVER = 2**31  # steps
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(cfg: Stage1Config, run_dir: Path) -> TrainingArguments:
    """What the Trainer is told. Where it has a switch for something that would harm, the switch is set here.

    Must exist before the model is loaded, and as long as it is used: with ZeRO-3 its existence makes
    `from_pretrained` spread the weights over the ranks.
    """
    run, optim = cfg.run, cfg.optim
    on_gpu = torch.cuda.is_available()
    if "wandb" in run.trackers:
        export_wandb_run(run_dir)
    return TrainingArguments(
        output_dir=str(run_dir),
        num_train_epochs=1,  # the data are as long as the run
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation_steps,
        seed=run.seed,
        # arithmetic
        bf16=run.precision == "bf16",
        use_cpu=not on_gpu,
        activation_checkpointing=run.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        torch_compile=run.compile,
        deepspeed=None if run.deepspeed is None else deepspeed_settings(run.deepspeed),
        ddp_find_unused_parameters=False,  # the collator sees to it that every step uses all
        # optimizer
        optim="adamw_torch_fused",
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        warmup_steps=optim.warmup,  # below 1: a share
        lr_scheduler_type=_SCHEDULES[optim.schedule],
        max_grad_norm=optim.max_grad_norm,
        # data
        train_sampling_strategy="sequential",  # the order is the dataset's own
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=run.num_workers,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"split_batches": False, "dispatch_batches": False},
        # what is written
        disable_tqdm=True,
        log_level="warning",
        logging_steps=run.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide what BatchWatch must see
        report_to=tracker_names(run.trackers) or "none",  # TensorBoard writes below run_dir/runs
        run_name=run_dir.name,
        eval_strategy="steps" if cfg.data.validation else "no",
        eval_steps=run.eval_every_steps or _NEVER,  # always at the end too
        save_steps=run.save_every_steps or _NEVER,  # likewise
        save_total_limit=None,  # CompleteCheckpoints deletes, when the next one is whole
    )
