"""A table as Markdown, CSV, LaTeX and aligned text. All of them hold the same cells and say the same below them."""

import csv as csv_format
import io
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kalmannorm.report.caption import pair
from kalmannorm.report.cells import Batch, Cell
from kalmannorm.report.remarks import describe
from kalmannorm.report.table import Row, Table, mark

WIDTH = 100  # characters of a terminal line

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "–": "--",
    "…": r"\ldots{}",
}


class Text(NamedTuple):
    """What stands in one place of the grid."""

    text: str
    marks: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table in whose places stands text already: what is printed of a Table, or of one that is not of accuracies."""

    stem: str  # file name without ending
    title: str
    caption: str  # goes after the title
    header: tuple[str, ...]
    labels: int  # how many columns from the left name the row
    rows: list[list[Text]]
    footnotes: tuple[str, ...]  # the note of mark a, b, ... in this order
    below: tuple[str, ...]  # paragraphs below the table
    records: tuple[Mapping[str, object], ...] = ()  # the lines of its CSV, by column


def sheet(table: Table | Sheet) -> Sheet:
    """What is printed of a table."""
    if isinstance(table, Sheet):
        return table
    below = (*([table.paper_note] if table.paper_note else []), *table.remarks)
    labels = 2 if table.shows_batch else 1
    return Sheet(table.stem, table.title, table.caption, table.header, labels, grid(table), table.footnotes, below)


def grid(table: Table) -> list[list[Text]]:
    """The table's rows as text, one list per row, as wide as its header; a block's heading is a row of its own."""
    rows = []
    block = ""
    for row in table.rows:
        if row.block != block:
            block = row.block
            rows.append([Text(f"{block}:"), *[Text("")] * (len(table.header) - 1)])
        line = [Text(row.label), *([Text(pair(row.batch) if row.batch else "")] if table.shows_batch else [])]
        for cell in row.cells:
            line.append(Text(value(cell, table.apart), table.marks(cell)) if cell else Text(""))
            if table.paper_note:
                line.append(Text(paper_value(row, cell) if cell else ""))
        if not table.apart:
            line.append(Text("/".join(dict.fromkeys(str(len(cell.by_seed)) for cell in row.filled))))
        rows.append(line)
    return rows


def markdown(table: Table | Sheet) -> str:
    """A pipe table, the caption above it and the notes below."""
    page = sheet(table)

    def written(place: Text) -> str:
        return escape_markdown(place.text) + (f"<sup>{place.marks}</sup>" if place.marks else "")

    rule = [*[":--"] * page.labels, *[":-:"] * (len(page.header) - page.labels)]
    lines = [[*map(escape_markdown, page.header)], rule, *[[written(place) for place in row] for row in page.rows]]
    parts = [
        f"**{escape_markdown(page.title)}.** {escape_markdown(page.caption)}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        *(f"<sup>{mark(i)}</sup> {escape_markdown(note)}" for i, note in enumerate(page.footnotes)),
        *map(escape_markdown, page.below),
    ]
    return "\n\n".join(parts) + "\n"


def text(table: Table | Sheet) -> str:
    """Aligned columns for the terminal, wrapped at WIDTH."""
    page = sheet(table)
    rows = [list(page.header)]
    rows += [[place.text + (f" [{place.marks}]" if place.marks else "") for place in row] for row in page.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(place.ljust(width) for place, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "-" * max(map(len, lines))
    notes = [f"[{mark(i)}] {note}" for i, note in enumerate(page.footnotes)]
    above = [_wrap(f"{page.title}."), _wrap(page.caption)]
    return "\n".join([*above, "", lines[0], rule, *lines[1:], rule, *map(_wrap, (*notes, *page.below))]) + "\n"


def latex(table: Table | Sheet) -> str:
    """A table environment for the packages booktabs and graphicx, with which a wide one shrinks to the text's width."""
    page = sheet(table)

    def written(place: Text) -> str:
        return escape_latex(place.text) + (rf"\textsuperscript{{{place.marks}}}" if place.marks else "")

    lines = [[*map(escape_latex, page.header)], *[[written(place) for place in row] for row in page.rows]]
    header, *body = [f"    {' & '.join(line)} \\\\" for line in lines]
    columns = len(page.header) - page.labels
    notes = [rf"\textsuperscript{{{mark(i)}}} {escape_latex(note)}" for i, note in enumerate(page.footnotes)]
    said = (escape_latex(page.caption), *notes, *map(escape_latex, page.below))
    below = " \\\\\n".join(f"  {line}" for line in said if line)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"  \centering",
            r"  \setlength{\belowcaptionskip}{\medskipamount}",
            rf"  \caption{{{escape_latex(page.title)}.}}",
            rf"  \label{{tab:{re.sub('[^A-Za-z0-9-]', '-', page.stem)}}}",
            r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"  \begin{{tabular}}{{{'l' * page.labels}{'c' * columns}}}",
            r"    \toprule",
            header,
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}}",
            r"  \par\smallskip\raggedright\scriptsize",
            below,
            r"\end{table}",
            "",
        ]
    )


