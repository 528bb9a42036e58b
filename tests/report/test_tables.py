"""Tables: what stands in a cell, in every format; whose value is the paper's."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from records import config, table7, write_record

from kalmannorm import report
from kalmannorm.experiments import card as cards
from kalmannorm.report import paper, tables
from kalmannorm.report import sheet as sheets
from kalmannorm.report.cells import Cells, Group
from kalmannorm.report.command import groups
from kalmannorm.report.sheet import Sheet

RESULTS = Path(__file__).resolve().parents[2] / "results"


def sheet(results: Path, name: str = "table7", dataset: str = "cifar10") -> Sheet:
    card = cards.read(name)
    return tables.table(card, Group("" if card.fixes_dataset else dataset, "lite"), Cells(report.load(results)))


def row(found: Sheet, label: str) -> dict[str, str]:
    place = [of for _, of in found.index].index(label)
    return dict(zip(found.header, [one.text for one in found.rows[place]], strict=True))


def test_few_seeds_are_shown_themselves(tmp_path: Path) -> None:
    table7(tmp_path, seeds=2)
    found = row(sheet(tmp_path), "KN, stat 2")
    assert found["moving"] == "62.15 (62.10, 62.20)" and found["moving: paper"] == "90.9"
    assert found["moving: Δ"] == "+2.00" and "211" not in found["moving"]


def test_rows_without_runs_are_a_line_below_unless_the_paper_prints_them(tmp_path: Path) -> None:
    table7(tmp_path)
    found = sheet(tmp_path)
    assert "KN, stat 2, belief=output (ours)" not in [label for _, label in found.index]
    assert "Not run: KN, stat 2, belief=output (ours)" in found.about[0] and "belief=output" in sheets.csv(found)
    eight = sheet(tmp_path, "table8")
    assert [label for block, label in eight.index if block == "ResNet-110"] == ["GN", "BN, stat 128", "KN, stat 128"]
    assert "ResNet-32, pre-activation: GN (ours); BN, stat 2 (ours)" in eight.about[0]


def test_many_seeds_have_their_interval(tmp_path: Path) -> None:
    table7(tmp_path, seeds=5)
    assert row(sheet(tmp_path), "BN, stat 2")["moving"] == "60.30 ± 0.20 (n = 5)"


def test_what_learned_and_what_did_not(tmp_path: Path) -> None:
    table7(tmp_path, seeds=2)
    write_record(tmp_path, config("bkn"), 3, 10.0, 10.0)
    write_record(tmp_path, config("bkn", belief="output"), 1, failed="the loss is not finite")
    found = sheet(tmp_path)
    assert row(found, "KN, stat 2")["moving"] == "2 of 3 learned: 62.15 (62.10, 62.20)"
    assert row(found, "KN, stat 2, belief=output (ours)")["moving"] == "failed"
    assert found.notes == ("seed 3 at chance under any statistics", "seed 1 failed: the loss is not finite")
    assert not any(place.best and "learned" in place.text for of in found.rows for place in of)


def test_the_papers_value_is_of_the_papers_data(tmp_path: Path) -> None:
    """Table 7 on CIFAR-100 once showed CIFAR-10's values."""
    for dataset in ("cifar10", "cifar100"):
        write_record(tmp_path, config("bn", dataset=dataset), 1, 50.0)
    ours, other = sheet(tmp_path), sheet(tmp_path, dataset="cifar100")
    assert "online: paper" in ours.header and not any("paper" in name for name in other.header)
    for written in (
        sheets.markdown(other),
        sheets.latex(other),
        sheets.csv(other),
        sheets.text(other),
        sheets.page_html(other),
    ):
        assert "90.9" not in written and "89.4" not in written
    write_record(tmp_path, config("wn"), 1, 50.0)
    eight = sheet(tmp_path, "table8")
    assert (
        row(eight, "BN, stat 2")["CIFAR-100: paper"] == "63.8"
        and row(eight, "WN")["CIFAR-10: paper"] == "87.83 (128, 2)"
    )
    assert not any("SVHN" in name for name in eight.header) and any("SVHN" in said for said in eight.about)


def test_paper_values() -> None:
    assert paper.printed("neurips.table7.kn_stat2.online") == 90.9
    assert paper.printed("neurips.table1.inception_v2_iterations_to_73.1.kn") == 100_000  # a key with a dot
    assert paper.printed("neurips.table1.inception_v2.gn") is None and paper.printed("neurips.table77") is None


def test_steps_to_an_accuracy(tmp_path: Path) -> None:
    of = {**config("bn", 32, dataset="imagenet", arch="inception_v2")}
    of = {**of, "schedule": {"name": "imagenet_linear"}, "batch": {"grad_batch": 256, "stat_batch": 32}}
    curves = {"epoch": [1, 2], "step": [100, 200], "moving": [70.0, 76.2], "online": [70.0, 76.2]}
    write_record(tmp_path, of, 1, curves=curves)
    card = cards.read("table1")
    cells = Cells(report.load(tmp_path))
    (group,) = groups(card, cells)
    found = row(tables.table(card, group, cells), "BN")
    assert found["Inception-v2"] == "76.20" and found["Inception-v2, steps to 73.1 %"] == "150"


