"""Records under other settings than a card's: tables, figures and files of their own, and nothing mixed."""

import json
from pathlib import Path
from typing import Any

import pytest
from conf_cards import budget_of, conf_cards, config_of, fill
from report_fixtures import write_record

from kalmannorm import report
from kalmannorm.cli import main
from kalmannorm.experiments.cards import load
from kalmannorm.experiments.config import result_part
from kalmannorm.experiments.record import NUMERICS
from kalmannorm.report import collection, variants
from kalmannorm.report.table import configs_of, table


@pytest.fixture
def cards() -> dict[str, dict[str, Any]]:
    return conf_cards()


def test_settings_of_a_card_are_apart(tmp_path: Path, cards: dict[str, Any]) -> None:
    fill(tmp_path, cards)
    longer = {**budget_of("cifar10", "lite"), "epochs": 30}
    for changes in ({"budget": longer}, {"arch": {**config_of(cards, "bn_stat2")["arch"], "width": 0.5}}):
        write_record(tmp_path, config_of(cards, "bn_stat2", **changes), 1, 50.0, numerics=NUMERICS)
    write_record(tmp_path, config_of(cards, "kn_stat2", "paper"), 1, 90.0, numerics=NUMERICS)
    found = report.records(tmp_path, NUMERICS)
    settings = variants.of_card(cards["table7"], found)
    assert [setting.label for setting in settings] == [
        "cifar10, budget paper",
        "cifar10, budget lite",
        "cifar10, budget lite (epochs=30)",
        "cifar10, budget lite (width=0.5)",
    ]
    assert [setting.full for setting in settings] == [True, False, False, False]
    tables = [table(variants.apply(cards["table7"], setting), found) for setting in settings]
    counts = [sum(len(cell.ids) for row in made.rows for cell in row.filled) for made in tables]
    assert counts == [2, 12, 2, 2]  # each under two kinds of statistics
    assert len({made.stem for made in tables}) == 4
    assert "dataset=cifar10 budget=lite budget.epochs=30" in variants.apply(cards["table7"], settings[2])["command"]


def test_a_card_under_settings_of_the_command_line_has_files_of_its_own(tmp_path, cards) -> None:  # type: ignore[no-untyped-def]
    """Else `report table7 arch.width=0.5` would write over the plain table; the same names as the whole report's."""
    fill(tmp_path, cards)
    plain = ["table7", "dataset=cifar10", "budget=lite", f"results={tmp_path}"]
    for arguments, name in (
        ([], "table7_cifar10_lite"),
        (["arch.width=1"], "table7_cifar10_lite"),
        (["schedule=released", "seeds=2"], "table7_cifar10_lite"),
        (["schedule=released_warmup"], "table7_cifar10_lite_schedule=released_warmup"),
        (["schedule.lr=[[1, 0.1]]"], "table7_cifar10_lite_schedule.lr=1,0.1"),
        (["arch.width=0.5", "budget.epochs=30"], "table7_cifar10_lite_epochs=30_width=0.5"),
        ([f"rows={','.join(['bn_stat2'] * 40)}"], "table7_cifar10_lite_@"),
        (["rows=bn_*,kn_stat2"], "table7_cifar10_lite_rows=bn_-,kn_stat2"),
    ):
        before = set(tmp_path.glob("*.md"))
        assert main(["report", *plain, *arguments]) == 0
        written = {path.stem for path in set(tmp_path.glob("*.md")) - before}
        if name.endswith("@"):  # a hash: a file's name has an end
            assert {len(stem) for stem in written} == {len("table7_cifar10_lite_") + 12}
        else:
            assert written == ({name} if name not in {path.stem for path in before} else set()), arguments
    whole = variants.Variant("cifar10", "lite", changes=json.dumps({"budget": {"epochs": 30}, "arch": {"width": 0.5}}))
    assert "_".join(["table7_cifar10_lite", *whole.differences]) == "table7_cifar10_lite_epochs=30_width=0.5"


def test_the_papers_values_are_of_the_papers_batches(tmp_path: Path) -> None:
    """Also where the command line gives others to every row."""
    card = load("table1", ["device=cpu", "seeds=1", "batch=g64_s8", "columns=resnet50"]).card
    written = report.render.markdown(table(card, report.records(tmp_path, NUMERICS)))
    assert "| BN | (64, 8) | not run | 76.4 (256, 32) |" in written and "for the same (grad, stat)" not in written


