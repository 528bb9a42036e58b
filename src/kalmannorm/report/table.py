"""A table of accuracies from an experiment card and the records: cells, differences to the baseline, what must be said.

A card is a dict:

    name, title   "table7", what it reproduces
    kind?         "table" (the default) or "figure", whose rows are BN's and KN's (figure.py)
    rows          [{"key", "label", "config", "ours"?: bool, "paper"?: path | None, "paper_batch"?: [grad, stat]}, ...]
    columns       kinds of statistics: names under a record's `final`
    paper?        path into paper_values.yaml; a cell's value stands at <paper>.<row key>.<column>
    paper_dataset?, paper_setting?   the data set of the paper's values; what to say of their setting
    baseline?     key of the row that the others are compared with
    command?      what runs the card; else `make <name> DATASET=.. BUDGET=..`
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalmannorm.report import caption, cells, paper
from kalmannorm.report.cells import Cell, Selection
from kalmannorm.report.read import Records
from kalmannorm.report.statistics import Difference, difference

Card = Mapping[str, Any]
VERDICTS = {
    "exceeds": "larger than its interval",
    "tie": "a tie, the interval contains 0",
    "open": "open, no interval (one seed, or no spread over the seeds)",
}
APART = "not compared"  # how the remark of a difference between different data begins


@dataclass(frozen=True)
class Row:
    """A row's cells in the order of the table's columns."""

    key: str
    label: str  # with "(ours)" where it is no row of the papers
    name: str  # where it stands alone, outside the table
    batch: tuple[int, int | None]  # grad_batch, stat_batch
    paper_batch: tuple[int, int | None]  # those of the paper's value
    cells: tuple[Cell, ...]


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

    name: str
    stem: str  # file name without ending
    title: str
    setting: str  # data, architecture and budget in a few words
    caption: str  # goes after the title
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    contrasts: tuple[Contrast, ...]
    footnotes: tuple[str, ...]  # the note of mark a, b, ... in this order
    remarks: tuple[str, ...]  # below the table, of the whole of it
    paper_note: str  # what the paper's values rest on; "" where the card has none
    same_data_as_paper: bool

    @property
    def header(self) -> tuple[str, ...]:
        """The names over the columns of every rendering but the CSV."""
        names = ["normalizer", "(grad, stat)"]
        for column in self.columns:
            names += [column, f"{column} (paper)"] if self.paper_note else [column]
        return (*names, "n")

    @property
    def empty(self) -> bool:
        """Whether no cell has a value."""
        return not any(cell.summary for row in self.rows for cell in row.cells)

    def marks(self, cell: Cell) -> str:
        """The footnote marks of a cell: "", "a", "a,c"."""
        return ",".join(mark(self.footnotes.index(note)) for note in cell.notes)


def table(card: Card, records: Records) -> Table:
    """Fill the card with the records of its rows."""
    rows: Sequence[Mapping[str, Any]] = card["rows"]
    of_row = [records.of(row["config"]) for row in rows]
    common = cells.most_common(of_row)
    selections = [cells.select(runs, common) for runs in of_row]
    apart = _apart(selections)
    built = tuple(_row(card, *parts) for parts in zip(rows, selections, apart, strict=True))
    contrasts = _contrasts(card, built, selections)
    datasets = caption.distinct([row["config"] for row in rows], "dataset", "name")
    same_data = card.get("paper_dataset") is None or datasets == [card["paper_dataset"]]
    return Table(
        name=card["name"],
        stem=stem(card),
        title=card["title"].rstrip("."),
        setting=caption.short([row["config"] for row in rows]),
        caption=_caption(card, selections),
        columns=tuple(card["columns"]),
        rows=built,
        contrasts=contrasts,
        footnotes=tuple(dict.fromkeys(note for row in built for cell in row.cells for note in cell.notes)),
        remarks=(*_verdicts(contrasts), *_stale(rows, records), *_not_run(card, built)),
        paper_note=_paper_note(card, built, same_data),
        same_data_as_paper=same_data,
    )


def stem(card: Card) -> str:
    """The name of the card's files, without ending: <name>_<dataset>_<budget>."""
    configs = [row["config"] for row in card["rows"]]
    parts = (caption.distinct(configs, "dataset", "name"), caption.distinct(configs, "budget", "name"))
    return "_".join((card["name"], *("-".join(part) for part in parts)))


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


def signed(value: float) -> str:
    """A difference in points, with its sign (a true minus, as in print)."""
    return f"{value:+.2f}".replace("-", "−")


def describe(contrast: Contrast) -> str:
    """ "+1.20 ± 0.40 (3 pairs)", without the names."""
    if contrast.difference is None:
        return contrast.remark
    found = contrast.difference
    half_width = "" if found.half_width is None else f" ± {found.half_width:.2f}"
    count = f"{found.n} pair{'s' if found.n > 1 else ''}" if found.paired else f"unpaired, n = {found.n} or more"
    return f"{signed(found.mean)}{half_width} ({count}{contrast.remark and f', {contrast.remark}'})"