def test_every_format_says_the_same(tmp_path: Path) -> None:
    table7(tmp_path)
    found = dataclasses.replace(sheet(tmp_path), title="Table 7: 100 % & more_or_less", notes=("#1 <b>|x|",))
    markdown, latex, text = sheets.markdown(found), sheets.latex(found), sheets.text(found)
    for written in (markdown, latex, text, sheets.page_html(found)):
        assert "62.20" in written and "90.9" in written
    assert r"more\_or\_less" in markdown and r"\|x\|" in markdown and "&lt;b>" in markdown
    assert r"\caption{100 \% \& more\_or\_less.}" in latex and "Table 7" not in latex  # one number, LaTeX's
    assert r"\textbf{66.20" in latex and "make " not in latex and "kalmannorm" not in latex and latex.isascii()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count(" |") for line in lines}) == 1
    assert 'href="#runs=' in sheets.page_html(found) and "<script" not in sheets.page_html(found)


def test_batches_are_columns_and_networks_blocks_with_a_best_each(tmp_path: Path) -> None:
    for arch, level in (("resnet14", 70.0), ("resnet32", 80.0)):
        for number, (norm, preset) in enumerate((("bn", "paper"), ("bkn", "paper"), ("bkn", "robust"))):
            write_record(tmp_path, config(norm, 2, arch=arch, preset=preset), 1, level + number)
    write_record(tmp_path, config("bn", 128, arch="resnet14"), 1, 75.0)
    card, group, cells = cards.read("variants"), Group("cifar10", "lite"), Cells(report.load(tmp_path))
    found = tables.table(tables.by_batch(card, group, cells), group, cells)
    assert found.header == ("moving, stat 2", "moving, stat 128", "online, stat 2", "online, stat 128")
    shown = {place: row[0] for place, row in zip(found.index, found.rows, strict=True)}
    assert list(shown) == [(a, n) for a in ("resnet14", "resnet32") for n in ("BN", "KN", "KN, preset robust (ours)")]
    assert [place.text for place in shown.values()] == ["70.00", "71.00", "72.00", "80.00", "81.00", "82.00"]
    assert [place.best for place in shown.values()] == [False, False, True] * 2
    assert found.rows[0][1].text == "75.00" and not found.rows[0][1].best


def test_blocks_are_ruled(tmp_path: Path) -> None:
    for arch in ("inception_cifar", "resnet32", "resnet32_preact"):
        write_record(tmp_path, config("bn", arch=arch), 1, 50.0)
    latex = sheets.latex(sheet(tmp_path, "table8"))
    assert latex.count(r"\cline") + latex.count(r"\cmidrule") >= 3 and "multirow" not in latex


def test_footnote_marks() -> None:
    assert [sheets.letter(i) for i in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_and_fits_the_page(tmp_path: Path) -> None:
    cells = Cells(report.load(RESULTS))
    found = [
        tables.table(c, g, cells) for c in map(cards.read, cards.names()) if c.kind == "table" for g in groups(c, cells)
    ]
    table7(tmp_path / "made")
    found += [sheet(tmp_path / "made")]
    narrow = found[-1]
    rows, index = tuple(row * 3 for row in narrow.rows[:9]), narrow.index[:9]
    wide = dataclasses.replace(narrow, stem="wide", header=narrow.header * 3, rows=rows, index=index)
    assert "sideways" in sheets.latex(wide) and "sideways" not in sheets.latex(narrow)
    found += [wide]
    text = "\n\\clearpage\n".join(map(sheets.latex, found))
    packages = r"\usepackage{booktabs,graphicx,rotating}"
    (tmp_path / "all.tex").write_text(rf"\documentclass{{article}}{packages}\begin{{document}}{text}\end{{document}}")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "all.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "Output written" in done.stdout and "Overfull" not in done.stdout and "too large" not in done.stdout


def test_the_lowest_loss_is_the_best(tmp_path: Path) -> None:
    for norm, batch, loss in (("pn", 256, 2.0), ("bn", 8, 1.5)):
        of = config(norm, batch, arch="resnet14", dataset="cifar10_few")
        of["batch"]["grad_batch"] = 256
        file = tmp_path / "records" / f"{write_record(tmp_path, of, 1, 50.0)}.json"
        record = json.loads(file.read_text())
        record["final"]["precise"]["loss"] = loss
        file.write_text(json.dumps(record))
    found = sheet(tmp_path, "talk-pn", "cifar10_few")
    loss = found.header.index("test loss, precise")
    assert [line[loss].best for line in found.rows] == [False, True] and "cross-entropy" in found.caption
