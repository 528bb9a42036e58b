"""Tables: a card's cells in one group as a Sheet."""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd

from kalmannorm.experiments.card import Card, Column, Row
from kalmannorm.experiments.record import reached
from kalmannorm.report import effects, paper, quantities
from kalmannorm.report.cells import Cell, Cells, Group, identity, values_of
from kalmannorm.report.effects import LEAST, Effect, signed
from kalmannorm.report.frame import batch_sizes
from kalmannorm.report.quantities import PRECISIONS, QUANTITIES
from kalmannorm.report.sheet import Place, Sheet, letter


class Found(NamedTuple):
    """What was found for a row in a column."""

    cell: Cell
    values: Mapping[int, float]  # by seed, of the runs that learned
    printed: float | None  # in the papers
    effect: Effect | None = None  # the difference to the baseline


def table(card: Card, group: Group, cells: Cells) -> Sheet:
    """Return the table of a card in one group: its cells, with printed values and differences to the baseline."""
    every = {column.key: find(card, group, column, cells) for column in card.columns}
    columns = [column for column in card.columns if any(one.cell.n for one in every[column.key].values())]
    columns = columns or list(card.columns)
    of_rows = {r.key: [of[r.key] for c in columns if r.key in (of := every[c.key])] for r in card.rows}
    rows = [r for r in card.rows if any(one.cell.n or one.printed is not None for one in of_rows[r.key])] or card.rows
    header: list[str] = []
    notes = list(dict.fromkeys(n for c in columns for r in rows if r.has(c) for n in every[c.key][r.key].cell.notes))
    places: dict[str, list[Place]] = {row.key: [] for row in rows}
    spreads: list[str] = []
    for column in columns:
        of = every[column.key]
        papers = any(of[row.key].printed is not None for row in rows if row.has(column))
        deltas = any(one.effect for one in of.values())
        header += [column.label, *[f"{column.label}: paper"] * papers, *[f"{column.label}: Δ"] * deltas]
        best = _best(card, column, of)
        for row in rows:
            if not row.has(column):
                places[row.key] += [Place("")] * (1 + papers + deltas)
                continue
            one = of[row.key]
            marks = ",".join(letter(notes.index(note)) for note in one.cell.notes)
            places[row.key] += [
                Place(value(one, column), one.cell.ids, row.key in best, marks),
                *[Place(_printed(card, row, column, one.printed))] * papers,
                *[Place(difference(one.effect), one.cell.ids if one.effect else ())] * deltas,
            ]
        words = dict.fromkeys(_spread(one.effect) for one in of.values() if one.effect and one.effect.df)
        spreads += [f"{column.label}: {' / '.join(words)}"] if words else []
    what = "COCO's average precision in percent" if any(c.value in PRECISIONS for c in card.columns) else "Percent"
    what += ", loss as cross-entropy," if any(QUANTITIES[column.value].lower for column in columns) else ""
    setting, about = described(card, group, cells)
    blocks: dict[str, list[str]] = {}
    for row in card.rows:
        blocks.setdefault(row.block, []).extend([] if row in rows else [row.name])
    missing = [column.label for column in card.columns if column not in columns]
    missing += [f"{block}: {'; '.join(of)}".removeprefix(": ") for block, of in blocks.items() if of]
    about = [*([f"Not run: {'; '.join(missing)}."] if missing else []), *about]
    about.append(
        f"With {LEAST + 1} seeds and more, ± half the 95 % interval. The best mean of a column, in each block, is "
        "bold. Where runs failed or stayed at chance: how many learned, and the mean of those."
    )
    keys = {row.key for row in card.rows}  # rows=KEY may leave out a baseline
    if baselines := dict.fromkeys(base for row in card.rows if (base := row.baseline or card.baseline) in keys):
        labels = dict.fromkeys(row.label for key in baselines for row in card.rows if row.key == key)
        about.append(
            f"Δ: difference to {' and '.join(labels)}, with its 95 % "
            "interval under the variance pooled over the network's rows here and in the papers' tables, from "
            f"{LEAST} degrees of freedom on (one interval at a time: verdicts are the claims')."
        )
    if spreads:
        about.append(f"Standard deviation of a run, pooled: {'; '.join(spreads)}.")
    if printed := card.paper_setting or card.paper_dataset:
        about.append(f"Paper: printed values ({printed}), never measured ones.")
    return Sheet(
        stem=f"{card.name}_{group.stem}",
        title=card.title,
        caption=f"{setting}. {what} after the last epoch: the mean, in brackets the seeds.",
        about=tuple(about),
        header=tuple(header),
        index=tuple((row.block, row.name) for row in rows),
        rows=tuple(tuple(places[row.key]) for row in rows),
        notes=tuple(notes),
        records=tuple(
            _record(card, row, column, every[column.key][row.key])
            for column in columns
            for row in card.rows
            if row.has(column)
        ),
    )


