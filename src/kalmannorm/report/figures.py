"""What each kind of card shows of its runs in one group (`DRAW`), by the three ways to draw of plots.py."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmannorm.data import SCENES
from kalmannorm.errors import UserError
from kalmannorm.experiments import record as records
from kalmannorm.experiments.card import Card, Column, Row
from kalmannorm.report import effects, quantities, style
from kalmannorm.report.effects import Cell, Cells, Group
from kalmannorm.report.plots import Entry, Line, Map, Panel, Point, forest, label_maps, lines, maps
from kalmannorm.report.quantities import PERCENT
from kalmannorm.report.style import Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = dict[str, "Figure"]  # by the suffix that the file name adds to the card's; empty if nothing was run
Arrays = dict[str, np.ndarray]
OF_FIRST_STEPS = ("death", "conditioning")  # kinds of cards about a run's first steps (train/first_steps.py)
FIRST_STEPS = {
    "offsets": "|prior mean - measured| / sd",
    "variance_ratios": "prior / measured variance",
    "scales": "mean square, normalized",
    "gradients": "gradient / weight",
}
SMOOTHED = 10  # steps over which a training loss is averaged
RELEASED = ((0, 0.1),)  # the released recipe's highest rate
READING = "Line: mean over the seeds that learned; band: from the lowest to the highest; hollow: one seed."
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
    said = f"{_said(ran, group)} After the last epoch. Ticks: single runs; marks: their mean, over those that learned."
    legend = {column.label: Point(0, *looks[column.key]) for column in columns}
    shown = any(entry.points for entry in entries)
    figures = {"": forest(entries, said, [f"{name} (%)" for name in axes], legend)} if shown else {}
    return figures | _scenes(card, group, cells) | _choices(card, group, cells)


def _choices(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the statistics that every layer of SSN finally chose, in every run that learned."""
    columns: dict[str, list[np.ndarray]] = {}
    for row, column in itertools.product(card.rows, card.columns):
        norms = [run["norms"] for run in cells.cell(card, row, group, column).learned if _norms(run, "choices")]
        chosen = [[of["choices"][name]["chosen"] for name in of["order"] if name in of["choices"]] for of in norms]
        for i, moment in enumerate(("mean", "variance") if chosen else ()):
            numbers = [[SN_OF.index(layer[i]) for layer in run] for run in chosen]
            tiles = np.kron(np.array(numbers).T, np.ones((TILE, TILE), int))
            tiles[TILE - 1 :: TILE], tiles[:, TILE - 1 :: TILE] = len(SN_OF), len(SN_OF)  # white lines between them
            columns[f"{column.label}: {moment}"] = [tiles]
    said = (
        f"{_said(card, group)} What SSN's layers chose for good, from the first (above) to the last; a column a seed."
    )
    return {"_choices": label_maps(columns, [name.upper() for name in SN_OF], said)} if columns else {}


