"""Experiments: one card each in conf/experiment, which names the runs of a table or figure."""

import copy
import itertools
from dataclasses import dataclass, field
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
    rows=paper     only the papers' rows, without ours; rows=KEY,KEY names them

    Rows that come to the same run (a normalizer without batch statistics at two of them) share it.
    """
    from omegaconf import OmegaConf

    if name not in names():
        raise UserError(nearest(name, names(), "experiment"))
    card: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "experiment" / f"{name}.yaml"), resolve=True)
    own = {key: value for key, _, value in (a.partition("=") for a in arguments) if key in ("seeds", "rows")}
    overrides = [a for a in arguments if a.partition("=")[0] not in own]
    card["rows"] = _choose(card["rows"], own.get("rows"))
    seeds = _seeds(own.get("seeds", str(card["seeds"])))
    card["command"] = " ".join(["kalmannorm sweep", name, *arguments])

    experiment = Experiment(card)
    known: set[str] = set()
    for row in card["rows"]:
        row.setdefault("ours", False)
        # Composed once: Hydra takes 0.1 s for it, and nothing in conf/ depends on the seed.
        composed = compose([*card.get("base", []), *row["overrides"], *overrides])
        row["config"] = {key: value for key, value in result_part(composed).items() if key != "seed"}
        for seed in seeds:
            config = copy.deepcopy(composed) | {"seed": seed}
            if run_id(config) not in known:
                known.add(run_id(config))
                experiment.runs.append(config)
                experiment.keys.append(row["key"])
    # Seed by seed, so that a sweep that is cut short has whole comparisons.
    order = sorted(range(len(experiment.runs)), key=lambda i: experiment.runs[i]["seed"])
    experiment.runs = [experiment.runs[i] for i in order]
    experiment.keys = [experiment.keys[i] for i in order]
    return experiment


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
    configs = [compose(list(combination)) for combination in itertools.product(*choices)]
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
    for key in wanted.split(","):
        if key not in keys:
            raise UserError(nearest(key, [*keys, "paper", "all"], "row"))
    return [row for row in rows if row["key"] in wanted.split(",")]


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
