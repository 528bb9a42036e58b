"""What is printed of a table: caption, text, Markdown, LaTeX, CSV."""

import csv
import dataclasses
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from report_fixtures import NUMERICS, card, config, full, made, row_of

from kalmannorm import report
from kalmannorm.report import caption, render
from kalmannorm.report.table import mark, table

BN, BN_LARGE, KN, KN_OUTPUT = (row["config"] for row in card()["rows"])


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


def test_batches_that_the_paper_does_not_print(tmp_path: Path) -> None:
    found = table(card(paper_batches=False), report.records(tmp_path, NUMERICS))
    assert "for batches that are not printed" in render.markdown(found)
    lines = list(csv.DictReader(io.StringIO(render.csv(found))))
    assert {(line["paper"] != "", line["paper_grad_batch"]) for line in lines} == {(True, ""), (False, "")}


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


@pytest.mark.parametrize(
    ("numbers", "said"),
    [((1,), "1"), ((1, 2), "1, 2"), ((1, 2, 3), "1 to 3"), ((1, 4, 5, 6, 9), "1, 4 to 6, 9"), ((), "")],
)
def test_numbers_in_a_row_are_said_as_a_span(numbers: tuple[int, ...], said: str) -> None:
    assert caption.spans(numbers) == said
