"""Figure 5 and the tables' pictures, drawn from records."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from report_fixtures import BINS, CHANNELS, LAYERS, NUMERICS, card, figure_card, full, write_record

from kalmannorm import report
from kalmannorm.errors import UserError
from kalmannorm.report import figure

BN, BN_LARGE, KN, KN_OUTPUT = (row["config"] for row in card()["rows"])


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
