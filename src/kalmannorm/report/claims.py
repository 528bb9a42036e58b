"""Test the papers' claims (claims.yaml) on the frame: each by an effect with its interval, all by one rule.

The rule: a claim is supported if the whole interval of its effect lies on the claimed side of the bound, contradicted
if it lies on the other side, else open. The intervals of a family (the papers' claims, in the papers' settings, at one
budget) hold all at once at 95 % (Bonferroni). Other settings and our own claims are explored: each has an interval of
its own and no verdict. With fewer than three degrees of freedom, or fewer than three lost runs if the claim compares
lost runs, there is no interval. Runs that failed or stayed at chance count against the side that the claim favours: if
it has one, the claim is not supported; if it lost more than half, and more than the other side, it is contradicted.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from kalmannorm.errors import UserError
from kalmannorm.experiments import card as cards
from kalmannorm.experiments.card import Card, Column, Row
from kalmannorm.report import effects, quantities, speed
from kalmannorm.report.cells import FIRST_STEPS, Cell, Cells, Group, identity
from kalmannorm.report.effects import LEAST, Effect, Shares, signed
from kalmannorm.report.frame import Identity
from kalmannorm.report.quantities import QUANTITIES

HERE = Path(__file__).parent
UNJUDGED = ("smoke", FIRST_STEPS)  # budgets whose accuracies mean nothing
SEEDS = (3, 5, 10)  # numbers of seeds for which an open claim's future interval is predicted
UNITS = {of: quantity.unit for of, quantity in QUANTITIES.items()}
UNITS |= {"steps_to": "%", "parameters": "parameters", "speed": "%", "lost": "points"}

State = Literal["supported", "contradicted", "open", "explored", "not run"]


@dataclass(frozen=True)
class Term:
    """A signed row of a card, under one kind of statistics."""

    sign: int
    card: Card
    row: Row
    column: Column | None
    statistics: str

    @property
    def identity(self) -> Identity:
        """The row's identity in the frame."""
        return identity(self.card, self.row, self.column)

    @property
    def place(self) -> str:
        return f"{self.card.name}/{self.row.key}{f'@{self.column.key}' if self.column else ''}"

    def __str__(self) -> str:
        return f"{'+' if self.sign > 0 else '−'} {self.place}"


