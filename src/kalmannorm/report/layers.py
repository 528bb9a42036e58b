"""What a network's normalizers learned and how well they estimate, layer by layer: gains, errors, SN's mixtures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmannorm.errors import UserError
from kalmannorm.report import caption, gaps, selected, style, table
from kalmannorm.report.gaps import Array
from kalmannorm.report.read import Record, Records
from kalmannorm.report.selected import Selected
from kalmannorm.report.style import BLUE, GREEN, GREY, ORANGE, SKY, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = "Band: from the lowest to the highest seed."
# Estimates whose errors are recorded, in the order of the arrays' first axis; how they are drawn.
ESTIMATES = ("measurement", "prior", "posterior")
ESTIMATE_LOOKS = (Look(SKY, "^", (0, (4, 1.5))), Look(GREEN, "D", (0, (1, 1))), Look(BLUE, "o", "-"))
BN_LOOK = Look(ORANGE, "s", "-")
ERRORS = {  # rows of panels: array -> what it is
    "layer_error_mean": "mean:\n|error| / population sd",
    "layer_error_var": "variance:\n|ln(estimate / population)|",
}
FLOOR = 0.001  # errors below it are zero but for rounding, or as good as zero
PARTS = {"": "root mean square error", "_bias": "systematic part", "_spread": "random part"}  # columns of panels
# Weights of a Switchable Norm layer, in the order of the record's lists.
MIXED = {"IN": Look("#000000", "^", (0, (1, 1))), "LN": Look(GREY, "D", (0, (4, 1.5))), "BN": BN_LOOK}


def gains(card: Mapping[str, Any], records: Records) -> "Figure":
    """The gain q that each layer learned, with its start: a line per row, a panel per architecture."""
    found = selected.select(card, records)
    panels = selected.facets([one for one in found if one.config["norm"].get("preset")], selected.arch)
    look = style.looks([(one.name, one.config) for one in found])

    def draw(axis: "Axes", rows: Sequence[Selected]) -> None:
        for one in rows:
            if one.runs:
                order = _gain_order(one.runs[0])
                learned = np.array([[run["norms"]["gains"][name] for name in order] for run in one.runs])
                idle = [i for i, name in enumerate(order) if one.runs[0]["norms"]["beliefs"].get(name)]
                style_of = look[one.name]
                style.band(axis, learned, f"{one.name} (n = {len(one.runs)})", style_of)
                axis.plot(idle, learned.mean(0)[idle], **style_of.points, markerfacecolor="white")
                start = one.config["norm"]["options"]["gain"]
                axis.axhline(start, color=style_of.colour, linestyle=style_of.dashes, lw=0.7, alpha=0.7)
                style.name_layers(axis, order)
        axis.set_ylim(0, 1)
        axis.set_ylabel("gain q, weight of the measurement")

    text = f"Horizontal: where the gain starts. Hollow: no prior, the gain is idle there. {_band_said(found)}"
    return _stacked(card, found, panels, draw, text)


def errors(card: Mapping[str, Any], records: Records) -> "Figure":
    """The mechanism: per layer, the errors of measurement, prior and posterior against population statistics.

    Rows: the mean's error and the variance's. Columns: the whole error and its parts (train/layer_errors.py). Raises
    UserError where no run has the arrays.
    """
    from matplotlib.figure import Figure

    found = selected.select(card, records)
    looks = _error_looks(found)
    loaded = {one.name: [gaps.load(run, _arrays(records, run)) for run in one.runs] for one in found}
    recorded = {name: kept for name, runs in loaded.items() if (kept := [run for run in runs if run.errors])}
    if not recorded:
        _not_recorded(card, records, "layer_error_mean and layer_error_var (in the .npz beside it)")
    with style.context():
        figure = Figure(figsize=(style.WIDTH, 6.4), layout="constrained")
        axes = figure.subplots(len(ERRORS), len(PARTS), sharex=True, sharey="row")
        for row, (key, label) in zip(axes, ERRORS.items(), strict=True):
            for axis, (part, title) in zip(row, PARTS.items(), strict=True):
                for name, runs in recorded.items():
                    for i, what in enumerate(ESTIMATES):
                        values = np.stack([run.errors[key + part][i] for run in runs if run.errors])
                        if (name, what) in looks and np.isfinite(values).any():
                            style.band(axis, values, f"{name}: {what} (n = {len(runs)})", looks[name, what])
                style.grid(axis)
                axis.set_title(title, loc="left")
            # Last: the panels of a row share their limits, which the smallest part of an error is to set.
            style.logarithmic(row[0], FLOOR)
            row[0].set_ylabel(label)
        for axis in axes[-1]:
            style.name_layers(axis, next(iter(recorded.values()))[0].layers, most=18)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, handlelength=3.2)
        missing = [one.name for one in found if one.runs and one.name not in recorded]
        missing += [f"{name}, seed {run.seed}" for name in recorded for run in loaded[name] if not run.errors]
        drawn = [
            replace(one, selection=replace(one.selection, runs=tuple(run.record for run in recorded[one.name])))
            for one in found
            if one.name in recorded
        ]
        text = selected.said(
            card,
            found,
            "Of the typical (median) channel, over groups of training images. Population: the statistics of the same "
            "features over the training set, in the network that normalizes as in training. Systematic: the same "
            "in all groups, so that gamma and beta can make up for it. Random: differs from group to group.",
            _band_said(drawn),
            f"Not recorded: {'; '.join(missing)}." if missing else "",
            drawn=[one.selection for one in drawn],
        )
        figure.supxlabel(style.wrapped(text), fontsize=8, x=0.01, ha="left")
    return figure


def mixture(card: Mapping[str, Any], records: Records) -> "Figure":
    """Switchable Norm's weights of IN, LN and BN against the statistics batch: the mean's and the variance's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    found = selected.select(card, records)
    shares = {
        caption.batches(one.config)[1]: np.concatenate([_weights(run) for run in one.runs if _weights(run) is not None])
        for one in found
        if any(_weights(run) is not None for run in one.runs)
    }
    if not shares:
        _not_recorded(card, records, "norms.mixture")
    batches = sorted(shares)  # type: ignore[type-var]
    with style.context():
        figure = Figure(figsize=(style.WIDTH, 3.6), layout="constrained")
        for j, axis in enumerate(figure.subplots(1, 2, sharey=True)):
            for i, (name, look) in enumerate(MIXED.items()):
                low, mean, high = (
                    [float(f(shares[batch][:, j, i])) for batch in batches]
                    for f in (lambda v: np.quantile(v, 0.25), np.mean, lambda v: np.quantile(v, 0.75))
                )
                axis.plot(batches, mean, **look.line, label=name)
                axis.fill_between(batches, low, high, color=look.colour, alpha=0.15, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(batches, [str(batch) for batch in batches])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_ylim(0, 1)
            axis.set_xlabel("images that share statistics")
            axis.set_title(f"weights of the {('means', 'variances')[j]}", loc="left")
            style.grid(axis)
        figure.axes[0].set_ylabel("weight")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, handlelength=3.2)
        band = "Line: mean over layers and seeds; band: from the first to the third quartile."
        text = selected.said(card, found, band)
        figure.supxlabel(style.wrapped(text), fontsize=8, x=0.01, ha="left")
    return figure


