"""Experiments: one card each in conf/experiment, which names the runs of a table or figure.

A card is a YAML file. Each row has the overrides of its runs. A column names a kind of statistics (`moving`), or has
overrides of its own, where the paper's columns are data sets, networks or batches:

    columns: [online, moving]
    columns:
      - {key: cifar10, label: CIFAR-10, statistics: moving, overrides: [dataset=cifar10]}

A row with `columns: [cifar10]` has a cell there alone. The rest of a card's keys: report/table.py.

A row with `sweep: {SETTING: [VALUE, ...], ...}` stands for one row per combination of the values: its overrides and
SETTING=VALUE, its key with the values behind it.
"""

import copy
import itertools
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments.config import Config, compose, conf_dir, result_part
from kalmannorm.experiments.record import run_id


@dataclass
class Experiment:
    """A card and the runs that it asks for.

    The card is the YAML file; each row has its composed `config` less the seed, and where columns have overrides its
    `configs` by the column's key (`config` is then the first of them); and the overrides they are composed of, by
    column ("" where columns have none), as `settings`.
    """

    card: dict[str, Any]
    runs: list[Config] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # row of each run


def names() -> list[str]:
    return sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml"))


def load(name: str, arguments: list[str]) -> Experiment:
    """The card `name` under `arguments`: overrides of every run, and

    seeds=N        seeds 1..N in place of the card's number; seeds=1,4 or seeds=4, names them
    rows=paper     only the papers' rows, without ours; rows=KEY,KEY names them; rows=bn_* by a pattern
    columns=KEY    only these columns, of a card whose columns have overrides
    dataset=NAME   where the columns are data sets: that one alone, also one that the paper does not have

    Rows that come to the same run (a normalizer without batch statistics at two of them) share it.
    UserError: unknown names or values.
    """
    from omegaconf import OmegaConf

    if name not in names():
        raise UserError(nearest(name, names(), "experiment"))
    card: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "experiment" / f"{name}.yaml"), resolve=True)
    own = {key: value for key, _, value in (a.partition("=") for a in arguments) if key in ("seeds", "rows", "columns")}
    overrides = [a for a in arguments if a.partition("=")[0] not in own]
    card["rows"] = _choose([one for row in card["rows"] for one in _swept(row)], own.get("rows"))
    seeds = _seeds(own.get("seeds", str(card.get("seeds", 1))))
    card["command"] = " ".join(["kalmannorm sweep", name, *arguments])
    if any(override.startswith("seed=") for override in overrides):
        raise UserError("seed: an experiment takes seeds=N (1 to N) or seeds=4,7 (these); seeds=4, is that one alone")
    # Other kinds announce that they are of whatever batches are given; a table's rows are named after theirs.
    fixed = ("arch.", "norm", "batch") if card.get("kind", "table") == "table" else ("arch.", "norm")
    for key in (override.partition("=")[0] for override in overrides if override.startswith(fixed)):
        if len({tuple(o for o in row["overrides"] if o.startswith(f"{key}=")) for row in card["rows"]}) > 1:
            raise UserError(f"{key}: the rows of {name} differ in it; name some that do not by rows=KEY,KEY")

    experiment = Experiment(card)
    columns, overrides = _columns(card, own.get("columns"), overrides)
    known: set[str] = set()
    for row in card["rows"]:
        row.setdefault("ours", False)
        for column, of_column in columns.items():
            if column in row.get("columns", columns):
                settings = _last_of_each(card.get("base", []), of_column, row["overrides"], overrides, ["seed=0"])
                config = compose(settings, among_many=True)
                if of_batch := [o for o in overrides if o.startswith("batch") and card.get("paper_batches", True)]:
                    without = [o for o in overrides if o not in of_batch]
                    of_card = _last_of_each(card.get("base", []), of_column, row["overrides"], without, ["seed=0"])
                    batch = compose(of_card, among_many=True)["batch"]
                    row.setdefault("paper_batch", [batch["grad_batch"], batch["stat_batch"]])
                less_seed = {key: value for key, value in result_part(config).items() if key != "seed"}
                row.setdefault("settings", {})[column] = tuple(settings)
                row.setdefault("config", less_seed)
                if column:
                    row.setdefault("configs", {})[column] = less_seed
                for seed in seeds:
                    run = copy.deepcopy(config) | {"seed": seed}
                    if run_id(run) not in known:
                        known.add(run_id(run))
                        experiment.runs.append(run)
                        experiment.keys.append(f"{row['key']} {column}".rstrip())
    card["rows"] = [row for row in card["rows"] if "config" in row]
    if not card["rows"]:
        raise UserError(f"{name}: none of its rows has a column of {', '.join(columns)}")
    # Seed by seed, so that a sweep that is cut short has whole comparisons.
    order = sorted(range(len(experiment.runs)), key=lambda i: experiment.runs[i]["seed"])
    experiment.runs = [experiment.runs[i] for i in order]
    experiment.keys = [experiment.keys[i] for i in order]
    return experiment


