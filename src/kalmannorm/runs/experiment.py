"""Experiments: one card each in conf/experiment, which names the runs of a table or figure.

A row with `sweep: {SETTING: [VALUE, ...], ...}` stands for one row per combination of the values: its overrides and
SETTING=VALUE, its key with the values behind it.
"""

import itertools
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from kalmannorm.errors import UserError, nearest
from kalmannorm.runs.config import Config, compose, conf_dir, result_part
from kalmannorm.runs.record import run_id


@dataclass
class Experiment:
    """A card (the YAML file, each row with its composed `config` less the seed) and the runs that it asks for."""

    card: dict[str, Any]
    runs: list[Config] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # row of each run


def names() -> list[str]:
    return sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml"))


def load(name: str, arguments: list[str]) -> Experiment:
    """The card `name` under `arguments`: overrides of every run, and

    seeds=N        seeds 1..N in place of the card's number; seeds=1,4 or seeds=4, names them
    rows=paper     only the papers' rows, without ours; rows=KEY,KEY names them; rows=bn_* by a pattern

    Rows that come to the same run (a normalizer without batch statistics at two of them) share it.
    """
    from omegaconf import OmegaConf

    if name not in names():
        raise UserError(nearest(name, names(), "experiment"))
    card: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "experiment" / f"{name}.yaml"), resolve=True)
    own = {key: value for key, _, value in (a.partition("=") for a in arguments) if key in ("seeds", "rows")}
    overrides = [a for a in arguments if a.partition("=")[0] not in own]
    card["rows"] = _choose([one for row in card["rows"] for one in _swept(row)], own.get("rows"))
    seeds = _seeds(own.get("seeds", str(card["seeds"])))
    card["command"] = " ".join(["kalmannorm sweep", name, *arguments])

    experiment = Experiment(card)
    known: set[str] = set()
    for row in card["rows"]:
        row.setdefault("ours", False)
        for seed in seeds:
            config = compose([*card.get("base", []), *row["overrides"], *overrides, f"seed={seed}"])
            row["config"] = {key: value for key, value in result_part(config).items() if key != "seed"}
            if run_id(config) not in known:
                known.add(run_id(config))
                experiment.runs.append(config)
                experiment.keys.append(row["key"])
    # Seed by seed, so that a sweep that is cut short has whole comparisons.
    order = sorted(range(len(experiment.runs)), key=lambda i: experiment.runs[i]["seed"])
    experiment.runs = [experiment.runs[i] for i in order]
    experiment.keys = [experiment.keys[i] for i in order]
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
    if "," not in text:
        numbers = list(range(1, numbers[0] + 1))
    if not numbers or min(numbers) < 0:
        raise UserError(f"seeds={text}: expected at least one seed from 0")
    return numbers
