"""Verdicts: the papers' claims against the records, one for each claim, data set and budget that has runs.

A verdict rests on seeds that all sides of the claim have, run with the same arithmetic on the same data. Where runs of
one side failed, or networks did not learn, the others alone decide nothing. All tests made at one budget, whatever the
schedule or the width, are one family, corrected by Holm's method; budgets are never mixed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments.measurement import FOLDER, where
from kalmannorm.report import caption, cells, hypotheses, quantities, speed, variants
from kalmannorm.report.cells import Setting
from kalmannorm.report.claims import Claim, Term, claims
from kalmannorm.report.hypotheses import ALPHA, Outcome
from kalmannorm.report.read import Record, Records
from kalmannorm.report.statistics import middle_half, summarize
from kalmannorm.report.variants import Settings, Variant

COUNTED = "parameters"  # a quantity that is counted from the models: no run is needed, and no test
TIMED = "speed"  # one that results/speed has measurements of (report/speed.py): no run and no test either
NO_JUDGE = "smoke"  # a budget whose numbers mean nothing

State = Literal["supported", "contradicted", "undecided", "not run"]
Cards = Mapping[str, Mapping[str, Any]]
Config = Mapping[str, Any]
Side = Mapping[Setting, Mapping[int, Record]]  # the done runs of one side of a claim, by setting and seed


@dataclass(frozen=True)
class Verdict:
    """What the records say of a claim in one setting; without a variant when nothing is run at all."""

    claim: Claim
    state: State
    why: str
    variant: Variant | None = None
    dataset: str = ""
    outcome: Outcome | None = None
    values: Mapping[int, float] = field(default_factory=dict)  # by seed
    adjusted: float | None = None  # p after Holm's correction
    tests: int = 0  # of the family
    rests_on: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()  # of the records
    measured_at: str = ""  # of a speed: input and device
    doubt: str = ""  # why the test's answer is no verdict

    @property
    def reduced(self) -> str:
        """ "at budget lite", of a speed "at 64x64 px, ...": the prominent mark of what is not the papers'; else ""."""
        if self.measured_at:
            return f"at {self.measured_at}"
        return f"at budget {self.variant.budget_label}" if self.variant and not self.variant.full else ""

    @property
    def estimate(self) -> str:
        """ "+1.20 ± 0.40 points (3 seeds)"."""
        if self.outcome is None:
            return ""
        found = self.outcome.summary
        spread = None if self.outcome.p is None else found.half_width
        half_width = "" if spread is None else f" ± {_short(spread)}"
        unit = f" {self.claim.unit}".rstrip()
        seeds = "" if self.claim.quantity in (COUNTED, TIMED) else f" ({found.n} seed{'s' if found.n > 1 else ''})"
        return f"{_signed(found.mean)}{half_width}{unit}{seeds}"

    @property
    def test(self) -> str:
        """ "p = 0.01, corrected for 12 tests 0.04"; "" where nothing was tested."""
        if self.outcome is None or self.outcome.p is None or self.adjusted is None:
            return ""
        return f"p = {self.outcome.p:.2g}, corrected for {self.tests} test{'s' * (self.tests > 1)} {self.adjusted:.2g}"


def evaluate(records: Records, cards: Cards) -> list[Verdict]:
    """Verdicts in the order of the claims. `cards`: by name, with composed rows (experiment.load)."""
    named = variants.named_archs(cards)
    verdicts = [verdict for claim in claims() for verdict in _of_claim(claim, records, cards, named)]
    return _correct(verdicts)


def _of_claim(claim: Claim, records: Records, cards: Cards, named: frozenset[str]) -> list[Verdict]:
    try:
        rows = [_row(term, cards) for term in claim.contrast]
        if claim.quantity == TIMED:
            found = _timed(claim, cards[claim.contrast[0].card], records)
            return found or [Verdict(claim, "not run", "no measurement")]
    except UserError as error:
        return [Verdict(claim, "not run", str(error))]
    if claim.quantity == COUNTED:
        return [_count(claim, [variants.composed(settings) for settings in rows])]
    found = [
        _judge(claim, variant, [variant.of(settings) for settings in rows], records)
        for variant in variants.of_rows(rows, records, named)
        if variant.budget != NO_JUDGE and (not claim.datasets or variant.dataset in claim.datasets)
    ]
    return found or [Verdict(claim, "not run", "no run of any side")]