def by_batch(card: Card, group: Group, cells: Cells) -> Card:
    """Turn a card whose rows differ in batches into a table card: a block for each network, a column for each batch and
    kind of statistics. Rows that did not run in the group are left out."""
    networks = list(dict.fromkeys(row.runs["arch"] for row in card.rows))
    batches = sorted({row.runs["batch"] for row in card.rows}, key=batch_sizes)
    columns = [
        replace(of, key=f"{of.key}_{batch}", label=f"{of.label}, stat {batch_sizes(batch)[1]}", runs={"batch": batch})
        for of in card.columns
        for batch in batches
    ]
    rows: dict[tuple[str, str], Row] = {}
    for row in sorted(card.rows, key=lambda row: networks.index(row.runs["arch"])):
        if any(cells.cell(card, row, group, column).n for column in card.columns):
            at = (row.runs["arch"], row.label)
            own = tuple(column.key for column in columns if column.runs["batch"] == row.runs["batch"])
            runs = {key: value for key, value in row.runs.items() if key != "batch"}
            before = rows.get(at, replace(row, block=row.runs["arch"], runs=runs, columns=()))
            rows[at] = replace(before, columns=(*(before.columns or ()), *own))
    return replace(card, kind="table", rows=tuple(rows.values()), columns=tuple(columns))


def find(card: Card, group: Group, column: Column, cells: Cells) -> dict[str, Found]:
    """Return what was found in a column, by row, with every row's difference to its baseline (effects.compare)."""
    read = quantities.value(column.value, column.at)
    if (level := column.steps_to) is not None:
        read = functools.partial(quantities.steps_to, level=level)
    found = {}
    for row in (row for row in card.rows if row.has(column)):
        cell = cells.cell(card, row, group, column)
        found[row.key] = Found(cell, values_of(cell, read), paper_value(card, row, column, group))
    for key, one in found.items():
        base = card.row(key).baseline or card.baseline
        if level is None and base != key and base in found and found[base].cell.kind == one.cell.kind:
            weights = {identity(card, card.row(of), column): sign for of, sign in ((key, 1), (base, -1))}
            effect = effects.compare(cells, [card], group, column.statistics, weights, read, [one.cell.kind])
            found[key] = one._replace(effect=effect)
    return found


def value(found: Found, column: Column) -> str:
    """Write a cell: "45.26 (45.41, 45.10)", "45.26 ± 0.81 (n = 5)", "2 of 3 learned: 34.10 (...)", "failed", ..."""
    cell, values = found.cell, list(found.values.values())
    if not cell.runs:
        return "failed" if cell.failed else "not run"
    lost = f"{len(cell.learned)} of {cell.n} learned" if cell.lost else ""
    if not values:
        return lost or ("not reached" if column.steps_to is not None else "no value")
    digits = 0 if column.steps_to is not None else 2
    shown = f"{sum(values) / len(values):,.{digits}f}"
    if math.isfinite(half := effects.interval(values)):
        shown += f" ± {half:.{digits}f} (n = {len(values)})"
    elif values[1:]:
        shown += f" ({', '.join(f'{one:,.{digits}f}' for one in values)})"
    return f"{lost}: {shown}" if lost else shown


def difference(found: Effect | None) -> str:
    """Write an effect with its interval, "+9.38 [+6.77, +11.99]"; "" for none."""
    if found is None:
        return ""
    low, high = found.interval()
    return signed(found.mean) + (f" [{signed(low)}, {signed(high)}]" if math.isfinite(low) else "")


def paper_value(card: Card, row: Row, column: Column, group: Group) -> float | None:
    """Return the papers' value for exactly this data set, row and statistics; None if they print none."""
    if not card.fixes_dataset and group.dataset != card.paper_dataset:
        return None
    path = row.paper or (f"{card.paper}.{row.key}" if card.paper and not row.ours else None)
    if not path:
        return None
    return paper.printed(path.format(column=column.key) if "{column}" in path else f"{path}.{column.key}")


