"""Effects: the differences between rows of runs, with their intervals.

There is one model, value = row + seed, fitted by least squares to the runs of the given rows (those of a card, for one
network on one data set). Its residuals give one variance for all rows, so that even the difference between rows of two
seeds each has an interval; a test for equal variances goes with it. An interval needs three degrees of freedom, as four
seeds of one row give; with fewer, the seeds' values are shown and nothing is decided. Runs that failed or stayed at
chance are not in the model, since a mean over learning and other runs describes neither. They are counted instead.
"""

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kalmannorm.experiments import card as cards
from kalmannorm.experiments.card import Card
from kalmannorm.report.cells import Cell, Cells, Group, identities, values_of
from kalmannorm.report.frame import Identity
from kalmannorm.report.quantities import Value

CONFIDENCE = 0.95
LEAST = 3  # fewest degrees of freedom for an interval; for one of shares, fewest runs that were lost


class Effect(NamedTuple):
    """A weighted sum of rows, such as a difference, with its standard error."""

    mean: float
    error: float  # standard error of the mean; nan without degrees of freedom
    df: int
    n: int  # runs of the row with the fewest
    spread: float  # standard deviation of a run
    weights: tuple[float, ...]
    rows: int  # number of rows in the model
    seeds: tuple[float, ...] = ()  # the weighted sum for each seed that all rows have
    equal: float = math.nan  # p of Bartlett's test that rows of two or more runs have one variance; nan: not tested

    def half_width(self, family: int = 1) -> float:
        """Return the half-width of the 95 % interval, simultaneous for `family` ones (Bonferroni); nan if undefined."""
        return t_quantile(self.df, family) * self.error if self.df >= LEAST else math.nan

    def interval(self, family: int = 1) -> tuple[float, float]:
        half = self.half_width(family)
        return self.mean - half, self.mean + half

    def half_width_of(self, seeds: int, family: int = 1) -> float:
        """Return the half-width that `seeds` seeds of each row of the model would give with the present spread."""
        error = self.spread * math.sqrt(sum(w**2 for w in self.weights) / seeds)
        return self._replace(df=(seeds - 1) * max(1, self.rows - 1), error=error).half_width(family)


class Shares(NamedTuple):
    """The shares of lost runs on two sides, `lost` of `of` and `others` of `of_others`, and their difference in
    percent."""

    lost: int
    of: int
    others: int
    of_others: int
    equal: float = math.nan  # as of Effect; shares have no variance to compare

    @property
    def mean(self) -> float:
        return 100 * (self.lost / self.of - self.others / self.of_others)

    @property
    def n(self) -> int:
        return min(self.of, self.of_others)

    def interval(self, family: int = 1) -> tuple[float, float]:
        """Return Newcombe's interval (1998, method 10), made from Wilson's interval of each side; nan with fewer than
        LEAST lost runs."""
        from scipy.stats import binomtest

        if self.lost + self.others < LEAST:
            return math.nan, math.nan
        confidence = 1 - (1 - CONFIDENCE) / family
        sides = ((self.lost, self.of), (self.others, self.of_others))
        (low, high), (below, above) = (binomtest(*of).proportion_ci(confidence, "wilson") for of in sides)
        p, q = self.lost / self.of, self.others / self.of_others
        return 100 * (p - q - math.hypot(p - low, above - q)), 100 * (p - q + math.hypot(high - p, q - below))


