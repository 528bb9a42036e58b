"""Reading results/records: every table and figure is made from what this module returns, and from nothing else."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmannorm.experiments.record import files, read_file

if TYPE_CHECKING:
    import pandas

    from kalmannorm.report.gaps import Gaps

Record = Mapping[str, Any]  # experiments.record.Record, as its readers see it

# Settings that a row of a table does not fix: how precisely the arithmetic runs. Runs that differ in them never share a
# mean (cells.py).
EXECUTION = ("precision", "compile", "deterministic")
_LOOSE = frozenset((*EXECUTION, "seed"))


@dataclass(frozen=True)
class Records:
    """The records of one results folder. `stale` ones, made under another NUMERICS, are listed but never tabulated."""

    folder: Path
    numerics: int
    current: tuple[Record, ...]
    stale: tuple[Record, ...]

    def of(self, config: Mapping[str, Any]) -> list[Record]:
        """The current records of a row: their configs equal `config` but for the seed and EXECUTION."""
        return self._current_by_row.get(row_key(config), [])

    def stale_of(self, config: Mapping[str, Any]) -> list[Record]:
        """The stale records that would otherwise belong to the row."""
        return self._stale_by_row.get(row_key(config), [])

    def open_settings_of(self, config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Configs of the current records of a row's network, normalizer and batches, one of each data set, budget,
        schedule and width."""
        return self._current_by_kind.get(kind_key(config), [])

    @functools.cached_property
    def _current_by_kind(self) -> dict[str, list[Mapping[str, Any]]]:
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for runs in self._current_by_row.values():
            config = runs[0]["config"]
            kinds.setdefault(kind_key(config), []).append(config)
        return kinds

    @functools.cached_property
    def _current_by_row(self) -> dict[str, list[Record]]:
        return _by_row(self.current)

    @functools.cached_property
    def _stale_by_row(self) -> dict[str, list[Record]]:
        return _by_row(self.stale)


def records(results: Path, numerics: int) -> Records:
    """All records in `results`/records, in the order of their ids; none when the folder does not exist.

    Raises UserError for a file that is not a whole record: a table must not silently lose a run.
    """
    current: list[Record] = []
    stale: list[Record] = []
    for path in files(results):
        record = read_file(path)
        (current if record["numerics"] == numerics else stale).append(record)
    return Records(results, numerics, tuple(current), tuple(stale))


def load(results: str | Path = "results") -> "pandas.DataFrame":
    """One row per record of every NUMERICS, with dotted columns, for notebooks.

    Settings stand under their own names ("seed", "norm.name", "batch.stat_batch"), results under the record's
    ("final.moving.accuracy", "host.seconds", ...), curves as lists ("curves.moving").
    """
    import pandas

    rows = []
    for path in files(Path(results)):
        record: Record = read_file(path)
        row = {key: record.get(key) for key in ("id", "numerics", "status", "reason", "parameters")}
        row |= flat(record["config"], "")
        for part in ("final", "data", "host", "curves"):
            row |= flat(record.get(part) or {}, f"{part}.")
        rows.append(row)
    return pandas.DataFrame(rows)


def curves(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """The accuracies after every epoch of `load`'s records, in long form: one row per run, epoch and statistics.

    Columns: every column of `load` that is no curve and no result, and "epoch", "step" (optimizer steps), "statistics"
    ("moving" or "online") and "accuracy" in percent. Runs without curves (failed ones) have no rows.
    """
    import pandas

    settings = [column for column in frame.columns if not column.startswith(("curves.", "final."))]
    parts = []
    for statistics in ("moving", "online"):
        lists = {"epoch": "curves.epoch", "step": "curves.step", "accuracy": f"curves.{statistics}"}
        if not set(lists.values()) <= set(frame.columns):
            continue
        whole = frame[frame[lists["epoch"]].str.len() > 0].dropna(subset=list(lists.values()))
        part = whole[settings].assign(statistics=statistics, **{key: whole[name] for key, name in lists.items()})
        parts.append(part.explode(list(lists), ignore_index=True))
    if not parts:
        return pandas.DataFrame(columns=[*settings, "epoch", "step", "statistics", "accuracy"])
    return pandas.concat(parts, ignore_index=True).astype({"epoch": int, "step": int, "accuracy": float})


def variance_gaps(identity: str, results: str | Path = "results") -> "Gaps":
    """The arrays beside one run's record: variance gaps of the last normalizers, gaps and errors per layer.

    UserError: no such record, or no arrays beside it.
    """
    from kalmannorm.report import gaps

    path = Path(results) / "records" / f"{identity}.json"
    return gaps.load(read_file(path), path.with_suffix(".npz"))


def row_key(config: Mapping[str, Any]) -> str:
    """Equal for two configs exactly when their runs belong to the same row."""
    return json.dumps({key: value for key, value in config.items() if key not in _LOOSE}, sort_keys=True)


def kind_key(config: Mapping[str, Any]) -> str:
    """Equal for two configs of the same network, normalizer and batches: what a card's row fixes."""
    return json.dumps([config["arch"]["name"], config["norm"], config["batch"]], sort_keys=True)


def _by_row(group: tuple[Record, ...]) -> dict[str, list[Record]]:
    rows: dict[str, list[Record]] = {}
    for record in group:
        rows.setdefault(row_key(record["config"]), []).append(record)
    return rows


def flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A tree of dicts as one dict with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