def _row(term: Term, cards: Cards) -> Settings:
    """The overrides of a term's row. Raises UserError when its card is not there, or has no such row or column."""
    if term.card not in cards:
        raise UserError(f"no card {term.card} yet")
    card = cards[term.card]
    row = next((row for row in card["rows"] if row["key"] == term.row), None)
    if row is None:
        raise UserError(f"{term.card}: {nearest(term.row, [row['key'] for row in card['rows']], 'row')}")
    of_columns: Mapping[str, Settings] = row["settings"]
    if term.column is None:
        return next(iter(of_columns.values()))
    if term.column not in of_columns:
        raise UserError(f"{term.card}: row {term.row} has no column {term.column}")
    return of_columns[term.column]


def _count(claim: Claim, configs: Sequence[Config]) -> Verdict:
    """The verdict of a claim about numbers of parameters."""
    from kalmannorm.report.parameters import count

    terms = [(term.sign, count(config)) for term, config in zip(claim.contrast, configs, strict=True)]
    outcome = hypotheses.examine(claim.hypothesis, [_combined(claim, terms)])
    said = [f"{term}: {number:,}" for term, (_, number) in zip(claim.contrast, terms, strict=True)]
    norms = dict.fromkeys(caption.estimator(config["norm"]) for config in configs if config["norm"].get("preset"))
    return Verdict(
        claim,
        "supported" if outcome.in_favour else "contradicted",
        f"counted from the models, no test: {claim.hypothesis}",
        outcome=outcome,
        rests_on=(*said, *norms),
    )


def _timed(claim: Claim, card: Mapping[str, Any], records: Records) -> list[Verdict]:
    """A verdict for each measurement of two networks whose training steps alternate: how much slower the second is."""
    plus, minus = (term.row for term in claim.contrast)
    found = []
    for measurement in speed.read(records.folder, card):
        more = [100 * (ratio - 1) for ratio in speed.ratios(measurement, plus, minus)]
        low, high = middle_half(more)
        within, beyond = high < claim.hypothesis.than, low > claim.hypothesis.than
        config = measurement["configs"][plus]
        norms = [caption.estimator(of["norm"]) for of in measurement["configs"].values() if of["norm"].get("preset")]
        verdict = Verdict(
            claim,
            "supported" if within else "contradicted" if beyond else "undecided",
            f"median of {len(more)} neighbouring steps, no test: the middle half is {_signed(low)} to {_signed(high)}",
            outcome=Outcome(summarize([median(more)]), None, within, None),
            rests_on=(*norms, f"measurement {measurement['id']} of results/{FOLDER}"),
            measured_at=f"{speed.setting(config)}, on {where(measurement)}",
        )
        found.append(verdict)
    return found


def _judge(claim: Claim, variant: Variant, configs: Sequence[Config], records: Records) -> Verdict:
    """The verdict before the correction for the number of tests."""
    verdict = Verdict(claim, "not run", "", variant, variant.dataset)
    runs_of = [records.of(config) for config in configs]
    sides = [_by_setting(runs) for runs in runs_of]
    missing = {str(term): runs for term, runs, side in zip(claim.contrast, runs_of, sides, strict=True) if not side}
    if missing and not all(missing.values()):
        return replace(verdict, why=f"no finished run of {', '.join(term for term in missing if not missing[term])}")
    if missing:
        said = "; ".join(f"{term}: {cells.failures(runs, len(runs))}" for term, runs in missing.items())
        ids = tuple(run["id"] for runs in missing.values() for run in runs)
        return replace(verdict, state="undecided", why=said, ids=ids)
    common = _common(sides)
    if common is None:
        return replace(verdict, state="undecided", why="no seed that all sides ran with the same arithmetic and data")
    setting, seeds = common
    runs = [[side[setting][seed] for side in sides] for seed in seeds]
    values: dict[int, float] = {}
    lost = _lost(claim, runs_of, sides, setting)
    notes = [*lost, *_left_out(sides, setting, seeds)]
    bound = False  # whether a value is only a bound in the claim's favour
    for seed, row in zip(seeds, runs, strict=True):
        value, is_bound = _value(claim, row, records.folder)
        bound = bound or is_bound
        if value is None:
            notes.append(f"seed {seed} left out: a record has no {claim.quantity.replace('_', ' ')}")
        else:
            values[seed] = value
    used = list(
        {run["id"]: run for seed, row in zip(seeds, runs, strict=True) if seed in values for run in row}.values()
    )
    idle = [run["id"] for run in used if quantities.at_chance(run)]
    if idle:
        notes.append(f"no better than chance, under any statistics: {_few(idle)}")
    if bound:
        notes.append("a run never reaches the other's final accuracy: its value is a bound in the claim's favour")
    verdict = replace(verdict, notes=tuple(notes), ids=tuple(run["id"] for run in used))
    if not values:
        return replace(verdict, why=f"the records have no {claim.quantity.replace('_', ' ')}")
    outcome = hypotheses.examine(claim.hypothesis, list(values.values()))
    nothing_learned = any(all(run["id"] in idle for run in row) for seed, row in zip(seeds, runs, strict=True))
    doubts = [
        "; ".join(lost),
        "networks did not learn" if nothing_learned or (idle and claim.quantity in quantities.OF_THE_LEARNED) else "",
        "a run never reached the accuracy" if bound and outcome.in_favour else "",
    ]
    return replace(
        verdict,
        state="undecided",
        outcome=outcome,
        values=values,
        rests_on=_rests_on(used, configs, setting, records),
        doubt="; ".join(filter(None, doubts)),
    )


