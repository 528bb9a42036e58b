"""What each kind of card shows of its runs in one group (`DRAW`), by the three ways to draw of plots.py."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from kalmannorm.data import SCENES
from kalmannorm.experiments.card import Card, Column, Row
from kalmannorm.report import quantities, style
from kalmannorm.report.cells import Cell, Cells, Group, identity, values_of
from kalmannorm.report.figure_data import READING, Figures, arrays_of, by_network, draw_panels, looks_of, setting
from kalmannorm.report.layer_figures import conditioning, death, figure5, gains, layer_errors
from kalmannorm.report.plots import Entry, Line, Panel, Point, forest, label_maps
from kalmannorm.report.quantities import PERCENT
from kalmannorm.report.style import Look

OF_FIRST_STEPS = ("death", "conditioning")  # kinds of cards about a run's first steps (train/first_steps.py)
RELEASED = ((0, 0.1),)  # the released recipe's highest rate
SN_OF, TILE = ("in", "ln", "bn"), 8
OF_SN = {"IN": Look("#000000", "^", ":"), "LN": Look(style.GREY, "D", "--"), "BN": Look(style.ORANGE, "s", "-")}
COLUMNS = tuple(zip((style.ORANGE, style.BLUE, style.GREEN, "#CC79A7", style.GREY), style.MARKERS, strict=False))
STATISTICS = dict(zip(("moving", "online"), COLUMNS, strict=False))  # these columns look the same in all figures


def table(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw a table's percentages, with an axis for each quantity: the mean, and a tick for every run. The paper's
    values are only in the table."""
    entries: list[Entry] = []
    columns = [
        c
        for c in card.columns
        if c.steps_to is None and c.value in PERCENT and any(cells.cell(card, r, group, c).runs for r in card.rows)
    ]
    axes = list(dict.fromkeys(PERCENT[column.value] for column in columns))
    others = [column.key for column in columns if column.key not in STATISTICS]
    free = COLUMNS if len(others) == len(columns) else COLUMNS[len(STATISTICS) :]
    looks = STATISTICS | dict(zip(others, itertools.cycle(free), strict=False))
    block = ""
    for row in card.rows:
        of_row = [(c, cells.cell(card, row, group, c)) for c in columns if row.has(c)]
        if not any(cell.n for _, cell in of_row):
            continue
        if row.block != block:
            block = row.block
            entries.append(Entry(block))
        lost = [f"{len(cell.learned)} of {cell.n} learned" for _, cell in of_row if cell.lost]
        found = [(column, list(_final(cell, column.value).values())) for column, cell in of_row]
        points = [
            Point(float(np.mean(runs)), *looks[column.key], runs=runs, axis=axes.index(PERCENT[column.value]))
            for column, runs in found
            if runs
        ]
        entries.append(Entry(row.name, points, lost[0] if lost else ""))
    ran = replace(card, columns=tuple(columns))
    caption = (
        f"{setting(ran, group)} After the last epoch. Ticks: single runs; marks: their mean, over those that learned."
    )
    legend = {column.label: Point(0, *looks[column.key]) for column in columns}
    shown = any(entry.points for entry in entries)
    figures = {"": forest(entries, caption, [f"{name} (%)" for name in axes], legend)} if shown else {}
    return figures | _scenes(card, group, cells) | _choices(card, group, cells)


