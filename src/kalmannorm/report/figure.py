"""The pictures: Figure 5 (variance gaps of BN and KN), the gap per layer, and a table's accuracies as points.

Maps in cividis, which colour-blind readers and black-and-white print keep in order; else as style.py says.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmannorm.errors import UserError
from kalmannorm.report import caption, gaps, style
from kalmannorm.report.cells import Column
from kalmannorm.report.gaps import Array, Gaps
from kalmannorm.report.read import Records
from kalmannorm.report.style import BLUE, GREEN, GREY, ORANGE, SKY, Look
from kalmannorm.report.table import Table, command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATISTICS = {"online": (BLUE, "o"), "moving": (ORANGE, "s"), "precise": (GREEN, "D")}
AP = {"box": (BLUE, "o"), "mask": (ORANGE, "s")}  # a detector's columns
CLIP = (1, 99)  # percentiles of a row of panels between which its colours spread


def figure5(card: Mapping[str, Any], records: Records) -> "Figure":
    """Gap between every batch's variance and the moving variance: BN's, KN's posterior, KN's measurement.

    Top: absolute. Bottom: over the moving variance, as the absolute variances of two networks do not compare. The
    card's first two rows are BN's and KN's.
    """
    from matplotlib.figure import Figure

    (bn_name, bn_runs), (kn_name, kn_runs) = _compared(card, records)
    bn, kn = gaps.one_seed(bn_runs, kn_runs)
    panels = [(f"{bn_name}: measurement", bn, bn.measured)]
    if kn.used is not None:
        panels.append((f"{kn_name}: posterior", kn, kn.used))
    panels.append((f"{kn_name}: measurement", kn, kn.measured))

    with style.context():
        figure = Figure(figsize=(style.WIDTH, 7.4), layout="constrained")
        axes = figure.subplots(2, len(panels), sharex="col", sharey="col", squeeze=False)
        _maps(figure, list(axes[0]), panels, [gap for _, _, gap in panels], "variance gap")
        relative = [run.relative(gap) for _, run, gap in panels]
        _maps(figure, list(axes[1]), panels, relative, "variance gap / moving variance")
        for axis, (_, _, gap) in zip(axes[1], panels, strict=True):
            axis.set_xlabel(f"batches, in {gap.shape[1]} bins")
        figure.supylabel(f"channels of the last normalizers ({len(bn.moving)})", fontsize=8)
        figure.supxlabel(_explain(card, bn, kn), fontsize=8, x=0.01, ha="left")
    return figure


def figure5_layers(card: Mapping[str, Any], records: Records) -> "Figure":
    """Mean relative gap per normalizer in network order, mean over seeds with a band from the lowest to the highest."""
    from matplotlib.figure import Figure

    (bn_name, bn), (kn_name, kn) = _compared(card, records)
    posteriors = [run.layer_used for run in kn if run.layer_used is not None]
    lines = [
        (f"{bn_name}: measurement", [run.layer_measured for run in bn], Look(ORANGE, "s", "-")),
        (f"{kn_name}: measurement", [run.layer_measured for run in kn], Look(SKY, "^", "--")),
        (f"{kn_name}: posterior", posteriors, Look(BLUE, "o", "-")),
    ]
    with style.context():
        figure = Figure(figsize=(style.WIDTH, 3.9), layout="constrained")
        axis = figure.subplots()
        for label, runs, look in lines:
            if runs:
                style.band(axis, np.stack(runs), f"{label} (n = {len(runs)})", look)
        style.name_layers(axis, bn[0].layers)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("mean variance gap / moving variance")
        style.grid(axis)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        band = " Band: from the lowest to the highest seed." if max(len(bn), len(kn)) > 1 else ""
        setting = caption.short([row["config"] for row in card["rows"]])
        said = f"Normalizers in network order; {setting}. KN's moving variance is its posterior's average.{band}"
        figure.supxlabel(style.wrapped(said), fontsize=8, x=0.01, ha="left")
    return figure


def accuracy_bars(table: Table) -> "Figure":
    """A table's accuracies as points with their intervals, every run as a dot, the paper's values hollow beside them.

    The paper's values are left out where they are of another data set.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with style.context():
        figure = Figure(figsize=(style.WIDTH, 1.5 + 0.26 * len(table.rows) * len(table.columns)), layout="constrained")
        axis = figure.subplots()
        looks = _looks(table.columns)
        paper_drawn = False
        for place, row in enumerate(table.rows):
            for i, cell in enumerate(row.filled):
                y = place + (i - (len(row.cells) - 1) / 2) * 0.34
                colour, marker = looks[cell.column]
                if cell.summary is None:
                    note = f"{cell.column}: {cell.state}"
                    axis.text(0.01, y, note, color=GREY, va="center", transform=axis.get_yaxis_transform())
                else:
                    mean, half_width = cell.summary.mean, cell.summary.half_width
                    axis.plot(list(cell.by_seed.values()), [y] * cell.summary.n, "|", color=colour, ms=8, mew=1)
                    axis.errorbar(mean, y, xerr=half_width, fmt=marker, color=colour, ms=5, capsize=2.5, elinewidth=1)
                if cell.paper is not None and table.same_data_as_paper:
                    axis.plot(cell.paper, y, marker, color=colour, markerfacecolor="white", ms=5, zorder=1)
                    paper_drawn = True
        axis.set_yticks(range(len(table.rows)), [textwrap.fill(row.name, 20) for row in table.rows])
        axis.set_ylim(len(table.rows) - 0.5, -0.5)
        for place in range(1, len(table.rows)):
            axis.axhline(place - 0.5, color="#dddddd", linewidth=0.6)
        if axis.get_xlim()[1] > 100:
            axis.set_xlim(right=100.4)  # an interval may reach beyond 100 %, an accuracy cannot
        style.grid(axis, "x")
        axis.set_xlabel(f"{caption.measure(table.columns)} after the last epoch (%)")
        axis.set_title(f"{textwrap.fill(table.title, 90)}\n{textwrap.fill(table.setting, 90)}", loc="left")
        handles = []
        for column in table.columns:
            colour, marker = looks[column.key]
            label = f"{column.label} {'statistics' if column.value == 'accuracy' else 'AP'}"
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=label))
        handles.append(Line2D([], [], color="black", marker="|", linestyle="", label="one run"))
        handles.append(Line2D([], [], color="black", label="95 % interval"))
        if paper_drawn:
            hollow = Line2D([], [], marker="o", linestyle="", color="black", markerfacecolor="white")
            hollow.set_label("paper's value")
            handles.append(hollow)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def encode(figure: "Figure", kind: str) -> bytes:
    """The bytes of a "png" (150 dpi) or "pdf" file, without dates and versions: the same picture is the same file."""
    metadata = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}[kind]
    out = io.BytesIO()
    with style.context():
        figure.savefig(out, format=kind, dpi=150, metadata=metadata)
    return out.getvalue()


