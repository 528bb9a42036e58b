"""What every experiment runs: a change in conf/ that makes other runs of an experiment shows here.

Where it is meant, write the ids again: `python tests/experiments/test_snapshots.py`.
"""

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kalmannorm.experiments import card, cards, config
from kalmannorm.experiments.record import run_id

FILE = Path(__file__).with_name("run_ids.json")
MACHINE = ("device=cpu", "precision=fp32", "compile=false")  # auto would differ between machines
BUDGETS = ("paper", "lite", "smoke")
DATASET = {
    "table6": "coco",
    "talk-table3": "coco",
    "talk-table4": "coco",
    "talk-table5": "ade20k",
    "talk-table6-ibn": "gta5",
    "camvid": "camvid",
    "camvid-dusk": "camvid_day",
    "talk-table6": "kinetics",
    "playback": "playback",
    "talk-ibn-transfer": "cifar10_recoloured",
    "talk-pn": "cifar10_few",
}  # not on CIFAR-10
MANY = 12  # of a card with more rows, which take long to compose, the other budgets' first row alone


def composed(name: str, row: str = "") -> dict[str, dict[str, config.Config]]:
    """The first seed's run of every row, or this, and column, per budget, on CIFAR-10 (or DATASET's) and a CPU."""
    found: dict[str, dict[str, config.Config]] = {}
    for budget in BUDGETS:
        settings = [f"dataset={DATASET.get(name, 'cifar10')}", f"budget={budget}", *MACHINE, "seeds=1"]
        if row or len(rows := found.get(BUDGETS[0], {})) > MANY:
            settings.append(f"rows={row or next(iter(rows)).split()[0]}")
        experiment = cards.load(name, settings)
        found[budget] = dict(zip(experiment.keys, experiment.runs, strict=True))
    return found


def ids(name: str, row: str = "") -> dict[str, dict[str, str]]:
    return {budget: {key: run_id(run) for key, run in runs.items()} for budget, runs in composed(name, row).items()}


@pytest.mark.parametrize("name", card.names())
def test_a_row_of_an_experiment_runs_what_it_ran(name: str) -> None:
    before = json.loads(FILE.read_text())[name]
    row = next(iter(before[BUDGETS[-1]])).split()[0]
    of_row = {
        budget: {key: run for key, run in runs.items() if key.split()[0] == row} for budget, runs in before.items()
    }
    assert ids(name, row) == of_row


@pytest.mark.slow
@pytest.mark.parametrize("name", card.names())
def test_experiment_runs_what_it_ran(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, before = ids(name), json.loads(FILE.read_text()).get(name)
    if now != before:
        pytest.fail(f"{name} has other runs than in {FILE.name}:\n" + difference(name, tmp_path, monkeypatch))


def difference(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Settings now and under conf/ as it was when the ids were written; for a person, so that it never fails."""
    now = flat(composed(name))
    try:
        git = ["git", "-C", str(FILE.parent.parent)]
        commit = subprocess.run([*git, "log", "-1", "--format=%H", "--", str(FILE)], capture_output=True, check=True)
        archive = [*git, "archive", commit.stdout.decode().strip(), "conf"]
        files = subprocess.run(archive, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(files)) as unpacked:
            unpacked.extractall(folder, filter="data")
        for module in (config, card):
            monkeypatch.setattr(module, "conf_dir", lambda: folder / "conf")
        card.read.cache_clear()
        before = flat(composed(name))
    except Exception as error:
        return f"(what was composed before cannot be seen: {error})"
    differing = [key for key in {**before, **now} if before.get(key, "none") != now.get(key, "none")]
    lines = [f"{key}: {before.get(key, 'none')} -> {now.get(key, 'none')}" for key in differing]
    return "\n".join(lines) or "the same files in conf/, composed or hashed in another way"


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key} ") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: ids(name) for name in card.names()}, indent=1, sort_keys=True) + "\n")
