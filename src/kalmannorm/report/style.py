"""The style of all pictures: fonts, sizes, colours, and the looks that tell normalizers' lines apart.

Pictures are drawn with matplotlib's objects, without pyplot: no window, no global state. The colours are Okabe and
Ito's, which colour-blind readers can tell apart; every line also has its own marker, for print without colour.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 7.2  # inches: a page's text width, so that the fonts print at the size set here
CAPTION = 124  # characters that fit into that width at 7.5 points
RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "kalmannorm",
}
ORANGE, BLUE, SKY, GREEN, GREY = "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#777777"
OF_NORM = {
    "bn": ORANGE,
    "bkn": BLUE,
    "gn": GREEN,
    "gkn": SKY,
    "brn": "#E69F00",
    "sn": "#CC79A7",
    "wn": "#882255",
    "ln": GREY,
    "in": "#000000",
}
MARKERS = ("s", "o", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))


@dataclass(frozen=True)
class Look:
    """How a row's line is drawn: the hue shows the normalizer, tint and dashes the variant, the marker the row."""

    colour: str
    marker: str
    dashes: Any

    @property
    def line(self) -> dict[str, Any]:
        """The look as keyword arguments of `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dashes, "ms": 4, "lw": 1.2}


def looks(rows: Sequence[tuple[str, str]]) -> dict[str, Look]:
    """Choose a look for each name. `rows`: (name, normalizer) in the order of the card; equal names share a look."""
    found: dict[str, Look] = {}
    variants: dict[str, int] = {}
    for name, norm in rows:
        if name not in found:
            variant = variants[norm] = variants.get(norm, -1) + 1
            marker = MARKERS[len(found) % len(MARKERS)]
            found[name] = Look(tint(OF_NORM.get(norm, "#000000"), variant), marker, DASHES[variant % len(DASHES)])
    return found


def tint(colour: str, variant: int) -> str:
    """Return a variant of a colour: 0 the colour itself, 1 half way to black (a lighter BLUE would look like SKY), 2
    half way to white, and so on in turn."""
    towards = (None, 0, 255)[variant % 3]
    if towards is None:
        return colour
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{(part + towards) // 2:02x}" for part in parts)


def of_class(number: int) -> str:
    """Return the colour of a class on a map: one of 12 hues, then their light shades; they repeat after 24."""
    hues = (SKY, GREY, "#000000", "#882255", ORANGE, GREEN, "#F0E442", "#E69F00", BLUE, "#CC79A7", "#44AA99", "#332288")
    return tint(hues[number % 12], number // 12 % 2 * 2)


@contextmanager
def context() -> Iterator[None]:
    """Set fonts and sizes while the context lasts, in place of the user's own settings. Figures are made and encoded
    within it."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)  # type: ignore[arg-type]
        yield


def grid(axis: "Axes", which: str = "y") -> None:
    """Draw faint lines behind the data."""
    axis.grid(axis=which, color="#dddddd", linewidth=0.6)  # type: ignore[arg-type]
    axis.set_axisbelow(True)


def logarithmic(axis: "Axes", floor: float) -> None:
    """Make the vertical axis logarithmic, with plain numbers at 1, 2 and 5. It does not go below `floor`."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.set_ylim(bottom=max(floor, axis.get_ylim()[0]))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())


def name_layers(axis: "Axes", names: Sequence[str], most: int = 24) -> None:
    """Write the normalizers' names along the horizontal axis; leave out some if there are more than `most`, which would
    overlap."""
    every = -(-len(names) // most)
    axis.set_xticks(range(0, len(names), every), names[::every], rotation=60, ha="right", rotation_mode="anchor")
