"""Read cards: conf/experiment/NAME.yaml names the runs of a table, figure or count, for sweeps and reports alike.

    name, title   "table7", and the title of what it reproduces
    kind          "table" (the default), or a kind of figure or count (report/__init__.py)
    runs          {SETTING: VALUE} for every run
    rows          - {key, label, runs: {SETTING: VALUE}}; from the papers unless `ours: true`. Optional: `block` (a
                  heading), `columns` (the only ones that the row has), `baseline` (a row's key), `paper` (a path into
                  paper_values.yaml, with {column} for the column's key), `paper_batch` ([grad, stat] of that value)
    columns       kinds of statistics (moving, online), or {key, label, statistics, value, steps_to, at, runs}: the
                  cell shows `value` of the final evaluation (accuracy), or the number of optimizer steps to `steps_to`
                  percent, or the accuracy after the part `at` of the steps; `runs`: settings of the column, where
                  columns are data sets, networks or batches
    baseline      key of the row that the others are compared with
    paper, paper_dataset, paper_setting
                  where the printed values are in paper_values.yaml, and the data set and setting that they are for
    paper_batches false if the paper does not print the batches

A setting is an override as on the command line: {arch: resnet32, norm: bkn, batch: g128_s2, norm.options.gain: 0.1}.
A sweep composes the runs from them; a report looks the runs up in the records (report/frame.py). A setting that a row
does not name has its default there, except data set, budget, schedule and width: tables are grouped by these.

A row with `sweep: {SETTING: [VALUE, ...], ...}` stands for one row for each combination of the values, which are
appended to its key.
"""

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments.composition import choices
from kalmannorm.experiments.config import conf_dir

Settings = Mapping[str, Any]
KNOWN = ConfigDict(extra="forbid")


def _column(written: Any) -> Any:
    """Complete a column: a name alone is a kind of statistics, and the label is the key unless it is given."""
    if isinstance(written, str):
        return {"key": written, "label": written, "statistics": written}
    return {"label": written.get("key"), **written} if isinstance(written, dict) else written


def _swept(rows: Iterable[Any]) -> list[Any]:
    """Replace each row that has a `sweep` by one row for each combination of the swept values."""
    found = []
    for row in rows:
        if not isinstance(row, dict) or "sweep" not in row:
            found.append(row)
            continue
        shared = {key: value for key, value in row.items() if key != "sweep"}
        for values in itertools.product(*row["sweep"].values()):
            runs = {**row["runs"], **dict(zip(row["sweep"], values, strict=True))}
            found.append({**shared, "key": "_".join(map(str, (row["key"], *values))), "runs": runs})
    return found


@dataclass(frozen=True, config=KNOWN)
class Column:
    """A column of a card: which quantity of its runs it shows."""

    key: str
    label: str = ""
    statistics: str = "moving"
    value: str = "accuracy"
    steps_to: int | float | None = None
    at: tuple[int | float, int | float] | None = None
    runs: Settings = field(default_factory=dict)


@dataclass(frozen=True, config=KNOWN)
class Row:
    """A row of a card: its runs differ only in the seed and in settings that the card leaves open."""

    key: str
    label: str
    runs: Settings
    block: str = ""
    ours: bool = False
    columns: tuple[str, ...] | None = None
    baseline: str | None = None
    paper: str | None = None
    paper_batch: tuple[int, int] | None = None

    def has(self, column: Column) -> bool:
        """Say whether the row has a cell in this column."""
        return self.columns is None or column.key in self.columns

    @property
    def name(self) -> str:
        """The label, marked as ours if the row is from no paper."""
        return f"{self.label} (ours)" if self.ours else self.label


@dataclass(frozen=True, config=KNOWN)
class Card:
    """One file of conf/experiment."""

    name: str
    title: str
    rows: Annotated[tuple[Row, ...], BeforeValidator(_swept)]
    columns: tuple[Annotated[Column, BeforeValidator(_column)], ...] = (Column("moving", "moving"),)
    kind: str = "table"
    runs: Settings = field(default_factory=dict)
    seeds: int = 1
    devices: int = 1
    seconds: int | float = 0
    baseline: str | None = None
    paper: str | None = None
    paper_dataset: str = ""
    paper_setting: str = ""
    paper_batches: bool = True
    paper_ratio: str = ""
    note: str = ""
    same_as: str = ""

    @property
    def of_papers(self) -> bool:
        """Whether it reproduces a table or figure of the papers, rather than the talk's or our own."""
        return self.name.startswith(("table", "figure", "v1-"))

    @property
    def fixes_dataset(self) -> bool:
        """Whether its columns are data sets."""
        return any("dataset" in column.runs for column in self.columns)

    @property
    def has_columns_of_runs(self) -> bool:
        """Whether its columns have runs of their own."""
        return any(column.runs for column in self.columns)

    def row(self, key: str) -> Row:
        """Find the row of this key. UserError: there is none."""
        found = next((row for row in self.rows if row.key == key), None)
        if found is None:
            raise UserError(f"{self.name}: {nearest(key, [row.key for row in self.rows], 'row')}")
        return found

    def columns_of(self, row: Row) -> list[Column]:
        return [column for column in self.columns if row.has(column)]

    def settings(self, row: Row, column: Column | None = None) -> dict[str, Any]:
        """Return the settings of a row's runs, those of `column` included."""
        return {**self.runs, **(column.runs if column else {}), **row.runs}


def names() -> list[str]:
    return choices(conf_dir() / "experiment")


@functools.cache
def read(name: str) -> Card:
    """Read a card. UserError: there is no such card, or its file is invalid, with the reason."""
    if name not in names():
        raise UserError(nearest(name, names(), "experiment", "`make` lists all"))
    try:
        tree = yaml.safe_load((conf_dir() / "experiment" / f"{name}.yaml").read_bytes())
        return TypeAdapter(Card).validate_python(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (yaml.YAMLError, UnicodeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"conf/experiment/{name}.yaml is no card: {reason}")


def overrides(settings: Settings) -> list[str]:
    """Return the settings as overrides for the command line."""
    return [f"{key}={_literal(value)}" for key, value in settings.items()]


def _literal(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return str(value) if isinstance(value, str) else json.dumps(value)
