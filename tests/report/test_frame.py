"""The frame: what is read, what is found by a card's row, what is noted and left out."""

import json
import re
from pathlib import Path

import pytest
from records import config, table7, write_record

from kalmannorm import report
from kalmannorm.errors import UserError
from kalmannorm.experiments import card as cards
from kalmannorm.experiments.record import NUMERICS, arrays_if_any
from kalmannorm.report import claims, frame, tables
from kalmannorm.report.cells import Cell, Cells, Group, identities, identity

LITE = Group("cifar10", "lite")


def cell(results: Path, row: str, statistics: str = "moving", card: str = "table7", group: Group = LITE) -> Cell:
    found = cards.read(card)
    return Cells(report.load(results)).cell(found, found.row(row), group, statistics=statistics)


def test_a_row_for_each_run_and_kind_of_statistics(tmp_path: Path) -> None:
    assert report.load(tmp_path).empty
    table7(tmp_path, seeds=2)
    runs = report.load(tmp_path)
    assert len(runs) == 2 * 3 * 3 and set(runs.statistics) == {"moving", "online", "precise"}
    kn = runs[(runs.normalizer == "bkn") & (runs.statistics == "online") & (runs.seed == 2)].iloc[0]
    assert kn.accuracy == 62.2 and kn["norm.options.gain"] == 0.5 and kn.stat_batch == 2 and kn.budget == "lite"
    assert kn.gap == 0 and kn.state == "used" and kn.note == ""


def test_every_run_of_a_card_is_found_by_the_row_that_asks_for_it(tmp_path: Path) -> None:
    """Composed as a sweep composes it, looked up as a report does."""
    from kalmannorm.experiments.cards import load

    for name in ("table7", "learning-rate", "v1-table3", "layer-errors", "variants"):
        experiment = load(name, ["seeds=1", "device=cpu", "precision=fp32", "compile=false"])
        for run in experiment.runs:
            write_record(tmp_path, run.result(), run.seed, 50.0, 50.0)
        cells = Cells(report.load(tmp_path))
        for row in experiment.card.rows:
            for column in experiment.card.columns_of(row):
                found = cells.cell(experiment.card, row, Group(column.runs.get("dataset", "cifar10"), "lite"), column)
                assert len(found.runs) == 1, (name, row.key, column.key)


def test_other_runs_do_not_enter(tmp_path: Path) -> None:
    write_record(tmp_path, config("bkn"), 1, 70.0)
    for seed, other in enumerate(
        (
            config("bkn", gain=0.1),
            config("bkn", belief="output"),
            config("bkn", 4),
            config("bkn", arch="resnet14"),
            config("bkn", dataset="cifar100"),
            config("bkn", budget="paper"),
            {**config("bkn"), "arch": {**config()["arch"], "width": 0.25}},
            {**config("bkn"), "schedule": {**config()["schedule"], "weight_decay": 0.1}},
            {**config("bkn"), "budget": {**config()["budget"], "epochs": 77}},
            {**config("bkn"), "dataset": {**config()["dataset"], "flip": False}},
        ),
        2,
    ):
        write_record(tmp_path, other, seed, 10.5)
    assert [run["accuracy"] for run in cell(tmp_path, "kn_stat2").runs] == [70.0]
    card = cards.read("table7")
    labels = {group.label for group in Cells(report.load(tmp_path)).groups([identity(card, card.row("kn_stat2"))])}
    assert labels == {
        "cifar10, budget lite",
        "cifar10, budget paper",
        "cifar100, budget lite",
        "cifar10, budget lite, width 0.25",
        "cifar10, budget lite, schedule released weight_decay=0.1",
        "cifar10, budget lite epochs=77",
        "cifar10 flip=false, budget lite",
    }


def test_a_width_that_a_row_names_is_no_setting_of_others(tmp_path: Path) -> None:
    wide = {**config("bn", dataset="cifar100"), "arch": {**config()["arch"], "width": 1.031}}
    write_record(tmp_path, wide, 1)
    cells = Cells(report.load(tmp_path))
    card = cards.read("v1-table3")
    row, column = card.row("bn_stat2_widened"), card.columns[2]
    assert cells.cell(card, row, Group("", "lite"), column).n == 1
    assert not cells.groups([identity(cards.read("table7"), cards.read("table7").row("bn_stat2"))])


