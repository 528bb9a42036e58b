"""The pictures, by three functions: `lines` (values against a setting, steps or layers), `forest` (values with their
intervals, one below the other) and `maps`. Each card's kind says what it shows of the frame (`DRAW`)."""

import hashlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.card import Card, Row
from kalmannorm.report import effects, quantities, style
from kalmannorm.report.effects import Cell, Cells, Group
from kalmannorm.report.style import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = dict[str, "Figure"]  # by what stands behind the card's name in the file's
FIRST_STEPS = {
    "offsets": "|prior mean - measured| / sd",
    "variance_ratios": "prior / measured variance",
    "scales": "mean square, normalized",
    "gradients": "gradient / weight",
}
CLIP = (1, 99)  # percentiles between which a map's colours spread
FLOOR = 0.001  # errors below it are zero but for rounding, or as good as zero
READING = "Line: mean over the seeds that learned; band: from the lowest to the highest; hollow: one seed."
STATISTICS = {"online": (style.BLUE, "o"), "moving": (style.ORANGE, "s")}


@dataclass
class Line:
    """Values of some seeds at each x; x None is no place on the axis, but all of it."""

    label: str
    look: Look
    at: list[float | None]
    values: Sequence[Sequence[float]]
    lost: list[float | None] = field(default_factory=list)  # where runs failed or stayed at chance
    apart: frozenset[int] = frozenset()  # places that no line joins to the one before
    band: bool = True


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    lines: list[Line]
    vertical: str = ""
    horizontal: str = ""
    log: bool = False
    limits: tuple[float, float] | None = None
    names: Sequence[str] = ()  # of the places 0, 1, ...
    levels: Mapping[float, Look] = field(default_factory=dict)  # faint horizontal lines


def lines(rows: Sequence[Sequence[Panel]], said: str, scale: str = "linear", ticks: Sequence[float] = ()) -> "Figure":
    """Draw a grid of panels with one legend; `scale` and `ticks` of the horizontal axis. Panels of a row share the
    vertical one."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    named = any(panel.names for row in rows for panel in row)
    with style.context():
        height = (3.0 if named else 2.2) * len(rows) + 1.2
        figure = Figure(figsize=(style.WIDTH, height), layout="constrained")
        grid = figure.subplots(len(rows), max(map(len, rows)), sharey="row", squeeze=False)
        shown: dict[str, tuple[Look, list[int]]] = {}
        for axes, panels in zip(grid, rows, strict=True):
            for axis, panel in zip(axes, panels, strict=True):
                for place, line in enumerate(panel.lines):
                    _line(axis, line, place)
                    counts = [len(of) for of in line.values if len(of)]
                    shown.setdefault(line.label, (line.look, []))[1].extend(counts)
                for level, look in panel.levels.items():
                    axis.axhline(level, color=look.colour, linestyle=look.dashes, lw=0.7, alpha=0.6)
                style.grid(axis, "y" if panel.names else "both")
                axis.set_title(panel.title, loc="left")
                axis.set_xlabel(panel.horizontal)
                if panel.names:
                    style.name_layers(axis, panel.names, 24 if len(panels) == 1 else 15)
                if panel.limits:
                    axis.set_ylim(*panel.limits)
                if scale != "linear":
                    axis.set_xscale(scale, **({"base": 2} if scale == "log" else {}))
                if len(ticks):
                    axis.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
                    axis.xaxis.set_minor_locator(NullLocator())
                    if scale == "logit":  # else half of it stays empty
                        axis.set_xlim(ticks[0] / 1.4, 1 - (1 - ticks[-1]) / 1.4)
            axes[0].set_ylabel(panels[0].vertical)
            if panels[0].log:
                style.logarithmic(axes[0], FLOOR)
            for axis in axes[len(panels) :]:
                axis.set_visible(False)
        handles = [Line2D([], [], **look.line, label=f"{label}{_n(counts)}") for label, (look, counts) in shown.items()]
        flat = {line.label for row in rows for panel in row for line in panel.lines if line.at == [None]}
        for handle, label in zip(handles, shown, strict=True):
            handle.set_marker("" if label in flat else handle.get_marker())
        _legend(figure, handles)
        figure.supxlabel(style.wrapped(said), fontsize=7.5, x=0.01, ha="left")
    return figure


@dataclass
class Entry:
    """One line of a forest: points (value, low, high, colour, marker, filled), each with its runs' values."""

    label: str
    points: list[tuple[float, float, float, str, str, bool]]
    ticks: list[tuple[Sequence[float], str]] = field(default_factory=list)
    note: str = ""
    head: bool = False  # a heading


