"""What the figures of cards share: the looks of rows, the arrays beside records, captions, grids of panels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kalmannorm.experiments import record as records
from kalmannorm.experiments.card import Card, Row
from kalmannorm.report import quantities, style
from kalmannorm.report.cells import Cell, Cells, Group, identity
from kalmannorm.report.plots import Panel, lines
from kalmannorm.report.style import Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = dict[str, "Figure"]  # by the suffix that the file name adds to the card's; empty if nothing was run
Arrays = dict[str, np.ndarray]
READING = "Line: mean over the seeds that learned; band: from the lowest to the highest; hollow: one seed."


def draw_panels(rows: Sequence[Sequence[Panel]], caption: str, scale: str = "linear") -> Figures:
    """Draw the rows of panels that have lines; {} if there are none."""
    drawn = [row for row in rows if any(panel.lines for panel in row)]
    return {"": lines(drawn, caption, scale)} if drawn else {}


def looks_of(card: Card, group: Group, cells: Cells) -> dict[str, Look]:
    """Choose looks for the rows that ran only, since few looks are easier to tell apart than many."""
    ran = [row for row in card.rows if any(cells.cell(card, row, group, column).n for column in card.columns)]
    return style.looks([(row.name, identity(card, row).normalizer.split(" ")[0]) for row in ran])


def by_network(card: Card) -> dict[str, list[Row]]:
    """Return the card's rows by their network."""
    found: dict[str, list[Row]] = {}
    for row in card.rows:
        found.setdefault(identity(card, row).network, []).append(row)
    return found


def arrays_of(
    cell: Cell, having: str = "gap_measured", of_all: bool = False
) -> dict[int, tuple[quantities.Run, Arrays]]:
    """Return by seed the runs that learned, or all runs, with the arrays beside their records. Runs without an array
    named `having` are left out."""
    found = {}
    for run in cell.runs if of_all else cell.learned:
        arrays = records.arrays_if_any(str(run["id"]), run["results"])
        if having in arrays:
            found[int(run["seed"])] = (run, arrays)
    return found


def setting(card: Card, group: Group) -> str:
    """Return the data sets and the group as the beginning of a caption."""
    of_columns = dict.fromkeys(column.runs["dataset"] for column in card.columns if "dataset" in column.runs)
    return f"{', '.join(filter(None, ['' if group.dataset else ' / '.join(of_columns), group.label]))}."