def t_quantile(df: float, family: int = 1) -> float:
    """Return the Student-t quantile for two-sided intervals of which `family` hold at once at 95 % (Bonferroni)."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 1 - (1 - CONFIDENCE) / (2 * family)))


def interval(values: Sequence[float]) -> float:
    """Return the half width of the 95 % Student-t interval for the mean of independent values; nan if too few."""
    df = len(values) - 1
    return t_quantile(df) * float(np.std(values, ddof=1)) / math.sqrt(df + 1) if df >= LEAST else math.nan


class Fit(NamedTuple):
    """A least-squares fit of value = row + seed, or of value = row."""

    places: list[Any]  # the rows, then the seeds
    levels: np.ndarray  # the fitted level of each place
    covariance: np.ndarray  # of the levels, divided by the variance
    estimable: np.ndarray  # projection on the sums of levels that the runs determine
    spread: float
    df: int
    equal: float


@functools.lru_cache(256)
def _fit(values: tuple[tuple[Any, tuple[tuple[int, float], ...]], ...], seeds: bool) -> Fit:
    runs = [(row, seed, value) for row, of in values for seed, value in of]
    places = [*dict.fromkeys(row for row, *_ in runs), *(sorted({seed for _, seed, _ in runs}) if seeds else [])]
    design = np.array([[float(place in (row, seed)) for place in places] for row, seed, _ in runs])
    found = np.array([value for *_, value in runs])
    normal = design.T @ design
    covariance = np.linalg.pinv(normal, rcond=1e-9, hermitian=True)
    estimable = covariance @ normal
    levels = covariance @ design.T @ found
    df = len(runs) - round(float(np.trace(estimable)))
    spread = math.sqrt(float(((found - design @ levels) ** 2).sum()) / df) if df else math.nan
    equal = _equal_variances([[value for _, value in of] for _, of in values])
    return Fit(places, levels, covariance, estimable, spread, df, equal)


def contrast(values: Mapping[Any, Mapping[int, float]], weights: Mapping[Any, float]) -> Effect | None:
    """Return a weighted sum of rows, by least squares on `values`: row -> seed -> value. None if a row has no run.

    If the weights add up to 0, the model is row + seed. Otherwise, or if no common seeds connect the rows, it is the
    rows alone.
    """
    if not all(values.get(row) for row in weights):
        return None
    runs = tuple((row, tuple(of.items())) for row, of in values.items())
    for seeds in (True, False) if abs(sum(weights.values())) < 1e-9 else (False,):
        fit = _fit(runs, seeds)
        sought = np.array([weights.get(place, 0.0) for place in fit.places])
        if np.allclose(fit.estimable @ sought, sought, atol=1e-9):
            break
    error = fit.spread * math.sqrt(max(0.0, float(sought @ fit.covariance @ sought)))
    # Rounded, since machines' linear algebra differs by about 1e-12: that must not decide whether -0.345 is printed as
    # -0.34 or -0.35.
    mean, error, spread = (round(float(x), 9) for x in (fit.levels @ sought, error, fit.spread))
    common = set.intersection(*(set(values[row]) for row in weights))
    each = (math.fsum(weight * values[row][seed] for row, weight in weights.items()) for seed in sorted(common))
    return Effect(
        mean=mean,
        error=error,
        df=fit.df,
        n=min(len(values[row]) for row in weights),
        spread=spread,
        weights=tuple(weights.values()),
        rows=sum(map(bool, values.values())),
        seeds=tuple(each),
        equal=fit.equal,
    )


def compare(
    cells: Cells,
    own: Iterable[Card],
    group: Group,
    statistics: str,
    weights: Mapping[Identity, float],
    value: Value,
    kinds: Collection[tuple[str, ...]],
) -> Effect | None:
    """Return a contrast of rows, with the spread pooled over rows of the same networks (`pool`) of one of `kinds`.

    `weights`: of the rows. `value`: reads the compared value from a run. If columns fix the data set, the rows' is used
    in place of the group's.
    """
    at = group._replace(dataset=next((row.dataset for row in weights if row.dataset), group.dataset))
    pooled = pool(cells, own, at, statistics, {(row.network, row.length) for row in weights})
    values = {row: values_of(cell, value) for row, cell in pooled.items() if cell.kind in kinds}
    return contrast(values, {replace(row, dataset=None): weight for row, weight in weights.items()})


def pool(
    cells: Cells, own: Iterable[Card], group: Group, statistics: str, trained: Collection[tuple[str, str]]
) -> dict[Identity, Cell]:
    """Return the rows over which spread is pooled, with their runs on the group's data: those of the papers' tables and
    of the cards `own`, of the (network, length) pairs in `trained`.

    The same difference therefore has the same interval in all of the papers' tables and claims, and rows of other cards
    cannot widen it.
    """
    every = dict.fromkeys((*_rows_of_papers(), *(row for card in own for row in identities(card))))
    rows = dict.fromkeys(replace(row, dataset=None) for row in every if (row.network, row.length) in trained)
    return {row: cells.of(row, group, statistics) for row in rows}


@functools.cache
def _rows_of_papers() -> tuple[Identity, ...]:
    return tuple(
        dict.fromkeys(
            row
            for card in map(cards.read, cards.names())
            if card.of_papers and card.kind == "table"
            for row in identities(card)
        )
    )


def signed(value: float) -> str:
    """Write a number with its sign and about three digits: "+1.23", "−0.4"."""
    size = abs(value)
    written = next((of for least, of in ((1000, ",.0f"), (100, ".1f"), (0.1, ".2f")) if size >= least), ".2g")
    return f"{'−' if value < 0 else '+'}{size:{written}}"


def _equal_variances(values: Iterable[Sequence[float]]) -> float:
    """Return p of Bartlett's test over the rows with two or more values; nan if fewer than two rows have them, or if a
    row's values are all equal."""
    from scipy.stats import bartlett

    several = [of for of in values if len(of) > 1]
    if len(several) < 2 or min(map(np.ptp, several)) <= 0:
        return math.nan
    return float(bartlett(*several).pvalue)
