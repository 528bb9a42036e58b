"""A table of accuracies from an experiment card and the records: cells, differences to the baseline, what must be said.

A card is a dict:

    name, title   "table7", what it reproduces
    kind?         "table" (the default), or another of KINDS
    rows          [{"key", "label", "config", "configs"?: by column, "columns"?: [key, ...], "ours"?: bool,
                    "block"?: heading, "baseline"?: key, "paper"?: path | None, "paper_batch"?: [grad, stat]}, ...]
    columns       ["moving", ...]: kinds of statistics, names under a record's `final`; or
                  [{"key", "label"?, "statistics"?: "moving", "steps_to"?: percent, "value"?: "accuracy",
                    "at"?: [step, of steps],
                    "overrides"?: [...]}, ...]
    paper?        path into paper_values.yaml; a cell's value stands at <paper>.<row key>.<column key>. A row's own path
                  has {column} where the column's key goes, else it is appended
    paper_dataset?, paper_setting?   the data set of the paper's values; what to say of their setting
    paper_batches?   false where the paper prints no batches
    baseline?     key of the row that the others are compared with
    command?      what runs the card; else `make <name> DATASET=.. BUDGET=..`
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalmannorm.report import caption, cells, paper, remarks
from kalmannorm.report.cells import Batch, Cell, Column, Selection
from kalmannorm.report.read import Records
from kalmannorm.report.statistics import Difference, difference

Card = Mapping[str, Any]

LONGEST = 150  # characters of what sets a file's name apart; longer is a hash, as file systems end at 255


@dataclass(frozen=True)
class Row:
    """A row's cells in the order of the table's columns."""

    key: str
    label: str  # with "(ours)" where it is no row of the papers
    name: str  # where it stands alone, outside the table
    block: str  # the heading it stands under, "" without blocks
    batch: Batch | None  # grad_batch, stat_batch; None where its columns differ in them
    paper_batch: Batch | None  # those of the paper's value
    cells: tuple[Cell | None, ...]  # None in a column that the row does not have

    @property
    def filled(self) -> list[Cell]:
        """The cells of the columns that the row has."""
        return [cell for cell in self.cells if cell]


@dataclass(frozen=True)
class Contrast:
    """A row minus the baseline under one kind of statistics; `difference` is None when `remark` says why."""

    row: str
    baseline: str
    column: str
    difference: Difference | None
    remark: str


@dataclass(frozen=True)
class Table:
    """All that the renderers and pictures need."""

    stem: str  # file name without ending
    title: str
    setting: str  # data, architecture and budget in a few words
    caption: str  # goes after the title
    columns: tuple[Column, ...]
    apart: bool  # the columns show different runs: data sets, networks or batches
    rows: tuple[Row, ...]
    contrasts: tuple[Contrast, ...]
    footnotes: tuple[str, ...]  # the note of mark a, b, ... in this order
    remarks: tuple[str, ...]  # below the table, of the whole of it
    paper_note: str  # what the paper's values rest on; "" where the card has none
    paper_batches: bool  # whether the paper says for which batches they are
    same_data_as_paper: bool

    @property
    def shows_batch(self) -> bool:
        """Whether rows have one pair of batches to show."""
        return any(row.batch for row in self.rows)

    @property
    def header(self) -> tuple[str, ...]:
        """The names over the columns of every rendering but the CSV."""
        names = ["normalizer", *(["(grad, stat)"] if self.shows_batch else [])]
        for column in self.columns:
            names += [column.label, f"{column.label} (paper)"] if self.paper_note else [column.label]
        return (*names, *([] if self.apart else ["n"]))

    @property
    def empty(self) -> bool:
        """Whether no cell has a value."""
        return not any(cell.summary for row in self.rows for cell in row.filled)

    def marks(self, cell: Cell) -> str:
        """The footnote marks of a cell: "", "a", "a,c"."""
        return ",".join(mark(self.footnotes.index(note)) for note in cell.notes)

    def contrast(self, row: Row, column: str) -> "Contrast | None":
        """The difference of a cell to its baseline."""
        return next((c for c in self.contrasts if (c.row, c.column) == (row.name, column)), None)


Selections = dict[tuple[str, str], Selection]  # by row's and column's key


def table(card: Card, records: Records) -> Table:
    """Fill the card with the records of its rows."""
    rows: Sequence[Mapping[str, Any]] = card["rows"]
    columns = columns_of(card)
    selections: Selections = {}
    for column in columns:
        of_row = {row["key"]: config for row in rows if (config := config_of(row, column.key))}
        common = cells.most_common([records.of(config) for config in of_row.values()])
        for key, config in of_row.items():
            selections[key, column.key] = cells.select(records.of(config), common)
    built = tuple(_row(card, row, columns, selections) for row in rows)
    contrasts = _contrasts(card, built, columns, selections)
    configs = configs_of(card)
    datasets = caption.distinct(configs, "dataset", "name")
    same_data = card.get("paper_dataset") is None or datasets == [card["paper_dataset"]]
    return Table(
        stem=stem(card),
        title=card["title"].rstrip("."),
        setting=caption.short(configs),
        caption=_caption(card, columns, selections),
        columns=columns,
        apart=any("configs" in row for row in rows),
        rows=built,
        contrasts=contrasts,
        footnotes=tuple(dict.fromkeys(note for row in built for cell in row.filled for note in cell.notes)),
        remarks=(
            *remarks.differences(contrasts),
            *remarks.on_training_images(
                {row.name: selections[row.key, row.filled[0].column].runs for row in built if row.filled}
            ),
            *remarks.stale(configs, records),
            *remarks.not_run(built, command(card)),
        ),
        paper_note=_paper_note(card, built, same_data),
        paper_batches=card.get("paper_batches", True),
        same_data_as_paper=same_data,
    )


def columns_of(card: Card) -> tuple[Column, ...]:
    """The columns of a table card; a name stands for a kind of statistics."""
    found = []
    for column in card.get("columns", ()):
        if isinstance(column, str):
            found.append(Column(column, column, column))
        else:
            label, target = column.get("label", column["key"]), column.get("steps_to")
            at = column["at"][0] / column["at"][1] if "at" in column else None
            shown = (column.get("statistics", "moving"), target, column.get("value", "accuracy"), at)
            found.append(Column(column["key"], label, *shown))
    return tuple(found)


def config_of(row: Mapping[str, Any], column: str) -> Mapping[str, Any] | None:
    """The config of a row's runs in a column; None where the row does not have it."""
    return row["configs"].get(column) if "configs" in row else row["config"]