def csv(table: Table | Sheet) -> str:
    """Long form, one line per cell, then one per difference to the baseline (half_width: of its interval; n: pairs).

    Of a sheet: its records.
    """
    out = io.StringIO()
    if isinstance(table, Sheet):
        lines = csv_format.DictWriter(out, list(table.records[0]) if table.records else [], lineterminator="\n")
        lines.writeheader()
        lines.writerows(table.records)
        return out.getvalue()
    writer = csv_format.writer(out, lineterminator="\n")
    writer.writerow(
        ["kind", "row", "label", "grad_batch", "stat_batch", "column", "state", "mean", "half_width", "n", "seeds"]
        + ["values", "paper", "paper_grad_batch", "paper_stat_batch", "records", "notes"]
    )
    kinds = {column.key: column.value if column.steps_to is None else "steps" for column in table.columns}
    for row in table.rows:
        for cell in row.filled:
            mean, half_width = (cell.summary.mean, cell.summary.half_width) if cell.summary else (None, None)
            of_paper = (row.paper_batch or cell.batch) if cell.paper is not None and table.paper_batches else None
            paper = ["" if cell.paper is None else cell.paper, *_batches(of_paper)]
            writer.writerow(
                [
                    kinds[cell.column],
                    row.key,
                    f"{row.block} {row.label}".strip(),
                    *_batches(cell.batch),
                    cell.column,
                    cell.state,
                ]
                + [_number(mean), _number(half_width), len(cell.by_seed), " ".join(map(str, cell.by_seed))]
                + [" ".join(map(_number, cell.by_seed.values())), *paper, " ".join(cell.ids), "; ".join(cell.notes)]
            )
    for contrast in table.contrasts:
        found = contrast.difference
        numbers = ["", "", 0] if found is None else [_number(found.mean), _number(found.half_width), found.n]
        state = found.verdict if found else contrast.remark
        writer.writerow(
            ["difference", f"{contrast.row} - {contrast.baseline}", "", "", "", contrast.column, state, *numbers]
            + ["", "", "", "", "", "", describe(contrast)]
        )
    return out.getvalue()


def escape_latex(text: str) -> str:
    """Text with LaTeX's special characters, and the signs that its default fonts lack, as commands."""
    return "".join(LATEX.get(character, character) for character in text)


def value(cell: Cell, with_count: bool) -> str:
    """A cell's mean with its interval, or its state."""
    if cell.summary is None:
        return cell.state
    half_width = "" if cell.summary.half_width is None else f" ± {cell.summary.half_width:,.{cell.decimals}f}"
    count = f" ({cell.summary.n})" if with_count else ""
    return f"{cell.summary.mean:,.{cell.decimals}f}{half_width}{count}"


def paper_value(row: Row, cell: Cell) -> str:
    """The printed value of a cell, with its batches where they are not the row's."""
    if cell.paper is None:
        return "–"
    elsewhere = f" {pair(row.paper_batch)}" if row.paper_batch and row.paper_batch != row.batch else ""
    return f"{cell.paper:,}{elsewhere}"  # as printed: 90.0, not 90.00


def _batches(batch: Batch | None) -> list[object]:
    return ["" if size is None else size for size in batch or (None, None)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _wrap(paragraph: str) -> str:
    indent = "  " if paragraph.startswith("- ") else ""
    return textwrap.fill(paragraph, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def escape_markdown(text: str) -> str:
    """Text that Markdown prints as it is, also inside a pipe table."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
