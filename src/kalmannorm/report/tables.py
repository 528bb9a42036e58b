"""Tables: a card's cells in one group as a Sheet, and a Sheet as HTML, LaTeX, Markdown, CSV and text."""

import html
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pandas as pd

from kalmannorm.experiments.card import Card, Column, Row
from kalmannorm.experiments.record import reached
from kalmannorm.report import effects, paper, quantities
from kalmannorm.report.effects import SEEDS_SHOWN, Cell, Cells, Effect, Group, signed
from kalmannorm.report.frame import batch_sizes

WIDTH = 100  # characters of a terminal line
WIDE = 130  # characters of a row, from which LaTeX would print a third of its text's size or less
LOW = 20  # rows that a page's width has room for, with what stands below
LATEX = {
    **{character: f"\\{character}" for character in "{}&%$#_"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"},
    **{">": r"\textgreater{}", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$", "–": "--", "Δ": r"$\Delta$"},
}


class Place(NamedTuple):
    """What stands in one place, and the runs behind it."""

    text: str
    ids: Sequence[str] = ()
    best: bool = False
    marks: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table in whose places stands text."""

    stem: str  # file name without ending
    title: str
    caption: str  # one line
    about: tuple[str, ...]  # the rest, on demand
    header: tuple[str, ...]
    index: tuple[tuple[str, str], ...]  # of each row: its block ("" without), its label
    rows: tuple[tuple[Place, ...], ...]
    notes: tuple[str, ...] = ()  # of mark a, b, ... in this order
    records: tuple[Mapping[str, object], ...] = field(default=(), repr=False)  # the lines of its CSV

    @property
    def empty(self) -> bool:
        """Whether no place has runs behind it."""
        return not any(place.ids for row in self.rows for place in row)


def table(card: Card, group: Group, cells: Cells) -> Sheet:
    """Return the cells of a card in one group, each with the printed value and the difference to its baseline."""
    columns = [c for c in card.columns if any(_cell(card, row, group, c, cells).n for row in card.rows)]
    header: list[str] = []
    notes: list[str] = []
    records: list[Mapping[str, object]] = []
    of_columns: dict[str, Mapping[str, Effect | None]] = {}
    places: list[list[Place]] = [[] for _ in card.rows]
    for column in columns or card.columns:
        of_rows = {row.key: _cell(card, row, group, column, cells) for row in card.rows if row.has(column)}
        papers = {row.key: paper_value(card, row, column, group) for row in card.rows if row.has(column)}
        found = differences(card, group, column, cells)
        of_columns[column.label] = found
        best = _best(card, column, of_rows)
        shown = {"paper": any(v is not None for v in papers.values()), "Δ": any(found.values())}
        header += [column.label, *(f"{column.label}: {name}" for name, there in shown.items() if there)]
        for row, line in zip(card.rows, places, strict=True):
            if (cell := of_rows.get(row.key)) is None:
                line += [Place("")] * (1 + sum(shown.values()))
                continue
            marks = [_mark(notes, note) for note in cell.notes]
            line.append(Place(value(cell, column), cell.ids, row.key in best, ",".join(marks)))
            if shown["paper"]:
                line.append(Place(_printed(card, row, column, papers[row.key])))
            if shown["Δ"]:
                line.append(Place(difference(found.get(row.key)), cell.ids if found.get(row.key) else ()))
            records.append(_record(card, row, column, group, cell, papers[row.key], found.get(row.key)))
    missing = [column.label for column in card.columns if column not in columns]
    baselines = dict.fromkeys(base for row in card.rows if (base := _base(card, row)))
    names = " and ".join(dict.fromkeys(card.row(key).label for key in baselines))
    said = [f"Not run: {'; '.join(missing)}."] if missing and columns else []
    detects = any(c.value in quantities.PRECISIONS for c in card.columns)
    what = "COCO's average precision in percent" if detects else "Percent"
    caption = f"{setting(card, group, cells)}. {what} after the last epoch: the mean, in brackets the seeds."
    about = [*said, *trained(card, group, cells)]
    about.append(
        f"With {SEEDS_SHOWN} seeds and more, ± half the 95 % interval. The best mean of a column, in each block, is "
        "bold. Where runs failed or stayed at chance: how many learned, and the mean of those."
    )
    if baselines:
        about.append(
            f"Δ: difference to {names}, with its 95 % interval under the variance pooled over all tables' rows of the "
            "network (one interval at a time: verdicts are the claims')."
        )
        about += _spreads(of_columns)
    if of := card.paper_setting or card.paper_dataset:
        about.append(f"Paper: printed values ({of}), never measured ones.")
    index = tuple((row.block, row.name) for row in card.rows)
    stem = f"{card.name}_{group.stem}"
    rows = tuple(map(tuple, places))
    return Sheet(stem, card.title, caption, tuple(about), tuple(header), index, rows, tuple(notes), tuple(records))


def by_batch(card: Card, group: Group, cells: Cells) -> Card:
    """Return a card of rows at several batches as a table of those that ran: a block for each network, a column for
    each batch and kind of statistics."""
    networks = list(dict.fromkeys(row.runs["arch"] for row in card.rows))
    batches = sorted({row.runs["batch"] for row in card.rows}, key=batch_sizes)
    columns = [
        replace(of, key=f"{of.key}_{batch}", label=f"{of.label}, stat {batch_sizes(batch)[1]}", runs={"batch": batch})
        for of in card.columns
        for batch in batches
    ]
    rows: dict[tuple[str, str], Row] = {}
    for row in sorted(card.rows, key=lambda row: networks.index(row.runs["arch"])):
        if any(cells.cell(card, row, group, column).n for column in card.columns):
            at = (row.runs["arch"], row.label)
            own = tuple(column.key for column in columns if column.runs["batch"] == row.runs["batch"])
            runs = {key: value for key, value in row.runs.items() if key != "batch"}
            before = rows.get(at, replace(row, block=row.runs["arch"], runs=runs, columns=()))
            rows[at] = replace(before, columns=(*(before.columns or ()), *own))
    return replace(card, kind="table", rows=tuple(rows.values()), columns=tuple(columns))


def differences(card: Card, group: Group, column: Column, cells: Cells) -> dict[str, Effect | None]:
    """Compare every row with its baseline, in one model per network: value = row + seed, one variance."""
    found: dict[str, Effect | None] = {}
    if column.steps_to is not None:
        return found
    of_rows = {row.key: (row, _cell(card, row, group, column, cells)) for row in card.rows if row.has(column)}
    for key, (row, cell) in of_rows.items():
        base = _base(card, row)
        if not base or base == key or base not in of_rows or cell.kind != of_rows[base][1].kind:
            continue
        ours, theirs = (effects.identity(card, one, column) for one in (row, of_rows[base][0]))
        at = group._replace(dataset=ours.dataset or group.dataset)
        weights = {replace(ours, dataset=None): 1, replace(theirs, dataset=None): -1}
        found[key] = effects.compare(cells, [card], at, column.statistics, weights, _value(column), [cell.kind])
    return found


def value(cell: Cell, column: Column) -> str:
    """ "45.26 (45.41, 45.10)", "45.26 ± 0.81 (n = 5)", "2 of 3 learned: 34.10 (...)", "failed", "not run"."""
    if not cell.runs:
        return "failed" if cell.failed else "not run"
    found = list(effects.values_of(cell, _value(column)).values())
    lost = f"{len(cell.learned)} of {cell.n} learned" if cell.lost else ""
    if not found:
        return lost or ("not reached" if column.steps_to is not None else "no value")
    digits = 0 if column.steps_to is not None else 2
    mean = f"{sum(found) / len(found):,.{digits}f}"
    if len(found) >= SEEDS_SHOWN:
        shown = f"{mean} ± {effects.interval(found):.{digits}f} (n = {len(found)})"
    else:
        shown = f"{mean} ({', '.join(f'{one:,.{digits}f}' for one in found)})" if found[1:] else mean
    return f"{lost}: {shown}" if lost else shown


def difference(found: Effect | None) -> str:
    """ "+9.38 [+6.77, +11.99]"."""
    if found is None:
        return ""
    half = found.half_width()
    between = f" [{signed(found.mean - half)}, {signed(found.mean + half)}]" if math.isfinite(half) else ""
    return signed(found.mean) + between


def paper_value(card: Card, row: Row, column: Column, group: Group) -> float | None:
    """Return what the sources print for exactly this data set, row and statistics; None on other data."""
    if not card.fixes_dataset and group.dataset != card.paper_dataset:
        return None
    path = row.paper or (f"{card.paper}.{row.key}" if card.paper and not row.ours else None)
    if not path:
        return None
    return paper.printed(path.format(column=column.key) if "{column}" in path else f"{path}.{column.key}")


def setting(card: Card, group: Group, cells: Cells) -> str:
    """ "CIFAR-10, small Inception, budget lite (12 epochs of 50,000 images at 16 px)", from the runs."""
    runs = _runs(card, group, cells)
    networks = dict.fromkeys(run["network"] for run in runs)
    length = dict.fromkeys(
        f"{run['budget.epochs']} epochs of {_seen(run)} at {run['budget.size']} px"
        for run in [run for run in runs if run["status"] == "done"] or runs
    )
    datasets = dict.fromkeys(run["dataset"] for run in runs)
    words = [*datasets, *networks, f"budget {group.budget} ({' / '.join(length)})"]
    words += [f"schedule {group.schedule}"] if group.schedule else []
    return ", ".join([*words, *([f"width {group.width:g}"] if group.width != 1 else [])])


def trained(card: Card, group: Group, cells: Cells) -> list[str]:
    """Data, seeds and arithmetic of the runs, in sentences."""
    runs = _runs(card, group, cells)
    whole = [run for run in runs if run["status"] == "done"] or runs  # a run that failed early knows no data
    data = dict.fromkeys(
        f"{run['dataset']}: {_recorded(run, 'data.fidelity') or 'exactness not recorded'}" for run in whole
    )
    seeds = sorted({int(run["seed"]) for run in runs})
    arithmetic = dict.fromkeys(str(run["arithmetic"]) for run in runs)
    said = [f"Data: {'; '.join(data)}."] if data else []
    if runs:
        said.append(f"Seeds {', '.join(map(str, seeds))}; {' / '.join(arithmetic)}; schedule {runs[0]['schedule']}.")
    weights = [run["weights"] for run in runs if isinstance(run["weights"], dict)]
    for what, key in (("Weights", "origin"), ("Constants of frozen BN", "constants")):
        origins = dict.fromkeys(str(of[key]) for of in weights if of.get(key))
        said += [f"{what}: {' / '.join(origins)}."] if origins else []
    by_heart = [run for run in runs if isinstance(run["training"], dict)]  # a set that is learned so
    if by_heart:
        one = len({run["network"] for run in by_heart}) == 1
        seen = {run["normalizer"] if one else f"{run['normalizer']} on {run['network']}": run for run in by_heart}
        shown = (f"{name} {reached(run['training'])}" for name, run in seen.items())
        said.append(f"On training images, box / mask: {', '.join(shown)}.")
    return said


def latex(sheet: Sheet) -> str:
    """Write a table environment for booktabs and graphicx, which shrinks it to the text's width.

    A wide one of few rows lies on its side (rotating), where it is shrunk half as much.
    """
    frame = _frame(sheet, _in_latex, _latex)
    styler = frame.style
    blocks = any(block for block, _ in sheet.index)
    body = styler.to_latex(
        hrules=True,
        clines="skip-last;data" if blocks else None,
        column_format=("ll" if blocks else "l") + "r" * len(sheet.header),
        multirow_align="naive",
    )
    title = sheet.title.partition(": ")[2] or sheet.title
    title = title[0].upper() + title[1:]
    notes = [rf"\textsuperscript{{{letter(i)}}} {_latex(note)}." for i, note in enumerate(sheet.notes)]
    below = [_latex(sheet.caption), *(_latex(said) for said in sheet.about), *notes]
    label = re.sub("[^A-Za-z0-9-]", "-", sheet.stem)
    texts = [sheet.header, *([place.text for place in row] for row in sheet.rows)]
    longest = [max(map(len, column)) for column in zip(*texts, strict=True)]
    wide = sum(longest) > WIDE and len(sheet.rows) <= LOW
    environment = "sidewaystable" if wide else "table"
    return "\n".join(
        [
            f"% \\usepackage{{booktabs,graphicx{',rotating' if wide else ''}}}",
            rf"\begin{{{environment}}}",
            r"\centering",
            rf"\caption{{{_latex(title)}.}}\label{{tab:{label}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            body.strip().removesuffix(r"\end{tabular}") + r"\end{tabular}}",
            r"\par\smallskip\raggedright\scriptsize " + " ".join(below),
            rf"\end{{{environment}}}",
            "",
        ]
    )


def page_html(sheet: Sheet, opens: str = "#runs=") -> str:
    """Write the table alone; each number a link that opens its runs."""

    def written(place: Place) -> str:
        text = html.escape(place.text)
        text = f"<b>{text}</b>" if place.best else text
        text = f'<a href="{opens}{",".join(place.ids)}">{text}</a>' if place.ids and place.text else text
        return text + (f"<sup>{place.marks}</sup>" if place.marks else "")

    styler = _frame(sheet, written, html.escape).style
    styler.set_table_attributes('class="numbers"').set_uuid(sheet.stem)
    text = styler.to_html(sparse_index=True)
    text = re.sub(r"<style.*?</style>\n", "", text, flags=re.DOTALL)
    return re.sub(r' (id|class)="(?!numbers)[^"]*"', "", text)


def markdown(sheet: Sheet) -> str:
    """Write a pipe table, the caption above it and the notes below."""

    def written(place: Place) -> str:
        text = escape_markdown(place.text)
        return (f"**{text}**" if place.best and text else text) + (f"<sup>{place.marks}</sup>" if place.marks else "")

    lines = [["", *map(escape_markdown, sheet.header)], [":--", *[":-:"] * len(sheet.header)]]
    block = ""
    for (of, label), row in zip(sheet.index, sheet.rows, strict=True):
        if of != block:
            lines.append([f"**{escape_markdown(of)}**", *[""] * len(row)])
            block = of
        lines.append([escape_markdown(label), *map(written, row)])
    parts = [
        f"**{escape_markdown(sheet.title)}.** {escape_markdown(sheet.caption)}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        *(f"<sup>{letter(i)}</sup> {escape_markdown(note)}" for i, note in enumerate(sheet.notes)),
        escape_markdown(" ".join(sheet.about)),
    ]
    return "\n\n".join(parts) + "\n"


def text(sheet: Sheet) -> str:
    """Write aligned columns for the terminal."""
    lines = [["", *sheet.header]]
    for (block, label), row in zip(sheet.index, sheet.rows, strict=True):
        marked = [f"{place.text}{f' [{place.marks}]' if place.marks else ''}" for place in row]
        lines.append([f"{block}: {label}" if block else label, *marked])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    drawn = [
        "  ".join(place.ljust(width) for place, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    notes = [f"[{letter(i)}] {note}" for i, note in enumerate(sheet.notes)]
    said = [textwrap.fill(part, WIDTH) for part in (*notes, *sheet.about)]
    return "\n".join([f"{sheet.title}.", textwrap.fill(sheet.caption, WIDTH), "", *drawn, "", *said, ""])


def csv(sheet: Sheet) -> str:
    """Write the long form: a line for each place, or what the sheet has as records; numbers unrounded."""
    out = io.StringIO()
    pd.DataFrame(sheet.records).to_csv(out, index=False, lineterminator="\n")
    return out.getvalue()


def files(sheet: Sheet) -> dict[str, bytes]:
    """Return its files by name."""
    texts = {"md": markdown(sheet), "csv": csv(sheet), "tex": latex(sheet)}
    return {f"{sheet.stem}.{ending}": content.encode() for ending, content in texts.items()}


def letter(place: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    return ("" if place < 26 else letter(place // 26 - 1)) + chr(ord("a") + place % 26)


def escape_markdown(said: str) -> str:
    """Return text that Markdown prints as it is, also inside a pipe table."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", said).replace("&", "&amp;").replace("<", "&lt;")


def _frame(sheet: Sheet, written: Any, escaped: Any) -> pd.DataFrame:
    blocks = any(block for block, _ in sheet.index)
    labels = [(escaped(block), escaped(label)) for block, label in sheet.index]
    index: Any = pd.MultiIndex.from_tuples(labels) if blocks else [label for _, label in labels]
    body = [[written(place) for place in row] for row in sheet.rows]
    return pd.DataFrame(body, index=index, columns=[escaped(name) for name in sheet.header])


def _in_latex(place: Place) -> str:
    text = _latex(place.text)
    text = rf"\textbf{{{text}}}" if place.best and text else text
    return text + (rf"\textsuperscript{{{place.marks}}}" if place.marks else "")


def _latex(said: str) -> str:
    return "".join(LATEX.get(character, character) for character in said)


def _base(card: Card, row: Row) -> str | None:
    return row.baseline or card.baseline


def _cell(card: Card, row: Row, group: Group, column: Column, cells: Cells) -> Cell:
    return cells.cell(card, row, group, column) if row.has(column) else Cell()


def _value(column: Column) -> effects.Value:
    if column.steps_to is not None:
        level = column.steps_to
        return lambda run: quantities.steps_to(run, level)
    at = column.at[0] / column.at[1] if column.at else None
    return lambda run: quantities.value(run, column.value, at)


def _best(card: Card, column: Column, cells: Mapping[str, Cell]) -> set[str]:
    """Return the row with the best mean of each block in which several have one."""
    means: dict[str, dict[str, float]] = {}
    for row in card.rows:
        if row.key in cells and column.steps_to is None and math.isfinite(mean := _mean(cells[row.key], column)):
            means.setdefault(row.block, {})[row.key] = mean
    return {max(of, key=lambda key: of[key]) for of in means.values() if len(of) > 1}


def _mean(cell: Cell, column: Column) -> float:
    found = list(effects.values_of(cell, _value(column)).values())
    return sum(found) / len(found) if found and not cell.lost else math.nan


def _printed(card: Card, row: Row, column: Column, printed: float | None) -> str:
    """Return the value as printed (90.0, not 90.00), with its batches where they are not the row's."""
    if printed is None:
        return "–"
    own = effects.identity(card, row, column)
    elsewhere = row.paper_batch and card.paper_batches and row.paper_batch != (own.grad_batch, own.stat_batch)
    return f"{printed:,}" + (f" ({row.paper_batch[0]}, {row.paper_batch[1]})" if elsewhere and row.paper_batch else "")


def _spreads(found: Mapping[str, Mapping[str, Effect | None]]) -> list[str]:
    """Return the pooled spreads behind the differences of each column."""
    said = []
    for column, of_rows in found.items():
        words = [
            f"{one.spread:.2f} ({one.df} degrees of freedom{_equal(one)})" for one in of_rows.values() if one and one.df
        ]
        said += [f"{column}: {' / '.join(dict.fromkeys(words))}"] if words else []
    return [f"Standard deviation of a run, pooled: {'; '.join(said)}."] if said else []


def _equal(of: Effect) -> str:
    return "" if math.isnan(of.equal) else f"; that all rows have the same: p = {of.equal:.2g}"


def _runs(card: Card, group: Group, cells: Cells) -> list[Any]:
    return [
        run
        for row in card.rows
        for column in card.columns_of(row)
        for cell in [cells.cell(card, row, group, column)]
        for run in (*cell.runs, *cell.failed)
    ]


def _seen(run: Mapping[str, Any]) -> str:
    """ "50,000 images", "96 videos"; without their number where the run failed before it was known."""
    count, what = _recorded(run, "data.train_images"), "videos" if _recorded(run, "dataset.frames") else "images"
    return f"{int(count):,} {what}" if count else what


def _recorded(run: Mapping[str, Any], key: str) -> Any:
    """Return a value of the record; None where it has none, which the frame has as nan."""
    return None if pd.isna(found := run.get(key)) else found


def _mark(notes: list[str], note: str) -> str:
    if note not in notes:
        notes.append(note)
    return letter(notes.index(note))


def _record(
    card: Card, row: Row, column: Column, group: Group, cell: Cell, printed: float | None, found: Effect | None
) -> dict[str, object]:
    values = effects.values_of(cell, _value(column))
    own = effects.identity(card, row, column)
    return {
        "row": row.key,
        "label": f"{row.block} {row.name}".strip(),
        "column": column.key,
        "grad_batch": own.grad_batch,
        "stat_batch": own.stat_batch or "",
        "runs": cell.n,
        "learned": len(cell.learned),
        "mean": sum(values.values()) / len(values) if values else "",
        "half_width": effects.interval(list(values.values())) if len(values) > 1 else "",
        "seeds": " ".join(map(str, values)),
        "values": " ".join(f"{one:.6g}" for one in values.values()),
        "paper": "" if printed is None else printed,
        "difference": found.mean if found else "",
        "difference_half_width": found.half_width() if found and found.df else "",
        "spread": found.spread if found and found.df else "",
        "df": found.df if found else "",
        "records": " ".join(cell.ids),
        "notes": "; ".join(cell.notes),
    }