def _by_setting(runs: Sequence[Record]) -> dict[Setting, dict[int, Record]]:
    """Done runs by what they must have in common, then by seed; the first started where a seed is there twice."""
    found: dict[Setting, dict[int, Record]] = {}
    done = [run for run in runs if run["status"] == "done"]
    for run in sorted(done, key=lambda run: (str((run.get("host") or {}).get("started")), run["id"])):
        found.setdefault(cells.setting_of(run), {}).setdefault(int(run["config"]["seed"]), run)
    return found


def _lost(claim: Claim, runs_of: Sequence[Sequence[Record]], sides: Sequence[Side], setting: Setting) -> list[str]:
    """For each side the seeds that failed and were never finished: without them the others may look better than all."""
    said = {}
    for term, runs, side in zip(claim.contrast, runs_of, sides, strict=True):
        failed = [
            run
            for run in runs
            if run["status"] == "failed"
            and cells.setting_of(run)._replace(data=setting.data) == setting  # a failed record knows no data
            and run["config"]["seed"] not in side[setting]
        ]
        if failed:
            said[f"{term.card}/{term.row}"] = cells.failures(failed, len(failed) + len(side[setting]))
    return [f"{row}: {failures}" for row, failures in said.items()]


def _common(sides: Sequence[Side]) -> tuple[Setting, list[int]] | None:
    """The setting with the most seeds that all sides have, and these seeds."""
    shared = {
        setting: sorted(set.intersection(*(set(side[setting]) for side in sides)))
        for setting in sides[0]
        if all(setting in side for side in sides)
    }
    setting = max(shared, key=lambda setting: (len(shared[setting]), str(setting)), default=None)
    return (setting, shared[setting]) if setting is not None and shared[setting] else None


def _value(claim: Claim, runs: Sequence[Record], folder: Path) -> tuple[float | None, bool]:
    """One seed's value, and whether it is only a bound in the claim's favour."""
    if claim.quantity == "steps_saved":
        return _steps_saved(claim, runs)
    terms = []
    for term, run in zip(claim.contrast, runs, strict=True):
        value = quantities.of_run(run, claim.quantity, term.statistics, folder, claim.at)
        if value is None:
            return None, False
        terms.append((term.sign, value))
    if claim.relative and any(sign < 0 and not value for sign, value in terms):
        return None, False
    return _combined(claim, terms), False


def _combined(claim: Claim, terms: Sequence[tuple[int, float]]) -> float:
    """The signed sum, or the plus side over the minus side in percent more."""
    if claim.relative:
        (plus,) = (value for sign, value in terms if sign > 0)
        (minus,) = (value for sign, value in terms if sign < 0)
        return 100 * (plus / minus - 1)
    return math.fsum(sign * value for sign, value in terms)