def test_a_length_that_a_column_names_is_no_group_of_others(tmp_path: Path) -> None:
    for epochs, warmup, moving in ((5, 0.8333, 60.0), (12, 2, 70.0), (7, 1, 65.0)):
        one = config("bn", arch="resnet14")
        write_record(tmp_path, {**one, "budget": {**one["budget"], "epochs": epochs, "warmup": warmup}}, 1, moving)
    cells = Cells(report.load(tmp_path))
    card = cards.read("epochs")
    bn, found = card.row("bn"), cells.groups(identities(card))
    assert [group.budget for group in found] == ["lite", "lite epochs=7 warmup=1"]
    of_columns = [cells.cell(card, bn, found[0], column) for column in card.columns]
    assert [[run["accuracy"] for run in cell.runs] for cell in of_columns] == [[60.0], [70.0], []]
    others = cells.groups(identities(cards.read("variants")))
    assert [group.budget for group in others] == ["lite", "lite epochs=7 warmup=1"]


def test_an_option_at_its_default_is_the_same_row() -> None:
    def identity(**settings: object) -> frame.Identity:
        return frame.identity(json.dumps({key.replace("__", "."): value for key, value in settings.items()}))

    assert identity(norm="bkn", norm__options__gain=0.5) == identity(norm="bkn")
    found = frame.identity(json.dumps({"norm": "bkn", "+norm.options.input_belief": "data"}))
    assert found.normalizer == "bkn input_belief=data"
    assert identity(norm="gn", batch="g128_s2") == identity(norm="gn", batch="g128_s128")
    assert identity(norm="bkn", norm__preset="released").normalizer == "bkn released"


# Checks


def test_failed_runs_are_counted_and_never_averaged(tmp_path: Path) -> None:
    write_record(tmp_path, config(), 1, 60.0)
    write_record(tmp_path, config(), 2, failed="the loss is not finite")
    found = cell(tmp_path, "bn_stat2")
    assert (len(found.runs), len(found.failed), found.lost, found.n) == (1, 1, 1, 2)
    assert found.notes == ["seed 2 failed: the loss is not finite"]


def test_what_did_not_learn_is_noted(tmp_path: Path) -> None:
    write_record(tmp_path, config(), 1, 60.0, 60.0)
    write_record(tmp_path, config(), 2, 10.3, 11.9)
    found = cell(tmp_path, "bn_stat2")
    assert [run["seed"] for run in found.learned] == [1] and found.lost == 1
    assert found.notes == ["seed 2 at chance under any statistics"]