def forest(
    entries: Sequence[Entry],
    said: str,
    horizontal: str,
    legend: Mapping[str, tuple[str, str, bool]],
    around: float | None = None,
) -> "Figure":
    """Draw values with their intervals, one below the other; `legend`: name -> colour, marker, filled. `around`: how
    far the axis reaches to either side of 0; an interval that goes on beyond it ends in an arrow."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with style.context():
        figure = Figure(figsize=(style.WIDTH, 1.0 + 0.21 * len(entries)), layout="constrained")
        axis = figure.subplots()
        for y, entry in enumerate(entries):
            offsets = list(np.linspace(-0.2, 0.2, len(entry.points))) if len(entry.points) != 1 else [0.0]
            for offset, (value, low, high, colour, marker, filled) in zip(offsets, entry.points, strict=True):
                if np.isfinite(low + high):
                    axis.plot([low, high], [y + offset] * 2, color=colour, lw=1.2, zorder=2)
                face = colour if filled else "white"
                axis.plot(value, y + offset, marker, color=colour, markerfacecolor=face, ms=4.5, zorder=3)
                for end in (low, high):
                    if around is not None and abs(end) > around:
                        edge, arrow = math.copysign(around, end), ">" if end > 0 else "<"
                        axis.plot(edge, y + offset, arrow, color=colour, ms=4, clip_on=False)
            for offset, (values, colour) in zip(offsets, entry.ticks, strict=False):
                axis.plot(values, [y + offset] * len(values), "|", color=colour, ms=7, mew=0.9)
            if entry.note:
                place = axis.get_yaxis_transform()
                axis.text(0.995, y, entry.note, color=style.GREY, va="center", ha="right", transform=place)
        axis.set_yticks(range(len(entries)), [entry.label for entry in entries])
        for label, entry in zip(axis.get_yticklabels(), entries, strict=True):
            label.set_fontweight("bold" if entry.head else "normal")
        axis.set_ylim(len(entries) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        if around is not None:
            axis.axvline(0, color="#444444", lw=0.8)
            axis.set_xlim(-around, around)
        style.grid(axis, "x")
        axis.set_xlabel(horizontal)
        handles = [
            Line2D(
                [],
                [],
                color=colour,
                marker=marker,
                linestyle="",
                markerfacecolor=colour if filled else "white",
                label=name,
            )
            for name, (colour, marker, filled) in legend.items()
        ]
        _legend(figure, handles)
        figure.supxlabel(style.wrapped(said), fontsize=7.5, x=0.01, ha="left")
    return figure


@dataclass
class Map:
    """Values [rows, columns] under a title; `names` of consecutive rows: name -> how many."""

    title: str
    values: np.ndarray
    names: Mapping[str, int] = field(default_factory=dict)


def maps(rows: Sequence[tuple[str, Sequence[Map]]], said: str, horizontal: str, vertical: str) -> "Figure":
    """Rows of maps, each row under one logarithmic scale of colours: (what is shown, maps)."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    with style.context():
        columns = len(rows[0][1])
        tall = 2.9 if len(rows) == 1 else 2.0
        figure = Figure(figsize=(style.WIDTH, tall * len(rows) + 1.1), layout="constrained")
        grid = figure.subplots(len(rows), columns, sharex="col", squeeze=False)
        for place, (axes, (label, of_row)) in enumerate(zip(grid, rows, strict=True)):
            everything = np.concatenate([one.values.ravel() for one in of_row])
            positive = everything[np.isfinite(everything) & (everything > 0)]
            low, high = np.percentile(positive, CLIP) if positive.size else (0.1, 1.0)
            norm = LogNorm(low, max(high, low * 1.01))
            colours = ScalarMappable(norm, "cividis")
            for axis, one in zip(axes, of_row, strict=True):
                title = [textwrap.fill(one.title, 60 // columns)] if place == 0 else []
                values = one.values[np.isfinite(one.values)]
                if values.size:
                    drawn = np.clip(_thinned(one.values), norm.vmin, norm.vmax)
                    extent = (-0.5, one.values.shape[1] - 0.5, len(one.values) - 0.5, -0.5)
                    axis.imshow(drawn, norm=norm, cmap="cividis", aspect="auto", interpolation="none", extent=extent)
                    mean = f"mean {values.mean():.3g}, " if columns <= 3 else ""
                    title.append(f"{mean}median {np.median(values):.3g}")
                else:
                    axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes)
                axis.set_title("\n".join(title), loc="left")
                axis.spines[:].set_visible(False)
                ends = np.cumsum([0, *one.names.values()])
                axis.set_yticks((ends[:-1] + ends[1:] - 1) / 2, list(one.names))
                axis.tick_params(axis="y", length=0, labelleft=one is of_row[0])
                for end in ends[1:-1]:
                    axis.axhline(end - 0.5, color="white", linewidth=0.8)
            figure.colorbar(colours, ax=list(axes), extend="both", pad=0.01, aspect=30).set_label(label)
        for axis in grid[-1] if columns <= 3 else [grid[-1][columns // 2]]:
            axis.set_xlabel(horizontal)
        figure.supylabel(vertical, fontsize=8)
        figure.supxlabel(style.wrapped(said), fontsize=7.5, x=0.01, ha="left")
    return figure


def _thinned(values: np.ndarray, most: int = 128) -> np.ndarray:
    """At most so many rows: the means of consecutive ones."""
    every = -(-len(values) // most)
    if every == 1:
        return values
    whole = np.pad(values, ((0, -len(values) % every), (0, 0)), constant_values=np.nan)
    return np.nanmean(whole.reshape(-1, every, values.shape[1]), axis=1)


def encode(figure: "Figure", kinds: Iterable[str] = ("png", "pdf")) -> dict[str, bytes]:
    """Return the bytes of files by their ending, without dates and versions: the same picture is the same file."""
    metadata = {
        "png": {"Software": None},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
        "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    }
    found = {}
    with style.context():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # once is enough
        for kind in kinds:
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=150, metadata=metadata[kind])
            found[kind] = out.getvalue()
    return found


def inline(picture: bytes, stem: str) -> str:
    """Prepare an SVG file to stand in a page: text as text, numbers with one decimal, looks once a line, names of its
    own."""
    text = picture.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (d|x|y|points|transform)="[^"]*"', lambda of: re.sub(r"\.(\d)\d+", r".\1", of[0]), text)
    text = (
        re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", text).replace("font-family: 'DejaVu Sans'; ", "").replace("\nL", " L")
    )
    own = hashlib.sha256(stem.encode()).hexdigest()[:4]
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}-", text)
    text = re.sub(r'<g( clip-path="[^"]*")>\s*((?:<use [^>]*?style="([^"]*)"/>\s*)+)</g>', _looks_once, text)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2))


