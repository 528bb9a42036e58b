"""From the frame to cells, the runs of a row, and effects, the differences between rows.

There is one model, value = row + seed, fitted by least squares to the runs of the given rows (those of a card, for one
network on one data set). Its residuals give one variance for all rows, so that even the difference between rows of two
seeds each has an interval; a test for equal variances goes with it. An interval needs three degrees of freedom, as four
seeds of one row give; with fewer, the seeds' values are shown and nothing is decided. Runs that failed or stayed at
chance are not in the model, since a mean over learning and other runs describes neither. They are counted instead.
"""

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kalmannorm.experiments import card as cards
from kalmannorm.experiments.card import Card, Column, Row
from kalmannorm.report import frame
from kalmannorm.report.frame import Identity
from kalmannorm.report.quantities import Run, Value

CONFIDENCE = 0.95
LONGEST = 60  # most characters of a group in a file's name
FIRST_STEPS = "start"  # the budget whose runs stop after a few steps, which are drawn; their accuracies are not used
LEAST = 3  # fewest degrees of freedom for an interval; for one of shares, fewest runs that were lost


class Group(NamedTuple):
    """The settings that a card leaves open and a group of its runs has in common.

    `schedule` "": each row has its own, or else the default of conf/.
    """

    dataset: str
    budget: str
    schedule: str = ""
    width: float = 1.0

    @property
    def main(self) -> bool:
        """Whether it is the papers' setting, whatever the budget."""
        return self.width == 1 and not self.schedule

    @property
    def label(self) -> str:
        """ "cifar10, budget lite, schedule released_warmup, width 0.25"."""
        said = [self.dataset, f"budget {self.budget}", f"schedule {self.schedule}" if self.schedule else ""]
        return ", ".join(filter(None, [*said, f"width {self.width:g}" if self.width != 1 else ""]))

    @property
    def stem(self) -> str:
        """The group in the names of files: "cifar10-lite", "cifar10-lite-released_warmup-w0.25"."""
        parts = [self.dataset, self.budget, self.schedule, f"w{self.width:g}" if self.width != 1 else ""]
        stem = re.sub(r"[^\w.]+", "-", "-".join(filter(None, parts))).strip("-")
        return stem if len(stem) < LONGEST else f"{stem[:LONGEST]}-{hashlib.sha256(stem.encode()).hexdigest()[:6]}"

    @property
    def length(self) -> str:
        """The budget's name, without settings that differ from conf/."""
        return self.budget.split(" ")[0]


class Cell(NamedTuple):
    """The runs of one row in one group under one kind of statistics, in the order of their seeds."""

    runs: list[Run]  # finished, one per seed
    failed: list[Run]
    left_out: list[Run]

    @property
    def learned(self) -> list[Run]:
        return [run for run in self.runs if run["learned"]]

    @property
    def lost(self) -> int:
        """How many runs failed or stayed at chance."""
        return self.n - len(self.learned)

    @property
    def n(self) -> int:
        return len(self.runs) + len(self.failed)

    @property
    def ids(self) -> list[str]:
        return [str(run["id"]) for run in (*self.runs, *self.failed)]

    @property
    def kind(self) -> tuple[str, ...]:
        """Arithmetic and data of the runs (frame.KIND); () without runs."""
        return tuple(self.runs[0][column] for column in frame.KIND) if self.runs else ()

    @property
    def notes(self) -> list[str]:
        """The runs' notes, with their seeds: "seed 2 failed: ..."."""
        said: dict[str, list[str]] = {}
        for run in (*self.runs, *self.failed, *self.left_out):
            if run["note"]:
                said.setdefault(str(run["note"]), []).append(str(run["seed"]))
        return [f"seed {', '.join(seeds)} {note}" for note, seeds in said.items()]