def described(card: Card, group: Group, cells: Cells) -> tuple[str, list[str]]:
    """Describe the runs: "CIFAR-10, small Inception, budget lite (12 epochs of 50,000 images at 16 px)", and sentences
    on data, seeds, arithmetic and weights."""
    of_rows = (cells.cell(card, row, group, column) for row in card.rows for column in card.columns_of(row))
    runs = [run for cell in of_rows for run in (*cell.runs, *cell.failed)]
    whole = [run for run in runs if run["status"] == "done"] or runs  # failed early: the record has no data
    length = dict.fromkeys(f"{run['budget.epochs']} epochs of {_seen(run)} at {run['budget.size']} px" for run in whole)
    words = [*dict.fromkeys(run["dataset"] for run in runs), *dict.fromkeys(run["network"] for run in runs)]
    words += [f"budget {group.budget} ({' / '.join(length)})", f"schedule {group.schedule}" if group.schedule else ""]
    setting = ", ".join(filter(None, [*words, f"width {group.width:g}" if group.width != 1 else ""]))
    if not runs:
        return setting, []
    exact = (f"{run['dataset']}: {_recorded(run, 'data.fidelity') or 'exactness not recorded'}" for run in whole)
    seeds = ", ".join(map(str, sorted({int(run["seed"]) for run in runs})))
    arithmetic = " / ".join(dict.fromkeys(str(run["arithmetic"]) for run in runs))
    said = [
        f"Data: {'; '.join(dict.fromkeys(exact))}.",
        f"Seeds {seeds}; {arithmetic}; schedule {runs[0]['schedule']}.",
    ]
    for what, key in (("Weights", "origin"), ("Constants of frozen BN", "constants")):
        weights = [run["weights"] for run in runs if isinstance(run["weights"], dict)]
        origins = dict.fromkeys(str(of[key]) for of in weights if of.get(key))
        said += [f"{what}: {' / '.join(origins)}."] if origins else []
    if by_heart := [run for run in runs if isinstance(run["training"], dict)]:  # evaluated on training images too
        one = len({run["network"] for run in by_heart}) == 1
        seen = {run["normalizer"] if one else f"{run['normalizer']} on {run['network']}": run for run in by_heart}
        shown = (f"{name} {reached(run['training'])}" for name, run in seen.items())
        said.append(f"On training images, box / mask: {', '.join(shown)}.")
    return setting, said


def _best(card: Card, column: Column, found: Mapping[str, Found]) -> set[str]:
    """Return the keys of the rows with the best mean in their block, for blocks in which several rows have a mean."""
    means: dict[str, dict[str, float]] = {}
    for row in card.rows if column.steps_to is None else ():
        if (one := found.get(row.key)) and one.values and not one.cell.lost:
            means.setdefault(row.block, {})[row.key] = sum(one.values.values()) / len(one.values)
    best = min if QUANTITIES[column.value].lower else max
    return {best(of, key=lambda key: of[key]) for of in means.values() if len(of) > 1}


def _printed(card: Card, row: Row, column: Column, printed: float | None) -> str:
    """Return a paper's value with the paper's digits (90.0, not 90.00), and its batches if they are not the row's."""
    if printed is None:
        return "–"
    own = identity(card, row, column)
    elsewhere = row.paper_batch and card.paper_batches and row.paper_batch != (own.grad_batch, own.stat_batch)
    return f"{printed:,}" + (f" ({row.paper_batch[0]}, {row.paper_batch[1]})" if elsewhere and row.paper_batch else "")


def _spread(found: Effect) -> str:
    """Write the spread over seeds: "0.68 (16 degrees of freedom; that all rows have the same: p = 0.31)"."""
    equal = "" if math.isnan(found.equal) else f"; that all rows have the same: p = {found.equal:.2g}"
    return f"{found.spread:.2f} ({found.df} degrees of freedom{equal})"


def _seen(run: quantities.Run) -> str:
    """Write the size of a run's training set: "50,000 images", "96 videos"; without a number if the run failed before
    it was known."""
    count, what = _recorded(run, "data.train_images"), "videos" if _recorded(run, "dataset.frames") else "images"
    return f"{int(count):,} {what}" if count else what


def _recorded(run: quantities.Run, key: str) -> Any:
    """Return a value of the record; None if the record has none, which the frame marks by nan."""
    return None if pd.isna(found := run.get(key)) else found


def _record(card: Card, row: Row, column: Column, one: Found) -> dict[str, object]:
    """Return a line of the CSV file. (pandas writes nan and None as empty.)"""
    own, effect, values = identity(card, row, column), one.effect, one.values.values()
    return {
        "row": row.key,
        "label": f"{row.block} {row.name}".strip(),
        "column": column.key,
        "grad_batch": own.grad_batch,
        "stat_batch": own.stat_batch or "",
        "runs": one.cell.n,
        "learned": len(one.cell.learned),
        "mean": sum(values) / len(values) if values else "",
        "half_width": effects.interval(list(values)),
        "seeds": " ".join(map(str, one.values)),
        "values": " ".join(f"{value:.6g}" for value in values),
        "paper": one.printed,
        "difference": effect.mean if effect else "",
        "difference_half_width": effect.half_width() if effect else "",
        "spread": effect.spread if effect else "",
        "df": effect.df if effect else "",
        "records": " ".join(one.cell.ids),
        "notes": "; ".join(one.cell.notes),
    }
