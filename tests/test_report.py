"""The report: records in, tables and figures out; nothing enters a cell unnoticed."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from report_fixtures import NUMERICS, card, config, figure_card, full, made, notes_of, row_of, write_record

from kalmannorm import report
from kalmannorm.errors import UserError
from kalmannorm.report import paper, render, statistics
from kalmannorm.report.table import table

BN, BN_LARGE, KN, KN_OUTPUT = (row["config"] for row in card()["rows"])


# Statistics


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_interval_is_scipys(n: int) -> None:
    from scipy import stats

    values = np.random.default_rng(n).normal(90, 2, n)
    summary = statistics.summarize(list(values))
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert summary.half_width is not None
    assert (summary.mean - summary.half_width, summary.mean + summary.half_width) == pytest.approx((low, high))


def test_differences_are_scipys() -> None:
    from scipy import stats

    draw = np.random.default_rng(0)
    ours, baseline = draw.normal(91, 1, 4), draw.normal(90, 2, 3)
    paired = statistics.difference(dict(enumerate(ours)), dict(enumerate(baseline)))
    low, high = stats.ttest_rel(ours[:3], baseline).confidence_interval()
    assert paired is not None and paired.half_width is not None and (paired.paired, paired.n) == (True, 3)
    assert (paired.mean - paired.half_width, paired.mean + paired.half_width) == pytest.approx((low, high))

    apart = statistics.difference(dict(enumerate(ours)), dict(enumerate(baseline, start=10)))
    low, high = stats.ttest_ind(ours, baseline, equal_var=False).confidence_interval()
    assert apart is not None and apart.half_width is not None and not apart.paired
    assert (apart.mean - apart.half_width, apart.mean + apart.half_width) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ({1: 92.0, 2: 92.1, 3: 91.9}, "exceeds"),
        ({1: 92.0, 2: 88.0, 3: 90.1}, "tie"),
        ({1: 92.0}, "open"),  # one seed has no interval
        (
            {1: 91.3, 2: 91.3, 3: 91.3},
            "open",
        ),  # the same difference in each seed: an interval of width 0 is no evidence
        ({1: 90.0, 2: 90.0, 3: 90.0}, "tie"),
        ({7: 92.0, 8: 92.1}, "exceeds"),  # unpaired; the baseline does not vary
    ],
)
def test_verdict(ours: dict[int, float], verdict: str) -> None:
    found = statistics.difference(ours, {1: 90.0, 2: 90.0, 3: 90.0})
    assert found is not None and found.verdict == verdict


def test_difference_needs_both_sides() -> None:
    assert statistics.difference({}, {1: 90.0}) is None


# The paper's values


def test_paper_values() -> None:
    assert paper.value("neurips.table7.bn_stat2.moving") == 89.4
    assert paper.value("neurips.table1.inception_v2_iterations_to_73.1.kn") == 100_000
    for absent in ("neurips.table7.kn_output.moving", "neurips.table4.moving.gn", "nowhere", "neurips.table7.bn_stat2"):
        assert paper.value(absent) is None
    assert "shared" not in paper.VALUES.read_text()


# Cells


def test_means_intervals_and_seeds(tmp_path: Path) -> None:
    for seed, moving in ((1, 90.0), (2, 91.0), (3, 92.0)):
        write_record(tmp_path, BN, seed, moving=moving, online=50.0)
    cell = row_of(made(tmp_path), "bn_stat2").cells[1]
    assert (cell.column, cell.state, list(cell.by_seed), cell.paper) == ("moving", "done", [1, 2, 3], 89.4)
    assert cell.summary is not None and cell.summary.mean == 91.0
    assert cell.summary.half_width == pytest.approx(4.302653 / math.sqrt(3))
    assert not cell.notes


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1, moving=90.25)
    found = made(tmp_path)
    assert row_of(found, "bn_stat2").cells[1].summary == statistics.Summary(90.25, None, 1)
    assert "| 90.25 |" in render.markdown(found)


def test_nothing_run(tmp_path: Path) -> None:
    found = made(tmp_path / "absent")
    assert found.empty and {cell.state for row in found.rows for cell in row.cells} == {"not run"}
    text = render.text(found)
    assert text.count("not run") == 8 and "make table7 DATASET=digits BUDGET=lite" in text
    assert "90.0" in text  # the paper's value stands in its own column only
    paths = report.write(card(), report.records(tmp_path / "absent", NUMERICS), tmp_path)
    assert [path.name for path in paths] == [f"table7_digits_lite.{kind}" for kind in ("md", "csv", "tex")]


def test_card_names_its_own_command(tmp_path: Path) -> None:
    assert "make demo" in render.text(made(tmp_path, command="make demo"))


def test_other_configs_do_not_enter(tmp_path: Path) -> None:
    other_budget = config() | {"budget": {**BN["budget"], "epochs": 5}}
    other_gain = config("bkn", gain=0.1)
    write_record(tmp_path, other_budget, 1)
    write_record(tmp_path, other_gain, 1)
    assert made(tmp_path).empty


def test_failed_runs(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1)
    write_record(tmp_path, BN, 2)
    write_record(tmp_path, BN, 3, failed="loss is nan\nat step 12")
    write_record(tmp_path, KN, 1, failed="out of memory")
    found = made(tmp_path)
    assert notes_of(found, "bn_stat2") == "1 of 3 runs failed: loss is nan at step 12 (seed 3)"
    assert row_of(found, "bn_stat2").cells[0].summary == statistics.Summary(91.0, 0.0, 2)
    assert row_of(found, "kn_stat2").cells[0].state == "failed"
    assert "[b] 1 of 1 run failed: out of memory (seed 1)" in render.text(found)


def test_accuracy_that_is_no_number(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1, online=90.0)
    bad = write_record(tmp_path, BN, 2, online=math.nan)
    found = made(tmp_path)
    assert row_of(found, "bn_stat2").cells[0].by_seed == {1: 90.0}
    assert notes_of(found, "bn_stat2") == f"left out, the online accuracy is not a finite number: seed 2 ({bad})"
    write_record(tmp_path, KN, 2, online=math.nan)
    assert row_of(made(tmp_path), "kn_stat2").cells[0].state == "failed"


def test_missing_kind_of_statistics(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1)
    found = made(tmp_path, columns=["precise", "unheard-of"])
    assert [cell.state for cell in row_of(found, "bn_stat2").cells] == ["done", "no value"]


def test_precisions_are_never_averaged(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_record(tmp_path, BN, seed, online=90.0)
    left_out = write_record(tmp_path, BN, 3, online=10.0, precision="bf16", compile=True)
    found = made(tmp_path)
    assert row_of(found, "bn_stat2").cells[0].by_seed == {1: 90.0, 2: 90.0}
    assert notes_of(found, "bn_stat2") == f"left out, precision bf16 instead of fp32, compiled: seed 3 ({left_out})"
    for output in (render.markdown(found), render.text(found), render.latex(found), render.csv(found)):
        assert left_out in output


def test_same_seed_in_two_precisions(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1, online=90.0)
    write_record(tmp_path, BN, 1, online=10.0, precision="bf16")
    write_record(tmp_path, KN, 1, precision="bf16")  # most of the table is bf16, so that decides the tie
    found = made(tmp_path)
    assert row_of(found, "bn_stat2").cells[0].by_seed == {1: 10.0}
    assert "precision fp32 instead of bf16: seed 1" in notes_of(found, "bn_stat2")


def test_data_are_never_averaged(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_record(tmp_path, BN, seed)
    left_out = write_record(tmp_path, BN, 3, sha256="e" * 64)
    assert notes_of(made(tmp_path), "bn_stat2") == (
        f"left out, data with sha256 eeeeeeee instead of dddddddd: seed 3 ({left_out})"
    )


def test_rows_of_different_settings_are_marked(tmp_path: Path) -> None:
    for row in (BN, BN_LARGE, KN_OUTPUT):
        for seed in (1, 2):
            write_record(tmp_path, row, seed, sha256="e" * 64 if row is KN_OUTPUT else "d" * 64)
    for seed in (1, 2):
        write_record(tmp_path, KN, seed, precision="bf16")
    found = made(tmp_path)
    assert notes_of(found, "kn_stat2") == "unlike the other rows: precision bf16 instead of fp32"
    assert notes_of(found, "kn_output") == "unlike the other rows: data with sha256 eeeeeeee instead of dddddddd"
    by_row = {contrast.row: contrast for contrast in found.contrasts if contrast.column == "moving"}
    assert by_row["KN"].difference is not None and "bf16" in by_row["KN"].remark
    assert by_row["KN, belief=output (ours)"].difference is None
    assert "- KN, belief=output (ours): online not compared: data with sha256" in "\n".join(found.remarks)


def test_duplicate_seed(tmp_path: Path) -> None:
    """Two done records of one run cannot come from disk (below), but a table does not rely on that."""
    first = write_record(tmp_path, BN, 1, online=90.0)
    (record,) = report.records(tmp_path, NUMERICS).current
    copy = json.loads(json.dumps(record | {"id": "planted"}))
    copy["final"]["online"]["accuracy"] = 99.0
    found = table(card(), report.Records(tmp_path, NUMERICS, (record, copy), ()))
    assert row_of(found, "bn_stat2").cells[0].summary == statistics.Summary(90.0, None, 1)
    assert notes_of(found, "bn_stat2") == f"seed 1 has 2 done records; {first} is used, left out: planted"


def test_planted_records(tmp_path: Path) -> None:
    """A copy under another name, and a record whose config was edited, are found by their ids."""
    good = write_record(tmp_path, BN, 1)
    path = tmp_path / "records" / f"{write_record(tmp_path, KN, 2)}.json"
    whole = path.read_text()
    record = json.loads(whole)
    record["config"]["norm"]["options"]["gain"] = 0.1
    for planted, complaint in ((record, "its id is not that of its configuration"), (record["config"], "'id' is None")):
        path.write_text(json.dumps(planted))
        with pytest.raises(UserError, match=complaint):
            report.records(tmp_path, NUMERICS)
    record = json.loads(whole)
    for impossible in (100.5, -1.0):
        record["final"]["online"]["accuracy"] = impossible
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match=f"{path.name} .*'final.online' is {impossible}, expected percent"):
            report.records(tmp_path, NUMERICS)
    for part, key, value in (("final", "online", {"accuracy": 99.0}), ("data", "name", "mnist")):
        record = json.loads(whole)
        record[part][key] = value
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match=r"its curve ends with 91.0|its data are mnist, its configuration's digits"):
            report.records(tmp_path, NUMERICS)
    path.write_text(whole)
    write_record(tmp_path, BN, 1, name="planted")
    with pytest.raises(UserError, match=f"planted.json .* its id is not that of its configuration, {good}"):
        report.records(tmp_path, NUMERICS)


def test_stale_records_are_listed_only(tmp_path: Path) -> None:
    stale = write_record(tmp_path, BN, 1, numerics=NUMERICS - 1)
    elsewhere = write_record(tmp_path, config(stat_batch=64), 1, numerics=NUMERICS - 1)
    read = report.records(tmp_path, NUMERICS)
    assert not read.current and {record["id"] for record in read.stale} == {stale, elsewhere}
    found = made(tmp_path)
    assert found.empty
    assert [line for line in found.remarks if stale in line] and not [
        line for line in found.remarks if elsewhere in line
    ]


# Reading


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"id": "broken", "numer', "truncated"),
        ("", "truncated"),
        ("[1, 2]", "expected a JSON object"),
        ("\x80", "record"),
        ('{"id": "other", "numerics": 3, "status": "done", "config": {"seed": 1}}', "file's name"),
        ('{"id": "broken", "status": "done", "config": {"seed": 1}}', "numerics"),
        ('{"id": "broken", "numerics": 3, "status": "half", "config": {"seed": 1}}', "status"),
        ('{"id": "broken", "numerics": 3, "status": "done", "config": {}}', "seed"),
        ('{"id": "broken", "numerics": 3, "status": "done", "config": {"seed": 1}}', "final"),
        (
            '{"id": "broken", "numerics": 3, "status": "done", "config": {"seed": 1}, "final": {"moving": {}}}',
            "accuracy",
        ),
    ],
)
def test_corrupt_record(tmp_path: Path, content: str, complaint: str) -> None:
    write_record(tmp_path, BN, 1)
    path = tmp_path / "records" / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as raised:
        report.records(tmp_path, NUMERICS)
    message = str(raised.value)
    assert str(path) in message and complaint in message and "run it again" in message and "\n" not in message


def test_only_whole_records_are_read(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1, arrays=True)
    (tmp_path / "records" / ".half.json").write_text("{")
    (tmp_path / "records" / "notes.txt").write_text("{")
    (tmp_path / "other.json").write_text("{")
    assert len(report.records(tmp_path, NUMERICS).current) == 1


def test_results_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text("")
    with pytest.raises(UserError, match="results folder"):
        report.records(path, NUMERICS)


def test_load_gives_a_frame(tmp_path: Path) -> None:
    assert report.load(tmp_path).empty
    write_record(tmp_path, BN, 1, moving=90.0)
    write_record(tmp_path, KN, 2, failed="out of memory")
    frame = report.load(tmp_path).set_index("seed")
    assert frame.loc[1, "final.moving.accuracy"] == 90.0 and frame.loc[1, "curves.moving"] == [50.0, 90.0]
    assert frame.loc[2, "reason"] == "out of memory" and frame.loc[2, "norm.options.gain"] == 0.5
    assert list(frame["batch.stat_batch"]) == [2, 2]


# The whole


def test_no_write_permission(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write"):
        report.write(card(), report.records(tmp_path, NUMERICS), out)


def test_many_records_are_quick(tmp_path: Path) -> None:
    for seed in range(1, 126):
        for row in (BN, BN_LARGE, KN, KN_OUTPUT):
            write_record(tmp_path, row, seed)
    start = time.process_time()  # other processes on the machine do not count
    found = made(tmp_path)
    for renderer in (render.markdown, render.csv, render.latex, render.text):
        renderer(found)
    assert time.process_time() - start < 2
    assert [row.cells[0].summary.n for row in found.rows if row.cells[0].summary] == [125] * 4


def test_report_does_not_import_torch(tmp_path: Path) -> None:
    """Neither does `import kalmannorm.report` wait for pandas, matplotlib or scipy: the command line imports it."""
    full(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps([card(), figure_card()]))
    code = f"""
import json, sys
from pathlib import Path
from kalmannorm import report
heavy = {{"torch", "pandas", "matplotlib", "scipy", "numpy", "yaml"}} & set(sys.modules)
assert not heavy, heavy
root = Path({str(tmp_path)!r})
for card in json.loads((root / "card.json").read_text()):
    report.write(card, report.records(root, {NUMERICS}), root / "out")
report.load(root)
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
