"""Means, Student-t intervals and differences between two rows over seeds.

Every interval is two-sided at 95 % and belongs to one mean alone: nothing here corrects for looking at many of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Literal

CONFIDENCE = 0.95
ROUNDING = 1e-6  # percent: differences below it are those of floating point (arrays are stored in single precision)


@dataclass(frozen=True)
class Summary:
    """A mean with the half width of its interval; None where the number of values gives none."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean difference of two rows over seeds; `half_width` is None when the seeds are too few for an interval."""

    mean: float
    half_width: float | None
    n: int  # pairs; for an unpaired difference the smaller of the two numbers of runs
    paired: bool

    @property
    def verdict(self) -> Literal["exceeds", "tie", "open"]:
        """`exceeds`: 0 lies outside the interval. `tie`: inside. `open`: no interval, or no spread to make one from.

        Without spread (every seed differs by the same amount, which small test sets bring about) the formula gives an
        interval of width 0, which is no evidence.
        """
        if self.half_width is None or self.half_width < ROUNDING < abs(self.mean):
            return "open"
        return "exceeds" if abs(self.mean) > self.half_width else "tie"


def t_quantile(degrees: float) -> float:
    """The Student-t quantile that leaves 2.5 % above it."""
    # scipy.special has it without the second that importing scipy.stats takes.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles, between which the middle half of the values lies; all of them where there are fewer than four."""
    if len(values) < 4:
        return min(values), max(values)
    quarters = quantiles(values, n=4)
    return quarters[0], quarters[2]


def summarize(values: Sequence[float]) -> Summary:
    """Mean and half width t * s / sqrt(n) of at least one value; one value has no interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(mean, None, 1)
    return Summary(mean, t_quantile(n - 1) * math.sqrt(variance(values) / n), n)


def difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """`ours` minus `baseline`, each a value per seed; None when either is empty.

    Paired by seed (same initialization, same order of the data) where at least two seeds are common; else unpaired with
    Welch's interval where each side has two runs; else the difference without an interval.
    """
    if not ours or not baseline:
        return None
    common = sorted(ours.keys() & baseline.keys())
    unpaired_has_interval = min(len(ours), len(baseline)) >= 2
    if len(common) >= 2 or (common and not unpaired_has_interval):
        pairs = summarize([ours[seed] - baseline[seed] for seed in common])
        return Difference(pairs.mean, pairs.half_width, pairs.n, paired=True)

    a, b = list(ours.values()), list(baseline.values())
    mean = math.fsum(a) / len(a) - math.fsum(b) / len(b)
    half_width = _welch(a, b) if unpaired_has_interval else None
    return Difference(mean, half_width, min(len(a), len(b)), paired=False)


def variance(values: Sequence[float]) -> float:
    """Sample variance of at least two values."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Half width of Welch's interval, with the degrees of freedom of Welch and Satterthwaite."""
    u, v = variance(a) / len(a), variance(b) / len(b)
    if u + v == 0:
        return 0.0
    degrees = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    return t_quantile(degrees) * math.sqrt(u + v)
