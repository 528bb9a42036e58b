"""Draw pictures and encode them as files: `lines` (values against a setting, steps or layers), `forest` (values with
their intervals, one below the other) and `maps`. figures.py says which of them a card uses."""

import hashlib
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from kalmannorm.report import style
from kalmannorm.report.style import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

CLIP = (1, 99)  # percentiles of the values that get a map's outermost colours
NOTHING = "#eeeeee"  # the colour of a map where there is no value
FLOOR = 0.001  # smaller errors are rounding errors, or negligible


@dataclass
class Line:
    """Values of some seeds at each x. An x of None stands for the whole axis: a horizontal line."""

    label: str
    look: Look
    at: list[float | None]
    values: Sequence[Sequence[float]]
    lost: list[float | None] = field(default_factory=list)  # where runs failed or stayed at chance
    apart: frozenset[int] = frozenset()  # places that are not joined by a line to the one before
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
    names: Sequence[str] = ()  # tick labels at x = 0, 1, ...
    levels: dict[float, Look] = field(default_factory=dict)  # faint horizontal lines


def lines(rows: Sequence[Sequence[Panel]], caption: str, scale: str = "linear") -> "Figure":
    """Draw a grid of panels with one legend and the caption. Panels of a row share the vertical axis. If `scale` is not
    linear, all panels share the horizontal axis, with a tick at every x that occurs."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    named = any(panel.names for row in rows for panel in row)
    ticks = sorted({x for row in rows for panel in row for line in panel.lines for x in line.at if x is not None})
    with style.context():
        height = (3.0 if named else 2.2) * len(rows) + 1.2
        figure = Figure(figsize=(style.WIDTH, height), layout="constrained")
        shared = scale != "linear"
        grid = figure.subplots(len(rows), max(map(len, rows)), sharex=shared, sharey="row", squeeze=False)
        shown: dict[str, tuple[Look, list[int]]] = {}
        for axes, panels in zip(grid, rows, strict=True):
            for axis, panel in zip(axes, panels, strict=False):
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
                if shared:
                    axis.set_xscale(scale, **({"base": 2} if scale == "log" else {}))
                    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                    axis.tick_params(labelbottom=True)
                    axis.xaxis.set_minor_locator(NullLocator())
                    if scale == "logit" and ticks:  # else half of the axis is empty
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
        _words(figure, caption, handles)
    return figure


class Point(NamedTuple):
    """A value in one line of a forest, with its interval and the values behind it."""

    value: float
    colour: str
    marker: str
    low: float = math.nan
    high: float = math.nan
    runs: Sequence[float] = ()
    filled: bool = True
    axis: int = 0  # number of its axis in the forest


@dataclass
class Entry:
    """One line of a forest; a heading if it has neither points nor a note."""

    label: str
    points: list[Point] = field(default_factory=list)
    note: str = ""


def forest(
    entries: Sequence[Entry],
    caption: str,
    horizontal: Sequence[str],
    legend: Mapping[str, Point],
    around: float | None = None,
) -> "Figure":
    """Draw values with their intervals, one below the other, on an axis for each label in `horizontal`.

    `legend`: names, each with a point in its look. `around`: how far the axes reach to either side of 0; an interval
    that is longer ends in an arrow.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with style.context():
        height = 1.0 + 0.21 * max(3, len(entries))  # with one entry, legend and caption need the room of three
        figure = Figure(figsize=(style.WIDTH, height), layout="constrained")
        axes = figure.subplots(1, len(horizontal), sharey=True, squeeze=False)[0]
        for place, entry in enumerate(entries):
            for number, axis in enumerate(axes):
                points = [point for point in entry.points if point.axis == number]
                offsets = np.linspace(-0.2, 0.2, len(points)) if len(points) > 1 else [0.0]
                for y, point in zip(place + np.asarray(offsets), points, strict=False):
                    axis.plot([point.low, point.high], [y, y], color=point.colour, lw=1.2, zorder=2)
                    axis.plot(point.value, y, zorder=3, **_mark(point))
                    axis.plot(point.runs, [y] * len(point.runs), "|", color=point.colour, ms=7, mew=0.9)
                    for end in (point.low, point.high):
                        if around is not None and abs(end) > around:
                            edge, arrow = math.copysign(around, end), ">" if end > 0 else "<"
                            axis.plot(edge, y, arrow, color=point.colour, ms=4, clip_on=False)
            at = axes[-1].get_yaxis_transform()
            axes[-1].text(0.995, place, entry.note, color=style.GREY, va="center", ha="right", transform=at)
        for axis, label in zip(axes, horizontal, strict=True):
            axis.tick_params(axis="y", length=0)
            if around is not None:
                axis.axvline(0, color="#444444", lw=0.8)
                axis.set_xlim(-around, around)
            style.grid(axis, "x")
            axis.set_xlabel(label)
        axes[0].set_yticks(range(len(entries)), [entry.label for entry in entries])
        for name, entry in zip(axes[0].get_yticklabels(), entries, strict=True):
            name.set_fontweight("normal" if entry.points or entry.note else "bold")
        axes[0].set_ylim(len(entries) - 0.4, -0.6)
        _words(figure, caption, [Line2D([], [], linestyle="", label=name, **_mark(of)) for name, of in legend.items()])
    return figure


