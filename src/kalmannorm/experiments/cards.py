"""Compose the runs of an experiment from its card (experiments/card.py)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments import card as cards
from kalmannorm.experiments.card import Card, Column, Row
from kalmannorm.experiments.composition import MOST, PATHS, expand, key_of, refuse_repeated
from kalmannorm.experiments.config import Config, compose
from kalmannorm.experiments.record import run_id


@dataclass
class Experiment:
    """A card reduced to the chosen rows and columns, and its runs."""

    card: Card
    runs: list[Config]
    keys: list[str]  # row of each run


def load(name: str, arguments: list[str]) -> Experiment:
    """Load the card `name` and compose its runs. `arguments`: overrides for every run, and

    seeds=N        seeds 1..N in place of the card's number; seeds=1,4 or seeds=4, names them
    rows=paper     only the papers' rows, without ours; rows=KEY,KEY names rows; rows=bn_*,paper: patterns, and several
    columns=KEY    only these columns, if the card's columns have runs of their own
    dataset=NAME   only this data set, if the columns are data sets; it may be one that the paper does not have

    Rows with the same run (a normalizer without batch statistics, at two statistics batches) share it.
    UserError: unknown names or values.
    """
    card, own, overrides = chosen(name, arguments)
    seeds = read_seeds(own.get("seeds", str(card.seeds)))
    found: dict[str, tuple[str, Config]] = {}  # by id: key and run
    for row in card.rows:
        for column in card.columns_of(row) if card.has_columns_of_runs else [None]:
            of_row = cards.overrides(card.settings(row, column))
            # The later of two overrides with the same key counts; Hydra would refuse both.
            config = compose(list({key_of(o): o for o in (*of_row, *overrides, "seed=0")}.values()))
            for seed in seeds:
                run = replace(config, seed=seed)
                found.setdefault(run_id(run), (f"{row.key} {column.key}" if column else row.key, run))
    # Seed by seed, so that an interrupted sweep has whole comparisons.
    ordered = sorted(found.values(), key=lambda one: one[1].seed)
    return Experiment(card, [run for _, run in ordered], [key for key, _ in ordered])


def chosen(name: str, arguments: Sequence[str]) -> tuple[Card, dict[str, str], list[str]]:
    """Return the card with the chosen rows and columns; the arguments seeds, rows, columns; and all other overrides.

    UserError: an unknown name or value; an override of a setting in which the rows differ.
    """
    refuse_repeated(arguments)
    card = cards.read(name)
    own = {key: value for key, _, value in (a.partition("=") for a in arguments) if key in ("seeds", "rows", "columns")}
    overrides = [a for a in arguments if a.partition("=")[0] not in own]
    if any(key_of(override) == "seed" for override in overrides):
        raise UserError("seed: an experiment takes seeds=N (1 to N) or seeds=4,7 (these); seeds=4, is that one alone")
    read_seeds(own.get("seeds", str(card.seeds)))
    if "rows" in own:
        card = replace(card, rows=_choose(card, own["rows"]))
    # Rows of a table are named after their batch; cards of other kinds show any batch that is given.
    fixed = ("arch.", "norm", "batch") if card.kind == "table" else ("arch.", "norm")
    for key in (key for key in map(key_of, overrides) if key.startswith(fixed)):
        if len({str(row.runs.get(key)) for row in card.rows}) > 1:
            raise UserError(f"{key}: the rows of {name} differ in it; name some that do not by rows=KEY,KEY")
    card, overrides = _columns(card, own.get("columns"), overrides)
    if card.has_columns_of_runs:
        card = replace(card, rows=tuple(row for row in card.rows if card.columns_of(row)))
    if not card.rows:
        raise UserError(f"{name}: none of its rows has a column of {', '.join(c.key for c in card.columns)}")
    return card, own, overrides


def _columns(card: Card, wanted: str | None, overrides: list[str]) -> tuple[Card, list[str]]:
    """Return the card with the wanted columns, and the overrides without a data set that chose a column."""
    if not card.has_columns_of_runs:
        if wanted is not None:
            raise UserError(
                f"columns={wanted}: no choice, the columns of {card.name} show the same runs: leave out columns="
            )
        return card, overrides
    if wanted is not None:
        keys = [column.key for column in card.columns]
        for key in wanted.split(","):
            if key not in keys:
                raise UserError(nearest(key, keys, "column"))
        card = replace(card, columns=tuple(column for column in card.columns if column.key in wanted.split(",")))
    dataset = next((o.partition("=")[2] for o in overrides if o.startswith("dataset=")), None)
    if dataset and card.fixes_dataset:
        overrides = [o for o in overrides if not o.startswith("dataset=")]
        same = tuple(column for column in card.columns if column.runs.get("dataset") == dataset)
        if not same:  # no paper restricts the rows of a new column
            same = (Column(dataset, dataset, card.columns[0].statistics, runs={"dataset": dataset}),)
            card = replace(card, rows=tuple(replace(row, columns=None) for row in card.rows))
        card = replace(card, columns=same)
    return card, overrides


def multirun(overrides: list[str]) -> Experiment:
    """Return the runs that Hydra's --multirun makes: all combinations of norm=bn,bkn and seed=range(1,4)."""
    choices = [[one] if key_of(one) in PATHS else expand(one) for one in overrides]
    title = " ".join(overrides)
    if not 1 <= math.prod(map(len, choices)) <= MOST:
        raise UserError(f"{title}: expected from 1 to {MOST:,} runs")
    configs = [compose(list(combination)) for combination in itertools.product(*choices)]
    runs = list({run_id(config): config for config in configs}.values())
    return Experiment(Card("multirun", title, ()), runs, ["multirun"] * len(runs))


def _choose(card: Card, wanted: str) -> tuple[Row, ...]:
    """Return the rows named by any of the words in `wanted`: all, paper, a key, or a pattern of keys."""

    def fits(row: Row, word: str) -> bool:
        return word == "all" or (word == "paper" and not row.ours) or fnmatch(row.key, word)

    words = [word.strip() for word in wanted.split(",")]
    for word in words:
        if word == "paper" and all(row.ours for row in card.rows):
            raise UserError(f"rows=paper: all rows of {card.name} are ours; name them by their keys or by rows=all")
        if not any(fits(row, word) for row in card.rows):
            listing = (
                f"kalmannorm sweep {card.name} --dry-run lists all {len(card.rows)}; patterns are such as rows=bn_*"
            )
            raise UserError(nearest(word, [*(row.key for row in card.rows), "paper", "all"], "row", listing))
    return tuple(row for row in card.rows if any(fits(row, word) for word in words))


def read_seeds(text: str) -> list[int]:
    """Return the seeds that seeds=TEXT means. UserError: it means none."""
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"seeds={text}: expected a number of seeds, or seeds separated by commas") from None
    if numbers and "," not in text:
        numbers = list(range(1, min(numbers[0], MOST + 1) + 1))
    if not numbers or min(numbers) < 0 or max(numbers) >= 2**63 or len(numbers) > MOST:
        raise UserError(f"seeds={text}: expected seeds from 0 to 2^63 - 1 with commas, or how many, from 1 to {MOST:,}")
    return numbers
