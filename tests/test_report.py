"""The report: records in, tables and figures out; nothing enters a cell unnoticed."""

import csv
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from report_fixtures import BINS, CHANNELS, LAYERS, NUMERICS, card, config, figure_card, write_record

from kalmannorm import report
from kalmannorm.errors import UserError
from kalmannorm.report import caption, figure, paper, render, statistics
from kalmannorm.report.table import Row, Table, mark, table

BN, BN_LARGE, KN, KN_OUTPUT = (row["config"] for row in card()["rows"])


def made(results: Path, **changes: object) -> Table:
    return table(card(**changes), report.records(results, NUMERICS))


def row_of(found: Table, key: str) -> Row:
    return next(row for row in found.rows if row.key == key)


def notes_of(found: Table, key: str) -> str:
    return "; ".join(row_of(found, key).cells[0].notes)


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


# Renderings


def full(results: Path) -> Table:
    """A table of three seeds per row of the paper's, one of ours."""
    for place, row in enumerate((BN, BN_LARGE, KN)):
        for seed in (1, 2, 3):
            value = 90.0 + 2 * place + 0.1 * seed * (1 + place)
            write_record(results, row, seed, moving=value, online=90.0 + (seed * 7 % 3 - 1) * (1 + place), arrays=True)
    write_record(results, KN_OUTPUT, 1, moving=95.0, arrays=True)
    return made(results)


def test_caption_says_which_variant_of_kn_a_row_is() -> None:
    """Beyond preset, predictor, gain and belief: what differs from every run before it was an option."""
    rows = [
        {"label": "KN", "config": config("bkn")},
        {"label": "talk", "config": config("bkn", transition="learned", noise=True)},
        {"label": "v1", "config": config("bkn", transition="learned", noise="shared")},
        {"label": "input", "config": config("bkn", input_belief="data")},
    ]
    plain, talk, v1, with_input = caption.estimators(rows).split(". ")[:4]
    assert plain == "KN: preset paper, predictor closed form, initial gain 0.5 (learned), belief=posterior"
    assert talk.endswith("belief=posterior, learned transition")
    assert v1.endswith("learned transition, one R for all layers")
    assert with_input.endswith("belief=posterior, the input's belief measured from the training set")


def test_caption_says_what_the_numbers_depend_on(tmp_path: Path) -> None:
    said = full(tmp_path).caption
    for part in (
        "digits (1,797 of 1,797 exact)",
        "360 test images",
        "Budget lite: 4 epochs (scaled down from 400), all 1,437 training images, 16x16 pixels",
        "inception_cifar, width 1 (903,018 to 904,618 parameters)",
        "KN: preset paper, predictor closed form, initial gain 0.5 (learned), belief=posterior",
        "KN, belief=output (ours): preset paper",
        "The initial gain is ours",
        "Precision: fp32",
        "last epoch (never the best)",
        "95 % Student-t interval",
    ):
        assert part in said
    subset = config() | {"budget": {**BN["budget"], "subset": 10_000}}
    assert "10,000 training images (a class-balanced subset)" in caption.what_was_trained([subset], [])


def test_verdicts_are_said(tmp_path: Path) -> None:
    said = "\n".join(full(tmp_path).remarks)
    assert "Differences to BN (128, 2)" in said
    assert "moving +2.20 ± 0.25 (3 pairs): larger than its interval" in said
    assert "- BN (128, 128): online +0.00 ± 2.48 (3 pairs): a tie, the interval contains 0; moving" in said
    assert "- KN, belief=output (ours): online +1.00 (1 pair): open, no interval" in said


def test_text_is_aligned(tmp_path: Path) -> None:
    lines = render.text(full(tmp_path)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("normalizer"))
    at = lines[start].index("moving (paper)")
    assert [line[at - 2 : at].strip() for line in lines[start + 2 : start + 6]] == [""] * 4
    assert [line[at : at + 4].strip() for line in lines[start + 2 : start + 6]] == ["89.4", "92.1", "90.9", "–"]
    assert max(map(len, lines)) <= 120


def test_markdown_columns_and_escapes(tmp_path: Path) -> None:
    found = full(tmp_path)
    rows = [line for line in render.markdown(found).splitlines() if line.startswith("|")]
    assert len(rows) == 6 and {row.count("|") for row in rows} == {len(found.header) + 1}
    assert "belief=output (ours)" in rows[-1]
    odd = dataclasses.replace(found, title="a|b *c* _d_ <e> &f")
    assert r"a\|b \*c\* \_d\_ &lt;e> &amp;f" in render.markdown(odd)