def test_a_duplicate_seed_is_left_out(tmp_path: Path) -> None:
    """Two done records of one run cannot come from disk (their ids are checked), but a table does not rely on that."""
    first = write_record(tmp_path, config(), 1, 60.0)
    runs = report.load(tmp_path)
    copy = runs.assign(id="planted", accuracy=99.0)
    checked = report.check(__import__("pandas").concat([runs, copy], ignore_index=True))
    planted = checked[checked.id == "planted"]
    assert set(planted.state) == {"left out"} and f"seed 1 has two records, {first} is used" in planted.note.iloc[0]
    assert set(checked[checked.id == first].state) == {"used"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "bf16", "compile": True}, "bf16, compiled where the others are fp32"),
        ({"sha256": "e" * 64}, "other data"),
    ],
)
def test_arithmetic_and_data_are_never_averaged(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    for seed in (1, 2):
        write_record(tmp_path, config(), seed, 60.0)
    other = write_record(tmp_path, config(), 3, 80.0, **changes)  # type: ignore[arg-type]
    found = cell(tmp_path, "bn_stat2")
    assert [run["accuracy"] for run in found.runs] == [60.0, 60.0]
    assert [run["id"] for run in found.left_out] == [other] and words in found.notes[0]


def test_a_row_in_several_arithmetics_is_shown_in_that_of_the_rows_beside_it(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_record(tmp_path, config(), seed, 80.0, precision="bf16", compile=True)
    for seed in (1, 2):
        write_record(tmp_path, config(), seed, 60.0)
        write_record(tmp_path, config("bkn"), seed, 62.0)
    card = cards.read("table7")
    alone = Cells(report.load(tmp_path))
    beside = alone.alike(identities(card), LITE)
    shown = [[run["accuracy"] for run in of.cell(card, card.row("bn_stat2"), LITE).runs] for of in (alone, beside)]
    assert shown == [[80.0, 80.0, 80.0], [60.0, 60.0]]
    assert beside.cell(card, card.row("bn_stat2"), LITE).notes == [
        "seed 1, 2, 3 left out: bf16, compiled where the others are fp32"
    ]
    kn = tables.find(card, LITE, card.columns[-1], beside)["kn_stat2"]
    assert kn.effect is not None and kn.effect.mean == 2
    assert tables.find(card, LITE, card.columns[-1], alone)["kn_stat2"].effect is None
    verdict = next(v for v in claims.evaluate(alone, tmp_path) if v.claim.id == "kn_over_bn")
    assert verdict.effect is not None and verdict.effect.mean == 2


def test_stale_records_are_listed_only(tmp_path: Path) -> None:
    write_record(tmp_path, config(), 1, numerics=NUMERICS + 1)
    runs = report.load(tmp_path)
    assert set(runs.state) == {"stale"} and f"this is {NUMERICS}" in runs.note.iloc[0]
    assert cell(tmp_path, "bn_stat2").n == 0


def test_planted_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy under another name, and a record whose config or result was edited, are named and left out."""
    good = write_record(tmp_path, config(), 1)
    path = tmp_path / "records" / f"{write_record(tmp_path, config('bkn'), 2)}.json"
    whole = json.loads(path.read_text())
    edits = {
        "its id is not that of its configuration": ("config", "norm", whole["config"]["norm"] | {"predictor": "x"}),
        "its curve ends with 91.0": ("final", "online", {"accuracy": 99.0}),
        "its data are mnist, its configuration's cifar10": ("data", "name", "mnist"),
    }
    for complaint, (part, key, value) in edits.items():
        path.write_text(json.dumps(whole | {part: whole[part] | {key: value}}))
        assert set(report.load(tmp_path).id) == {good} and complaint in capsys.readouterr().err
    path.write_text(json.dumps(whole["config"]))
    assert set(report.load(tmp_path).id) == {good} and "'id' is None" in capsys.readouterr().err
    path.write_text(json.dumps(whole))
    write_record(tmp_path, config(), 1, name="planted")
    assert set(report.load(tmp_path).id) == {good, path.stem}
    assert re.search(f"planted.json .* its id is not that of its configuration, {good}", capsys.readouterr().err)


# For notebooks


def test_curves_in_long_form(tmp_path: Path) -> None:
    write_record(tmp_path, config(), 1, 80.0, 90.0)
    write_record(tmp_path, config(), 2, failed="x")
    long = report.curves(report.load(tmp_path))
    assert len(long) == 4 and set(long.seed) == {1}
    assert long[long.statistics == "online"].accuracy.tolist() == [50.0, 90.0] and long.step.tolist() == [11, 22] * 2


def test_arrays_of_one_run(tmp_path: Path) -> None:
    run = write_record(tmp_path, config("bkn"), 1, arrays=True)
    assert report.arrays(run, tmp_path)["gap_used"].shape == (40, 24)
    with pytest.raises(UserError, match="restore it"):
        report.arrays(write_record(tmp_path, config("bkn"), 2), tmp_path)
    (tmp_path / "records" / f"{run}.npz").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        report.arrays(run, tmp_path)


def test_damaged_arrays_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = (write_record(tmp_path, config("bkn"), seed, arrays=True) for seed in (1, 2))
    (tmp_path / "records" / f"{run}.npz").write_bytes(b"")
    (tmp_path / "records" / f"{other}.npz").unlink()  # as where only records were copied
    assert arrays_if_any(run, tmp_path) == arrays_if_any(other, tmp_path) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert f"left out: {tmp_path}/records/{run}.npz cannot be read" in line


def test_curves_of_no_records(tmp_path: Path) -> None:
    assert report.curves(report.load(tmp_path)).empty