@dataclass(frozen=True, eq=False)
class Claim:
    """An entry of claims.yaml; the fields are explained at the top of that file."""

    id: str
    text: str
    where: str
    contrast: tuple[Term, ...]
    expect: Literal["greater", "less", "equal"]
    quantity: str = "accuracy"
    than: float = 0.0
    margin: float = 0.0
    margin_why: str = ""
    at: tuple[float, float] | None = None
    level: float = 1.0
    relative: bool = False
    ours: bool = False
    answer: str = ""
    network: str = ""
    datasets: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    paper: float | Mapping[str, float] = field(default_factory=dict)
    conflict: tuple[str, ...] = ()

    @property
    def hypothesis(self) -> str:
        """The claim about the effect, in words: "greater than 0", "within ±0.3 of 0"."""
        if self.expect == "equal":
            return f"within ±{self.margin:g} of {self.than:g}"
        return f"{self.expect} than {self.than:g}"

    @property
    def unit(self) -> str:
        return "%" if self.relative else UNITS[self.quantity]

    @property
    def log(self) -> bool:
        """Whether logarithms are compared."""
        return self.quantity == "steps_to" or (self.quantity in QUANTITIES and QUANTITIES[self.quantity].log)

    @property
    def of(self) -> tuple[str, ...]:
        """The data sets that the claim is about: those named, else those with a printed value, else the card's."""
        printed = tuple(self.paper) if isinstance(self.paper, Mapping) else ()
        return self.datasets or printed or (str(self.contrast[0].card.runs.get("dataset", "cifar10")),)

    def printed(self, dataset: str) -> float | None:
        """Return the paper's value on a data set; None if it prints none."""
        return self.paper.get(dataset) if isinstance(self.paper, Mapping) else self.paper

    def percent(self, value: float) -> float:
        """Return a compared value as it is shown: percent where logarithms are compared."""
        return 100 * math.expm1(value) if self.log else value

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval in which the compared value lies by the claim."""
        than, margin = (math.log1p(bound / 100) if self.log else bound for bound in (self.than, self.margin))
        if self.expect == "equal":
            return than - margin, than + margin
        return (than, math.inf) if self.expect == "greater" else (-math.inf, than)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a claim in one group of runs."""

    claim: Claim
    state: State
    why: str = ""
    group: Group | None = None
    effect: Effect | Shares | None = None
    low: float = math.nan  # bounds of the interval that decides, as shown
    high: float = math.nan
    family: int = 0  # how many intervals hold at once
    notes: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    count: float = math.nan  # the value of a claim about parameters or speed, which has no effect
    lost: Literal["", "some", "most"] = ""  # how many of the favoured side's runs were lost; `why` has the numbers

    @property
    def judged(self) -> bool:
        return self.state in ("supported", "contradicted", "open")

    @property
    def explored(self) -> bool:
        """Whether there is an effect, but no verdict: its interval is not one of a family."""
        return self.state == "explored" and self.effect is not None

    @property
    def budget(self) -> str:
        return self.group.budget if self.group else ""

    @property
    def place(self) -> str:
        """Data set and budget, "cifar10, lite"; "" for parameters and speed."""
        return f"{self.group.dataset}, {self.group.budget}" if self.group else ""

    @property
    def printed(self) -> str:
        """The paper's value on these data, with its sign: "+1.5"; "" if there is none."""
        value = self.claim.printed(self.group.dataset if self.group else "")
        return "" if value is None or self.claim.than > 50 else f"{value:+g}".replace("-", "−")

    @property
    def measured(self) -> float:
        """The measured value, as shown; nan if there is none."""
        return self.claim.percent(self.effect.mean) if self.effect else self.count

    @property
    def estimate(self) -> str:
        """The measured value with its interval, "+1.2 [−0.3, +2.7] points (n = 3)"; without an interval with the seeds'
        values, "+1.2 (+1.1, +1.3) points (n = 2)"."""
        if not math.isfinite(self.measured):
            return ""
        between = f" [{signed(self.low)}, {signed(self.high)}]" if math.isfinite(self.low + self.high) else ""
        if not between and isinstance(self.effect, Effect) and self.effect.seeds[1:]:
            between = f" ({', '.join(signed(self.claim.percent(seed)) for seed in self.effect.seeds)})"
        counted = f" (n = {self.effect.n})" if self.effect else ""
        return f"{signed(self.measured)}{between} {self.claim.unit}".rstrip() + counted


@functools.cache
def claims() -> tuple[Claim, ...]:
    """Return all claims of claims.yaml, in its order."""
    return tuple(_claim(tree) for tree in yaml.load((HERE / "claims.yaml").read_bytes(), yaml.CSafeLoader))


def evaluate(cells: Cells, results: Path) -> list[Verdict]:
    """Return the verdicts in the order of the claims: one for each group of runs, or one "not run".

    `results`: the folder with speed measurements.
    """
    measured = [verdict for claim in claims() for verdict in _of_claim(claim, cells, results)]
    family: dict[str, int] = {}
    for verdict in measured:
        if verdict.effect and verdict.group and _in_family(verdict):
            family[verdict.group.budget] = family.get(verdict.group.budget, 0) + 1
    return [_decide(verdict, family.get(verdict.group.budget, 1) if verdict.group else 1) for verdict in measured]


def decide(claim: Claim, low: float, high: float) -> Literal["supported", "contradicted", "open"]:
    """Return the verdict on a compared value with the interval [low, high], by the rule above."""
    least, most = claim.bounds
    if least < low and high < most:
        return "supported"
    return "contradicted" if high < least or low > most else "open"


def _claim(tree: Mapping[str, Any]) -> Claim:
    lists = {key: tuple(tree[key]) for key in ("datasets", "budgets", "conflict", "at") if key in tree}
    found = Claim(**{**tree, **lists, "contrast": tuple(map(_term, tree["contrast"]))})
    if found.quantity not in UNITS:
        raise UserError(f"claims.yaml: {found.id} has an unknown quantity {found.quantity!r}")
    return found


