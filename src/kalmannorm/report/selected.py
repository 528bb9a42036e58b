"""The runs that a picture draws: per row of its card, chosen as a table chooses them, and what must be said of them."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.report import caption, cells, table
from kalmannorm.report.read import Record, Records

NAMED = 6  # rows or notes that a picture's text names one by one

Card = Mapping[str, Any]


@dataclass(frozen=True)
class Selected:
    """A row with the runs that are drawn for it: one a seed, of one arithmetic and one data set; none where not run."""

    row: Mapping[str, Any]
    name: str  # where it stands alone
    selection: cells.Selection
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[Record, ...]:
        """Done runs in the order of their seeds."""
        return self.selection.runs

    @property
    def label(self) -> str:
        """The row's label; rows that differ in a swept setting alone have the same."""
        return caption.row_label(self.row)

    @property
    def config(self) -> Mapping[str, Any]:
        """The row's composed config, without a seed."""
        config: Mapping[str, Any] = self.row["config"]
        return config

    def accuracies(self, statistics: str) -> list[float]:
        """The last epoch's accuracy of each run that has one; without those that are no finite number."""
        found = [values["accuracy"] for run in self.runs if "accuracy" in (values := run["final"].get(statistics, {}))]
        return [float(value) for value in found if math.isfinite(value)]


def select(card: Card, records: Records) -> list[Selected]:
    """One for each row of the card, in its order. Raises UserError, with the command, when no row has a run to draw."""
    of_row = [records.of(row["config"]) for row in card["rows"]]
    common = cells.most_common(of_row)
    selections = [cells.select(runs, common) for runs in of_row]
    if not any(selection.runs for selection in selections):
        state = "all of them failed" if any(selection.failed for selection in selections) else "none is recorded"
        what = caption.short([row["config"] for row in card["rows"]])
        raise UserError(
            f"{card['name']} has nothing to draw: it needs a finished run ({what}), "
            f"but {state} in {records.folder / 'records'}. To run them: {table.command(card)}"
        )
    names = caption.row_names(card["rows"])
    return [
        Selected(row, names[row["key"]], one, tuple(filter(None, (cells.apart(one, selections), *one.notes))))
        for row, one in zip(card["rows"], selections, strict=True)
    ]


def facets(found: Sequence[Selected], title: Callable[[Mapping[str, Any]], str]) -> dict[str, list[Selected]]:
    """The rows by what distinguishes panels, in the order of the card; without panels that have no run."""
    panels: dict[str, list[Selected]] = {}
    for one in found:
        panels.setdefault(title(one.config), []).append(one)
    return {key: rows for key, rows in panels.items() if any(one.runs for one in rows)}


def arch(config: Mapping[str, Any]) -> str:
    """The architecture in a word or two: "inception_cifar", "inception_cifar, width 0.5"."""
    width = config["arch"].get("width", 1)
    return config["arch"]["name"] + (f", width {width:g}" if width != 1 else "")


def said(card: Card, found: Sequence[Selected], *more: str, drawn: Sequence[cells.Selection] | None = None) -> str:
    """The text under a picture: title, setting, seeds, `more`, what was left out, what has not run and its command.

    `drawn`: where not all runs of the rows are in the picture, those that are.
    """
    shown = [one.selection for one in found] if drawn is None else drawn
    parts = [
        f"{card['title'].rstrip('.')}. {caption.short([one.config for one in found])}.",
        caption.seeds(shown),
        caption.precision(shown),
        *more,
    ]
    # Rows of one name (swept settings) go by their keys, which `rows=` takes.
    several = {name for name, count in Counter(one.name for one in found).items() if count > 1}
    names = [one.row["key"] if one.name in several else one.name for one in found]
    notes = [f"{name}: {note}" for name, one in zip(names, found, strict=True) for note in one.notes]
    if notes:
        parts.append(f"{_some(notes)}.")
    missing = [name for name, one in zip(names, found, strict=True) if not one.runs and not one.selection.failed]
    if missing:
        parts.append(f"Not run: {_some(missing)}. To run what is missing: {table.command(card)}")
    return " ".join(part for part in parts if part)


def _some(words: Sequence[str]) -> str:
    rest = f"; and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return "; ".join(words[:NAMED]) + rest