def _mark(point: Point) -> dict[str, Any]:
    face = point.colour if point.filled else "white"
    return {"marker": point.marker, "color": point.colour, "markerfacecolor": face, "ms": 4.5}


@dataclass
class Map:
    """Values [rows, columns] under a title. `names`: of consecutive rows, each with the number of rows it is for."""

    title: str
    values: np.ndarray
    names: Mapping[str, int] = field(default_factory=dict)


def maps(rows: Sequence[tuple[str, Sequence[Map]]], caption: str, horizontal: str, vertical: str) -> "Figure":
    """Draw rows of maps, (label of the colour bar, maps). A row has one logarithmic colour scale."""
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
            for axis, one in zip(axes, of_row, strict=True):
                title = [_title(one.title, columns)] if place == 0 else []
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
                axis.set_facecolor(NOTHING)
                ends = np.cumsum([0, *one.names.values()])
                axis.set_yticks((ends[:-1] + ends[1:] - 1) / 2, list(one.names))
                axis.tick_params(axis="y", length=0, labelleft=one is of_row[0])
                for end in ends[1:-1]:
                    axis.axhline(end - 0.5, color="white", linewidth=0.8)
            colours = ScalarMappable(norm, "cividis")
            figure.colorbar(colours, ax=list(axes), extend="both", pad=0.01, aspect=30).set_label(label)
        for axis in grid[-1] if columns <= 3 else [grid[-1][columns // 2]]:
            axis.set_xlabel(horizontal)
        figure.supylabel(vertical, fontsize=8)
        _words(figure, caption)
    return figure


def label_maps(columns: Mapping[str, Sequence[np.ndarray]], classes: Sequence[str], caption: str) -> "Figure":
    """Draw maps of classes, [H, W] of indices into `classes`, with a column for each name. Larger numbers are white."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = [*(style.of_class(number) for number in range(len(classes))), "#ffffff"]
    first = next(iter(columns.values()))
    height = 0.95 * style.WIDTH / len(columns) * sum(one.shape[0] / one.shape[1] for one in first)
    with style.context():
        figure = Figure(figsize=(style.WIDTH, height + 0.12 * len(first) + 1.0), layout="compressed")
        grid = figure.subplots(len(first), len(columns), squeeze=False)
        for place, (name, of_column) in enumerate(columns.items()):
            for axis, one in zip(grid[:, place], of_column, strict=True):
                shown = np.minimum(one, len(classes))
                axis.imshow(shown, ListedColormap(colours), vmin=0, vmax=len(classes), interpolation="none")
                axis.set_axis_off()
            grid[0, place].set_title(_title(name, len(columns)))
        seen = np.unique(np.concatenate([one.ravel() for of_column in columns.values() for one in of_column]))
        patches = [Patch(color=colours[int(i)], label=classes[int(i)]) for i in seen if i < len(classes)]
        figure.legend(handles=patches, loc="outside upper center", ncols=6, frameon=False)
        _words(figure, caption)
    return figure


def _title(text: str, columns: int) -> str:
    """Break a title into lines that fit one of `columns` columns."""
    return textwrap.fill(text, 84 // columns)


def _thinned(values: np.ndarray, most: int = 128) -> np.ndarray:
    """Average consecutive rows until at most `most` are left."""
    every = -(-len(values) // most)
    if every == 1:
        return values
    whole = np.pad(values, ((0, -len(values) % every), (0, 0)), constant_values=np.nan)
    return np.nanmean(whole.reshape(-1, every, values.shape[1]), axis=1)


def _line(axis: "Axes", line: Line, place: int) -> None:
    """Draw one line with its band and marks; values without an x as a horizontal line."""
    colour, dashes, marker = line.look.colour, line.look.dashes, line.look.marker
    for x, values in zip(line.at, line.values, strict=True):
        if x is None and len(values):
            axis.axhline(float(np.mean(values)), color=colour, linestyle=dashes, lw=1)
            axis.axhspan(min(values), max(values), color=colour, alpha=0.08, linewidth=0)
    places = [(x, list(of)) for x, of in zip(line.at, line.values, strict=True) if x is not None]
    at, seeds = np.array([x for x, _ in places], float), itertools.zip_longest(*(of for _, of in places))
    found = pd.DataFrame(list(seeds), columns=range(len(at)), dtype=float)
    means, lows, highs = (of().to_numpy() for of in (found.mean, found.min, found.max))
    if len(at):
        cuts = sorted(line.apart)  # the line has a gap before each of these places
        joined = [np.insert(values, cuts, np.nan) for values in (at, means, lows, highs)]
        axis.plot(*joined[:2], color=colour, linestyle=dashes, lw=1.2 if line.band else 0.8)
        if line.band and (highs > lows).any():
            axis.fill_between(joined[0], joined[2], joined[3], color=colour, alpha=0.18, linewidth=0)
        every = max(1, len(at) // 8) if len(at) > 30 and not line.apart else 1
        marked, single = np.arange(len(at)) % every == place % every, np.array([len(of) == 1 for _, of in places])
        for chosen, face in ((marked & ~single, colour), (marked & single, "white")):
            if marker and chosen.any():
                axis.plot(at[chosen], means[chosen], marker, color=colour, ms=3.5, markerfacecolor=face)
    for x in line.lost:
        transform = axis.transAxes if x is None else axis.get_xaxis_transform()
        height = 0.03 + 0.045 * (place % 8)
        axis.plot([x or 0], [height], "x", color=colour, ms=4.5, mew=1.3, transform=transform, clip_on=False)


def _words(figure: "Figure", caption: str, handles: Sequence["Line2D"] = ()) -> None:
    """Write the caption below, in lines as long as the figure is wide, and the legend above."""
    figure.supxlabel(textwrap.fill(caption, style.CAPTION), fontsize=7.5, x=0.01, ha="left")
    if handles:
        widest = max(len(str(handle.get_label())) for handle in handles)
        columns = min(len(handles), max(1, 105 // (widest + 9)))
        figure.legend(handles=list(handles), loc="outside upper center", ncols=columns, frameon=False, handlelength=3.0)


def _n(counts: Sequence[int]) -> str:
    """Write the range of the numbers of seeds: " (n = 1 to 3)", or nothing if there are none."""
    found = sorted(set(counts))
    return f" (n = {found[0]}{f' to {found[-1]}' if found[1:] else ''})" if found else ""


def encode(figure: "Figure", kinds: Iterable[str] = ("png", "pdf")) -> dict[str, bytes]:
    """Return the bytes of files by their ending. They have no dates or versions, so that equal pictures are equal
    files."""
    metadata = {
        "png": {"Software": None},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
        "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    }
    found = {}
    with style.context(), _fonts_as_shapes():
        if engine := figure.get_layout_engine():
            engine.execute(figure)
        figure.set_layout_engine(None)  # the layout is done: with an engine, savefig would draw everything twice
        for kind in kinds:
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=150, metadata=metadata[kind])
            found[kind] = out.getvalue()
    return found


@contextmanager
def _fonts_as_shapes() -> Iterator[None]:
    """Embed fonts in PDFs without their tables for text layout, which no reader needs and which take fontTools two
    thirds of its time."""
    from fontTools import subset  # type: ignore[import-untyped]

    options = subset.Options
    dropped = [*options().drop_tables, "GDEF", "GPOS", "GSUB", "MATH"]
    try:
        subset.Options = lambda **given: options(drop_tables=[*dropped], **given)
        yield
    finally:
        subset.Options = options


def inline(picture: bytes, stem: str) -> str:
    """Return an SVG file as text to be embedded in a page: coordinates with one decimal, a line's style written once,
    and ids that are unique to `stem`."""
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
