"""What every experiment runs, composed: a change in conf/ that changes an experiment shows here.

Where it is meant, write the files again: `python tests/test_snapshots.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kalmannorm.errors import UserError
from kalmannorm.runs import experiment

FOLDER = Path(__file__).parent / "snapshots"
BUDGETS = ("paper", "lite", "smoke")
DATASET = {"table6": "coco"}  # of the cards that are not of CIFAR-10's task
MANY = 12  # of a card with more rows, which take long to compose, the other budgets' first row alone


def composed(name: str) -> dict[str, Any] | None:
    """Rows with their configurations, per budget, on CIFAR-10 (or DATASET's) and a CPU.

    None for a card that has no runs, or a network or data set that is not there yet.
    """
    found: dict[str, Any] = {}
    dataset = f"dataset={DATASET.get(name, 'cifar10')}"
    for budget in BUDGETS:
        many = len(found.get(BUDGETS[0], ())) > MANY
        chosen = [f"rows={next(iter(found[BUDGETS[0]]))}"] if many else []
        try:
            loaded = experiment.load(name, [dataset, f"budget={budget}", "device=cpu", "seeds=1", *chosen])
        except UserError as error:
            assert "unknown" in str(error)
            return None
        card = loaded.card
        if not loaded.runs:
            return None
        found[budget] = {row["key"]: row.get("configs") or row.get("config") for row in card["rows"]}
    return found


@pytest.mark.parametrize("name", experiment.names())
def test_experiment_is_what_it_was(name: str) -> None:
    found = composed(name)
    if found is None:
        assert not (FOLDER / f"{name}.json").exists(), "it was composed once"
        pytest.skip("nothing to compose yet")
    assert found == json.loads((FOLDER / f"{name}.json").read_text())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in experiment.names():
        if (rows := composed(name)) is not None:
            (FOLDER / f"{name}.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