def test_a_row_of_another_width_is_no_setting(tmp_path: Path, cards: dict[str, Any]) -> None:
    """A card that widens a network (v1's Table 3): no row shows another's runs, no other card the wide ones."""
    plain, settings = config_of(cards, "bn_stat2"), cards["table7"]["rows"][0]["settings"][""]
    wide = {**plain, "arch": {**plain["arch"], "width": 1.031}}
    card = {**cards["table7"], "name": "wider"}
    card["rows"] = [
        {"key": "plain", "label": "p", "settings": {"": settings}},
        {"key": "wide", "label": "w", "settings": {"": (*settings, "arch.width=1.031")}},
    ]
    for seed, of in enumerate((plain, wide, {**plain, "arch": {**plain["arch"], "width": 0.5}}), 1):
        write_record(tmp_path, of, seed, numerics=NUMERICS)
    found = report.records(tmp_path, NUMERICS)
    (setting,) = variants.of_card(card, found)
    by_row = {row.key: row.filled[0].by_seed for row in table(variants.apply(card, setting), found).rows}
    assert {key: list(seeds) for key, seeds in by_row.items()} == {"plain": [1], "wide": [2]}
    both = {"wider": card, "table7": cards["table7"]}
    entries = collection.collect(both, dict.fromkeys(set(collection.PAPERS) - both.keys(), "not here"), found)
    (of_table7,) = (entry.made for entry in entries if entry.name == "table7")
    labels = [one.variant.label for one in of_table7 if one.variant]
    assert labels == ["cifar10, budget lite", "cifar10, budget lite (width=0.5)"]


def test_every_row_is_of_its_own_schedule_and_data_set(tmp_path: Path) -> None:
    """The papers' length depends on a row's schedule; a detector's sizes on data set and budget: no reductions."""
    for name, settings in (("table1", ("budget=paper",)), ("table6", ("budget=paper", "dataset=coco"))):
        asked = load(name, ["device=cpu", "seeds=1", *settings])
        for run in asked.runs:
            config = {key: value for key, value in result_part(run).items() if key != "seed"}
            write_record(tmp_path / name, config, 1, numerics=NUMERICS)
        plain = load(name, ["device=cpu", "seeds=1"]).card
        found = report.records(tmp_path / name, NUMERICS)
        (setting,) = variants.of_card(plain, found, variants.named_archs({name: plain}))
        assert setting.full and setting.label.endswith("budget paper"), setting
        assert all(found.of(config) for config in configs_of(variants.apply(plain, setting)))


def test_settings_that_not_all_rows_have(tmp_path: Path) -> None:
    """A data set's belongs to its column, a network's extra one to every row; schedules of one name stay apart."""
    table8 = ["device=cpu", "seeds=1", "rows=inception_bn_stat2,inception_kn_stat2"]
    card = load("table8", table8).card
    lr = "schedule.lr=[[400, 0.1]]"
    for number, change in enumerate(("dataset.pad=0", "+arch.extra=true", lr, "schedule.momentum=0.5")):
        rows = load("table8", [*table8, "columns=cifar10", change]).card["rows"]
        results = tmp_path / str(number)
        for row in rows:
            write_record(results, row["config"], 1, 44.0, numerics=NUMERICS)
        found = report.records(results, NUMERICS)
        (setting,) = variants.of_card(card, found)
        filled = table(variants.apply(card, setting), found)
        assert [cell.column for row in filled.rows for cell in row.filled if cell.by_seed] == ["cifar10"] * 2
        assert change.replace(" ", "") in [said.replace(" ", "") for said in setting.overrides]
        assert table(card, found).empty  # and none of them is a plain run
        assert setting.differences == variants.in_names([change.removeprefix("+arch.")])


def test_a_table_of_settled_numbers_does_not_follow_the_runs(tmp_path: Path) -> None:
    """Table 2 counts at ImageNet's 1,000 classes, whatever else was trained."""
    cards = {"table2": load("table2", ["device=cpu", "seeds=1"]).card}
    other = load("table2", ["device=cpu", "seeds=1", "dataset=tiny_imagenet_20", "budget=lite"]).card
    for row in other["rows"]:
        for config in row["configs"].values():
            write_record(tmp_path, config, 1, numerics=NUMERICS)
    problems = dict.fromkeys(set(collection.PAPERS) - cards.keys(), "not here")
    entries = collection.collect(cards, problems, report.records(tmp_path, NUMERICS))
    (entry,) = (entry for entry in entries if entry.name == "table2")
    (made,) = entry.made
    assert made.sheet is not None and "at 1000 classes" in made.sheet.caption and "table2.md" in made.files
