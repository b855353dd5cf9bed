"""What goes through the model, seen at its door: sample ids, token counts, and losses that are not finite.

The watch stands on public places only: hooks of the model and of torch's optimizer, and callbacks of the Trainer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmga.non_finite import BAD_GRADIENT, save_and_stop
from llmga.runtime import MetricsLog, Ranks, any_rank, outlive_terminate, sum_over_ranks
from llmga.stage1.feed import Feed
from llmga.stage1.packing import check_packed
from llmga.tokens import IGNORE_INDEX


class NamedBatches:
    """A collator that adds `sample_ids` and `num_tokens`, for `BatchWatch` to take off again at the model's door.

    Args:
        feed: makes batches of examples that each have a `sample_id`.
    """

    def __init__(self, feed: Feed) -> None:
        self.choose, self.collate = feed.choose, feed.collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        outlive_terminate()
        taken = self.choose(examples)
        batch = self.collate(taken)
        return {
            **batch,
            "sample_ids": torch.tensor([example["sample_id"] for example in taken]),
            "num_tokens": torch.tensor(sum(len(example["input_ids"]) for example in taken)),
        }


class BatchWatch(TrainerCallback):
    """Counts what is trained on, records sample ids, and stops the run before a bad step is made.

    Args:
        run_dir: `non_finite/` and `samples-rank<r>.jsonl` go there.
        ranks: this process among the others.
        decode: token ids to text, for the saved batch.
        record_sample_ids: write the ids of every step.
    """

    def __init__(
        self, run_dir: Path, ranks: Ranks, decode: Callable[[list[int]], str], record_sample_ids: bool = False
    ) -> None:
        self.run_dir, self.ranks, self.decode = run_dir, ranks, decode
        self.record = MetricsLog(run_dir / f"samples-rank{ranks.rank}.jsonl") if record_sample_ids else None
        self._step = 0
        self._batches: list[tuple[list[int], dict[str, Tensor]]] = []  # of the step at hand
        self._counts: Tensor | None = None  # samples, tokens and trained tokens since the last `take_counts`

    def attach(self, model: nn.Module) -> None:
        """Stand at the model's door. The hooks stay on the inner model whatever wraps it later."""
        model.register_forward_pre_hook(self._on_batch, with_kwargs=True)
        model.register_forward_hook(self._on_loss)

    def take_counts(self) -> tuple[int, int, int]:
        """Samples, tokens (padding excluded) and trained tokens over all ranks since the last call; all must call."""
        counts = [0, 0, 0] if self._counts is None else self._counts.tolist()
        self._counts = None
        samples, tokens, trained = (int(count) for count in sum_over_ranks(counts))
        return samples, tokens, trained

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"].optimizer  # below accelerate's
        if isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed's of ZeRO are none; see `on_pre_optimizer_step`
            optimizer.register_step_pre_hook(self._on_optimizer_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = state.global_step + 1
        self._batches = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # ZeRO's optimizers have been asked for their step by now, and leave it out when the gradient is not finite: all
        # ranks together, for they know the norm over all. They would go on with the next batch.
        if kwargs["optimizer"].step_was_skipped:
            self._stop(BAD_GRADIENT)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.record is not None:
            self.record.write(state.global_step, ids=[ids for ids, _ in self._batches])
        self._batches = []

    def _on_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Optimizer's pre-hook: all ranks have the same gradients here, so all stop or none."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            self._stop(BAD_GRADIENT)

    @torch.compiler.disable  # a compiled hook would be compiled anew for every length of the list of batches
    def _on_batch(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: take the ids off, remember and count the batch."""
        ids, num_tokens = kwargs.pop("sample_ids", None), kwargs.pop("num_tokens", None)
        if "labels" in kwargs:
            kwargs["use_cache"] = False  # the LLM would keep a copy of keys and values that nobody reads
            check_packed(kwargs, module.config.text_config._attn_implementation)
        if module.training and "labels" in kwargs:
            labels = kwargs["labels"]
            self._batches.append((ids.tolist(), kwargs))
            counts = torch.stack(
                [torch.tensor(len(ids)), num_tokens.cpu(), (labels[:, 1:] != IGNORE_INDEX).sum().cpu()]
            )
            self._counts = counts if self._counts is None else self._counts + counts
        return args, kwargs

    @torch.compiler.disable
    def _on_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: ahead of the backward pass, because DeepSpeed makes its step inside it."""
        loss = getattr(output, "loss", None)
        if not module.training or loss is None:
            return
        value = float(loss.detach())
        if any_rank(not torch.tensor(value).isfinite()):
            self._stop(f"the loss is {value}" if not torch.tensor(value).isfinite() else "a loss is not finite")

    def _stop(self, what: str) -> NoReturn:
        """Save this rank's batches of the step and raise on all ranks."""
        batches = [
            (tensors, {"sample_ids": ids, "texts": [self.decode(row) for row in tensors["input_ids"].tolist()]})
            for ids, tensors in self._batches
        ]
        save_and_stop(self.run_dir, self.ranks, self._step, what, batches)