def _row(card: Card, row: Mapping[str, Any], selection: Selection, apart: str) -> Row:
    batch = caption.batches(row["config"])
    grad, stat = row.get("paper_batch") or batch
    path = row.get("paper", f"{card['paper']}.{row['key']}" if card.get("paper") and not row.get("ours") else None)
    return Row(
        key=row["key"],
        label=caption.row_label(row),
        name=caption.row_names(card["rows"])[row["key"]],
        batch=batch,
        paper_batch=(grad, stat),
        cells=tuple(
            cells.cell(
                row["key"],
                column,
                selection,
                paper.value(f"{path}.{column}") if path else None,
                [apart] if apart else [],
            )
            for column in card["columns"]
        ),
    )


def _apart(selections: Sequence[Selection]) -> list[str]:
    """Per row a note when its runs were made under another setting than most rows' runs; else ""."""
    settings = Counter(selection.setting for selection in selections if selection.setting)
    if len(settings) < 2:
        return [""] * len(selections)
    most = settings.most_common(1)[0][0]
    return [
        f"unlike the other rows: {cells.contrast(selection.setting, most)}"
        if selection.setting and selection.setting != most
        else ""
        for selection in selections
    ]


def _contrasts(card: Card, rows: Sequence[Row], selections: Sequence[Selection]) -> tuple[Contrast, ...]:
    at = next((i for i, row in enumerate(rows) if row.key == card.get("baseline")), None)
    if at is None:
        return ()
    found = []
    for column in range(len(card["columns"])):
        for row, selection in zip(rows, selections, strict=True):
            if row.key != card["baseline"]:
                pair = (row.cells[column], rows[at].cells[column])
                found.append(_contrast(row, rows[at], pair, selection, selections[at]))
    return tuple(found)


def _contrast(row: Row, baseline: Row, pair: tuple[Cell, Cell], ours: Selection, theirs: Selection) -> Contrast:
    found = difference(pair[0].by_seed, pair[1].by_seed)
    remark = ""
    if found is None:
        remark = next(cell.state for cell in pair if not cell.summary)
    elif ours.setting and theirs.setting and ours.setting != theirs.setting:
        remark = cells.contrast(ours.setting, theirs.setting)
        if ours.setting.data != theirs.setting.data:
            found, remark = None, f"{APART}: {remark}"
    return Contrast(row.name, baseline.name, pair[0].column, found, remark)


def _verdicts(contrasts: Sequence[Contrast]) -> list[str]:
    """Per row one line: its differences, and which exceed their intervals, which tie, which the runs leave open."""
    lines: dict[str, list[str]] = {}
    for contrast in contrasts:
        if contrast.difference:
            verdict = f"{describe(contrast)}: {VERDICTS[contrast.difference.verdict]}"
            lines.setdefault(contrast.row, []).append(f"{contrast.column} {verdict}")
        elif contrast.remark.startswith(APART):
            lines.setdefault(contrast.row, []).append(f"{contrast.column} {contrast.remark}")
    if not lines:
        return []
    return [
        f"Differences to {contrasts[0].baseline} in points, with 95 % Student-t intervals, paired by seed where at "
        "least two seeds are common; not corrected for their number:",
        *(f"- {row}: {'; '.join(said)}." for row, said in lines.items()),
    ]


def _stale(rows: Sequence[Mapping[str, Any]], records: Records) -> list[str]:
    found = [f"{run['id']} (NUMERICS {run['numerics']})" for row in rows for run in records.stale_of(row["config"])]
    if not found:
        return []
    return [
        f"{len(found)} stale record{'s' if len(found) > 1 else ''} of these rows left out, made before results changed "
        f"to NUMERICS {records.numerics}: {', '.join(found)}."
    ]


def _not_run(card: Card, rows: Sequence[Row]) -> list[str]:
    missing = [row.name for row in rows if any(cell.state == "not run" for cell in row.cells)]
    return [f"Not run: {'; '.join(missing)}. To run what is missing:", command(card)] if missing else []


def _paper_note(card: Card, rows: Sequence[Row], same_data: bool) -> str:
    if all(cell.paper is None for row in rows for cell in row.cells):
        return ""
    setting = card.get("paper_setting") or card.get("paper_dataset")
    note = f"Paper: the printed value{f' ({setting})' if setting else ''}, never a measured one"
    if not same_data:
        note += ", and of other data than this table's"
    if all(row.batch == row.paper_batch for row in rows):
        return f"{note}; for the same (grad, stat) as its row."
    return f"{note}; for the (grad, stat) written beside it where that is not the row's."


def _caption(card: Card, selections: Sequence[Selection]) -> str:
    rows = card["rows"]
    configs = [row["config"] for row in rows]
    runs = [run for selection in selections for run in selection.runs]
    sentences = [
        caption.what_was_trained(configs, runs),
        caption.estimators(rows),
        caption.seeds(selections),
        caption.arithmetic([selection.setting for selection in selections if selection.setting]),
        "Values: top-1 accuracy in percent of the last epoch (never the best), mean over n seeds ± half the 95 % "
        "Student-t interval (none at n = 1).",
        "(grad, stat): images per optimizer step and images per set of statistics.",
        caption.statistics(card["columns"]),
    ]
    return " ".join(sentence for sentence in sentences if sentence)
