"""Cells and effects against other arithmetic: scipy's tests, least squares by hand, plain pandas from the files."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kalmannorm import report
from kalmannorm.experiments import card as cards
from kalmannorm.report import effects, tables
from kalmannorm.report.cells import FIRST_STEPS, Cells, Group, identity
from kalmannorm.report.effects import contrast

RESULTS = Path(__file__).resolve().parents[2] / "results"


def drawn(rows: int, seeds: int, noise: float = 1.0, draw: int = 0) -> dict[str, dict[int, float]]:
    random = np.random.default_rng(draw)
    of_seed = random.normal(0, 3, seeds)
    return {
        f"r{i}": {s: float(10 * i + of_seed[s] + random.normal(0, noise)) for s in range(seeds)} for i in range(rows)
    }


def test_two_rows_are_the_paired_t_test() -> None:
    from scipy import stats

    values = drawn(2, 5)
    found = contrast(values, {"r1": 1, "r0": -1})
    of = stats.ttest_rel(list(values["r1"].values()), list(values["r0"].values()))
    low, high = of.confidence_interval(0.95)
    assert found is not None and found.df == 4
    assert found.mean - found.half_width() == pytest.approx(low) and found.mean + found.half_width() == pytest.approx(
        high
    )


def test_more_rows_lend_their_spread() -> None:
    """The two-way table without interaction: variance = residual sum of squares / ((rows - 1)(seeds - 1))."""
    values = drawn(4, 3)
    table = pd.DataFrame(values)
    left = table - table.mean() - table.mean(axis=1).to_numpy()[:, None] + table.to_numpy().mean()
    spread = math.sqrt(float((left**2).to_numpy().sum()) / 6)
    found = contrast(values, {"r3": 1, "r0": -1})
    assert found is not None and found.df == 6 and found.spread == pytest.approx(spread)
    assert found.error == pytest.approx(spread * math.sqrt(2 / 3)) and found.mean == pytest.approx(
        table.r3.mean() - table.r0.mean()
    )
    assert found.half_width(30) > found.half_width() and found.half_width_of(12) < found.half_width()


def test_missing_seeds_are_least_squares() -> None:
    values = drawn(3, 4)
    del values["r2"][0], values["r2"][1], values["r0"][3]
    found = contrast(values, {"r2": 1, "r0": -1})
    rows = [(int(r[1]), s, v) for r, of in values.items() for s, v in of.items()]
    design = np.array([[*(float(r == i) for i in range(3)), *(float(s == j) for j in range(1, 4))] for r, s, _ in rows])
    solved, *_ = np.linalg.lstsq(design, np.array([v for *_, v in rows]), rcond=None)
    assert found is not None and found.mean == pytest.approx(solved[2] - solved[0]) and found.df == 9 - 6


def test_without_common_seeds_rows_are_compared_as_they_are() -> None:
    values = {"a": {1: 1.0, 2: 2.0}, "b": {3: 5.0, 4: 7.0}}
    found = contrast(values, {"b": 1, "a": -1})
    assert found is not None and found.mean == pytest.approx(4.5) and found.df == 2


def test_a_level_has_the_spread_over_seeds() -> None:
    values = {"a": {1: 1.0, 2: 3.0}, "b": {1: 10.0, 2: 12.0}}
    found = contrast(values, {"a": 1})
    assert (
        found is not None
        and found.mean == pytest.approx(2)
        and found.spread == pytest.approx(math.sqrt(2))
        and found.df == 2
    )


def test_two_islands_of_seeds_are_not_compared_within_one_model() -> None:
    values = {"a": {1: 1.0, 2: 2.0}, "b": {1: 2.0, 2: 3.5}, "c": {3: 5.0, 4: 7.0}, "d": {3: 6.0, 4: 7.5}}
    apart = contrast(values, {"c": 1, "a": -1})
    assert apart is not None and apart.mean == pytest.approx(4.5) and apart.df == 8 - 4  # the rows alone
    within = contrast(values, {"d": 1, "c": -1})
    assert within is not None and within.mean == pytest.approx(0.75) and within.df == 8 - (4 + 4 - 2)


def test_nothing_to_compare() -> None:
    assert contrast({"a": {1: 1.0}, "b": {}}, {"a": 1, "b": -1}) is None
    found = contrast({"a": {1: 1.0}, "b": {1: 2.0}}, {"b": 1, "a": -1})
    assert found is not None and found.mean == pytest.approx(1) and math.isnan(found.half_width())


def test_an_interval_needs_three_degrees_of_freedom() -> None:
    for rows, seeds in ((2, 3), (2, 4)):
        found = contrast(drawn(rows, seeds), {"r1": 1, "r0": -1})
        assert found is not None and math.isfinite(found.half_width()) == (found.df >= 3) and found.spread > 0
        assert np.mean(found.seeds) == pytest.approx(found.mean)
    assert math.isnan(effects.interval([1, 2, 3])) and effects.interval([1, 2, 3, 4]) == pytest.approx(2.0542, abs=1e-4)


def test_equal_variances_are_scipys() -> None:
    from scipy import stats

    values = drawn(4, 6)
    expected = stats.bartlett(*(list(of.values()) for of in values.values())).pvalue
    found = contrast(values, {"r1": 1, "r0": -1})
    assert found is not None and found.equal == pytest.approx(expected)


@pytest.mark.slow
def test_intervals_are_simultaneous() -> None:
    """Thirty differences from two seeds of sixteen rows: all intervals hold at once in 95 % of draws."""
    held = 0
    for draw in range(300):
        values = drawn(16, 2, draw=draw)
        truth = [(f"r{i}", f"r{j}", 10 * (i - j)) for i in range(16) for j in range(i) if (i + j) % 4 == 0]
        found = [(contrast(values, {a: 1, b: -1}), difference) for a, b, difference in truth]
        held += all(e is not None and abs(e.mean - d) <= e.half_width(len(truth)) for e, d in found)
    assert 0.93 < held / 300 <= 1


# The committed records, recomputed from the files alone


def plain() -> pd.DataFrame:
    """A row for each classifier's record and kind of statistics, by nothing of the project's but the files."""
    rows = []
    for path in sorted((RESULTS / "records").glob("*.json")):
        record = json.loads(path.read_text())
        if record["status"] == "done" and "accuracy" in record["final"]["moving"]:
            for kind, final in record["final"].items():
                best = max(value["accuracy"] for value in record["final"].values())
                if best > 120 / record["config"]["dataset"]["classes"]:
                    rows.append(
                        {"id": record["id"], "seed": record["config"]["seed"], "kind": kind, "value": final["accuracy"]}
                    )
    return pd.DataFrame(rows)


@pytest.mark.skipif(not list((RESULTS / "records").glob("*.json")), reason="no record is committed")
def test_every_cell_and_effect_of_the_committed_records() -> None:
    by_id = plain().set_index(["id", "kind"])
    runs = report.load(RESULTS)
    cells = Cells(runs)
    cell_count = effect_count = 0
    variants = dataclasses.replace(cards.read("variants"), baseline="bn_resnet14_g128_s2")
    for card in (variants, *(card for card in map(cards.read, cards.names()) if card.kind == "table")):
        columns = [
            column
            for column in card.columns
            if column.value == "accuracy" and column.at is None and not column.steps_to
        ]
        rows = [identity(card, row, c if card.has_columns_of_runs else None) for row in card.rows for c in columns]
        for group in cells.groups(rows):
            sheet = tables.table(card, group, cells)
            for record in sheet.records:
                if record["mean"] == "" or record["column"] not in {c.key for c in columns}:
                    continue
                kind = next(c.statistics for c in columns if c.key == record["column"])
                values = [by_id.value[i, kind] for i in str(record["records"]).split() if (i, kind) in by_id.index]
                assert record["mean"] == pytest.approx(np.mean(values))
                assert str(record["values"]).split() == [f"{one:.6g}" for one in values]
                cell_count += 1
                if record["difference"] != "":
                    assert _recomputed(cells, card, group, record, kind, by_id) == pytest.approx(record["difference"])
                    effect_count += 1
    assert (cell_count and effect_count) or not (runs.state == "used").any()


def _recomputed(cells: Cells, card: cards.Card, group: Group, record: dict, kind: str, by_id: pd.DataFrame) -> float:  # type: ignore[type-arg]
    """The difference to the baseline by least squares over all rows of the network, written out."""
    row = card.row(str(record["row"]))
    column = next(c for c in card.columns if c.key == record["column"])
    ours, base = (identity(card, one, column) for one in (row, card.row(row.baseline or str(card.baseline))))
    at = group._replace(dataset=ours.dataset or group.dataset)
    ours, base = (dataclasses.replace(one, dataset=None) for one in (ours, base))
    pool = effects.pool(cells, [card], at, kind, {(row.network, row.length) for row in (ours, base)})
    chosen = cells.of(ours, at, kind)
    points = [
        (key, run["seed"], by_id.value[run["id"], kind])
        for key, cell in pool.items()
        if cell.kind == chosen.kind
        for run in cell.runs
        if (run["id"], kind) in by_id.index
    ]
    rows = pd.get_dummies(pd.Series([str(key) for key, *_ in points])).astype(float)
    seeds = pd.get_dummies(pd.Series([seed for _, seed, _ in points])).astype(float).iloc[:, 1:]
    design = pd.concat([rows, seeds], axis=1).to_numpy()
    solved, *_ = np.linalg.lstsq(design, np.array([value for *_, value in points]), rcond=None)
    places = list(rows.columns)
    return float(solved[places.index(str(ours))] - solved[places.index(str(base))])


def test_a_budget_keeps_its_name_when_a_setting_differs() -> None:
    assert Group("cifar10", "start").length == FIRST_STEPS
    assert Group("cifar10", "start epochs=3").length == FIRST_STEPS
    assert Group("cifar10", "lite epochs=3").length == "lite"