def _looks(columns: Sequence[Column]) -> dict[str, tuple[str, str]]:
    """Colour and marker by column: those of its statistics; darker, and a triangle, where another column has them."""
    found: dict[str, tuple[str, str]] = {}
    for column in columns:
        colour, marker = AP.get(column.key) or STATISTICS.get(column.statistics, (GREY, "o"))
        taken = (colour, marker) in found.values()
        found[column.key] = (style.tint(colour, 1), "^") if taken else (colour, marker)
    return found


def _compared(card: Mapping[str, Any], records: Records) -> list[tuple[str, list[Gaps]]]:
    """Name and runs of BN's row and of KN's. UserError: the card has not both."""
    if len(card["rows"]) < 2:
        raise UserError(f"{card['name']} compares two rows, this is {card['rows'][0]['key']} alone: leave out rows=")
    names = caption.row_names(card["rows"])
    return [(names[row["key"]], gaps.of_row(card, row, records, command(card))) for row in card["rows"][:2]]


def _maps(
    figure: "Figure",
    axes: "Sequence[Axes]",
    panels: Sequence[tuple[str, Gaps, Array]],
    values: Sequence[Array],
    label: str,
) -> None:
    """One row of panels under one colour scale.

    Logarithmic: channels, and KN's posterior and measurement, differ by orders of magnitude.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    everything = np.concatenate([value.ravel() for value in values])
    positive = everything[np.isfinite(everything) & (everything > 0)]
    low, high = np.percentile(positive, CLIP) if positive.size else (0.1, 1.0)
    norm = LogNorm(low, max(high, low * 1.01))
    image = None
    for axis, (title, _, _), value in zip(axes, panels, values, strict=True):
        clipped = np.clip(value, norm.vmin, norm.vmax)
        # "antialiased" draws cells as they are, and averages them where several fall on one pixel.
        image = axis.imshow(clipped, norm=norm, cmap="cividis", aspect="auto", interpolation="antialiased")
        axis.set_title(f"{title}\nmean {np.nanmean(value):.3g}, median {np.nanmedian(value):.3g}", loc="left")
        axis.spines[:].set_visible(False)
        _name_channels(axis, panels[0][1])
    for axis in axes[1:]:
        axis.tick_params(left=False, labelleft=False)
    assert image is not None  # panels are never empty
    bar = figure.colorbar(image, ax=list(axes), extend="both", pad=0.01, aspect=30)
    bar.set_label(label)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else range(1, 10)))
    bar.ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    bar.ax.yaxis.set_minor_locator(NullLocator())


def _name_channels(axis: "Axes", run: Gaps) -> None:
    """Each normalizer's name beside its channels; the channels' numbers where a record does not say whose they are."""
    if run.last:
        ends = np.cumsum([0, *run.last.values()])
        axis.set_yticks((ends[:-1] + ends[1:] - 1) / 2, _without_common_parts(list(run.last)))
        axis.tick_params(axis="y", length=0)
        for end in ends[1:-1]:
            axis.axhline(end - 0.5, color="white", linewidth=0.8)


def _without_common_parts(names: list[str]) -> list[str]:
    """["block3.b1.bn", "block3.pool.bn"] -> ["b1", "pool"]."""
    split = [name.split(".") for name in names]
    if len(names) > 1:
        while all(len(parts) > 1 for parts in split) and len({parts[0] for parts in split}) == 1:
            split = [parts[1:] for parts in split]
        while all(len(parts) > 1 for parts in split) and len({parts[-1] for parts in split}) == 1:
            split = [parts[:-1] for parts in split]
    return [".".join(parts) for parts in split]


def _explain(card: Mapping[str, Any], bn: Gaps, kn: Gaps) -> str:
    """Under Figure 5: which runs, which data, how binned, which colours."""
    runs = f"seed {bn.seed}" if bn.seed == kn.seed else f"seeds {bn.seed} (BN) and {kn.seed} (KN)"
    bins = bn.measured.shape[1]
    size = caption.batches(bn.record["config"])[1]
    if bn.batches is None:
        binned = f"batches of {size} in {bins} bins (how many a bin was not recorded)"
    else:
        binned = f"{bn.batches:,} batches of {size}, {bn.batches / bins:.3g} a bin (mean of their gaps)"
    return style.wrapped(
        f"{caption.short([row['config'] for row in card['rows']])}; {runs}, "
        f"runs {bn.record['id']} and {kn.record['id']}. "
        f"Training set without augmentation: {binned}. Top: |variance − moving variance|. Bottom: the same over the "
        f"moving variance. One logarithmic colour scale per row, from its {CLIP[0]}st to its {CLIP[1]}th percentile. "
        "The posterior is what normalizes in KN, and KN's moving variance is the posterior's average: where prior and "
        "measurement disagree throughout, the measurement's gap has a part that no larger batch removes."
    )
