"""The held-out loss weighs every token alike, whatever example and batch it is in."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import EvalPrediction

from llmga.stage1.callbacks import keep_token_loss
from llmga.stage1.held_out import mean_token_loss, token_losses


def test_mean_over_tokens_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=generator)
    labels = torch.randint(0, 5, (3, 6), generator=generator)
    labels[0, :5] = labels[2] = -100  # one token, five tokens, none
    together = functional.cross_entropy(logits[:, :-1].reshape(-1, 5), labels[:, 1:].reshape(-1))
    parts = [token_losses((logits[:1], "other output"), labels[:1]), token_losses(logits[1:], labels[1:])]
    assert torch.cat(parts)[:, 1].tolist() == [1, 5, 0]
    found = mean_token_loss(EvalPrediction(predictions=torch.cat(parts).numpy(), label_ids=labels.numpy()))
    assert found["token_loss"] == pytest.approx(float(together), rel=1e-6)
    assert mean_token_loss(EvalPrediction(predictions=np.zeros((2, 2)), label_ids=None))["token_loss"] == 0


def test_of_the_trainers_log_only_the_token_loss_stays() -> None:
    logs = {"eval_toy_loss": 9.0, "eval_toy_token_loss": 1.5, "eval_toy_runtime": 3.0, "epoch": 0.5}
    assert keep_token_loss(logs)
    assert logs == {"eval_toy_loss": 1.5}
    assert not keep_token_loss({"train_loss": 1.0, "train_runtime": 2.0})
