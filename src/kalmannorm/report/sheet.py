"""A Sheet, the text of a table with links to its runs, and its forms: HTML, LaTeX, Markdown, CSV and text."""

import html
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

WIDTH = 100  # characters of a terminal line
WIDE = 130  # characters of a row above which LaTeX would shrink a table to a third of the text's size or less
LOW = 20  # most rows of a table that lies on its side, with its notes
LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "{}&%$#_"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"},
        **{">": r"\textgreater{}", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$", "–": "--", "Δ": r"$\Delta$"},
    }
)


class Place(NamedTuple):
    """The text in one place of a table, the runs that it was made from, and the letters of its notes."""

    text: str
    ids: Sequence[str] = ()
    best: bool = False
    marks: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    stem: str  # file name without ending
    title: str
    caption: str  # one line
    about: tuple[str, ...]  # further sentences, which the page shows on demand
    header: tuple[str, ...]
    index: tuple[tuple[str, str], ...]  # each row's block ("" for none) and label
    rows: tuple[tuple[Place, ...], ...]
    notes: tuple[str, ...] = ()  # footnotes a, b, ... in this order
    records: tuple[Mapping[str, object], ...] = field(default=(), repr=False)  # the lines of the CSV file

    @property
    def width(self) -> int:
        """Characters of a line, without its label, if every column is as wide as its longest text."""
        lines = [self.header, *([place.text for place in row] for row in self.rows)]
        return sum(max(map(len, column)) for column in zip(*lines, strict=True))


def latex(sheet: Sheet) -> str:
    """Return a table environment for booktabs and graphicx, shrunk to the text's width if necessary.

    A wide table of few rows is turned on its side (rotating), where it has to shrink half as much.
    """
    blocks = any(block for block, _ in sheet.index)
    body = _written(sheet, _latex, r"\textbf{{{}}}", r"\textsuperscript{{{}}}").style.to_latex(
        hrules=True,
        clines="skip-last;data" if blocks else None,
        column_format=("ll" if blocks else "l") + "r" * len(sheet.header),
        multirow_align="naive",
    )
    title = sheet.title.partition(": ")[2] or sheet.title
    notes = [rf"\textsuperscript{{{letter(i)}}} {_latex(note)}." for i, note in enumerate(sheet.notes)]
    below = [*map(_latex, (sheet.caption, *sheet.about)), *notes]
    wide = sheet.width > WIDE and len(sheet.rows) <= LOW
    environment = "sidewaystable" if wide else "table"
    return rf"""% \usepackage{{booktabs,graphicx{",rotating" if wide else ""}}}
\begin{{{environment}}}
\centering
\caption{{{_latex(title[0].upper() + title[1:])}.}}\label{{tab:{re.sub("[^A-Za-z0-9-]", "-", sheet.stem)}}}
\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{%
{body.strip()}}}
\par\smallskip\raggedright\scriptsize {" ".join(below)}
\end{{{environment}}}
"""


def page_html(sheet: Sheet) -> str:
    """Return the table as HTML, without caption and notes; each number is a link that opens its runs."""
    frame = _written(sheet, html.escape, "<b>{}</b>", "<sup>{}</sup>", '<a href="#runs={}">{}</a>')
    text = frame.style.set_table_attributes('class="numbers"').set_uuid(sheet.stem).to_html(sparse_index=True)
    text = re.sub(r"<style.*?</style>\n", "", text, flags=re.DOTALL)
    return re.sub(r' (id|class)="(?!numbers)[^"]*"', "", text)


def markdown(sheet: Sheet) -> str:
    """Return a pipe table, with the caption above it and the notes below."""
    escaped = escape_markdown
    frame = _written(sheet, escaped, "**{}**", "<sup>{}</sup>")
    lines = [["", *frame.columns], [":--", *[":-:"] * len(sheet.header)]]
    block = ""
    for (of, label), row in zip(sheet.index, frame.to_numpy(), strict=True):
        if of != block:
            lines.append([f"**{escaped(of)}**", *[""] * len(row)])
            block = of
        lines.append([escaped(label), *row])
    parts = [
        f"**{escaped(sheet.title)}.** {escaped(sheet.caption)}",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        *(f"<sup>{letter(i)}</sup> {escaped(note)}" for i, note in enumerate(sheet.notes)),
        escaped(" ".join(sheet.about)),
    ]
    return "\n\n".join(parts) + "\n"


def text(sheet: Sheet) -> str:
    """Return the table in aligned columns, for the terminal, with its notes."""
    body = _written(sheet, str, "{}", " [{}]").to_numpy()
    labels = [f"{block}: {label}" if block else label for block, label in sheet.index]
    drawn = aligned([["", *sheet.header], *([label, *row] for label, row in zip(labels, body, strict=True))])
    notes = [f"[{letter(i)}] {note}" for i, note in enumerate(sheet.notes)]
    said = [textwrap.fill(part, WIDTH) for part in (*notes, *sheet.about)]
    return "\n".join([f"{sheet.title}.", textwrap.fill(sheet.caption, WIDTH), "", *drawn, "", *said, ""])


def csv(sheet: Sheet) -> str:
    """Return the sheet's records as CSV: for a card's table one line per row and column, with numbers unrounded."""
    return pd.DataFrame(sheet.records).to_csv(index=False, lineterminator="\n")


def files(sheet: Sheet) -> dict[str, bytes]:
    """Return a sheet's files by name."""
    texts = {"md": markdown(sheet), "csv": csv(sheet), "tex": latex(sheet)}
    return {f"{sheet.stem}.{ending}": content.encode() for ending, content in texts.items()}


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of padded columns; a line may have fewer columns than others."""
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
    return [
        "  ".join(place.ljust(width) for place, width in zip(line, widths, strict=False)).rstrip() for line in lines
    ]


def letter(place: int) -> str:
    """Return the letter of a footnote by its place: a, b, ... z, aa, ab, ..."""
    return ("" if place < 26 else letter(place // 26 - 1)) + chr(ord("a") + place % 26)


def escape_markdown(said: str) -> str:
    """Return text that Markdown prints as it is, also inside a pipe table."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", said).replace("&", "&amp;").replace("<", "&lt;")


def _latex(said: str) -> str:
    return said.translate(LATEX)


def _written(sheet: Sheet, escaped: Callable[[str], str], best: str, mark: str, link: str = "{1}") -> pd.DataFrame:
    """Return the places as text. Formats: `best` for the best value, `mark` for footnote letters, `link` for (run ids,
    text) if a place has runs; `escaped` escapes text."""

    def written(place: Place) -> str:
        text = escaped(place.text)
        text = best.format(text) if place.best and text else text
        text = link.format(",".join(place.ids), text) if place.ids and text else text
        return text + (mark.format(place.marks) if place.marks else "")

    blocks = any(block for block, _ in sheet.index)
    labels = [(escaped(block), escaped(label)) for block, label in sheet.index]
    index: Any = pd.MultiIndex.from_tuples(labels) if blocks else [label for _, label in labels]
    return pd.DataFrame([list(map(written, row)) for row in sheet.rows], index, list(map(escaped, sheet.header)))
