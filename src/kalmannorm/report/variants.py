"""Under which settings the rows of a card were run: what records differ in that the card leaves open.

A card fixes network, normalizer and batches, and some fix the data set. Data set, budget, schedule and width come from
the command line; every combination of them that records have makes a table, a figure and a verdict of its own.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.report.read import Records
from kalmannorm.report.table import Card
from kalmannorm.runs.experiment import fixes_dataset

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One combination. Parts are kept as JSON, so that variants compare and sort."""

    dataset: str  # the data set's name; "" where the columns are data sets
    budget: str  # the budget's name
    changes: str  # JSON: {"budget": {...}, "arch": {...}, "dataset": {...}, "schedule": {...}} against conf/

    @property
    def full(self) -> bool:
        """Whether this is the papers' own length and data, not a reduction."""
        return self.budget == "paper" and not json.loads(self.changes)

    @property
    def budget_label(self) -> str:
        """ "lite", "lite (epochs=30, width=0.5)"."""
        said = self.differences
        return f"{self.budget} ({', '.join(said)})" if said else self.budget

    @property
    def label(self) -> str:
        """With the data set: "cifar10, budget lite"."""
        return f"{self.dataset}, budget {self.budget_label}" if self.dataset else f"budget {self.budget_label}"

    @property
    def differences(self) -> list[str]:
        """What differs from conf/, as words that fit into a file's name."""
        changes = json.loads(self.changes)
        said = [f"{key}={value}" for part in ("budget", "arch") for key, value in changes.get(part, {}).items()]
        return said + [f"{part}={changes[part]['name']}" for part in ("schedule", "dataset") if part in changes]

    @property
    def overrides(self) -> list[str]:
        """What the command line says for it."""
        changes = json.loads(self.changes)
        said = [*([f"dataset={self.dataset}"] if self.dataset else []), f"budget={self.budget}"]
        for part in ("budget", "arch"):
            for key, value in changes.get(part, {}).items():
                said.append(f"{part}.{key}={'null' if value is None else value}")
        return said + ([f"schedule={changes['schedule']['name']}"] if "schedule" in changes else [])

    def of(self, config: Config) -> Config:
        """A row's config under this variant."""
        changes = json.loads(self.changes)
        dataset = config["dataset"]
        if self.dataset and self.dataset != dataset["name"]:
            dataset = known_dataset(self.dataset) or {"name": self.dataset}
        dataset = changes.get("dataset", dataset)
        budget = {**known_budget(dataset["name"], self.budget), "name": self.budget, **changes.get("budget", {})}
        arch = {**config["arch"], **{k: v for k, v in changes.get("arch", {}).items() if k in config["arch"]}}
        schedule = changes.get("schedule", config["schedule"])
        return {**config, "dataset": dataset, "budget": budget, "arch": arch, "schedule": schedule}


def of_card(card: Card, records: Records, named: frozenset[str] = frozenset()) -> list[Variant]:
    """The variants that records of the card's rows have, the papers' length first."""
    columns_are_data = fixes_dataset(dict(card))
    configs = [c for row in card["rows"] for c in (row.get("configs") or {"": row.get("config")}).values() if c]
    return of_configs(configs, records, named, columns_are_data)


def of_configs(
    configs: Sequence[Config],
    records: Records,
    named: frozenset[str] = frozenset(),
    columns_are_data: bool = False,
) -> list[Variant]:
    """The variants that records of these rows have.

    A network that another row has (a wider one, say) is that row's, and no variant of this one: `named`, of all cards,
    and those of these rows.
    """
    archs = {_json(config["arch"]) for config in configs}
    names = [config["arch"]["name"] for config in {_json(c["arch"]): c for c in configs}.values()]
    found: set[Variant] = set()
    for config in configs:
        for run in records.open_settings_of(config):
            if columns_are_data and run["dataset"]["name"] != config["dataset"]["name"]:
                continue
            elsewhere = _json(run["arch"]) in named | archs or names.count(config["arch"]["name"]) > 1
            if run["arch"] == config["arch"] or not elsewhere:
                found.add(_variant(config, run, columns_are_data))
    return sorted(found, key=lambda variant: (not variant.full, variant.label))


def named_archs(cards: Mapping[str, Card]) -> frozenset[str]:
    """The networks that rows of cards have, as `of_configs` takes them."""
    rows = [row for card in cards.values() for row in card["rows"]]
    configs = [config for row in rows for config in (row.get("configs") or {"": row.get("config")}).values()]
    return frozenset(_json(config["arch"]) for config in configs if config)


def apply(card: Card, variant: Variant) -> dict[str, Any]:
    """The card under a variant."""
    rows = []
    for row in card["rows"]:
        configs = {key: variant.of(config) for key, config in (row.get("configs") or {}).items()}
        rows.append({**row, "config": variant.of(row["config"]), **({"configs": configs} if configs else {})})
    command = " ".join(["kalmannorm sweep", card["name"], *variant.overrides])
    return {**card, "rows": rows, "variant": variant.differences, "command": command}


@functools.cache
def known_budget(dataset: str, budget: str) -> dict[str, Any]:
    """A budget of conf/ on a data set; {} where conf/ has none of that name."""
    from kalmannorm.runs.config import compose

    try:
        config = compose([f"dataset={dataset}", f"budget={budget}", "device=cpu"], among_many=True)
    except UserError:
        return {}
    return dict(config["budget"])


@functools.cache
def known_dataset(name: str) -> dict[str, Any] | None:
    """A data set's part of a config, as conf/ has it; None where it has none of that name."""
    from kalmannorm.runs.config import compose

    try:
        found: dict[str, Any] = compose([f"dataset={name}", "device=cpu"], among_many=True)["dataset"]
    except UserError:
        return None
    return found


def _variant(row: Config, run: Config, columns_are_data: bool) -> Variant:
    name, budget = run["dataset"]["name"], run["budget"]
    changes = {
        "budget": _changed(known_budget(name, budget["name"]), budget),
        "arch": _changed(row["arch"], run["arch"]),
        "dataset": {} if run["dataset"] == known_dataset(name) else run["dataset"],
        "schedule": {} if run["schedule"] == row["schedule"] else run["schedule"],
    }
    text = json.dumps({part: change for part, change in changes.items() if change}, sort_keys=True)
    return Variant("" if columns_are_data else name, budget["name"], text)


def _changed(known: Config, found: Config) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "name" and known.get(key, ...) != value}


def _json(part: Config) -> str:
    return json.dumps(part, sort_keys=True)