def _last_of_each(*overrides: list[str]) -> list[str]:
    """The later one of two overrides of the same key, which Hydra would refuse."""
    return list({o.partition("=")[0]: o for group in overrides for o in group}.values())


def fixes_dataset(card: dict[str, Any]) -> bool:
    """Whether the columns of a card are data sets."""
    return any(_dataset(column) for column in card.get("columns", []))


def _columns(card: dict[str, Any], wanted: str | None, overrides: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Overrides by column's key, {"": []} where all columns show the same runs; and the overrides of every run."""
    having = [column for column in card.get("columns", []) if isinstance(column, dict) and "overrides" in column]
    if not having:
        if wanted is not None:
            raise UserError(f"columns={wanted}: the columns of {card['name']} are of the same runs; there is no choice")
        return {"": []}, overrides
    if wanted is not None:
        keys = [column["key"] for column in having]
        for key in wanted.split(","):
            if key not in keys:
                raise UserError(nearest(key, keys, "column"))
        having = [column for column in having if column["key"] in wanted.split(",")]
    dataset = next((o.partition("=")[2] for o in overrides if o.startswith("dataset=")), None)
    if dataset and fixes_dataset(card):
        overrides = [o for o in overrides if not o.startswith("dataset=")]
        same = [column for column in having if _dataset(column) == dataset]
        having = same or [{**having[0], "key": dataset, "label": dataset, "overrides": [f"dataset={dataset}"]}]
        if not same:  # every row can have it, as no paper says otherwise
            for row in card["rows"]:
                row.pop("columns", None)
    card["columns"] = having
    return {column["key"]: column["overrides"] for column in having}, overrides


def _dataset(column: Any) -> str | None:
    overrides = column.get("overrides", []) if isinstance(column, dict) else []
    return next((o.partition("=")[2] for o in overrides if o.startswith("dataset=")), None)


def multirun(overrides: list[str]) -> Experiment:
    """The runs that Hydra's --multirun makes of `overrides`: the combinations of norm=bn,bkn and seed=range(1,4)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    choices = []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
            if not parsed.is_sweep_override():
                choices.append([override])
            elif isinstance(parsed.value(), Glob):
                raise UserError(f"override {override!r}: name the values, as in norm=bn,bkn")
            else:
                choices.append([f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()])
        except HydraException as error:
            raise UserError(f"override {override!r}: {str(error).splitlines()[0]}") from None
    title = " ".join(overrides)
    experiment = Experiment({"name": "multirun", "title": title, "command": f"kalmannorm train --multirun {title}"})
    configs = [compose(list(combination), among_many=True) for combination in itertools.product(*choices)]
    for config in {run_id(config): config for config in configs}.values():
        experiment.runs.append(config)
        experiment.keys.append("multirun")
    return experiment


def _choose(rows: list[dict[str, Any]], wanted: str | None) -> list[dict[str, Any]]:
    if wanted is None or wanted == "all":
        return rows
    if wanted == "paper":
        return [row for row in rows if not row.get("ours")]
    keys = [row["key"] for row in rows]
    for pattern in wanted.split(","):
        if not any(fnmatch(key, pattern) for key in keys):
            raise UserError(nearest(pattern, [*keys, "paper", "all"], "row"))
    return [row for row in rows if any(fnmatch(row["key"], pattern) for pattern in wanted.split(","))]


def _swept(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a row stands for: itself, or one per combination of its swept values."""
    sweep: dict[str, list[Any]] = row.pop("sweep", {})
    if not sweep:
        return [row]
    return [
        row
        | {
            "key": "_".join(map(str, (row["key"], *values))),
            "overrides": [*row["overrides"], *(f"{key}={value}" for key, value in zip(sweep, values, strict=True))],
        }
        for values in itertools.product(*sweep.values())
    ]


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"seeds={text}: expected a number of seeds, or seeds separated by commas") from None
    if numbers and "," not in text:
        numbers = list(range(1, numbers[0] + 1))
    if not numbers or min(numbers) < 0:
        raise UserError(f"seeds={text}: expected at least one seed from 0")
    return numbers
