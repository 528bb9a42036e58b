"""From the records of a table's row to one cell: which runs share a mean, and what must be said about the others.

A mean is taken over seeds alone. Runs of one row that differ in arithmetic or data are never averaged: the kind with
the most seeds fills the cell, a footnote names the rest.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kalmannorm.report.quantities import accuracy, accuracy_at, steps_to
from kalmannorm.report.read import Record
from kalmannorm.report.statistics import Summary, summarize

Batch = tuple[int, int | None]  # grad_batch, stat_batch
State = Literal["done", "failed", "no value", "not reached", "not run"]


class Column(NamedTuple):
    """What a column of a table shows of the runs: an accuracy (or another final value), or the steps to one."""

    key: str
    label: str
    statistics: str = "moving"
    steps_to: float | None = None  # percent
    value: str = "accuracy"  # its name in a record's final values, in percent
    at: float | None = None  # part of the run's steps; None: at its end

    @property
    def decimals(self) -> int:
        """How many are shown."""
        return 2 if self.steps_to is None else 0


class Setting(NamedTuple):
    """What runs must have in common, beside their row, to be averaged."""

    precision: str
    compile: bool
    deterministic: bool
    data: str  # sha256 of the data set, else its exactness in words; "" where a record has neither


@dataclass(frozen=True)
class Selection:
    """The runs of one row that its cells rest on: one done record a seed, in the order of the seeds."""

    runs: tuple[Record, ...]
    setting: Setting | None  # None without a done run
    failures: tuple[Record, ...]
    notes: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether there are records, and all of them failed."""
        return bool(self.failures) and not self.runs


@dataclass(frozen=True)
class Cell:
    """One row under one kind of statistics."""

    row: str
    column: str
    state: State
    summary: Summary | None  # of a `done` cell, None of every other
    by_seed: dict[int, float]
    ids: tuple[str, ...]
    paper: float | None
    notes: tuple[str, ...]
    batch: Batch  # of the cell's runs
    decimals: int


def setting_of(record: Record) -> Setting:
    """The setting that a record was made under."""
    config, data = record["config"], record.get("data") or {}
    return Setting(
        str(config.get("precision")),
        bool(config.get("compile")),
        bool(config.get("deterministic")),
        str(data.get("sha256") or data.get("fidelity") or ""),
    )


def most_common(rows: Sequence[Sequence[Record]]) -> Counter[Setting]:
    """How many done runs of all rows have each setting: decides between settings that tie within a row."""
    return Counter(setting_of(run) for runs in rows for run in runs if run["status"] == "done")


def select(runs: Sequence[Record], common: Counter[Setting]) -> Selection:
    """Choose the runs that one row's cells rest on, with a note for each run left out."""
    done = [run for run in runs if run["status"] == "done"]
    failed = [run for run in runs if run["status"] == "failed"]
    if not done:
        return Selection((), None, tuple(failed), (failures(failed, len(runs)),) if failed else ())

    kinds: dict[Setting, list[Record]] = {}
    for run in done:
        kinds.setdefault(setting_of(run), []).append(run)
    seeds_of = {kind: len({_seed(run) for run in same}) for kind, same in kinds.items()}
    chosen = max(kinds, key=lambda kind: (seeds_of[kind], common[kind], tuple(map(str, kind))))

    by_seed: dict[int, list[Record]] = {}
    for run in kinds[chosen]:
        by_seed.setdefault(_seed(run), []).append(run)
    notes = []
    kept = []
    for seed, same in sorted(by_seed.items()):
        same.sort(key=lambda run: (str((run.get("host") or {}).get("started")), run["id"]))
        kept.append(same[0])
        if len(same) > 1:
            others = ", ".join(run["id"] for run in same[1:])
            notes.append(f"seed {seed} has {len(same)} done records; {same[0]['id']} is used, left out: {others}")
    for kind, others_of_kind in kinds.items():
        if kind != chosen:
            notes.append(
                f"left out, {contrast(kind, chosen)}: "
                + ", ".join(f"seed {_seed(run)} ({run['id']})" for run in sorted(others_of_kind, key=_seed))
            )
    if failed:
        notes.append(failures(failed, len(runs), chosen))
    return Selection(tuple(kept), chosen, tuple(failed), tuple(notes))