def test_latex_escapes(tmp_path: Path) -> None:
    assert render.escape_latex(r"50 % of a_b & {c} #1 $2 ~ ^ \x <y> ± −") == (
        r"50 \% of a\_b \& \{c\} \#1 \$2 \textasciitilde{} \textasciicircum{} \textbackslash{}x "
        r"\textless{}y\textgreater{} $\pm$ $-$"
    )
    found = full(tmp_path)
    written = render.latex(dataclasses.replace(found, title="100 % & more_or_less", footnotes=("#1",)))
    assert r"100 \% \& more\_or\_less" in written and r"\textsuperscript{a} \#1" in written
    assert written.count("{") == written.count("}")
    for rule in ("toprule", "midrule", "bottomrule"):
        assert written.count(rf"\{rule}") == 1
    body = written.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert [line.count(" & ") for line in body.strip().splitlines()] == [len(found.header) - 1] * 4
    assert written.isascii()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_and_fits_the_page(tmp_path: Path) -> None:
    found = full(tmp_path)
    rows = tuple(dataclasses.replace(row, label=f"{row.label} " * 9) for row in found.rows)
    wide = dataclasses.replace(found, title="100 % & more_or_less", rows=rows)
    text = "".join(map(render.latex, (found, wide)))
    packages = r"\usepackage{booktabs,graphicx}"
    (tmp_path / "all.tex").write_text(rf"\documentclass{{article}}{packages}\begin{{document}}{text}\end{{document}}")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "all.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "Output written" in done.stdout and "Overfull" not in done.stdout


def test_csv_is_long(tmp_path: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(render.csv(full(tmp_path)))))
    cells = [line for line in lines if line["kind"] == "accuracy"]
    assert len(cells) == 8 and len(lines) == 8 + 6
    kn = next(line for line in cells if (line["row"], line["column"]) == ("kn_stat2", "moving"))
    assert (kn["paper"], kn["n"], kn["seeds"], kn["grad_batch"], kn["stat_batch"]) == ("90.9", "3", "1 2 3", "128", "2")
    assert len(kn["records"].split()) == 3 and float(kn["half_width"]) > 0
    ours = next(line for line in cells if (line["row"], line["column"]) == ("kn_output", "moving"))
    assert (ours["paper"], ours["half_width"], ours["mean"]) == ("", "", "95")


def test_paper_value_of_other_batches_is_marked(tmp_path: Path) -> None:
    changed = card()
    changed["rows"][0] |= {"paper_batch": [64, 2]}
    changed["rows"][1] |= {"ours": True}
    found = table(changed, report.records(tmp_path, NUMERICS))
    written = render.markdown(found)
    assert "90.0 (64, 2)" in written and "where that is not the row's" in written
    assert row_of(found, "bn_stat128").cells[0].paper is None  # a row of ours has no paper's value, whatever its key


def test_normalizer_without_batch_statistics(tmp_path: Path) -> None:
    changed = card()
    changed["rows"][0] |= {"label": "GN", "config": config("gn", stat_batch=None), "paper_batch": [128, 2]}
    written = render.markdown(table(changed, report.records(tmp_path, NUMERICS)))
    assert "| GN | (128, –) | not run | 90.0 (128, 2) |" in written


def test_card_without_paper_has_no_paper_columns(tmp_path: Path) -> None:
    found = made(tmp_path, paper=None)
    assert found.header == ("normalizer", "(grad, stat)", "online", "moving", "n") and not found.paper_note


def test_footnote_marks() -> None:
    assert [mark(i) for i in (0, 25, 26, 27, 701, 702)] == ["a", "z", "aa", "ab", "zz", "aaa"]


# Figures


def test_figure5(tmp_path: Path) -> None:
    full(tmp_path)
    drawn = figure.figure5(figure_card(), report.records(tmp_path, NUMERICS))
    panels = [axis for axis in drawn.axes if axis.images]
    assert len(panels) == 6
    titles = [axis.get_title(loc="left").splitlines()[0] for axis in panels]
    assert titles == ["BN: measurement", "KN: posterior", "KN: measurement"] * 2
    assert {axis.images[0].get_array().shape for axis in panels} == {(CHANNELS, BINS)}
    for row in (panels[:3], panels[3:]):
        assert len({axis.images[0].get_clim() for axis in row}) == 1  # one colour scale per row
    said = drawn.get_supxlabel().replace("\n", " ")
    assert "seed 1" in said and "719 batches of 2, 30 a bin" in said
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["block2.b5", "block3.b0"]


