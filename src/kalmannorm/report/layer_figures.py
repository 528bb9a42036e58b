"""Draw what records hold by layer: variance gaps, gains, errors, first steps and condition numbers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kalmannorm.experiments.card import Card
from kalmannorm.report import quantities, style
from kalmannorm.report.cells import Cells, Group
from kalmannorm.report.figure_data import (
    READING,
    Arrays,
    Figures,
    arrays_of,
    by_network,
    draw_panels,
    looks_of,
    setting,
)
from kalmannorm.report.plots import Line, Map, Panel, lines, maps
from kalmannorm.report.style import Look

WATCHED = {  # arrays of the first steps -> the labels of their rows
    "offsets": "|prior mean - measured| / sd",
    "variance_ratios": "prior / measured variance",
    "scales": "mean square, normalized",
    "gradients": "gradient / weight",
}
SMOOTHED = 10  # steps over which a training loss is averaged


def figure5(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw variance gaps of the last normalizers by channel and batch, and of every layer, for the first two rows."""
    (bn_name, bn), (kn_name, kn) = ((row.name, arrays_of(cells.cell(card, row, group))) for row in card.rows[:2])
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
    caption = (
        f"{setting(card, group)} Seed {seed if seed is not None else 'of each its own'}; groups of the training set "
        "without augmentation, in bins. Top: |variance − moving variance|; bottom: over the moving variance. One "
        "logarithmic scale a row. The paper compares the sample variance; the posterior is what normalizes in KN."
    )
    of_maps = [("gap", absolute), ("gap / moving variance", relative)]
    by_channel = maps(of_maps, caption, "groups, in bins", "channels of the last normalizers")
    panel = Panel("", [], "mean gap / moving variance", log=True)
    for name, runs, what, look in (
        (bn_name, bn, "measured", Look(style.ORANGE, "s", "-")),
        (kn_name, kn, "measured", Look(style.SKY, "^", "--")),
        (kn_name, kn, "used", Look(style.BLUE, "o", "-")),
    ):
        found = [(run, arrays[key]) for run, arrays in runs.values() if (key := f"layer_gap_{what}") in arrays]
        _add_layers(panel, f"{name}: {sample if what == 'measured' else posterior}", look, found)
    by_layer = lines([[panel]], f"{setting(card, group)} Normalizers in network order. {READING}")
    return {"": by_channel, "_layers": by_layer}


def gains(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the gain that every layer learned, a line per row."""
    look, found = looks_of(card, group, cells), []
    for network, rows in by_network(card).items():
        panel = Panel(network, [], "gain q, weight of the measurement", limits=(-0.03, 1.03), levels={})
        for row in rows:
            runs = [run for run in cells.cell(card, row, group).learned if quantities.norm_state(run, "gains")]
            if not runs:
                continue
            order = [name for name in runs[0]["norms"]["order"] if name in runs[0]["norms"]["gains"]]
            values = [np.array([run["norms"]["gains"][name] for name in order]) for run in runs]
            _add_layers(panel, row.name, look[row.name], [({"norms": {"order": order}}, of) for of in values])
            if (start := quantities.number(runs[0].get("norm.options.gain"))) is not None:
                panel.levels[start] = look[row.name]
        found.append([panel])
    return draw_panels(found, f"{setting(card, group)} Faint: where the gain starts. {READING}")


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
    loaded = {row.name: arrays_of(cells.cell(card, row, group)) for row in card.rows}

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

    caption = (
        f"{setting(card, group)} Of the median channel, over groups of training images, against the statistics of the "
        "same features over the training set. What is the same in all groups, gamma and beta can make up for. "
        f"{READING}"
    )
    return draw_panels([[panel(moment, part) for part in parts] for moment in what], caption)


def death(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw each layer's first steps (train/first_steps.py): the error of its prior, the mean square of its normalized
    features, gradient over weight. A network whose priors are wrong, but trusted, diverges.
    """
    found: dict[str, list[Map]] = {label: [] for label in WATCHED.values()}
    for row in card.rows:
        watched = arrays_of(cells.cell(card, row, group), "scales", of_all=True)
        for run, arrays in list(watched.values())[:1]:
            for name, label in WATCHED.items():
                names = quantities.layers(run, arrays[name].shape[1])
                found[label].append(Map(row.name, arrays[name].T, dict.fromkeys(names, 1) if len(names) < 13 else {}))
    if not any(found.values()):
        return {}
    caption = (
        f"{setting(card, group)} A column a normalizer, the first layer on top; each row has one logarithmic scale of "
        "colours; median: of all layers and steps; none, grey: there is no prior."
    )
    return {"": maps(list(found.items()), caption, "steps, from the first on", "layers, from the first on")}


def conditioning(card: Card, group: Group, cells: Cells) -> Figures:
    """Draw the layers' condition numbers at each step (train/conditioning.py), and the training loss."""
    watched = {r.name: arrays_of(cells.cell(card, r, group), "condition_inputs", of_all=True) for r in card.rows}
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
    caption = (
        f"{setting(card, group)} Condition numbers: as the weights that learn see them, geometric mean over the "
        f"convolutions. Loss: mean over {SMOOTHED} steps. A line that runs away is cut off."
    )
    return draw_panels([panels("condition number", True, conditions), panels("cross-entropy", False, loss)], caption)


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
    names = [name.split(".") for name in quantities.norm_state(run, "last") or []]
    sizes = [int(size) for size in arrays.get("last_channels", ())]
    if not names or len(sizes) != len(names) or sum(sizes) != len(arrays["moving_var"]):
        return {}
    kept = [[part for part in parts if sum(part in other for other in names) < len(names)] for parts in names]
    return dict(zip([".".join(parts) for parts in kept], sizes, strict=True))
