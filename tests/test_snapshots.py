"""What every experiment runs, composed: a change in conf/ that changes an experiment shows here.

Where it is meant, write the files again: `python tests/test_snapshots.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kalmannorm.runs import experiment

FOLDER = Path(__file__).parent / "snapshots"
BUDGETS = ("paper", "lite", "smoke")


def composed(name: str) -> dict[str, Any]:
    """Rows with their configurations, per budget, on CIFAR-10 and a CPU."""
    found = {}
    for budget in BUDGETS:
        card = experiment.load(name, ["dataset=cifar10", f"budget={budget}", "device=cpu", "seeds=1"]).card
        found[budget] = {row["key"]: row["config"] for row in card["rows"]}
    return found


@pytest.mark.parametrize("name", experiment.names())
def test_experiment_is_what_it_was(name):
    assert composed(name) == json.loads((FOLDER / f"{name}.json").read_text())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in experiment.names():
        (FOLDER / f"{name}.json").write_text(json.dumps(composed(name), indent=1, sort_keys=True) + "\n")