def cell(
    row: str,
    column: Column,
    selection: Selection,
    paper: float | None,
    notes: Sequence[str],
    batch: Batch,
) -> Cell:
    """The last epoch's accuracy, one on the way to it, or the steps to one; `notes` come before the selection's own.

    Steps have no mean where a run does not reach the accuracy: that of the others would be too good.
    """
    by_seed: dict[int, float] = {}
    ids, missing, broken, never = [], [], [], []
    for run in selection.runs:
        value = accuracy(run, column.statistics, column.value)
        if column.at is not None:
            value = accuracy_at(run, column.statistics, column.at)
        if value is not None and column.steps_to is not None:
            value = steps_to(run, column.statistics, column.steps_to)
        if value is None:
            missing.append(f"seed {_seed(run)} ({run['id']})")
        elif math.isinf(value) and column.steps_to is not None:
            never.append(f"seed {_seed(run)} ({run['id']})")
        elif not math.isfinite(value):
            broken.append(f"seed {_seed(run)} ({run['id']})")
        else:
            by_seed[_seed(run)] = value
            ids.append(run["id"])

    said = [*notes, *selection.notes]
    what = f"{column.statistics} {column.value.replace('_', ' ')}"
    if missing:
        said.append(f"no {what} in the record of {', '.join(missing)}")
    if broken:
        said.append(f"left out, the {what} is not a finite number: {', '.join(broken)}")
    if never:
        said.append(f"{column.steps_to:g} % never reached: {', '.join(never)}")
        by_seed, ids = {}, [run["id"] for run in selection.runs]
    state: State
    if never:
        state = "not reached"
    elif by_seed:
        state = "done"
    elif selection.failed or broken:
        state = "failed"
    else:
        state = "no value" if missing else "not run"
    summary = summarize(list(by_seed.values())) if by_seed else None
    return Cell(row, column.key, state, summary, by_seed, tuple(ids), paper, tuple(said), batch, column.decimals)


def apart(selection: Selection, others: Sequence[Selection]) -> str:
    """A note when a row's runs were made under another setting than most rows' runs; else ""."""
    settings = Counter(other.setting for other in others if other.setting)
    if not selection.setting or len(settings) < 2:
        return ""
    most = settings.most_common(1)[0][0]
    return f"unlike the other rows: {contrast(selection.setting, most)}" if selection.setting != most else ""


def contrast(setting: Setting, other: Setting) -> str:
    """In words, how `setting` differs from `other`: "precision bf16 instead of fp32"."""
    said = []
    if setting.precision != other.precision:
        said.append(f"precision {setting.precision} instead of {other.precision}")
    if setting.compile != other.compile:
        said.append("compiled" if setting.compile else "not compiled")
    if setting.deterministic != other.deterministic:
        said.append("deterministic" if setting.deterministic else "not deterministic")
    if setting.data != other.data:
        said.append(f"data with sha256 {_short(setting.data)} instead of {_short(other.data)}")
    return ", ".join(said)


def failures(failed: Sequence[Record], runs: int, chosen: Setting | None = None) -> str:
    """One note for all failed runs: "1 of 3 runs failed: loss is nan (seed 2)"."""
    reasons: dict[str, list[str]] = {}
    for run in sorted(failed, key=_seed):
        where = f"seed {_seed(run)}"
        # A failed record knows no data, so only its arithmetic is compared.
        if chosen and (difference := contrast(setting_of(run)._replace(data=chosen.data), chosen)):
            where += f", {difference}"
        reason = " ".join(str(run.get("reason") or "no reason recorded").split())
        reasons.setdefault(reason, []).append(where)
    because = "; ".join(f"{reason} ({', '.join(seeds)})" for reason, seeds in reasons.items())
    return f"{len(failed)} of {runs} run{'s' if runs > 1 else ''} failed: {because}"


def _seed(run: Record) -> int:
    return int(run["config"]["seed"])


def _short(sha256: str) -> str:
    return (sha256[:8] if " " not in sha256 else sha256) or "unknown"
