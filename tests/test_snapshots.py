"""What every experiment runs, composed: a change in conf/ that changes an experiment shows here.

Where it is meant, write the files again: `python tests/test_snapshots.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kalmannorm.experiments import cards

FOLDER = Path(__file__).parent / "snapshots"
BUDGETS = ("paper", "lite", "smoke")
DATASET = {"table6": "coco"}  # of the cards that are not of CIFAR-10's task
MANY = 12  # of a card with more rows, which take long to compose, the other budgets' first row alone


def composed(name: str) -> dict[str, Any]:
    """Rows with their configurations, per budget, on CIFAR-10 (or DATASET's) and a CPU."""
    found: dict[str, Any] = {}
    dataset = f"dataset={DATASET.get(name, 'cifar10')}"
    for budget in BUDGETS:
        many = len(found.get(BUDGETS[0], ())) > MANY
        chosen = [f"rows={next(iter(found[BUDGETS[0]]))}"] if many else []
        card = cards.load(name, [dataset, f"budget={budget}", "device=cpu", "seeds=1", *chosen]).card
        found[budget] = {row["key"]: row.get("configs") or row.get("config") for row in card["rows"]}
    return found


@pytest.mark.parametrize("name", cards.names())
def test_experiment_is_what_it_was(name: str) -> None:
    assert composed(name) == json.loads((FOLDER / f"{name}.json").read_text())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in cards.names():
        (FOLDER / f"{name}.json").write_text(json.dumps(composed(name), indent=1, sort_keys=True) + "\n")
