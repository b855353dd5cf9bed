"""Guards the loss by chunks: the same number and gradients as from all logits at once, and never all logits at once.

Run: pytest tests/unit/test_cross_entropy.py
"""

import pytest
import torch
from torch.nn import functional

from llmga.stage1.cross_entropy import LossHead, summed_cross_entropy, use_chunked_cross_entropy
from llmga.stage1.held_out import token_losses
from llmga.tokens import IGNORE_INDEX
from tests.toy import toy_llava

VOCABULARY = 700


def made_up(tokens: int = 37, width: int = 24, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, width, generator=generator).to(dtype)
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(0, VOCABULARY, (tokens,), generator=generator),
    )


def full(hidden, weight, targets):
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")


def gradients(loss, *tensors):
    return torch.autograd.grad(loss / 7, tensors)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 1000])
def test_sum_and_gradients_are_exact_whatever_the_chunks(chunk_tokens):
    hidden, weight, targets = made_up()
    total = summed_cross_entropy(hidden, weight, targets, chunk_tokens * VOCABULARY)
    expected = full(hidden, weight, targets)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for made, wanted in zip(gradients(total, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)


def test_never_more_logits_than_a_chunk_and_only_those_of_trained_tokens(monkeypatch):
    model = toy_llava().train()
    use_chunked_cross_entropy(model)
    vocabulary, sizes, linear = model.config.text_config.vocab_size, [], functional.linear

    def recorded(inputs, weight, *bias):
        if weight.shape[0] in (VOCABULARY, vocabulary):
            sizes.append(inputs.shape[0])
        return linear(inputs, weight, *bias)

    monkeypatch.setattr(functional, "linear", recorded)
    hidden, weight, targets = made_up()
    summed_cross_entropy(hidden, weight, targets, 10 * VOCABULARY).backward()
    assert sizes == [10, 10, 10, 7]
    sizes.clear()
    ids = torch.randint(5, 200, (2, 30))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 20:24] = ids[0, 20:24]
    labels[1, 0:3] = ids[1, 0:3]  # the first has nothing before it
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    assert sizes == [4 + 2]


def test_under_bf16_autocast_it_is_as_close_to_float32_as_the_full_loss():
    hidden, weight, targets = made_up()
    exact = full(hidden, weight, targets)
    exact_gradients = gradients(exact, hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        plain, total = full(hidden, weight, targets), summed_cross_entropy(hidden, weight, targets, 5 * VOCABULARY)
    assert total.dtype == torch.float32
    assert abs(total - exact) <= 1.01 * abs(plain - exact)  # the very same logits
    for made, rounded, wanted in zip(
        gradients(total, hidden, weight), gradients(plain, hidden, weight), exact_gradients, strict=True
    ):
        assert made.dtype == torch.float32
        assert (made - wanted).norm() <= 1.1 * (rounded - wanted).norm()


def test_bf16_weights_add_up_their_gradient_in_float32():
    hidden, weight, targets = made_up(400, dtype=torch.bfloat16)
    (by_chunks,) = gradients(summed_cross_entropy(hidden, weight, targets, VOCABULARY), weight)  # 400 chunks
    exact = gradients(full(hidden.float(), weight.float(), targets), weight)[0].float()
    assert by_chunks.dtype == torch.bfloat16
    assert (by_chunks.float() - exact).norm() < 0.01 * exact.norm()


def test_a_frozen_head_gets_no_gradient_and_no_tokens_give_zero():
    hidden, weight, targets = made_up()
    weight.requires_grad_(False)
    summed_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is None and hidden.grad.any()
    hidden, weight, targets = made_up(0)
    total = summed_cross_entropy(hidden, weight, targets)
    total.backward()
    assert total.item() == 0 and not weight.grad.any()


def test_a_second_backward_pass_is_refused():
    hidden, weight, targets = made_up()
    total = summed_cross_entropy(hidden, weight, targets)
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward pass"):
        total.backward()


def test_the_model_gives_loss_sums_and_logits_where_each_is_asked_for():
    model = toy_llava()
    names, tied = list(model.state_dict()), model.lm_head.weight
    ids = torch.randint(5, 200, (3, 20))
    labels = ids.masked_fill(torch.arange(20) < 12, IGNORE_INDEX)
    expected = model(input_ids=ids, labels=labels, use_cache=False)
    use_chunked_cross_entropy(model)
    assert list(model.state_dict()) == names and model.lm_head.weight is tied
    assert isinstance(model.get_output_embeddings(), LossHead)
    evaluated = model(input_ids=ids, labels=labels, use_cache=False)
    torch.testing.assert_close(evaluated.loss.float(), expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(token_losses(evaluated.logits, labels), token_losses(expected.logits, labels))
    assert torch.equal(model(input_ids=ids).logits, expected.logits)  # a call without labels, after one with
    trained = model.train()(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(50))
    torch.testing.assert_close(trained.loss, expected.loss * 24 / 50, rtol=1e-6, atol=0)
