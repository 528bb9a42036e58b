"""Cards: conf/experiment/NAME.yaml names the runs of a table, figure or count. Sweeps and reports read the same ones.

    name, title   "table7", what it reproduces
    kind          "table" (the default), or one of the pictures' and counts' (report/__init__.py)
    runs          {SETTING: VALUE} of every run
    rows          - {key, label, runs: {SETTING: VALUE}}; of the papers unless `ours: true`. More: `block` (a heading),
                  `columns` (the only ones that it has), `baseline` (a row's key), `paper` (a path into
                  paper_values.yaml, {column} where the column's key goes), `paper_batch` ([grad, stat] of that value)
    columns       kinds of statistics (moving, online), or {key, label, statistics, value, steps_to, at, runs}: `value`
                  of the final ones (accuracy), or optimizer steps to `steps_to` percent, or the accuracy at the part
                  `at` of the steps; `runs` where columns are data sets, networks or batches
    baseline      the row that the others are compared with
    paper, paper_dataset, paper_setting, paper_batches
                  where the printed values stand, and what they are of; false where no batches are printed

A setting is an override of the command line: {arch: resnet32, norm: bkn, batch: g128_s2, norm.options.gain: 0.1}.
Sweeps compose them; a report looks them up in the records (report/frame.py), where what a row does not name is the
default, but for data set, budget, schedule and width, in which tables are grouped.

A row with `sweep: {SETTING: [VALUE, ...], ...}` stands for one row per combination of the values, which its key ends
with.
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
    """Give a column its label: a name alone is a kind of statistics, a key is what it is called."""
    if isinstance(written, str):
        return {"key": written, "label": written, "statistics": written}
    return {"label": written.get("key"), **written} if isinstance(written, dict) else written


def _swept(rows: Iterable[Any]) -> list[Any]:
    """Put in place of a row with a `sweep` one for each combination of the swept values."""
    found = []
    for row in rows:
        if not isinstance(row, dict) or "sweep" not in row:
            found.append(row)
            continue
        plain = {key: value for key, value in row.items() if key != "sweep"}
        for values in itertools.product(*row["sweep"].values()):
            runs = {**row["runs"], **dict(zip(row["sweep"], values, strict=True))}
            found.append({**plain, "key": "_".join(map(str, (row["key"], *values))), "runs": runs})
    return found


@dataclass(frozen=True, config=KNOWN)
class Column:
    """What a column shows of its runs."""

    key: str
    label: str = ""
    statistics: str = "moving"
    value: str = "accuracy"
    steps_to: int | float | None = None
    at: tuple[int | float, int | float] | None = None
    runs: Settings = field(default_factory=dict)


@dataclass(frozen=True, config=KNOWN)
class Row:
    """Runs that differ in nothing but their seed, and in what a card leaves open."""

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
        """Say whether the row has a place in this column."""
        return self.columns is None or column.key in self.columns

    @property
    def name(self) -> str:
        """The label, marked where the row is none of the papers'."""
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
        """Whether it is a table or figure of the papers, not of the talk, and none of ours."""
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
        """Return the settings of a row's runs, in one column."""
        return {**self.runs, **(column.runs if column else {}), **row.runs}


def names() -> list[str]:
    return choices(conf_dir() / "experiment")


@functools.cache
def read(name: str) -> Card:
    """Read a card. UserError: no such card, or one that is no card, with the reason."""
    if name not in names():
        raise UserError(nearest(name, names(), "experiment"))
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
    """Return the settings as the command line takes them."""
    return [f"{key}={_literal(value)}" for key, value in settings.items()]


def _literal(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    return str(value) if isinstance(value, str) else json.dumps(value)