def _steps_saved(claim: Claim, runs: Sequence[Record]) -> tuple[float | None, bool]:
    """Percent fewer steps of the first run to the second's final accuracy, both at their first evaluation at it."""
    ours, theirs = runs
    statistics = claim.contrast[0].statistics
    target = quantities.accuracy(theirs, statistics)
    if target is None:
        return None, False
    steps, of_theirs = quantities.steps_to(ours, statistics, target), quantities.steps_to(theirs, statistics, target)
    if math.isnan(steps) or not math.isfinite(of_theirs):
        return None, False
    never = math.isinf(steps)
    if never:  # it needs more steps than it made
        steps = float(ours["curves"]["step"][-1])
    return 100 * (1 - steps / of_theirs), never


def _left_out(sides: Sequence[Side], chosen: Setting, seeds: list[int]) -> list[str]:
    others = sorted(
        {run["id"] for side in sides for key, runs in side.items() if key != chosen for run in runs.values()}
    )
    alone = sorted({run["id"] for side in sides for seed, run in side[chosen].items() if seed not in seeds})
    notes = []
    if others:
        notes.append(f"left out, of other arithmetic or data: {_few(others)}")
    if alone:
        notes.append(f"left out, seeds that not all sides have: {_few(alone)}")
    return notes


def _rests_on(runs: Sequence[Record], configs: Sequence[Config], setting: Setting, records: Records) -> tuple[str, ...]:
    norms = dict.fromkeys(caption.estimator(config["norm"]) for config in configs if config["norm"].get("preset"))
    fidelities = dict.fromkeys(caption.fidelity(run) for run in runs)
    rates = {
        str(run["schedule"])
        for config in configs
        for run in records.open_settings_of(config)
        if all(run[part]["name"] == config[part]["name"] for part in ("dataset", "budget"))
    }
    count = (
        "one learning-rate schedule"
        if len(rates) == 1
        else f"one of {len(rates)} learning-rate schedules that were run"
    )
    seeds = sorted({run["config"]["seed"] for run in runs})
    return (
        caption.short(configs),
        f"data {' / '.join(fidelities)}",
        *norms,
        *(["the initial gain is ours"] if any("initial gain" in norm for norm in norms) else []),
        count,
        caption.arithmetic([setting]),
        f"seed{'s' if len(seeds) > 1 else ''} {_few([str(seed) for seed in seeds])}",
    )


def _correct(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Holm's correction, one family for each budget, and the states that follow."""
    families: dict[str, list[int]] = {}
    for i, verdict in enumerate(verdicts):
        if verdict.variant and verdict.outcome and verdict.outcome.p is not None:
            families.setdefault(verdict.variant.budget, []).append(i)
    corrected = list(verdicts)
    for members in families.values():
        adjusted = hypotheses.holm([_p(verdicts[i]) for i in members])
        for i, p in zip(members, adjusted, strict=True):
            corrected[i] = replace(verdicts[i], adjusted=p, tests=len(members))
    return [_decide(verdict) for verdict in corrected]


def _p(verdict: Verdict) -> float:
    assert verdict.outcome is not None and verdict.outcome.p is not None
    return verdict.outcome.p


def _decide(verdict: Verdict) -> Verdict:
    outcome, claim = verdict.outcome, verdict.claim
    if outcome is None or claim.quantity in (COUNTED, TIMED):
        return verdict
    if outcome.p is None or verdict.adjusted is None:
        if verdict.doubt:
            return replace(verdict, why=verdict.doubt)
        if outcome.summary.n < 2:
            return replace(verdict, why="one seed has no spread: at least 2 are needed, to know how many")
        return replace(verdict, why="the same in every seed: no spread to test against")
    decided = verdict.adjusted < ALPHA
    if decided and verdict.doubt:
        return replace(verdict, why=f"{'in favour' if outcome.in_favour else 'against'}, but {verdict.doubt}")
    if decided:
        return replace(verdict, state="supported" if outcome.in_favour else "contradicted", why=str(claim.hypothesis))
    count = hypotheses.needed(claim.hypothesis, outcome, verdict.tests)
    many = f"about {count:,}" if count else f"more than {hypotheses.MOST:,}"
    uncorrected = ", as a single test it would be decided" if outcome.p < ALPHA else ""
    leaning = "leans to the claim" if outcome.in_favour else "leans against it"
    doubt = f"; {verdict.doubt}" if verdict.doubt else ""
    return replace(verdict, why=f"{leaning}{uncorrected}; by the observed spread {many} seeds would decide{doubt}")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{_short(abs(value))}"
