"""From the frame to cells: the runs of a card's row, in one group, under one kind of statistics."""

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd

from kalmannorm.experiments import card as cards
from kalmannorm.experiments.card import Card, Column, Row
from kalmannorm.report import frame
from kalmannorm.report.frame import Identity
from kalmannorm.report.quantities import Run, Value

LONGEST = 60  # most characters of a group in a file's name
FIRST_STEPS = "start"  # the budget whose runs stop after a few steps, which are drawn; their accuracies are not used


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
