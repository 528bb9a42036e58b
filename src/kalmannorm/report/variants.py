"""Under which settings the rows of a card were run: what records differ in that the card leaves open.

A card fixes network, normalizer and batches, and some fix the data set. Data set, budget, schedule and width come from
the command line; every combination of them that records have makes a table, a figure and a verdict of its own. What a
row is under one of them, conf/ says: schedules have lengths and budgets have resolutions that rows do not name.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.experiments.cards import fixes_dataset
from kalmannorm.experiments.config import Config, compose, result_part
from kalmannorm.report.read import Records, row_key
from kalmannorm.report.table import Card

OF = "name"  # among the changes of a data set: the one that they are of
PARTS = ("budget", "arch", "schedule", "dataset")  # of a config, in the order in which names show them

Settings = tuple[str, ...]  # a row's overrides


@dataclass(frozen=True)
class Variant:
    """One combination. Parts are kept as JSON, so that variants compare and sort."""

    dataset: str  # the data set's name; "" where the columns are data sets
    budget: str  # the budget's name
    schedule: str = ""  # the schedule's name; "" where every row has its own
    changes: str = "{}"  # JSON: {"budget": {...}, "arch": {...}, "dataset": {...}, "schedule": {...}} against conf/

    @property
    def full(self) -> bool:
        """Whether this is the papers' own length and data, not a reduction."""
        return self.budget == "paper" and not self.differences

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
        said = words(json.loads(self.changes))
        return said if not self.schedule else [*said, f"schedule={self.schedule}"]

    @property
    def overrides(self) -> list[str]:
        """What the command line says for it."""
        said = [*([f"dataset={self.dataset}"] if self.dataset else []), f"budget={self.budget}"]
        said += [f"schedule={self.schedule}"] if self.schedule else []
        for part, changes in json.loads(self.changes).items():
            for key, value in changes.items():
                if key != OF:
                    plus = "+" if key.startswith("+") else ""
                    said.append(f"{plus}{part}.{key.removeprefix('+')}={_literal(value)}")
        return said

    def of(self, settings: Settings) -> Config:
        """A row's config under this variant."""
        config = {**composed(settings, self.dataset, self.budget, self.schedule)}
        for part, changes in json.loads(self.changes).items():
            known = config[part]
            if changes.get(OF, known.get("name")) == known.get("name"):
                fitting = {k.removeprefix("+"): v for k, v in changes.items() if k in known or k.startswith("+")}
                config[part] = {**known, **fitting}
        return config


def of_card(card: Card, records: Records, named: frozenset[str] = frozenset()) -> list[Variant]:
    """The variants that records of the card's rows have, the papers' length first."""
    return of_rows(settings_of(card), records, named, fixes_dataset(dict(card)))


def of_rows(
    rows: Sequence[Settings], records: Records, named: frozenset[str] = frozenset(), columns_are_data: bool = False
) -> list[Variant]:
    """The variants that records of these rows have.

    A network that another row has (a wider one, say) is that row's, and no variant of this one: `named`, of all cards.
    Nor is a setting of the network that these rows differ in.
    """
    found: set[Variant] = set()
    for settings in rows:
        own = composed(settings)
        for run in records.open_settings_of(own):
            if columns_are_data and run["dataset"]["name"] != own["dataset"]["name"]:
                continue
            variant = _variant(settings, run, columns_are_data)
            changed = json.loads(variant.changes).get("arch", {})
            if changed and (_json(run["arch"]) in named or _differ(rows, variant, run, changed)):
                continue
            if row_key(variant.of(settings)) == row_key(run):
                found.add(variant)
    return sorted(found, key=lambda variant: (not variant.full, variant.label))


def set_apart(card: Card, plain: Card) -> list[str]:
    """What settings of the command line change of the card `plain`, as its files' names are to say."""
    said: dict[str, None] = {}
    columns_are_data = fixes_dataset(dict(card))
    for settings, changed in zip(settings_of(plain), settings_of(card), strict=True):
        own, config = composed(settings), composed(changed)
        others = [part for part in ("arch", "norm") if config[part]["name"] != own[part]["name"]]
        rest = {part: _changed(own[part], config[part]) for part in ("norm", "batch") if part not in others}
        said |= dict.fromkeys(f"{part}={config[part]['name']}" for part in others)
        said |= dict.fromkeys([*_variant(settings, config, columns_are_data).differences, *words(rest)])
    return list(said)


