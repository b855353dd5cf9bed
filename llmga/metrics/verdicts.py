"""Comparisons of two systems, each ending in one of three words, with Holm's correction over those made together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Literal

from pydantic.dataclasses import dataclass

from llmga.config import STRICT
from llmga.metrics.comparisons import holm, holm_levels
from llmga.metrics.features import MetricError
from llmga.metrics.intervals import Interval

Verdict = Literal["supported", "contradicted", "inconclusive"]


@plain_dataclass(frozen=True)
class Contrast:
    """That a is better than b in a metric, before it is judged.

    Attributes:
        interval: of the difference a - b, at a level of confidence.
        p: of a test of no difference; None where there is none, and the contrast stands outside Holm's correction.
        test: how p was found.
        claim: what it is asked for, in words or by number.
        smallest_effect: a difference that does not exceed it does not count.
    """

    a: str
    b: str
    metric: str
    higher_is_better: bool
    interval: Callable[[float], Interval]
    p: float | None = None
    test: str = ""
    claim: str = ""
    smallest_effect: float = 0.0


@dataclass(config=STRICT)
class Comparison:
    """A judged contrast; the difference is that of a less b.

    Attributes:
        ci_low, ci_high: of 95 % for this comparison alone.
        p_holm: p, corrected for all comparisons made together.
        judged_at: confidence of the interval behind the verdict, which that correction makes stricter.
    """

    a: str
    b: str
    metric: str
    difference: float
    ci_low: float
    ci_high: float
    ci_method: str
    n: int
    p: float | None
    p_holm: float | None
    test: str
    claim: str
    smallest_effect: float
    judged_at: float
    verdict: Verdict


def judge(contrasts: Sequence[Contrast], level: float = 0.95) -> list[Comparison]:
    """Judge contrasts together.

    A contrast is *supported* where its corrected interval excludes 0 on the claimed side and the difference exceeds the
    smallest effect of interest, *contradicted* where the interval excludes 0 on the other side, else *inconclusive*.

    Args:
        level: confidence in all verdicts together.
    Raises:
        MetricError: a p-value that is none, or a smallest effect below 0.
    """
    p_values = [contrast.p for contrast in contrasts if contrast.p is not None]
    corrected = iter(zip(holm(p_values), holm_levels(p_values, level), strict=True))
    found = []
    for contrast in contrasts:
        p_holm, judged_at = (None, level) if contrast.p is None else next(corrected)
        found.append(_judged(contrast, p_holm, judged_at, level))
    return found


def verdict(
    low: float, high: float, difference: float, higher_is_better: bool, smallest_effect: float = 0.0
) -> Verdict:
    """The word for an interval of a difference; see `judge`."""
    if not higher_is_better:
        low, high, difference = -high, -low, -difference
    if low > 0 and difference > smallest_effect:
        return "supported"
    return "contradicted" if high < 0 else "inconclusive"


def _judged(contrast: Contrast, p_holm: float | None, judged_at: float, level: float) -> Comparison:
    if contrast.smallest_effect < 0:
        raise MetricError(f"the smallest effect of {contrast.metric} is {contrast.smallest_effect}; expected 0 or more")
    shown = contrast.interval(level)
    strict = shown if judged_at == level else contrast.interval(judged_at)
    return Comparison(
        a=contrast.a,
        b=contrast.b,
        metric=contrast.metric,
        difference=shown.value,
        ci_low=shown.low,
        ci_high=shown.high,
        ci_method=shown.method,
        n=shown.n,
        p=contrast.p,
        p_holm=p_holm,
        test=contrast.test,
        claim=contrast.claim,
        smallest_effect=contrast.smallest_effect,
        judged_at=judged_at,
        verdict=verdict(strict.low, strict.high, shown.value, contrast.higher_is_better, contrast.smallest_effect),
    )