def _scenes(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw a few test scenes' true and predicted classes, if the runs are segmenters: a column for each row of the
    card."""
    loaded = {row.name: _arrays(cells.cell(card, row, group, card.columns[0]), "scene_true_0") for row in card.rows}
    found = {name: next(iter(of_seeds.values())) for name, of_seeds in loaded.items() if of_seeds}
    if not found:
        return {}
    run, first = next(iter(found.values()))
    scenes = range(sum(key.startswith("scene_true_") for key in first))
    columns = {"truth": [first[f"scene_true_{i}"] for i in scenes]}
    columns |= {name: [arrays[f"scene_predicted_{i}"] for i in scenes] for name, (_, arrays) in found.items()}
    said = f"{_said(card, group)} Test scenes of {run['dataset']} by moving statistics, the first seed that learned."
    return {
        "_maps": label_maps(columns, SCENES[run["config"]["dataset"]["name"]].classes, f"{said} White: not labelled.")
    }


def curves(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the accuracy after every epoch against steps, a panel per kind of statistics; runs at chance as thin
    lines."""
    look = _looks(card, group, cells)

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

    networks = _by_network(card)
    return _lines(_accuracies(card, networks, "optimizer steps", of_network), f"{_said(card, group)} {READING}")


def against(name: str, scale: str, of: Callable[[Card, Row], float | None], apart: str) -> "Draw":
    """Return a function that draws final accuracy against a setting of the rows: a line per label, a panel per title
    and kind of statistics. Rows without the setting (no statistics batch, no gain) are horizontal lines.

    `name`: the setting, for the axis. `scale`: of the axis. `of`: reads the setting from a row. `apart`: a format that
    makes the panel's title from a row's identity.
    """

    def draw(card: Card, group: Group, cells: Cells) -> Figures:
        look, titles = _looks(card, group, cells), [apart.format(effects.identity(card, row)) for row in card.rows]
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

        said = f"{READING} Crosses: where runs failed or stayed at chance. Horizontal: no such setting."
        said += _differing(ran_in)
        return _lines(_accuracies(card, titles, name, of_title), f"{_said(card, group)} {said}", scale)

    return draw


def _differing(ran_in: Mapping[str, Mapping[str, list[str]]]) -> str:
    """Return a sentence on the rows that ran in another arithmetic than most; "" if there are none. Panels are named if
    a row's arithmetic differs between them."""
    if len(ran_in) < 2:
        return ""
    *few, most = sorted(ran_in, key=lambda arithmetic: len(ran_in[arithmetic]))
    several = Counter(called for rows in ran_in.values() for called in rows)
    said = []
    for arithmetic in few:
        rows = sorted(ran_in[arithmetic].items())
        names = [f"{called} ({', '.join(panels)})" if several[called] > 1 else called for called, panels in rows]
        said.append(f"{', '.join(names)} in {arithmetic}")
    return f" Arithmetic differs: {'; '.join(said)}; the others in {most}."


def figure5(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw variance gaps of the last normalizers by channel and batch, and of every layer, for the first two rows."""
    (bn_name, bn), (kn_name, kn) = ((row.name, _arrays(cells.cell(card, row, group))) for row in card.rows[:2])
    if not bn or not kn:
        return {}
    seed = min(bn.keys() & kn.keys(), default=None)
    (run, one), (_, other) = (of[seed] if seed is not None else next(iter(of.values())) for of in (bn, kn))
    sample, posterior = "sample variance", "posterior"
    shown = [(f"{bn_name}: {sample}", one, "gap_measured"), (f"{kn_name}: {sample}", other, "gap_measured")]
    shown += [(f"{kn_name}: {posterior}", other, "gap_used")] if "gap_used" in other else []
    names = _last(run, one)
    absolute = [Map(title, of[key], names) for title, of, key in shown]
    relative = [Map(title, of[key] / (of["moving_var"][:, None] + quantities.EPS), names) for title, of, key in shown]
    said = (
        f"{_said(card, group)} Seed {seed if seed is not None else 'of each its own'}; groups of the training set "
        "without augmentation, in bins. Top: |variance − moving variance|; bottom: over the moving variance. One "
        "logarithmic scale a row. The paper compares the sample variance; the posterior is what normalizes in KN."
    )
    of_maps = [("gap", absolute), ("gap / moving variance", relative)]
    by_channel = maps(of_maps, said, "groups, in bins", "channels of the last normalizers")
    panel = Panel("", [], "mean gap / moving variance", log=True)
    for name, runs, what, look in (
        (bn_name, bn, "measured", Look(style.ORANGE, "s", "-")),
        (kn_name, kn, "measured", Look(style.SKY, "^", "--")),
        (kn_name, kn, "used", Look(style.BLUE, "o", "-")),
    ):
        found = [(run, arrays[key]) for run, arrays in runs.values() if (key := f"layer_gap_{what}") in arrays]
        _add_layers(panel, f"{name}: {sample if what == 'measured' else posterior}", look, found)
    by_layer = lines([[panel]], f"{_said(card, group)} Normalizers in network order. {READING}")
    return {"": by_channel, "_layers": by_layer}


def gains(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the gain that every layer learned, a line per row."""
    look, found = _looks(card, group, cells), []
    for network, rows in _by_network(card).items():
        panel = Panel(network, [], "gain q, weight of the measurement", limits=(-0.03, 1.03), levels={})
        for row in rows:
            runs = [run for run in cells.cell(card, row, group).learned if _norms(run, "gains")]
            if not runs:
                continue
            order = [name for name in runs[0]["norms"]["order"] if name in runs[0]["norms"]["gains"]]
            values = [np.array([run["norms"]["gains"][name] for name in order]) for run in runs]
            _add_layers(panel, row.name, look[row.name], [({"norms": {"order": order}}, of) for of in values])
            if (start := quantities.number(runs[0].get("norm.options.gain"))) is not None:
                panel.levels[start] = look[row.name]
        found.append([panel])
    return _lines(found, f"{_said(card, group)} Faint: where the gain starts. {READING}")


def layer_errors(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw, for each layer, the errors of measurement, prior and posterior against the population's statistics, and
    their parts."""
    what = {"mean": "mean:\n|error| / population sd", "var": "variance:\n|ln(estimate / population)|"}
    parts = {"": "root mean square error", "_bias": "the same in all groups", "_spread": "from group to group"}
    estimates = {
        "measurement": (style.SKY, "^", "--"),
        "prior": (style.GREEN, "D", ":"),
        "posterior": (style.BLUE, "o", "-"),
    }
    loaded = {row.name: _arrays(cells.cell(card, row, group)) for row in card.rows}

    def panel(moment: str, part: str) -> Panel:
        found = Panel(parts[part], [], what[moment], log=True)
        for place, (name, of_row) in enumerate(loaded.items()):
            is_bn = any("gap_used" not in arrays for _, arrays in of_row.values())  # it normalizes by its measurement
            for i, (estimate, (colour, marker, dashes)) in enumerate(estimates.items()):
                errors = [
                    (run, arrays[key][i])
                    for run, arrays in of_row.values()
                    if (key := f"layer_error_{moment}{part}") in arrays
                ]
                look = Look(style.ORANGE, "s", "-") if is_bn else Look(style.tint(colour, place - 1), marker, dashes)
                if not (is_bn and estimate == "posterior"):
                    _add_layers(found, f"{name}: {estimate}", look, errors)
        return found

    said = (
        f"{_said(card, group)} Of the median channel, over groups of training images, against the statistics of the "
        "same features over the training set. What is the same in all groups, gamma and beta can make up for. "
        f"{READING}"
    )
    return _lines([[panel(moment, part) for part in parts] for moment in what], said)


def mixture(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw Switchable Norm's weights of IN, LN and BN against the statistics batch."""
    shares: dict[float | None, np.ndarray] = {}  # statistics batch -> [layers and seeds, means or variances, weights]
    for row in card.rows:
        layers = [
            [layer["mean"], layer["var"]]
            for run in cells.cell(card, row, group).learned
            for layer in (_norms(run, "mixture") or {}).values()
        ]
        if layers:
            shares[float(effects.identity(card, row).stat_batch)] = np.array(layers)

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
    said = f"{_said(card, group)} Over layers and seeds: the quartiles and their mean."
    return _lines([panels], said, "log")


def death(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw each layer's first steps (train/first_steps.py): the error of its prior, the mean square of its normalized
    features, gradient over weight. A network whose priors are wrong, but trusted, diverges.
    """
    found: dict[str, list[Map]] = {label: [] for label in FIRST_STEPS.values()}
    for row in card.rows:
        watched = _arrays(cells.cell(card, row, group), "scales", of_all=True)
        for run, arrays in list(watched.values())[:1]:
            for name, label in FIRST_STEPS.items():
                names = quantities.layers(run, arrays[name].shape[1])
                found[label].append(Map(row.name, arrays[name].T, dict.fromkeys(names, 1) if len(names) < 13 else {}))
    if not any(found.values()):
        return {}
    said = (
        f"{_said(card, group)} A column a normalizer, the first layer on top; each row has one logarithmic scale of "
        "colours; median: of all layers and steps; none, grey: there is no prior."
    )
    return {"": maps(list(found.items()), said, "steps, from the first on", "layers, from the first on")}


def conditioning(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the layers' condition numbers at each step (train/conditioning.py), and the training loss."""
    watched = {r.name: _arrays(cells.cell(card, r, group), "condition_inputs", of_all=True) for r in card.rows}
    watched = {name: runs for name, runs in watched.items() if runs}
    smooth = np.full(SMOOTHED, 1 / SMOOTHED)

    def condition(*factors: str) -> Callable[[Arrays], np.ndarray]:
        return lambda arrays: np.exp(sum(np.log(arrays[f"condition_{factor}"]).mean(1) for factor in factors))

    def panels(vertical: str, log: bool, of: Mapping[str, Callable[[Arrays], np.ndarray]]) -> list[Panel]:
        found, highest = [Panel(title, [], vertical, "steps", log) for title in of], dict.fromkeys(watched, 0.0)
        lowest = np.inf
        for panel, value in zip(found, of.values(), strict=True):
            for place, (name, runs) in enumerate(watched.items()):
                values = list(zip(*(value(arrays) for _, arrays in runs.values()), strict=False))
                look = Look(style.of_class(place + (place > 5)), "", "-")  # skips yellow, which is faint on white
                panel.lines.append(Line(name, look, [float(i + 1) for i in range(len(values))], values))
                highest[name], lowest = max(highest[name], np.max(values)), min(lowest, np.min(values))
        top = 1.2 * sorted(highest.values())[-2:][0]  # a diverging row would squeeze the others
        for panel in found:
            panel.limits = (0.9 * lowest, top)
        return found

    if not watched:
        return {}
    conditions = {
        "of the inputs, E[o oᵀ]": condition("inputs"),
        "of the gradients, E[dh dhᵀ]": condition("gradients"),
        "of both: of the block": condition("inputs", "gradients"),
    }
    loss = {"training loss": lambda arrays: np.convolve(arrays["losses"], smooth, "valid")}
    said = (
        f"{_said(card, group)} Condition numbers: as the weights that learn see them, geometric mean over the "
        f"convolutions. Loss: mean over {SMOOTHED} steps. A line that runs away is cut off."
    )
    return _lines([panels("condition number", True, conditions), panels("cross-entropy", False, loss)], said)


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


def _lines(rows: Sequence[Sequence[Panel]], said: str, scale: str = "linear") -> Figures:
    """Draw the rows of panels that have lines; {} if there are none."""
    drawn = [row for row in rows if any(panel.lines for panel in row)]
    return {"": lines(drawn, said, scale)} if drawn else {}


def _norms(run: quantities.Run, key: str) -> dict[str, Any] | None:
    return (run["norms"] or {}).get(key)


def _final(cell: Cell, quantity: str = "accuracy") -> dict[int, float]:
    return effects.values_of(cell, quantities.value(quantity))


def _looks(card: Card, group: Group, cells: Cells) -> dict[str, Look]:
    """Choose looks for the rows that ran only, since few looks are easier to tell apart than many."""
    ran = [row for row in card.rows if any(cells.cell(card, row, group, column).n for column in card.columns)]
    return style.looks([(row.name, effects.identity(card, row).normalizer.split(" ")[0]) for row in ran])


def _by_network(card: Card) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in card.rows:
        found.setdefault(effects.identity(card, row).network, []).append(row)
    return found


def _arrays(cell: Cell, having: str = "gap_measured", of_all: bool = False) -> dict[int, tuple[quantities.Run, Arrays]]:
    """Return by seed the runs that learned, or all runs, with the arrays beside their records. Runs without an array
    named `having` are left out."""
    found = {}
    for run in cell.runs if of_all else cell.learned:
        try:
            arrays = records.arrays(str(run["id"]), run["results"])
        except UserError:  # there are no arrays
            continue
        if having in arrays:
            found[int(run["seed"])] = (run, arrays)
    return found


def _add_layers(panel: Panel, label: str, look: Look, found: Sequence[tuple[quantities.Run, np.ndarray]]) -> None:
    """Add a line of some runs' values per layer to a panel, if there are any. It does not join parallel branches of a
    block."""
    found = [(run, of) for run, of in found if np.isfinite(of).any()]
    if not found:
        return
    names = panel.names = quantities.layers(found[0][0], len(found[0][1]))
    branches = [_branch(name) for name in names]
    parallel = {block for block, _ in branches if len({b for other, b in branches if other == block}) > 1}
    apart = frozenset(
        i for i in range(1, len(names))
        if branches[i] != branches[i - 1] and (branches[i][0] in parallel or branches[i - 1][0] in parallel)
    )  # fmt: skip
    values = np.array([one for _, one in found if len(one) == len(names)]).T
    panel.lines.append(Line(label, look, [float(i) for i in range(len(names))], values.tolist(), apart=apart))


def _branch(name: str) -> tuple[tuple[str, ...], str]:
    """Return a layer's block and branch: "blocks.0.b3.1.bn" is in b3 of blocks.0, "layers.3.bn1" in "" of layers.3."""
    block = quantities.block(name)
    rest = name.split(".")[len(block) :]
    return block, rest[0] if len(rest) > 1 else ""


def _last(run: quantities.Run, arrays: Arrays) -> dict[str, int]:
    """Return the numbers of channels of the last normalizers, by the parts of their names that differ; {} if the record
    does not have them."""
    names = [name.split(".") for name in _norms(run, "last") or []]
    sizes = [int(size) for size in arrays.get("last_channels", ())]
    if not names or len(sizes) != len(names) or sum(sizes) != len(arrays["moving_var"]):
        return {}
    kept = [[part for part in parts if sum(part in other for other in names) < len(names)] for parts in names]
    return dict(zip([".".join(parts) for parts in kept], sizes, strict=True))


def _said(card: Card, group: Group) -> str:
    of_columns = dict.fromkeys(column.runs["dataset"] for column in card.columns if "dataset" in column.runs)
    return f"{', '.join(filter(None, ['' if group.dataset else ' / '.join(of_columns), group.label]))}."


# By kind of cards that vary one setting, the arguments of `against`: the setting's name, the axis's scale, a function
# that reads it from a row, the panels' titles.
SETTINGS: Mapping[str, tuple[str, str, Callable[[Card, Row], float | None], str]] = {
    "stat_batch": (
        "images that share statistics",
        "log",
        lambda card, row: effects.identity(card, row).stat_batch or None,
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