class Cells:
    """The frame's runs, found by row, group and kind of statistics."""

    def __init__(self, runs: pd.DataFrame) -> None:
        self.runs = runs
        self._found: dict[tuple[Any, ...], Cell] = {}
        current: Any = runs[runs.state != "stale"].sort_values("seed", kind="stable").to_dict("records")
        for run in current:
            key = tuple(run[column] for column in (*frame.ROW, *frame.GROUP, "statistics"))
            cell = self._found.setdefault(key, Cell([], [], []))
            {"used": cell.runs, "failed": cell.failed, "left out": cell.left_out}[run["state"]].append(run)
        self.default_schedule = frame.defaults()["schedule"]
        self._in: dict[str, Cells] = {}

    def alike(self, rows: Collection[Identity], group: Group) -> "Cells":
        """Return cells in which rows that ran in several arithmetics are shown in the one that most of `rows` have.

        By default a row is shown in the arithmetic with most seeds. Beside rows of another arithmetic, it would have no
        difference to them.
        """
        cells = [self.of(row, group, "moving") for row in rows]
        ran = [Counter(r["arithmetic"] for r in (*of.runs, *of.left_out) if r["status"] == "done") for of in cells]
        if all(len(of) < 2 for of in ran):
            return self
        together = sum(ran, Counter[str]())
        most = max(together, key=lambda arithmetic: (sum(arithmetic in of for of in ran), together[arithmetic]))
        if most not in self._in:
            self._in[most] = Cells(frame.check(self.runs, arithmetic=most))
        return self._in[most]

    def cell(self, card: Card, row: Row, group: Group, column: Column | None = None, statistics: str = "") -> Cell:
        """Return the runs of a card's row under `statistics`, else the column's; an empty cell if there are none."""
        return self.of(identity(card, row, column), group, statistics or (column.statistics if column else "moving"))

    def of(self, row: Identity, group: Group, statistics: str) -> Cell:
        """Return the runs of a row's identity under one kind of statistics; an empty cell where there are none."""
        width = group.width if row.width is None else row.width
        schedule = row.rates or group.schedule or row.schedule or self.default_schedule
        whole = (row.network, width, row.normalizer, row.grad_batch, row.stat_batch)
        budget = f"{group.budget} {row.length}".strip()
        return self._found.get((*whole, row.dataset or group.dataset, budget, schedule, statistics), Cell([], [], []))

    def groups(self, rows: Iterable[Identity]) -> list[Group]:
        """Return the groups in which any of the rows has runs, the papers' length first.

        `dataset` is "" if the row fixes it. Runs with a width, schedule or length that some row of a card names belong
        to that row alone, and make no group of other rows.
        """
        found = set()
        for row in rows:
            own = row.rates or row.schedule or self.default_schedule
            for group in self._by_row.get((row.network, row.normalizer, row.grad_batch, row.stat_batch), ()):
                _, _, length = group.budget.partition(" ")
                if (
                    row.dataset in (None, group.dataset)
                    and (group.width not in named("width") if row.width is None else group.width == row.width)
                    and (group.schedule == own or not (row.rates or group.schedule in named("rates")))
                    and (length == row.length or not (row.length or length in named("length")))
                ):
                    budget = group.length if row.length else group.budget
                    dataset = "" if row.dataset else group.dataset
                    width = 1.0 if row.width is not None else group.width
                    found.add(Group(dataset, budget, "" if group.schedule == own else group.schedule, width))
        return sorted(found, key=lambda g: (g.budget != "paper", g.width != 1, g.schedule, g.dataset, g.budget))

    @functools.cached_property
    def _by_row(self) -> dict[tuple[Any, ...], set[Group]]:
        found: dict[tuple[Any, ...], set[Group]] = {}
        for network, width, normalizer, grad, stat, dataset, budget, schedule, _ in self._found:
            found.setdefault((network, normalizer, grad, stat), set()).add(Group(dataset, budget, schedule, width))
        return found


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


def values_of(cell: Cell, value: Value) -> dict[int, float]:
    """Return the value by seed, for those runs that learned and have a finite one."""
    found = {int(run["seed"]): value(run) for run in cell.learned}
    return {seed: of_run for seed, of_run in found.items() if of_run is not None and math.isfinite(of_run)}


@functools.cache
def named(what: str) -> frozenset[Any]:
    """Return the values that rows of any card give a field of Identity: `width`, `rates` or `length`."""
    every = (one for card in map(cards.read, cards.names()) for one in identities(card))
    return frozenset(getattr(one, what) for one in every) - {None}


def identities(card: Card) -> list[Identity]:
    """Return the identities of a card's rows; if columns have runs of their own, one for each row and column."""
    return [
        identity(card, row, column)
        for row in card.rows
        for column in (card.columns_of(row) if card.has_columns_of_runs else [None])
    ]


def identity(card: Card, row: Row, column: Column | None = None) -> Identity:
    """Return the identity of a card's row, with the data set if the column fixes it."""
    settings = card.settings(row, column)
    found = frame.identity(json.dumps(settings))
    return replace(found, dataset=settings["dataset"]) if column and "dataset" in column.runs else found


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
