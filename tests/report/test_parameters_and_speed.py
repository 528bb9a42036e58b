"""Tables 2 and 3: counted parameters, and measured speed; a measurement is stored, and the table reads nothing else."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments import cards
from kalmannorm.experiments.card import Card, read
from kalmannorm.report import parameters, speed
from kalmannorm.report import sheet as sheets
from kalmannorm.runs import measure_speed

TINY = ["budget.size=32", "arch.width=0.1", "batch.grad_batch=4", "batch.stat_batch=2", "device=cpu"]


def load(tmp_path: Path, *overrides: str) -> cards.Experiment:
    return cards.load("table3", ["device=cpu", f"results={tmp_path}", *overrides])


def table3(tmp_path: Path, *overrides: str) -> sheets.Sheet:
    return speed.sheet(load(tmp_path, *overrides).card, tmp_path)


def rows(sheet: sheets.Sheet) -> list[list[str]]:
    return [[label, *(place.text for place in row)] for (_, label), row in zip(sheet.index, sheet.rows, strict=True)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Steps are not run but take given times; which were compiled."""
    asked: list[bool] = []

    def steps(configs: dict[str, Any], card: Card, device: Any, compiled: bool) -> dict[str, list[float]]:
        asked.append(compiled)
        return {"bn": [0.2, 0.1, 0.2, 0.4], "kn": [0.3, 0.2, 0.3, 0.6]}

    monkeypatch.setattr(measure_speed, "_alternate", steps)
    return asked


# --- Table 2 ---


def test_table2_has_the_printed_digits() -> None:
    sheet = parameters.sheet(read("table2"))
    assert rows(sheet)[0] == ["Inception-v2", "11.29 (11,285,224)", "11.29", "11.29 (11,285,224)", "11.29",
                              "11.30 (11,295,309)", "11.30"]  # fmt: skip
    assert [row[0] for row in rows(sheet)] == ["Inception-v2", "ResNet-101", "ResNet-50"]
    for row in rows(sheet):
        assert [value.split()[0] for value in row[1::2]] == row[2::2]
    assert "All equal the printed digits." in sheet.caption
    counts = {(line["network"], line["normalizer"]): line["parameters"] for line in sheet.records}
    assert counts["resnet50", "kn"] == 25_583_645 and counts["resnet101", "gn"] == 44_549_160


def test_table2_says_where_it_differs() -> None:
    card = read("table2")
    narrow = replace(card, rows=(replace(card.rows[0], runs={**card.rows[0].runs, "arch.width": 0.5}),))
    said = "Not the printed digits: Inception-v2 with BN, Inception-v2 with GN, Inception-v2 with KN."
    assert said in parameters.sheet(narrow).caption


def test_table2_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["table2", "rows=resnet50", "columns=kn", "device=cpu", f"results={tmp_path}"]
    assert main(["sweep", *arguments]) == 0 and "nothing to run" in capsys.readouterr().err
    assert main(["report", *arguments]) == 0
    assert "25.58 (25,583,645)" in capsys.readouterr().out
    names = [f"table2-rows-resnet50-columns-kn.{ending}" for ending in ("csv", "md", "tex")]  # not over the whole table
    assert sorted(file.name for file in tmp_path.iterdir()) == names


# --- Table 3 ---


def test_table3_not_run(tmp_path: Path) -> None:
    ((label, *values),) = rows(table3(tmp_path))
    assert label.startswith("paper (4x Titan X") and values == ["325.74", "320.94", "1.015", ""]


@pytest.mark.slow
def test_a_real_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = load(tmp_path, *TINY[:-1])
    small.card = replace(small.card, seconds=0)
    assert measure_speed.measure(small) == 0
    (file,) = (tmp_path / "speed").iterdir()
    found = json.loads(file.read_text())
    assert {len(steps) for steps in found["seconds"].values()} == {5}
    assert found["configs"]["kn"]["norm"]["name"] == "bkn" and not found["configs"]["bn"]["compile"]
    assert {"hardware", "threads", "git", "versions", "started"} <= set(found["host"])
    before = file.read_bytes()
    assert measure_speed.measure(small) == 0 and file.read_bytes() == before  # done already
    assert "done" in capsys.readouterr().err
    assert main(["report", "table3", f"results={tmp_path}"]) == 0
    assert "32x32 px, (4, 2), width 0.1, fp32, eager" in (tmp_path / "table3.md").read_text()


def test_medians_and_the_middle_half(tmp_path: Path, timed: list[bool]) -> None:
    assert measure_speed.measure(load(tmp_path)) == 0
    (row, printed) = rows(table3(tmp_path))
    assert row[1:] == ["320.00", "213.33", "1.500 [1.500, 1.875]", "4"]
    assert "thread" in row[0] and "224x224 px, (64, 32), fp32, eager" in row[0] and printed[0].startswith("paper")
    (bn, kn) = csv.DictReader(io.StringIO(sheets.csv(table3(tmp_path))))
    assert (bn["row"], float(bn["examples_per_s"]), bn["paper_examples_per_s"], bn["n"]) == ("bn", 320, "325.74", "4")
    assert kn["commit"] and kn["torch"] and float(kn["seconds_per_step"]) == 0.3 and float(kn["ratio_high"]) == 1.875
    for output in (sheets.markdown, sheets.latex, sheets.text):
        assert "320.00" in output(table3(tmp_path))


def test_eager_and_compiled_where_runs_are_compiled(tmp_path: Path, timed: list[bool]) -> None:
    measure_speed.measure(load(tmp_path))
    assert timed == [False]
    compiling = load(tmp_path, "compile=true")
    measure_speed.measure(compiling, dry_run=True)
    assert timed == [False]
    measure_speed.measure(compiling)
    assert timed == [False, True]  # the eager one is there
    assert [row[0].split(", ")[-1] for row in rows(table3(tmp_path))[:2]] == ["compiled", "eager"]


def test_measurements_of_other_settings_have_rows_of_their_own(tmp_path: Path, timed: list[bool]) -> None:
    for overrides in (["budget.size=64"], ["batch.grad_batch=128"]):
        measure_speed.measure(load(tmp_path, *overrides))
    found = [row[0].split("; ")[1].split(", fp32")[0] for row in rows(table3(tmp_path))[:2]]
    assert found == ["224x224 px, (128, 32)", "64x64 px, (64, 32)"]


@pytest.mark.parametrize("content", ["", "{}", '{"id": "x"}', "[]", "[" * 100_000, None])
def test_a_damaged_measurement_is_named(tmp_path: Path, timed: list[bool], content: str | None) -> None:
    measure_speed.measure(load(tmp_path))
    (file,) = (tmp_path / "speed").iterdir()
    whole = json.loads(file.read_text())
    whole["seconds"]["kn"].pop()
    file.write_text(json.dumps(whole) if content is None else content)
    with pytest.raises(UserError, match=file.name):
        table3(tmp_path)


def test_a_comparison_needs_both_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compares two rows"):
        measure_speed.measure(load(tmp_path, "rows=kn"))


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure_speed, "_alternate", fail)
    with pytest.raises(UserError, match=r"smaller batch\.grad_batch"):
        measure_speed.measure(load(tmp_path))
    assert not (tmp_path / "speed").exists()