def settings_of(card: Card) -> list[Settings]:
    """The overrides of all rows, of each column where these have their own."""
    return [settings for row in card["rows"] for settings in row["settings"].values()]


def named_archs(cards: Mapping[str, Card]) -> frozenset[str]:
    """The networks that rows of cards have, as `of_rows` takes them."""
    return frozenset(_json(composed(settings)["arch"]) for card in cards.values() for settings in settings_of(card))


def apply(card: Card, variant: Variant) -> dict[str, Any]:
    """The card under a variant."""
    rows = []
    for row in card["rows"]:
        configs = {column: variant.of(settings) for column, settings in row["settings"].items()}
        first = next(iter(configs.values()))
        rows.append({**row, "config": first, **({"configs": configs} if "configs" in row else {})})
    command = " ".join(["kalmannorm sweep", card["name"], *variant.overrides])
    return {**card, "rows": rows, "variant": variant.differences, "command": command}


def words(changes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """ "width=0.5", "schedule.lr=0.1": changes as words that fit into a file's name."""
    said = []
    for part, of_part in changes.items():
        for key, value in of_part.items():
            if key != OF:
                plain = key.removeprefix("+")
                said.append(f"{plain if part in ('budget', 'arch') else f'{part}.{plain}'}={_literal(value)}")
    return in_names(said)


def in_names(said: Iterable[str]) -> list[str]:
    """Without what does not belong into a file's name."""
    return [re.sub(r"[^\w.,=+-]", "-", re.sub(r"[\s\[\]{}\"']", "", text)) for text in said]


@functools.cache
def composed(settings: Settings, dataset: str = "", budget: str = "", schedule: str = "") -> Config:
    """A row's config, less its seed, on another data set, at another budget, under another schedule.

    What conf/ has no file of has its name alone.
    """
    chosen = {"dataset": dataset, "budget": budget, "schedule": schedule}
    kept = [s for s in settings if not chosen.get(s.partition("=")[0])]
    wanted = [*kept, *(f"{group}={name}" for group, name in chosen.items() if name)]
    for more in ([], ["dataset.classes=1"]):  # a folder of images has its classes counted, were it here
        try:
            return _composed(tuple(sorted([*wanted, *more])))
        except UserError:
            continue
    own = _composed(tuple(sorted(settings)))
    return own | {group: {"name": name} for group, name in chosen.items() if name not in ("", own[group]["name"])}


@functools.cache  # in whatever order a row and a variant say it: cards have many rows in common
def _composed(overrides: Settings) -> Config:
    config = result_part(compose(list(overrides), among_many=True))
    return {key: value for key, value in config.items() if key != "seed"}


def _variant(settings: Settings, run: Mapping[str, Any], columns_are_data: bool) -> Variant:
    name, budget, schedule = run["dataset"]["name"], run["budget"]["name"], run["schedule"]["name"]
    if composed(settings, name, budget)["schedule"]["name"] == schedule:
        schedule = ""
    known = composed(settings, name, budget, schedule)
    changes = {part: _changed(known[part], run[part]) for part in PARTS}
    if columns_are_data and changes["dataset"]:
        changes["dataset"][OF] = name
    text = json.dumps({part: change for part, change in changes.items() if change})
    return Variant("" if columns_are_data else name, budget, schedule, text)


def _changed(known: Config, found: Mapping[str, Any]) -> dict[str, Any]:
    """What `found` has otherwise than `known`; with a + before the key what `known` has not."""
    return {
        (key if key in known else f"+{key}"): value
        for key, value in sorted(found.items())
        if key != "name" and known.get(key, ...) != value
    }


def _differ(rows: Iterable[Settings], variant: Variant, run: Mapping[str, Any], changed: Iterable[str]) -> bool:
    """Whether the rows of a run's network have different values of settings that changed."""
    name, budget = run["dataset"]["name"], run["budget"]["name"]
    archs = [composed(settings, variant.dataset and name, budget, variant.schedule)["arch"] for settings in rows]
    same = [arch for arch in archs if arch["name"] == run["arch"]["name"]]
    return any(len({_json(arch.get(key)) for arch in same}) > 1 for key in changed)


def _literal(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _json(part: Any) -> str:
    return json.dumps(part, sort_keys=True)