def _choices(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the statistics that every layer of SSN finally chose, in every run that learned."""
    columns: dict[str, list[np.ndarray]] = {}
    for row, column in itertools.product(card.rows, card.columns):
        learned = cells.cell(card, row, group, column).learned
        norms = [run["norms"] for run in learned if quantities.norm_state(run, "choices")]
        chosen = [[of["choices"][name]["chosen"] for name in of["order"] if name in of["choices"]] for of in norms]
        for i, moment in enumerate(("mean", "variance") if chosen else ()):
            numbers = [[SN_OF.index(layer[i]) for layer in run] for run in chosen]
            tiles = np.kron(np.array(numbers).T, np.ones((TILE, TILE), int))
            tiles[TILE - 1 :: TILE], tiles[:, TILE - 1 :: TILE] = len(SN_OF), len(SN_OF)  # white lines between them
            columns[f"{column.label}: {moment}"] = [tiles]
    caption = (
        f"{setting(card, group)} What SSN's layers chose for good, from the first (above) to the last; a column a seed."
    )
    return {"_choices": label_maps(columns, [name.upper() for name in SN_OF], caption)} if columns else {}


def _scenes(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw a few test scenes' true and predicted classes, if the runs are segmenters: a column for each row of the
    card."""
    loaded = {row.name: arrays_of(cells.cell(card, row, group, card.columns[0]), "scene_true_0") for row in card.rows}
    found = {name: next(iter(of_seeds.values())) for name, of_seeds in loaded.items() if of_seeds}
    if not found:
        return {}
    run, first = next(iter(found.values()))
    scenes = range(sum(key.startswith("scene_true_") for key in first))
    columns = {"truth": [first[f"scene_true_{i}"] for i in scenes]}
    columns |= {name: [arrays[f"scene_predicted_{i}"] for i in scenes] for name, (_, arrays) in found.items()}
    dataset, classes = run["dataset"], SCENES[run["config"]["dataset"]["name"]].classes
    caption = f"{setting(card, group)} Test scenes of {dataset} by moving statistics, the first seed that learned."
    return {"_maps": label_maps(columns, classes, f"{caption} White: not labelled.")}


def curves(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the accuracy after every epoch against steps, a panel per kind of statistics; runs at chance as thin
    lines."""
    look = looks_of(card, group, cells)

    def line(label: str, look: Look, runs: Sequence[quantities.Run], band: bool = True) -> Line:
        places = list(zip(*(run["curve"] for run in runs), strict=False))  # up to the epoch that all runs reached
        values = [[np.nan if value is None else value for value in place] for place in places]
        return Line(label, look, runs[0]["step"][: len(places)], values, band=band)

    def of_row(row: Row, cell: Cell) -> Iterator[Line]:
        runs = [run for run in cell.runs if isinstance(run["curve"], list) and len(run["curve"]) > 1]
        if learned := [run for run in runs if run["learned"]]:
            yield line(row.name, look[row.name], learned)
        for run in (run for run in runs if not run["learned"]):
            yield line(f"{row.name}, at chance", Look(look[row.name].colour, "", ":"), [run], band=False)

    def of_network(network: str, column: Column) -> Iterator[Line]:
        for row in networks[network]:
            yield from of_row(row, cells.cell(card, row, group, column))

    networks = by_network(card)
    return draw_panels(_accuracies(card, networks, "optimizer steps", of_network), f"{setting(card, group)} {READING}")


def against(name: str, scale: str, of: Callable[[Card, Row], float | None], apart: str) -> "Draw":
    """Return a function that draws final accuracy against a setting of the rows: a line per label, a panel per title
    and kind of statistics. Rows without the setting (no statistics batch, no gain) are horizontal lines.

    `name`: the setting, for the axis. `scale`: of the axis. `of`: reads the setting from a row. `apart`: a format that
    makes the panel's title from a row's identity.
    """

    def draw(card: Card, group: Group, cells: Cells) -> Figures:
        look, titles = looks_of(card, group, cells), [apart.format(identity(card, row)) for row in card.rows]
        at = [of(card, row) for row in card.rows]
        ran_in: dict[str, dict[str, list[str]]] = {}  # arithmetic -> row -> panels in which the row ran so
        for row, title, x in zip(card.rows, titles, at, strict=True):
            called = row.name if x is None else f"{row.name} {x:g}"
            for arithmetic in {run["arithmetic"] for run in cells.cell(card, row, group).runs}:
                ran_in.setdefault(arithmetic, {}).setdefault(called, []).append(title)

        def of_title(title: str, column: Column) -> Iterator[Line]:
            for label in look:
                same = [
                    row for row in zip(card.rows, titles, at, strict=True) if (row[0].name, row[1]) == (label, title)
                ]
                ran = {x: cell for row, _, x in same if (cell := cells.cell(card, row, group, column)).n}
                if places := sorted(ran, key=lambda x: (x is None, x)):
                    values = [list(_final(ran[x]).values()) for x in places]
                    yield Line(label, look[label], places, values, [x for x in places if ran[x].lost])

        caption = f"{READING} Crosses: where runs failed or stayed at chance. Horizontal: no such setting."
        caption += _differing(ran_in)
        return draw_panels(_accuracies(card, titles, name, of_title), f"{setting(card, group)} {caption}", scale)

    return draw


def _differing(ran_in: Mapping[str, Mapping[str, list[str]]]) -> str:
    """Return a sentence on the rows that ran in another arithmetic than most; "" if there are none. Panels are named if
    a row's arithmetic differs between them."""
    if len(ran_in) < 2:
        return ""
    *few, most = sorted(ran_in, key=lambda arithmetic: len(ran_in[arithmetic]))
    several = Counter(called for rows in ran_in.values() for called in rows)
    parts = []
    for arithmetic in few:
        rows = sorted(ran_in[arithmetic].items())
        names = [f"{called} ({', '.join(panels)})" if several[called] > 1 else called for called, panels in rows]
        parts.append(f"{', '.join(names)} in {arithmetic}")
    return f" Arithmetic differs: {'; '.join(parts)}; the others in {most}."


def mixture(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw Switchable Norm's weights of IN, LN and BN against the statistics batch."""
    shares: dict[float | None, np.ndarray] = {}  # statistics batch -> [layers and seeds, means or variances, weights]
    for row in card.rows:
        layers = [
            [layer["mean"], layer["var"]]
            for run in cells.cell(card, row, group).learned
            for layer in (quantities.norm_state(run, "mixture") or {}).values()
        ]
        if layers:
            shares[float(identity(card, row).stat_batch)] = np.array(layers)

    def quartiles(j: int, i: int) -> list[list[float]]:
        return [list(np.quantile(of[:, j, i], (0.25, 0.5, 0.75))) for of in shares.values()]

    panels = [
        Panel(
            f"weights of the {moment}",
            [Line(name, look, list(shares), quartiles(j, i)) for i, (name, look) in enumerate(OF_SN.items()) if shares],
            "weight",
            "images that share statistics",
        )
        for j, moment in enumerate(("means", "variances"))
    ]
    caption = f"{setting(card, group)} Over layers and seeds: the quartiles and their mean."
    return draw_panels([panels], caption, "log")


def _accuracies(
    card: Card, titles: Iterable[str], horizontal: str, of: Callable[[str, Column], Iterable[Line]]
) -> list[list[Panel]]:
    """Return a row of panels for each title, a panel per kind of statistics."""
    return [
        [
            Panel(f"{title}: {c.label} statistics", list(of(title, c)), "top-1 accuracy (%)", horizontal)
            for c in card.columns
        ]
        for title in dict.fromkeys(titles)
    ]


def _final(cell: Cell, quantity: str = "accuracy") -> dict[int, float]:
    return values_of(cell, quantities.value(quantity))


# By kind of cards that vary one setting, the arguments of `against`: the setting's name, the axis's scale, a function
# that reads it from a row, the panels' titles.
SETTINGS: Mapping[str, tuple[str, str, Callable[[Card, Row], float | None], str]] = {
    "stat_batch": (
        "images that share statistics",
        "log",
        lambda card, row: identity(card, row).stat_batch or None,
        "{0.network}",
    ),
    "initial_gain": (
        "initial gain q",
        "logit",
        lambda card, row: card.settings(row).get("norm.options.gain"),
        "{0.network}, statistics of {0.stat_batch}",
    ),
    "learning_rate": (
        "highest learning rate",
        "log",
        lambda card, row: max(rate for _, rate in card.settings(row).get("schedule.lr", RELEASED)),
        "{0.network}",
    ),
}
Draw = Callable[[Card, Group, Cells], Figures]
DRAW: Mapping[str, Draw] = {
    "table": table,
    "curves": curves,
    "figure": figure5,
    "gains": gains,
    "layer_errors": layer_errors,
    "mixture": mixture,
    "death": death,
    "conditioning": conditioning,
    **{kind: against(*of) for kind, of in SETTINGS.items()},
}
