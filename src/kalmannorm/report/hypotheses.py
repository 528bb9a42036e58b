"""One hypothesis about a mean, from a value per seed: evidence for it and against it, and how many seeds would decide.

`greater` and `less`: a one-sample t-test against a bound. `equal`: two one-sided t-tests against +-margin (TOST). Each
has a p-value for the claim and one against it, both one-sided; `p` is twice the smaller, so that a verdict in either
direction errs in at most 5 % together. For a paired difference this is the usual two-sided paired t-test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kalmannorm.report.statistics import ROUNDING, Summary, summarize, variance

ALPHA = 0.05
POWER = 0.8
MOST = 1000  # seeds; more than that is "more than 1,000"

Expect = Literal["greater", "less", "equal"]


@dataclass(frozen=True)
class Hypothesis:
    """The mean is greater or less than `than`, or equal to 0 within +-margin."""

    expect: Expect
    than: float = 0.0
    margin: float = 0.0

    def __str__(self) -> str:
        if self.expect == "equal":
            return f"|mean| < {self.margin:g}"
        return f"mean {'>' if self.expect == 'greater' else '<'} {self.than:g}".replace("-", "−")


@dataclass(frozen=True)
class Outcome:
    """What the values say; `p` is None where they are too few, or do not vary."""

    summary: Summary
    p: float | None
    in_favour: bool  # which of the two the smaller p-value is for
    deviation: float | None  # standard deviation over the seeds


def examine(hypothesis: Hypothesis, values: Sequence[float]) -> Outcome:
    """The test. At least one value."""
    summary = summarize(list(values))
    holds = _holds(hypothesis, summary.mean)
    if len(values) < 2:
        return Outcome(summary, None, holds, None)
    deviation = math.sqrt(variance(values))
    if deviation < ROUNDING:  # the same in every seed: an interval of width 0 is no evidence
        return Outcome(summary, None, holds, deviation)
    above, below = _one_sided(values, hypothesis.than)
    if hypothesis.expect == "equal":
        over_low, under_low = _one_sided(values, -hypothesis.margin)
        over_high, under_high = _one_sided(values, hypothesis.margin)
        # Equal: above the lower and below the upper bound. Not equal: beyond one of them; the mean cannot be at both.
        favour, against = max(over_low, under_high), min(under_low, over_high)
    else:
        favour, against = (above, below) if hypothesis.expect == "greater" else (below, above)
    return Outcome(summary, min(1.0, 2 * min(favour, against)), favour <= against, deviation)


def needed(hypothesis: Hypothesis, outcome: Outcome, tests: int) -> int | None:
    """Seeds for a verdict with power 0.8, were mean and spread those observed, with `tests` tests corrected for.

    None where the spread is not known, or where more than MOST are needed.
    """
    if not outcome.deviation or outcome.deviation < ROUNDING:
        return None
    mean = abs(outcome.summary.mean)
    if hypothesis.expect != "equal":
        distances = [abs(outcome.summary.mean - hypothesis.than)]
    elif mean < hypothesis.margin:  # both one-sided tests have to succeed
        distances = [hypothesis.margin - mean, hypothesis.margin + mean]
    else:
        distances = [mean - hypothesis.margin]
    sizes = [distance / outcome.deviation for distance in distances]

    def power(n: int) -> float:
        return 1 - sum(1 - _power(size, n, tests) for size in sizes)

    low, high = outcome.summary.n + 1, MOST
    if 0 in sizes or power(high) < POWER:
        return None
    while low < high:  # power grows with n
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the family's error stays below ALPHA whatever their dependence."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _holds(hypothesis: Hypothesis, mean: float) -> bool:
    if hypothesis.expect == "equal":
        return abs(mean) < hypothesis.margin
    return mean > hypothesis.than if hypothesis.expect == "greater" else mean < hypothesis.than


def _one_sided(values: Sequence[float], bound: float) -> tuple[float, float]:
    """p-values of "the mean is above the bound" and of "it is below"."""
    from scipy.stats import ttest_1samp

    above = float(ttest_1samp(values, bound, alternative="greater").pvalue)
    return above, float(ttest_1samp(values, bound, alternative="less").pvalue)


def _power(size: float, n: int, tests: int) -> float:
    """Power of a two-sided one-sample t-test at ALPHA / tests (Bonferroni's, which suffices for Holm's)."""
    from scipy.stats import nct, t

    critical = t.ppf(1 - ALPHA / (2 * tests), n - 1)
    power = float(nct.sf(critical, n - 1, size * math.sqrt(n)))
    return 1.0 if math.isnan(power) else power  # scipy gives NaN where the noncentrality is huge