def _stacked(
    card: Mapping[str, Any], found: Sequence[Selected], panels: Mapping[str, Sequence[Selected]], draw: Any, text: str
) -> "Figure":
    """One panel above the other, each with its own layers and legend."""
    from matplotlib.figure import Figure

    with style.context():
        figure = Figure(figsize=(style.WIDTH, 0.9 + 3.2 * len(panels)), layout="constrained")
        for axis, (title, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
            draw(axis, rows)
            style.grid(axis)
            axis.set_title(title, loc="left")
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=2, frameon=False, handlelength=3.2)
        figure.supxlabel(style.wrapped(selected.said(card, found, text)), fontsize=8, x=0.01, ha="left")
    return figure


def _band_said(found: Sequence[Selected]) -> str:
    return BAND if any(len(one.runs) > 1 for one in found) else ""


def _error_looks(found: Sequence[Selected]) -> dict[tuple[str, str], Look]:
    """A look per row and estimate: BN has its measurement alone; the markers of further KN rows differ."""
    looks: dict[tuple[str, str], Look] = {}
    kalman = [one.name for one in found if one.config["norm"].get("preset")]
    for one in found:
        if one.name in kalman:
            for what, look in zip(ESTIMATES, ESTIMATE_LOOKS, strict=True):
                place = kalman.index(one.name)
                marker = look.marker if place == 0 else style.MARKERS[3 + len(looks) % (len(style.MARKERS) - 3)]
                looks[one.name, what] = Look(style.tint(look.colour, place), marker, look.dashes)
        else:
            looks[one.name, ESTIMATES[0]] = BN_LOOK
    return looks


def _gain_order(run: Record) -> list[str]:
    """The layers with a gain in network order."""
    order, known = run["norms"]["order"], run["norms"]["gains"]
    return [name for name in order if name in known] or list(known)


def _arrays(records: Records, run: Record) -> Path:
    return records.folder / "records" / f"{run['id']}.npz"


def _weights(run: Record) -> Array | None:
    """[K, 2, 3]: layer, mean or variance, IN LN BN; None where the record has none."""
    mixed = (run.get("norms") or {}).get("mixture")
    return np.array([[layer["mean"], layer["var"]] for layer in mixed.values()]) if mixed else None


def _not_recorded(card: Mapping[str, Any], records: Records, what: str) -> None:
    raise UserError(
        f"{card['name']} has nothing to draw: {what} not recorded by any of its runs in {records.folder / 'records'}, "
        f"which an earlier version made. Move their records away to run them again: {table.command(card)}"
    )


# By a card's kind.
DRAW: dict[str, Callable[[Mapping[str, Any], Records], "Figure"]] = {
    "gains": gains,
    "layer_errors": errors,
    "mixture": mixture,
}