def test_figure5_layers(tmp_path: Path) -> None:
    full(tmp_path)
    drawn = figure.figure5_layers(figure_card(), report.records(tmp_path, NUMERICS))
    (axis,) = drawn.axes
    assert [line.get_label() for line in axis.lines] == [
        "BN: measurement (n = 3)",
        "KN: measurement (n = 3)",
        "KN: posterior (n = 3)",
    ]
    assert {len(line.get_xdata()) for line in axis.lines} == {LAYERS}
    assert len(axis.collections) == 3  # a band each
    assert "Band" in drawn.get_supxlabel()


def test_accuracy_bars(tmp_path: Path) -> None:
    found = full(tmp_path)
    (axis,) = figure.accuracy_bars(found).axes
    assert [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()] == [row.name for row in found.rows]
    assert not [line for line in axis.lines if line.get_markerfacecolor() == "white"]  # digits are not the paper's data
    same = dataclasses.replace(found, same_data_as_paper=True)
    (axis,) = figure.accuracy_bars(same).axes
    assert len([line for line in axis.lines if line.get_markerfacecolor() == "white"]) == 6
    assert {text.get_fontsize() for text in axis.get_xticklabels() + axis.get_yticklabels()} == {8.0}


def test_files_are_reproducible(tmp_path: Path) -> None:
    full(tmp_path)
    found = report.records(tmp_path, NUMERICS)
    first = {path.name: path.read_bytes() for path in write_all(found, tmp_path / "a")}
    second = {path.name: path.read_bytes() for path in write_all(found, tmp_path / "b")}
    assert first == second
    assert set(first) == {f"table7_digits_lite.{kind}" for kind in ("md", "csv", "tex", "png", "pdf")} | {
        f"{name}_digits_lite.{kind}" for name in ("figure5", "figure5_layers") for kind in ("png", "pdf")
    }
    assert all(content.startswith(b"\x89PNG") for name, content in first.items() if name.endswith("png"))
    assert not list(tmp_path.glob("?/.*"))  # no temporary file stays


def write_all(found: report.Records, out: Path) -> list[Path]:
    return [*report.write(card(), found, out), *report.write(figure_card(), found, out)]


def test_figure_without_runs(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1, arrays=True)
    write_record(tmp_path, KN, 1, failed="loss is nan")
    with pytest.raises(UserError, match=r"figure5 needs a finished run of KN \(digits.*make figure5") as raised:
        report.write(figure_card(), report.records(tmp_path, NUMERICS), tmp_path / "out")
    assert "all 1 failed" in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"PK not a zip", "shape", "empty"])
def test_broken_arrays(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "records" / f"{write_record(tmp_path, BN, 1)}.npz"
    write_record(tmp_path, KN, 1, arrays=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "shape":
        np.savez(path, gap_measured=np.zeros((3, 2)), moving_var=np.zeros(4), layer_gap_measured=np.zeros(2))
    elif content == "empty":
        np.savez(path)
    with pytest.raises(UserError, match=path.name):
        figure.figure5(figure_card(), report.records(tmp_path, NUMERICS))


def test_dead_channels_are_drawn(tmp_path: Path) -> None:
    full(tmp_path)
    for path in (tmp_path / "records").glob("*.npz"):
        with np.load(path) as stored:
            arrays = dict(stored)
        arrays["moving_var"][0] = 0
        arrays["gap_measured"][0] = [0, 1] * (BINS // 2)
        arrays["gap_measured"][1 : CHANNELS // 2] = 0  # a logarithmic scale has no place for them
        np.savez(path, **arrays)
    drawn = figure.figure5(figure_card(), report.records(tmp_path, NUMERICS))
    assert figure.encode(drawn, "png")
    assert {axis.images[0].get_clim()[0] > 0 for axis in drawn.axes if axis.images} == {True}
    titles = "".join(axis.get_title(loc="left") for axis in drawn.axes)
    assert "nan" not in titles and "inf" not in titles


def test_seed_of_the_card_is_drawn(tmp_path: Path) -> None:
    full(tmp_path)
    drawn = figure.figure5(figure_card(seed=3), report.records(tmp_path, NUMERICS))
    assert "seed 3" in drawn.get_supxlabel()


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
    start = time.perf_counter()
    found = made(tmp_path)
    for renderer in (render.markdown, render.csv, render.latex, render.text):
        renderer(found)
    assert time.perf_counter() - start < 2
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


@pytest.mark.parametrize(
    ("numbers", "said"),
    [((1,), "1"), ((1, 2), "1, 2"), ((1, 2, 3), "1 to 3"), ((1, 4, 5, 6, 9), "1, 4 to 6, 9"), ((), "")],
)
def test_numbers_in_a_row_are_said_as_a_span(numbers: tuple[int, ...], said: str) -> None:
    assert caption.spans(numbers) == said
