"""Accuracy against optimizer steps, and final accuracy against a setting: the statistics batch, the initial gain.

A line is the mean over seeds, its band reaches from the lowest to the highest seed (the tables have intervals). One
column of panels per kind of statistics, one row per architecture (and statistics batch, where that is no axis).
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmannorm.errors import UserError
from kalmannorm.report import caption, selected, style
from kalmannorm.report.read import Records
from kalmannorm.report.selected import Selected
from kalmannorm.report.style import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Config = Mapping[str, Any]
Panels = dict[str, list[Selected]]
BAND = "Line: mean over seeds; band: from the lowest to the highest seed."


@dataclass(frozen=True)
class Setting:
    """What final accuracy is drawn against."""

    path: tuple[str, ...]  # where it stands in a config
    label: str
    scale: str  # "log" or "logit"
    panel: Callable[[Config], str]  # which rows share a panel


def _arch_and_batch(config: Config) -> str:
    return f"{selected.arch(config)}, stat_batch {caption.batches(config)[1]}"


SETTINGS = {
    "stat_batch": Setting(("batch", "stat_batch"), "images that share statistics", "log", selected.arch),
    "initial_gain": Setting(("norm", "options", "gain"), "initial gain q", "logit", _arch_and_batch),
}


def curves(card: Mapping[str, Any], records: Records) -> "Figure":
    """Test accuracy after every epoch against optimizer steps, a line per row, a panel per kind of statistics."""
    found = selected.select(card, records)
    panels = selected.facets(found, selected.arch)
    look = style.looks([(one.name, one.config) for one in found])

    def draw(axis: "Axes", statistics: str, rows: Sequence[Selected]) -> None:
        for i, one in enumerate(row for row in rows if row.runs):
            steps, accuracies = _curves(one, statistics)
            every = max(1, len(steps) // 8)
            marks = (min(i * every // 4 % every, len(steps) - 1), every)  # not all lines' markers at the same steps
            axis.plot(steps, accuracies.mean(0), **look[one.name].line, markevery=marks)
            if len(accuracies) > 1:
                axis.fill_between(
                    steps, accuracies.min(0), accuracies.max(0), color=look[one.name].colour, alpha=0.2, linewidth=0
                )

    return _panels(card, found, panels, look, draw, "optimizer steps", lambda one: one.name, BAND)


def against(card: Mapping[str, Any], records: Records, setting: Setting) -> "Figure":
    """Final test accuracy against a setting, a line per label of the card's rows.

    Rows whose config lacks the setting (no statistics batch, no gain) are horizontal lines.
    """
    found = selected.select(card, records)
    panels = selected.facets(found, setting.panel)
    look = style.looks([(one.label, one.config) for one in found])
    values = sorted({x for one in found if (x := _value(one.config, setting.path)) is not None})

    def draw(axis: "Axes", statistics: str, rows: Sequence[Selected]) -> None:
        heights = itertools.count(0.03, 0.05)  # of crosses: those of two lines are not to hide each other
        for label in dict.fromkeys(one.label for one in rows):
            of_line = [one for one in rows if one.label == label]
            points = {
                _value(one.config, setting.path): accuracies
                for one in of_line
                if (accuracies := one.accuracies(statistics)) or one.selection.failed
            }
            if points:
                _line(axis, points, look[label])
            if failed := [_value(one.config, setting.path) for one in of_line if one.selection.failures]:
                _crosses(axis, failed, next(heights), look[label])
        _scale(axis, setting, values)

    said = f"Last epoch, never the best. {BAND} Small ticks: single runs."
    if any(one.selection.failures for one in found):
        said += " Crosses below: where runs of the line failed."
    if any(_value(one.config, setting.path) is None for one in found):
        said += " Horizontal: normalizers without this setting."
    return _panels(card, found, panels, look, draw, setting.label, lambda one: one.label, said)


def _panels(
    card: Mapping[str, Any],
    found: Sequence[Selected],
    panels: Panels,
    look: Mapping[str, Look],
    draw: "Callable[[Axes, str, Sequence[Selected]], None]",
    label: str,
    name: Callable[[Selected], str],
    said: str,
) -> "Figure":
    """The grid of panels, one legend of the lines that have runs, the text below."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = card["columns"]
    with style.context():
        figure = Figure(figsize=(style.WIDTH, 1.5 + 2.3 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), len(columns), sharex=True, sharey="row", squeeze=False)
        for row, (title, rows) in zip(axes, panels.items(), strict=True):
            for axis, statistics in zip(row, columns, strict=True):
                draw(axis, statistics, rows)
                style.grid(axis, "both")
                axis.set_title(f"{title}: {statistics} statistics", loc="left")
            row[0].set_ylabel("top-1 accuracy (%)")
        for axis in axes[-1]:
            axis.set_xlabel(label)
        seeds: dict[str, list[int]] = {}  # how many, of each of a line's points
        for one in found:
            if one.runs:
                seeds.setdefault(name(one), []).append(len(one.runs))
        handles = [
            Line2D([], [], **look[line].line, label=f"{line} (n = {' to '.join(map(str, sorted({min(n), max(n)})))})")
            for line, n in seeds.items()
        ]
        failed = dict.fromkeys(name(one) for one in found if one.selection.failed and name(one) not in seeds)
        handles += [
            Line2D([], [], color=look[line].colour, marker="x", linestyle="", label=f"{line} (failed)")
            for line in failed
        ]
        widest = max(len(str(handle.get_label())) for handle in handles)
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(len(handles), max(1, 100 // (widest + 9))),
            frameon=False,
            handlelength=3.2,
        )
        figure.supxlabel(style.wrapped(selected.said(card, found, said)), fontsize=8, x=0.01, ha="left")
    return figure


def _curves(one: Selected, statistics: str) -> tuple[Any, Any]:
    """Steps [E] and accuracies [seeds, E] of a row's runs, which have the same epochs."""
    kept = [run["curves"] for run in one.runs]
    lengths = {len(curve.get(key) or []) for curve in kept for key in ("step", statistics)}
    if len(lengths) != 1 or 0 in lengths:
        ids = ", ".join(run["id"] for run in one.runs)
        raise UserError(f"{one.name}: the {statistics} curves of runs {ids} are not of one length: run them again")
    return np.array(kept[0]["step"]), np.array([curve[statistics] for curve in kept], dtype=float)


def _line(axis: "Axes", points: Mapping[Any, list[float]], look: Look) -> None:
    """points: a setting's value -> accuracies of its runs; the value None is a horizontal line.

    Where all runs failed there are no accuracies, and the line has a gap.
    """
    if constant := points.get(None):
        axis.axhline(float(np.mean(constant)), color=look.colour, linestyle=look.dashes, lw=1)
        axis.axhspan(min(constant), max(constant), color=look.colour, alpha=0.08, linewidth=0)
        axis.plot([0, 1], [np.mean(constant)] * 2, transform=axis.get_yaxis_transform(), clip_on=False, **look.points)
    places = sorted(x for x in points if x is not None)
    if places:
        of = [points[x] or [np.nan] for x in places]
        means, lows, highs = ([float(f(values)) for values in of] for f in (np.mean, min, max))
        axis.plot(places, means, **look.line)
        axis.fill_between(places, lows, highs, color=look.colour, alpha=0.15, linewidth=0)
        single = [(x, value) for x in places for value in points[x] if len(points[x]) > 1]
        if single:
            axis.plot(*zip(*single, strict=True), "_", color=look.colour, ms=5, mew=0.8)


def _crosses(axis: "Axes", places: Sequence[Any], height: float, look: Look) -> None:
    """A cross at the bottom for each place; None, a horizontal line's, is the left edge."""
    for x in places:
        transform = axis.transAxes if x is None else axis.get_xaxis_transform()
        axis.plot([x or 0], [height], "x", color=look.colour, ms=5, mew=1.4, transform=transform, clip_on=False)


def _scale(axis: "Axes", setting: Setting, values: Sequence[float]) -> None:
    """The horizontal axis, with a tick at every value that the card has."""
    from matplotlib.ticker import NullLocator

    if not values:
        return
    if setting.scale == "log":
        axis.set_xscale("log", base=2)
        axis.set_xlim(values[0] / 1.25, values[-1] * 1.25)
    else:  # equal steps of log(q / (1 - q)), which is what is learned
        axis.set_xscale(setting.scale)
        odds = [values[0] / (1 - values[0]) / 1.4, values[-1] / (1 - values[-1]) * 1.4]
        axis.set_xlim(*(ratio / (1 + ratio) for ratio in odds))
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())


def _value(config: Config, path: Sequence[str]) -> Any:
    node: Any = config
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


# By a card's kind.
DRAW: dict[str, Callable[[Mapping[str, Any], Records], "Figure"]] = {
    "curves": curves,
    **{kind: functools.partial(against, setting=setting) for kind, setting in SETTINGS.items()},
}
