"""Cards as conf/ has them, and records of their rows."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report_fixtures import write_record

from kalmannorm.experiments import cards
from kalmannorm.experiments.record import NUMERICS
from kalmannorm.report import variants


@functools.cache
def conf_cards() -> dict[str, dict[str, Any]]:
    """Composed once a process: Hydra takes long."""
    found = {name: cards.load(name, ["device=cpu", "seeds=1"]).card for name in ("table6", "table7", "figure5")}
    some = "rows=inception_bn_stat2,inception_kn_stat2,resnet32_bn_stat2,resnet32_kn_stat2"
    return {**found, "table8": cards.load("table8", ["device=cpu", "seeds=1", some]).card}


def budget_of(dataset: str, name: str) -> dict[str, Any]:
    """A budget as conf/ has it."""
    budget: dict[str, Any] = variants.composed((), dataset, name)["budget"]
    return budget


def config_of(cards: Mapping[str, Any], key: str, at: str = "lite", **changes: Any) -> dict[str, Any]:
    """The config of a row of table7 at a budget."""
    row = next(row for row in cards["table7"]["rows"] if row["key"] == key)
    found = {**row["config"], "budget": budget_of("cifar10", at), **changes}
    return {**found, "precision": "fp32", "compile": False}


def fill(results: Path, cards: Mapping[str, Any], seeds: int = 3, **changes: Any) -> None:
    """Records of Table 7's BN and KN."""
    for seed in range(1, seeds + 1):
        write_record(results, config_of(cards, "bn_stat2"), seed, 80 + 0.1 * seed, 79.5, numerics=NUMERICS, **changes)
        write_record(results, config_of(cards, "kn_stat2"), seed, 81 + 0.1 * seed**2, 81, numerics=NUMERICS, **changes)
