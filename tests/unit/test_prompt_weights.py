"""Guards bracket weights: what is stressed, what is plain text, and that no text makes them fail by accident.

Run: pytest tests/unit/test_prompt_weights.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmga.prompt_chunks import PromptError
from llmga.stage2.prompt_weights import read_brackets, weigh


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [("", 1)]),
        ("plain, text: nothing", [("plain, text: nothing", 1)]),
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("a [b] c", [("a ", 1), ("b", 1 / 1.1), (" c", 1)]),
        ("a (b:1.3) c", [("a ", 1), ("b", 1.3), (" c", 1)]),
        ("(b:.5)", [("b", 0.5)]),
        ("(b:-2)", [("b", -2)]),
        ("((b))", [("b", 1.1**2)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("[(b)]", [("b", 1)]),
        (r"\(b\) \[c\] \\", [("(b) [c] \\", 1)]),
        ("a (b [c", [("a ", 1), ("b ", 1.1), ("c", 1)]),
        ("a) b] c:2)", [("a) b] c:2)", 1)]),
        ("(ratio 16:9)", [("ratio 16", 9)]),
        ("(time: noon)", [("time: noon", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a\nb)", [("a\nb", 1.1)]),
    ],
)
def test_pieces_and_their_weights(text: str, pieces: list[tuple[str, float]]) -> None:
    read = read_brackets(text)
    assert [piece for piece, _ in read] == [piece for piece, _ in pieces]
    assert [weight for _, weight in read] == pytest.approx([weight for _, weight in pieces])


@settings(deadline=None)
@given(st.text() | st.text(alphabet="()[]\\:.1a -+"))
def test_any_text_is_read_or_refused_and_words_stay(text: str) -> None:
    try:
        pieces = read_brackets(text)
    except PromptError:
        return
    assert pieces and all(math.isfinite(weight) for _, weight in pieces)
    joined = "".join(piece for piece, _ in pieces)
    assert not set(joined) - set(text)
    if not set(text) & set("()[]\\"):
        assert pieces == [(text, 1.0)]


def test_brackets_without_end_are_refused() -> None:
    with pytest.raises(PromptError, match="nested more than 100 deep"):
        read_brackets("(" * 101 + "a")


def test_a_weight_past_all_numbers_is_refused() -> None:
    with pytest.raises(PromptError, match="the weight of 'a' is inf, expected a number such as"):
        read_brackets(f"((a:{'9' * 300}):{'9' * 300})")


def test_each_prompt_keeps_its_own_mean_and_dtype() -> None:
    states = torch.rand(2, 5, 3, dtype=torch.bfloat16) + 1
    weights = torch.ones(2, 5)
    weights[1, 2] = 3
    weighed = weigh(states, weights)
    assert weighed.dtype == torch.bfloat16 and torch.equal(weighed[0], states[0])
    torch.testing.assert_close(weighed[1].float().mean(), states[1].float().mean(), rtol=1e-2, atol=0)
    ratio = (weighed[1].float() / states[1].float()).mean(dim=1)
    assert (ratio[2] / ratio[0]).item() == pytest.approx(3, rel=2e-2)


def test_weights_that_leave_nothing_are_not_rescaled() -> None:
    assert torch.equal(weigh(torch.ones(1, 4, 2), torch.zeros(1, 4)), torch.zeros(1, 4, 2))


def test_a_mean_that_is_rounding_is_no_basis_for_a_factor() -> None:
    states = torch.tensor([[[1.0, -1.0 + 1e-7], [2.0, -2.0], [3.0, -3.0]]])
    weights = torch.tensor([[2.0, 1.0, 1.5]])
    assert torch.equal(weigh(states, weights), states * weights[:, :, None])