def configs_of(card: Card) -> list[Mapping[str, Any]]:
    """The configs of all rows and columns."""
    return [config for row in card["rows"] for config in (row.get("configs") or {"": row["config"]}).values()]


def stem(card: Card) -> str:
    """The name of the card's files, without ending: <name>_<dataset>_<budget>; no data set where it is a column.

    `variant` of the card (variants.py) sets apart what these names do not tell.
    """
    configs = configs_of(card)
    datasets = caption.distinct(configs, "dataset", "name")
    budgets = "-".join(caption.distinct(configs, "budget", "name"))
    return "_".join([card["name"], *([] if len(datasets) > 1 else datasets), budgets, *suffix(card)])


def suffix(card: Card) -> list[str]:
    """The card's `variant` as it stands in the names of files."""
    said = list(card.get("variant", ()))
    whole = "_".join(said)
    return said if len(whole) <= LONGEST else [hashlib.sha256(whole.encode()).hexdigest()[:12]]


def command(card: Card) -> str:
    """What runs the runs of a card."""
    if card.get("command"):
        return str(card["command"])
    config = card["rows"][0]["config"]
    return f"make {card['name']} DATASET={config['dataset']['name']} BUDGET={config['budget']['name']}"


def mark(position: int) -> str:
    """The mark of the footnote at a position: a to z, then aa, ab, ..."""
    letters = ""
    position += 1
    while position:
        position, letter = divmod(position - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return letters


def _row(card: Card, row: Mapping[str, Any], columns: Sequence[Column], selections: Selections) -> Row:
    found: list[Cell | None] = []
    for column in columns:
        config = config_of(row, column.key)
        if config is None:
            found.append(None)
            continue
        same_column = [selection for (_, key), selection in selections.items() if key == column.key]
        chosen = selections[row["key"], column.key]
        apart = cells.apart(chosen, same_column)
        paper_value = _paper_value(card, row, column.key)
        notes = [apart] if apart else []
        found.append(cells.cell(row["key"], column, chosen, paper_value, notes, caption.batches(config)))
    batches = {cell.batch for cell in found if cell}
    batch: Batch | None = batches.pop() if len(batches) == 1 else None
    grad_stat = row.get("paper_batch")
    return Row(
        key=row["key"],
        label=caption.row_label(row),
        name=caption.row_names(card["rows"])[row["key"]],
        block=str(row.get("block", "")),
        batch=batch,
        paper_batch=(grad_stat[0], grad_stat[1]) if grad_stat else batch,
        cells=tuple(found),
    )


def _paper_value(card: Card, row: Mapping[str, Any], column: str) -> float | None:
    path = row.get("paper", f"{card['paper']}.{row['key']}" if card.get("paper") and not row.get("ours") else None)
    if not path:
        return None
    return paper.value(path.format(column=column) if "{column}" in path else f"{path}.{column}")


def _contrasts(
    card: Card, rows: Sequence[Row], columns: Sequence[Column], selections: Selections
) -> tuple[Contrast, ...]:
    by_key = {row.key: row for row in rows}
    of_row = {row["key"]: row.get("baseline", card.get("baseline")) for row in card["rows"]}
    found = []
    for at, column in enumerate(columns):
        for row in rows:
            baseline = by_key.get(of_row[row.key])
            ours, theirs = row.cells[at], baseline.cells[at] if baseline else None
            # A difference of steps is no "points": claims.py compares those.
            if baseline and baseline is not row and ours and theirs and column.steps_to is None:
                settings = (selections[row.key, column.key], selections[baseline.key, column.key])
                found.append(_contrast(row, baseline, (ours, theirs), *settings))
    return tuple(found)


def _contrast(row: Row, baseline: Row, pair: tuple[Cell, Cell], ours: Selection, theirs: Selection) -> Contrast:
    found = difference(pair[0].by_seed, pair[1].by_seed)
    remark = ""
    if found is None:
        remark = next(cell.state for cell in pair if not cell.summary)
    elif ours.setting and theirs.setting and ours.setting != theirs.setting:
        remark = cells.contrast(ours.setting, theirs.setting)
        if ours.setting.data != theirs.setting.data:
            found, remark = None, f"{remarks.APART}: {remark}"
    return Contrast(row.name, baseline.name, pair[0].column, found, remark)


def _paper_note(card: Card, rows: Sequence[Row], same_data: bool) -> str:
    if all(cell.paper is None for row in rows for cell in row.filled):
        return ""
    setting = card.get("paper_setting") or card.get("paper_dataset")
    note = f"Paper: the printed value{f' ({setting})' if setting else ''}, never a measured one"
    if not same_data:
        note += ", and of other data than this table's"
    if not card.get("paper_batches", True):
        return f"{note}; for batches that are not printed."
    if all(row.batch == row.paper_batch for row in rows):
        return f"{note}; for the same (grad, stat) as its row."
    return f"{note}; for the (grad, stat) written beside it where that is not the row's."


def _caption(card: Card, columns: Sequence[Column], selections: Selections) -> str:
    rows = card["rows"]
    chosen = list({id(selection): selection for selection in selections.values()}.values())
    runs = list({run["id"]: run for selection in chosen for run in selection.runs}.values())
    kinds = dict.fromkeys(column.statistics for column in columns)
    sentences = [
        caption.what_was_trained(configs_of(card), runs),
        caption.estimators(rows),
        caption.seeds(chosen),
        caption.precision(chosen),
        f"Values: {caption.measure(columns)} in percent of the last epoch (never the best), mean over n seeds ± half "
        "the 95 % Student-t interval (none at n = 1).",
        "(grad, stat): images per optimizer step and images per set of statistics.",
        caption.statistics(list(kinds)),
    ]
    if targets := [column for column in columns if column.steps_to is not None]:
        said = ", ".join(f"{column.label}: optimizer steps to {column.steps_to:g} %" for column in targets)
        sentences.insert(-2, f"{said}, from the accuracies after each epoch.")
    if any("configs" in row for row in rows):
        sentences.insert(-2, "(n) behind a value: its number of seeds.")
    return " ".join(sentence for sentence in sentences if sentence)