def _looks_once(found: re.Match[str]) -> str:
    look = found[3]
    return f'<g{found[1]} style="{look}">{found[2].replace(chr(32) + "style=" + chr(34) + look + chr(34), "")}</g>'


def table(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw a table's accuracies: the mean, and a tick for every run. The paper's values stand in the table."""
    entries: list[Entry] = []
    block = ""
    columns = [
        c for c in card.columns if c.steps_to is None and any(cells.cell(card, r, group, c).runs for r in card.rows)
    ]
    colours = [style.BLUE, style.ORANGE, style.GREEN, "#CC79A7", style.GREY]
    looks = {
        column.key: (STATISTICS[column.key] if column.key in STATISTICS else (colours[i % 5], style.MARKERS[i]))
        for i, column in enumerate(columns)
    }
    for row in card.rows:
        of_row = {
            c.key: cells.cell(card, row, group, c) for c in columns if row.columns is None or c.key in row.columns
        }
        if not any(cell.n for cell in of_row.values()):
            continue
        if row.block != block:
            block = row.block
            entries.append(Entry(block, [], head=True))
        entry = Entry(row.name, [])
        lost = [f"{len(cell.learned)} of {cell.n} learned" for cell in of_row.values() if cell.lost]
        for column in columns:
            found = list(_final(of_row.get(column.key, Cell()), column.value).values())
            if found:
                entry.points.append((float(np.mean(found)), np.nan, np.nan, *looks[column.key], True))
                entry.ticks.append((found, looks[column.key][0]))
        entry.note = dict.fromkeys(lost).__iter__().__next__() if lost else ""
        entries.append(entry)
    said = f"{_said(card, group)} Ticks: single runs; marks: their mean, over those that learned."
    legend = {column.label: (*looks[column.key], True) for column in columns}
    return {"": forest(entries, said, "percent after the last epoch", legend)} if entries else {}


def curves(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the accuracy after every epoch against steps, a panel per kind of statistics; runs at chance as thin
    lines."""
    found: list[list[Panel]] = []
    look = _looks(card)
    for network, rows in _by_network(card).items():
        panels = []
        for column in card.columns:
            drawn = []
            for row in rows:
                cell = cells.cell(card, row, group, column)
                for runs, band in ((cell.learned, True), ([r for r in cell.runs if not r["learned"]], False)):
                    whole = [run for run in runs if isinstance(run["curve"], list) and len(run["curve"]) > 1]
                    for together in [whole] if band else [[run] for run in whole]:
                        if together:
                            length = min(len(run["curve"]) for run in together)
                            values = [
                                [np.nan if r["curve"][i] is None else r["curve"][i] for r in together]
                                for i in range(length)
                            ]
                            shown = row.name if band else f"{row.name}, at chance"
                            style_ = look[row.name] if band else Look(look[row.name].colour, "", ":")
                            drawn.append(Line(shown, style_, together[0]["step"][:length], values, band=band))
            panels.append(
                Panel(f"{network}: {column.label} statistics", drawn, "top-1 accuracy (%)", "optimizer steps")
            )
        found.append(panels)
    if not any(panel.lines for row in found for panel in row):
        return {}
    return {"": lines([row for row in found if any(p.lines for p in row)], f"{_said(card, group)} {READING}")}


def against(
    card: Card,
    group: Group,
    cells: Cells,
    of: Callable[[Row], float | None],
    name: str,
    scale: str,
    apart: Callable[[Row], str],
) -> Figures:
    """Final accuracy against a setting `of` the rows: a line per label, a panel per `apart` and kind of statistics.

    Rows without the setting (no statistics batch, no gain) are horizontal lines.
    """
    rows = list(card.rows)
    look = _looks(card)
    ticks = sorted({x for row in rows if (x := of(row)) is not None})
    found = []
    for title in dict.fromkeys(map(apart, rows)):
        panels = []
        for column in card.columns:
            drawn = []
            for label in dict.fromkeys(row.name for row in rows):
                same = [row for row in rows if row.name == label and apart(row) == title]
                of_line = {of(row): cells.cell(card, row, group, column) for row in same}
                ran = {x: cell for x, cell in sorted(of_line.items(), key=lambda p: (p[0] is None, p[0])) if cell.n}
                if ran:
                    values = [list(_final(cell).values()) for cell in ran.values()]
                    lost = [x for x, cell in ran.items() if cell.lost]
                    drawn.append(Line(label, look[label], list(ran), values, lost))
            panels.append(Panel(f"{title}: {column.label} statistics", drawn, "top-1 accuracy (%)", name))
        if any(panel.lines for panel in panels):
            found.append(panels)
    said = (
        f"{_said(card, group)} {READING} Crosses: where runs failed or stayed at chance. Horizontal: no such setting."
    )
    return {"": lines(found, said, scale, ticks)} if found else {}


def figure5(card: Card, group: Group, cells: Cells) -> Figures:
    """Variance gaps of the last normalizers by channel and batch, and of every layer; of the card's first two rows."""
    (bn_name, bn), (kn_name, kn) = ((row.name, _arrays(cells.cell(card, row, group))) for row in card.rows[:2])
    if not bn or not kn:
        return {}
    seed = min(bn.keys() & kn.keys(), default=None)
    (run, one), (_, other) = (
        (bn[seed], kn[seed]) if seed is not None else (next(iter(bn.values())), next(iter(kn.values())))
    )
    shown = [
        (f"{bn_name}: sample variance", one, "gap_measured"),
        (f"{kn_name}: sample variance", other, "gap_measured"),
    ]
    shown += [(f"{kn_name}: posterior", other, "gap_used")] if "gap_used" in other else []
    names = _last(run, one)
    absolute = [Map(title, of[key], names) for title, of, key in shown]
    below = [of["moving_var"][:, None] + quantities.EPS for _, of, _ in shown]
    relative = [Map(one.title, one.values / by, names) for one, by in zip(absolute, below, strict=True)]
    said = (
        f"{_said(card, group)} Seed {seed if seed is not None else 'of each its own'}; groups of the training set "
        "without augmentation, in bins. Top: |variance − moving variance|; bottom: over the moving variance. One "
        "logarithmic scale a row. The paper compares the sample variance; the posterior is what normalizes in KN."
    )
    pictures = {
        "": maps(
            [("gap", absolute), ("gap / moving variance", relative)],
            said,
            "groups, in bins",
            "channels of the last normalizers",
        )
    }
    looks = {
        (0, "measured"): Look(style.ORANGE, "s", "-"),
        (1, "measured"): Look(style.SKY, "^", "--"),
        (1, "used"): Look(style.BLUE, "o", "-"),
    }
    drawn = []
    for (row, what), look in looks.items():
        of_runs = [arrays[f"layer_gap_{what}"] for _, arrays in (bn, kn)[row].values() if f"layer_gap_{what}" in arrays]
        if of_runs:
            label = f"{(bn_name, kn_name)[row]}: {'sample variance' if what == 'measured' else 'posterior'}"
            drawn.append(_over_layers(label, look, of_runs, run))
    panel = Panel("", drawn, "mean gap / moving variance", names=quantities.layers(run, len(one["layer_gap_measured"])))
    pictures["_layers"] = lines([[panel]], f"{_said(card, group)} Normalizers in network order. {READING}")
    return pictures


def gains(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the gain that every layer learned, a line per row."""
    look, found = _looks(card), []
    for network, rows in _by_network(card).items():
        panel = Panel(network, [], "gain q, weight of the measurement", limits=(0, 1))
        levels = {}
        for row in rows:
            cell = cells.cell(card, row, group)
            learned = [run for run in cell.learned if (run["norms"] or {}).get("gains")]
            if learned:
                order = [name for name in learned[0]["norms"]["order"] if name in learned[0]["norms"]["gains"]]
                values = [np.array([run["norms"]["gains"][name] for name in order]) for run in learned]
                panel.lines.append(_over_layers(row.name, look[row.name], values, {"norms": {"order": order}}))
                panel.names = order
                start = learned[0].get("norm.options.gain")
                if start is not None and np.isfinite(start):
                    levels[float(start)] = look[row.name]
        panel.levels = levels
        found += [[panel]] if panel.lines else []
    return {"": lines(found, f"{_said(card, group)} Faint: where the gain starts. {READING}")} if found else {}


def layer_errors(card: Card, group: Group, cells: Cells) -> Figures:
    """Per layer, the errors of measurement, prior and posterior against the population's statistics, and their
    parts."""
    what = {"mean": "mean:\n|error| / population sd", "var": "variance:\n|ln(estimate / population)|"}
    parts = {"": "root mean square error", "_bias": "the same in all groups", "_spread": "from group to group"}
    estimates = {
        "measurement": (style.SKY, "^", "--"),
        "prior": (style.GREEN, "D", ":"),
        "posterior": (style.BLUE, "o", "-"),
    }
    loaded = {row.name: _arrays(cells.cell(card, row, group)) for row in card.rows}
    rows = []
    for moment, label in what.items():
        panels = []
        for part, title in parts.items():
            panel, key = Panel(title, [], label, log=True), f"layer_error_{moment}{part}"
            for place, (name, of_row) in enumerate(loaded.items()):
                for i, (estimate, (colour, marker, dashes)) in enumerate(estimates.items()):
                    values = [arrays[key][i] for _, arrays in of_row.values() if key in arrays]
                    values = [one for one in values if np.isfinite(one).any()]
                    if values:
                        run = next(iter(of_row.values()))[0]
                        bn = "gap_used" not in next(iter(of_row.values()))[1]
                        if bn and estimate == "posterior":  # BN normalizes by its measurement
                            continue
                        look = (
                            Look(style.ORANGE, "s", "-") if bn else Look(style.tint(colour, place - 1), marker, dashes)
                        )
                        panel.lines.append(_over_layers(f"{name}: {estimate}", look, values, run))
                        panel.names = quantities.layers(run, len(values[0]))
            panels.append(panel)
        rows.append(panels)
    if not any(panel.lines for row in rows for panel in row):
        return {}
    said = (
        f"{_said(card, group)} Of the median channel, over groups of training images, against the statistics of the "
        "same features over the training set. What is the same in all groups, gamma and beta can make up for. "
        f"{READING}"
    )
    return {"": lines(rows, said)}


def mixture(card: Card, group: Group, cells: Cells) -> Figures:
    """Switchable Norm's weights of IN, LN and BN against the statistics batch."""
    looks = {"IN": Look("#000000", "^", ":"), "LN": Look(style.GREY, "D", "--"), "BN": Look(style.ORANGE, "s", "-")}
    panels = [
        Panel(f"weights of the {what}", [], "weight", "images that share statistics", limits=(0, 1))
        for what in ("means", "variances")
    ]
    at, shares = [], []
    for row in card.rows:
        learned = [run for run in cells.cell(card, row, group).learned if (run["norms"] or {}).get("mixture")]
        if learned:
            at.append(float(effects.identity(card, row)["stat_batch"]))
            layers = [layer for run in learned for layer in run["norms"]["mixture"].values()]
            shares.append(np.array([[layer["mean"], layer["var"]] for layer in layers]))
    if not at:
        return {}
    for j, panel in enumerate(panels):
        for i, (name, look) in enumerate(looks.items()):
            quartiles = [list(np.quantile(of[:, j, i], (0.25, 0.5, 0.75))) for of in shares]
            panel.lines.append(Line(name, look, list(at), quartiles))
    return {
        "": lines([panels], f"{_said(card, group)} Over layers and seeds: the quartiles and their mean.", "log", at)
    }


def death(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw what becomes of each layer, step by step (train/first_steps.py): how wrong its prior is, the mean square of
    its normalized features, gradient over weight. A network whose estimate does not know that it is wrong blows up.
    """
    found: dict[str, list[Map]] = {label: [] for label in FIRST_STEPS.values()}
    for row in card.rows:
        for run, arrays in _arrays(cells.cell(card, row, group), all_runs=True).values():
            if "scales" in arrays:
                for name, label in FIRST_STEPS.items():
                    names = quantities.layers(run, arrays[name].shape[1])
                    found[label].append(
                        Map(row.name, arrays[name].T, dict.fromkeys(names, 1) if len(names) < 13 else {})
                    )
                break
    if not any(found.values()):
        return {}
    return {"": maps(list(found.items()), _said(card, group), "steps, from the first on", "layers, from the first on")}


def _line(axis: "Axes", line: Line, place: int) -> None:
    """One line with its band; horizontal without marks where it has no x."""
    for x, values in zip(line.at, line.values, strict=True):
        if x is None and len(values):
            axis.axhline(float(np.mean(values)), color=line.look.colour, linestyle=line.look.dashes, lw=1)
            axis.axhspan(min(values), max(values), color=line.look.colour, alpha=0.08, linewidth=0)
    places = [(x, np.asarray(of, float)) for x, of in zip(line.at, line.values, strict=True) if x is not None]
    at = np.array([x for x, _ in places], float)
    means, lows, highs = (
        np.array([float(f(of[np.isfinite(of)])) if np.isfinite(of).any() else np.nan for _, of in places])
        for f in (np.mean, np.min, np.max)
    )
    colour, cuts = line.look.colour, sorted(line.apart)  # a gap before each of these
    joined = [np.insert(values, cuts, np.nan) for values in (at, means, lows, highs)]
    if places:
        width = 1.2 if line.band else 0.8
        axis.plot(*joined[:2], color=colour, linestyle=line.look.dashes, lw=width)
        if line.band and np.nanmax(highs - lows, initial=0) > 0:
            axis.fill_between(joined[0], joined[2], joined[3], color=colour, alpha=0.18, linewidth=0)
        every = max(1, len(at) // 8) if len(at) > 30 and not line.apart else 1
        single = np.array([len(of) == 1 for _, of in places])
        for hollow in (False, True):
            chosen = (single == hollow) & (np.arange(len(at)) % every == place % every)
            if chosen.any() and line.look.marker:
                face = "white" if hollow else colour
                axis.plot(at[chosen], means[chosen], line.look.marker, color=colour, ms=3.5, markerfacecolor=face)
    for x in line.lost:
        transform = axis.transAxes if x is None else axis.get_xaxis_transform()
        axis.plot(
            [x or 0],
            [0.03 + 0.045 * (place % 8)],
            "x",
            color=line.look.colour,
            ms=4.5,
            mew=1.3,
            transform=transform,
            clip_on=False,
        )


def _legend(figure: "Figure", handles: Sequence[Any]) -> None:
    if handles:
        widest = max(len(str(handle.get_label())) for handle in handles)
        columns = min(len(handles), max(1, 105 // (widest + 9)))
        figure.legend(handles=list(handles), loc="outside upper center", ncols=columns, frameon=False, handlelength=3.0)


def _n(counts: Sequence[int]) -> str:
    """ " (n = 1 to 3)"."""
    found = sorted(set(counts))
    return f" (n = {found[0]}{f' to {found[-1]}' if found[1:] else ''})" if found else ""


def _final(cell: Cell, quantity: str = "accuracy") -> dict[int, float]:
    return effects.values_of(cell, lambda run: quantities.value(run, quantity))


def _looks(card: Card) -> dict[str, Look]:
    return style.looks([(row.name, effects.identity(card, row)["normalizer"].split(" ")[0]) for row in card.rows])


def _by_network(card: Card) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in card.rows:
        found.setdefault(effects.identity(card, row)["network"], []).append(row)
    return found


def _arrays(cell: Cell, all_runs: bool = False) -> dict[int, tuple[Any, dict[str, np.ndarray]]]:
    """Return, by seed, the runs that learned and have arrays beside their record."""
    found = {}
    for run in cell.runs if all_runs else cell.learned:
        try:
            found[int(run["seed"])] = (run, records.arrays(str(run["id"]), run["results"]))
        except UserError:  # none beside it
            continue
    return {
        seed: (run, arrays) for seed, (run, arrays) in found.items() if "gap_measured" in arrays or "scales" in arrays
    }


def _over_layers(label: str, look: Look, runs: Sequence[np.ndarray], run: Mapping[str, Any]) -> Line:
    """Return values per layer of some seeds; parallel branches of a block are not joined."""
    names = quantities.layers(run, len(runs[0]))
    branches = [_branch(name) for name in names]
    parallel = {block for block, _ in branches if len({b for other, b in branches if other == block}) > 1}
    apart = frozenset(
        i for i in range(1, len(names))
        if branches[i] != branches[i - 1] and (branches[i][0] in parallel or branches[i - 1][0] in parallel)
    )  # fmt: skip
    same = [one for one in runs if len(one) == len(runs[0])]
    return Line(
        label,
        look,
        [float(i) for i in range(len(names))],
        [[float(one[i]) for one in same] for i in range(len(names))],
        apart=apart,
    )


def _branch(name: str) -> tuple[tuple[str, ...], str]:
    """Block and branch: "blocks.0.b3.1.bn" is in b3 of blocks.0; "layers.3.bn1" in the one branch of layers.3."""
    block = quantities.block(name)
    rest = name.split(".")[len(block) :]
    return block, rest[0] if len(rest) > 1 else ""


def _last(run: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return the last normalizers with their channels, by what their names do not share; {} where that is not known."""
    names = [name.split(".") for name in (run["norms"] or {}).get("last") or []]
    sizes = [int(size) for size in arrays.get("last_channels", ())]
    if not names or len(sizes) != len(names) or sum(sizes) != len(arrays["moving_var"]):
        return {}
    kept = [[part for part in parts if sum(part in other for other in names) < len(names)] for parts in names]
    return dict(zip([".".join(parts) for parts in kept], sizes, strict=True))


def _said(card: Card, group: Group) -> str:
    dataset = card.runs.get("dataset", "")
    return f"{group.label if group.dataset else ', '.join(filter(None, [str(dataset), group.label.lstrip(', ')]))}."


def _stat_batch(card: Card) -> Callable[[Row], float | None]:
    return lambda row: effects.identity(card, row)["stat_batch"] or None


def _gain(card: Card) -> Callable[[Row], float | None]:
    return lambda row: card.settings(row).get("norm.options.gain")


def _rate(card: Card) -> Callable[[Row], float | None]:
    def highest(row: Row) -> float:
        rates = card.settings(row).get("schedule.lr")
        return max(rate for _, rate in rates) if rates else 0.1  # the released recipe's

    return highest


def _network(card: Card) -> Callable[[Row], str]:
    return lambda row: str(effects.identity(card, row)["network"])


def _network_and_batch(card: Card) -> Callable[[Row], str]:
    return lambda row: "{network}, statistics of {stat_batch}".format(**effects.identity(card, row))


# By a card's kind: its pictures in one group; none where nothing was run.
DRAW: dict[str, Callable[[Card, Group, Cells], Figures]] = {
    "table": table,
    "curves": curves,
    "figure": figure5,
    "gains": gains,
    "layer_errors": layer_errors,
    "mixture": mixture,
    "death": death,
    "stat_batch": lambda c, g, x: against(c, g, x, _stat_batch(c), "images that share statistics", "log", _network(c)),
    "initial_gain": lambda c, g, x: against(c, g, x, _gain(c), "initial gain q", "logit", _network_and_batch(c)),
    "learning_rate": lambda c, g, x: against(c, g, x, _rate(c), "highest learning rate", "log", _network(c)),
}