def _term(text: str) -> Term:
    """Parse a term such as "+table8/KEY@COLUMN online". UserError: no such card, row or column."""
    place, _, statistics = text[1:].partition(" ")
    name, _, key = place.partition("/")
    key, _, column = key.partition("@")
    card = cards.read(name)
    of_runs = next((of for of in card.columns if of.key == column), None)
    if column and of_runs is None:
        raise UserError(f"{name}: row {key} has no column {column}")
    return Term(1 if text[0] == "+" else -1, card, card.row(key), of_runs, statistics or "moving")


def _of_claim(claim: Claim, cells: Cells, results: Path) -> list[Verdict]:
    if claim.quantity == "parameters":
        return [_count(claim)]
    if claim.quantity == "speed":
        return _timed(claim, results) or [Verdict(claim, "not run", "no measurement")]
    rows = [term.identity for term in claim.contrast]
    groups = [group for group in cells.groups(rows) if group.length not in UNJUDGED]
    if claim.budgets:
        groups = [group for group in groups if group.budget in claim.budgets]
    found = [_measure(claim, group, rows, cells) for group in groups]
    some = [verdict for verdict in found if verdict.ids]
    return some or [Verdict(claim, "not run", "no run of any side" if not found else found[0].why)]


def _measure(claim: Claim, group: Group, rows: Sequence[Identity], cells: Cells) -> Verdict:
    """Return a verdict with the effect, not decided yet: the interval depends on the size of the family."""
    cells = cells.alike(rows, group)
    sides = [cells.of(row, group, term.statistics) for row, term in zip(rows, claim.contrast, strict=True)]
    verdict = Verdict(claim, "open", "", group)
    ids = tuple(dict.fromkeys(identity for side in sides for identity in side.ids))
    if claim.quantity == "lost":  # counts the runs of all rows that ran, whether or not they learned
        of = {sign: [side for side, t in zip(sides, claim.contrast, strict=True) if t.sign == sign] for sign in (1, -1)}
        (lost, n), (others, m) = (
            (sum(side.lost for side in of[sign]), sum(side.n for side in of[sign])) for sign in of
        )
        if not n or not m:
            return replace(verdict, state="not run", why="no run of one side")
        said = f"{lost} of {n} runs of one side were lost, {others} of {m} of the other"
        return replace(verdict, why=said, effect=Shares(lost, n, others, m), ids=ids)
    if missing := [str(term) for term, side in zip(claim.contrast, sides, strict=True) if not side.n]:
        return replace(verdict, state="not run", why=f"no run of {', '.join(missing)}")
    notes = tuple(dict.fromkeys(note for side in sides for note in side.notes))
    verdict = replace(verdict, ids=ids, notes=notes)
    kinds = {side.kind for side in sides if side.runs}
    if len(kinds) > 1:
        return replace(verdict, why="the sides ran with other arithmetic, or on other data")
    value = _value(claim, sides)
    if value is None:
        return replace(verdict, why="no run of the other side learned")
    why, share = _lost(claim, sides, value)
    own = {term.card.name: term.card for term in claim.contrast}.values()
    weights = dict.fromkeys(rows, 0.0)
    for row, term in zip(rows, claim.contrast, strict=True):
        weights[row] += term.sign
    statistics = claim.contrast[0].statistics
    found = effects.compare(cells, own, group, statistics, weights, value, kinds)
    if found is None and not share:
        return replace(verdict, state="not run", why=f"the records have no {claim.quantity.replace('_', ' ')}")
    return replace(verdict, effect=found, why=why, lost=share)


def _value(claim: Claim, sides: Sequence[Cell]) -> quantities.Value | None:
    """Return the function that reads the compared value from a run; None if `steps_to` has no run to set the level."""
    if claim.quantity == "steps_to":
        against = [
            run for term, side in zip(claim.contrast, sides, strict=True) if term.sign < 0 for run in side.learned
        ]
        if not against:
            return None
        level = claim.level * min(float(run["accuracy"]) for run in against)
        return lambda run: math.log(steps) if (steps := quantities.steps_to(run, level)) and steps < math.inf else None
    return quantities.value(claim.quantity, claim.at)


