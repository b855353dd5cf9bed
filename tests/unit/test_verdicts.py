"""The three words, each where it belongs, and stricter where many comparisons are made together.

Run: pytest tests/unit/test_verdicts.py
"""

from statistics import NormalDist

import pytest

from llmga.metrics.intervals import Interval
from llmga.metrics.verdicts import Contrast, judge


def contrast(difference: float, sd: float = 1.0, higher: bool = True, smallest: float = 0.0) -> Contrast:
    """A normal estimate with the p-value and intervals that belong to it."""

    def interval(level: float) -> Interval:
        reach = NormalDist().inv_cdf((1 + level) / 2) * sd
        return Interval(difference, difference - reach, difference + reach, 100, "normal")

    p = 2 * (1 - NormalDist().cdf(abs(difference) / sd))
    return Contrast("a", "b", "m", higher, interval, p, "z", smallest_effect=smallest)


@pytest.mark.parametrize(
    ("case", "word"),
    [
        (contrast(2.5), "supported"),
        (contrast(-2.5), "contradicted"),
        (contrast(1.5), "inconclusive"),
        (contrast(-2.5, higher=False), "supported"),
        (contrast(2.5, higher=False), "contradicted"),
        (contrast(2.5, smallest=3.0), "inconclusive"),
        (contrast(-2.5, higher=False, smallest=2.0), "supported"),
    ],
)
def test_each_word_has_its_place(case: Contrast, word: str) -> None:
    assert judge([case])[0].verdict == word


def test_the_correction_takes_what_chance_gives_to_many() -> None:
    alone = judge([contrast(2.1)])[0]
    among = judge([contrast(2.1), *(contrast(0.1 * n) for n in range(9)), contrast(5)])
    assert alone.verdict == "supported" and alone.p_holm == pytest.approx(0.0357, abs=1e-3)
    assert among[0].verdict == "inconclusive" and among[0].p_holm == pytest.approx(0.357, abs=1e-2)
    assert among[-1].verdict == "supported"
    assert (among[0].ci_low, among[0].ci_high) == (alone.ci_low, alone.ci_high)  # shown for itself
    assert among[0].judged_at == pytest.approx(1 - 0.05 / 10)


def test_one_without_a_p_value_stands_outside() -> None:
    distance = Contrast("a", "b", "frechet", False, lambda level: Interval(-1, -2, -0.5, 9, "halves"))
    both = judge([contrast(2.1), distance])
    assert [each.verdict for each in both] == ["supported", "supported"]
    assert both[1].p_holm is None and both[0].judged_at == 0.95