def _lost(claim: Claim, sides: Sequence[Cell], value: quantities.Value) -> tuple[str, Literal["", "some", "most"]]:
    """Return in words which runs were lost, and how many of the favoured side: "", "some", or "most", which means more
    than half, and more than on the other side, and contradicts the claim. ("", "") if the favoured side lost none."""
    parts: dict[int, list[tuple[int, int]]] = {1: [], -1: []}
    said = []
    for term, side in zip(claim.contrast, sides, strict=True):
        never = sum(value(run) is None for run in side.learned) if claim.quantity == "steps_to" else 0
        # If a run is compared with itself and was lost, both sides lost it.
        for sign in (1, -1) if claim.quantity == "shift" and not claim.contrast[1:] else (term.sign,):
            parts[sign].append((side.lost + never, side.n))
        if side.lost + never:
            how = "never got there" if never == side.lost + never else "failed or stayed at chance"
            said.append(f"{side.lost + never} of {side.n} runs of {term} {how}")
    share = {sign: sum(lost for lost, _ in of) / max(1, sum(n for _, n in of)) for sign, of in parts.items()}
    favoured = {"greater": 1, "less": -1}.get(claim.expect, max(share, key=lambda sign: share[sign]))
    if claim.quantity == "steps_to":  # fewer steps are better
        favoured = -favoured
    if not share[favoured]:
        return "", ""
    return "; ".join(said), "most" if share[favoured] > max(0.5, share[-favoured]) else "some"


def _in_family(verdict: Verdict) -> bool:
    """Say whether a verdict is on a claim of the papers in the papers' setting, at whatever budget."""
    group, claim = verdict.group, verdict.claim
    return not claim.ours and group is not None and group.main and group.dataset in claim.of


def _decide(verdict: Verdict, family: int) -> Verdict:
    claim, found = verdict.claim, verdict.effect
    if verdict.group is None or verdict.state == "not run":
        return verdict
    judged = _in_family(verdict)
    state: State = "open" if judged else "explored"
    why = verdict.why
    low = high = math.nan
    if found is not None:
        bounds = found.interval(family if judged else 1)
        low, high = map(claim.percent, bounds)
        if math.isnan(low):
            few = (
                f"{found.df} of at least {LEAST} degrees of freedom"
                if isinstance(found, Effect)
                else f"fewer than {LEAST}"
            )
            why = "; ".join(filter(None, [why, f"no interval: {few}"]))
        elif judged:
            state = decide(claim, *bounds)
            if verdict.lost and state == "supported":
                state = "open"
            if state == "open" and not why and isinstance(found, Effect):
                halves = {n: claim.percent(found.half_width_of(n, family)) for n in SEEDS if n > found.n}
                with_ = ", ".join(f"{half:.2g} with {n}" for n, half in halves.items())
                why = f"half the interval would be {with_} seeds of these rows" if halves else ""
    if judged and verdict.lost == "most":
        state = "contradicted"
    return replace(verdict, state=state, why=why, low=low, high=high, family=family if judged else 1)


def _count(claim: Claim) -> Verdict:
    """Return the verdict on numbers of parameters, which are counted from the models: no run is needed."""
    from kalmannorm.report import parameters

    terms = [(term, parameters.count(term.card.settings(term.row, term.column))) for term in claim.contrast]
    plus, minus = (sum(n for term, n in terms if term.sign == sign) for sign in (1, -1))
    value = 100 * (plus / minus - 1) if claim.relative else plus - minus
    state: State = "supported" if decide(claim, value, value) == "supported" else "contradicted"
    said = tuple(f"{term}: {number:,}" for term, number in terms)
    return Verdict(claim, state, f"counted from the models: {claim.hypothesis}", notes=said, count=value)


def _timed(claim: Claim, results: Path) -> list[Verdict]:
    """Return a verdict for each measurement of two networks whose training steps alternate: the slowdown in percent."""
    plus, minus = (term.row.key for term in claim.contrast)
    found = []
    for measurement in speed.read(results, claim.contrast[0].card):
        low, middle, high = (100 * (ratio - 1) for ratio in speed.quartiles(speed.ratios(measurement, plus, minus)))
        pairs = len(measurement["seconds"][plus])
        why = f"the middle half of {pairs} pairs of steps; {speed.describe(measurement, plus)}"
        found.append(Verdict(claim, decide(claim, low, high), why, low=low, high=high, count=middle))
    return found
