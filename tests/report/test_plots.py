"""Pictures: what they draw, and what they must not suggest."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import quick
from records import config, table7, write_record

from kalmannorm import report
from kalmannorm.experiments import card as cards
from kalmannorm.report import command, figure_data, figures, frame, layer_figures, plots, style
from kalmannorm.report.cells import Cells, Group
from kalmannorm.report.plots import Line, Panel

LITE = Group("cifar10", "lite")
LOOK = style.Look(style.BLUE, "o", "-")


def drawn(results: Path, name: str, group: Group = LITE) -> figure_data.Figures:
    card = cards.read(name)
    return figures.DRAW[card.kind](card, group, Cells(report.load(results)))


def marks(axis: object) -> list[object]:
    return [line for line in axis.lines if line.get_marker() == "o"]  # type: ignore[attr-defined]


def test_a_line_of_runs_in_other_arithmetic_says_so(tmp_path: Path) -> None:
    for gain, precision in ((0.1, "fp32"), (0.5, "fp32"), (0.9, "bf16")):
        one = config("bkn", arch="resnet14", gain=gain)
        write_record(tmp_path, one | {"precision": precision}, 1, 60)
    (figure,) = drawn(tmp_path, "initial-gain").values()
    said = " ".join(str(figure.get_supxlabel()).split())
    assert "Arithmetic differs: KN 0.9 in bf16" in said and "; the others in fp32" in said


KINDS = ("table7", "table8", "figure4", "figure5", "gains", "layer-errors", "mixture", "stat-batch", "initial-gain")


@pytest.fixture(scope="module")
def of_many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with runs for every kind of card."""
    results = tmp_path_factory.mktemp("many")
    table7(results)
    for seed in (1, 2):
        for norm in ("bn", "bkn", "gn", "gkn"):
            write_record(results, config(norm, arch="resnet32"), seed, 50 + seed)
        for batch in (1, 2, 128):
            write_record(results, config("sn", batch, arch="resnet14"), seed, 50 + seed, mixture=(0.2, 0.3, 0.5))
            write_record(results, config("bkn", batch, arch="resnet14", gain=0.1), seed, 40 + seed)
            write_record(results, config("bn", batch, arch="resnet14"), seed, 40 + seed)
    return results


# Matplotlib takes a second for a picture: where tests are to be quick, one with lines and one with an image.
@pytest.mark.parametrize("name", quick(KINDS, "table7", "figure5"))
def test_every_kind_of_card_is_drawn(of_many: Path, name: str) -> None:
    found = drawn(of_many, name, Group("", "lite") if name == "table8" else LITE)
    assert found
    for figure in found.values():
        first = plots.encode(figure, ("svg",))["svg"]
        assert first.startswith(b"<?xml") and b"nan" not in first.lower()
        picture = plots.inline(first, name)
        assert picture.startswith("<svg") and "<metadata" not in picture and "<g id=" not in picture


def test_every_kind_of_card_has_figures(of_many: Path, tmp_path: Path) -> None:
    assert all(drawn(of_many, name, Group("", "lite") if name == "table8" else LITE) for name in KINDS)
    assert not drawn(tmp_path / "nothing", "figure4")


def test_files_are_reproducible(tmp_path: Path) -> None:
    table7(tmp_path)
    one, other = (plots.encode(drawn(tmp_path, "table7")[""], ("png", "pdf", "svg")) for _ in range(2))
    assert one == other and one["png"].startswith(b"\x89PNG") and one["pdf"].startswith(b"%PDF")


def test_a_pdf_stays_beside_the_same_png(tmp_path: Path) -> None:
    table7(tmp_path)
    figure = drawn(tmp_path, "table7")[""]
    picture, files = command._draw(tmp_path, "a", figure)
    assert picture.startswith("<svg") and sorted(files) == ["a.pdf", "a.png"]
    (tmp_path / "a.pdf").write_bytes(b"of another machine")
    assert sorted(command._draw(tmp_path, "a", figure)[1]) == ["a.pdf", "a.png"]
    assert (tmp_path / "a.pdf").read_bytes() == b"of another machine"
    (tmp_path / "a.png").write_bytes(b"another picture")
    command._draw(tmp_path, "a", figure)
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF") and (
        tmp_path / "a.png"
    ).read_bytes() != b"another picture"


def test_a_horizontal_line_has_no_marks() -> None:
    figure = plots.lines([[Panel("", [Line("GN", LOOK, [None], [[50.0, 60.0]])])]], "")
    (axis,) = figure.axes
    assert not marks(axis) and [line.get_ydata()[0] for line in axis.lines] == [55.0]


def test_branches_are_not_joined_and_a_single_seed_is_hollow() -> None:
    line = Line("KN", LOOK, [0.0, 1.0, 2.0], [[1.0, 3.0], [2.0], [5.0, 5.0]], apart=frozenset({2}))
    figure = plots.lines([[Panel("", [line], names=["a", "b", "c"])]], "")
    (axis,) = figure.axes
    joined = next(found for found in axis.lines if found.get_linestyle() == "-")
    assert np.isnan(joined.get_ydata()[2]) and list(joined.get_ydata()[[0, 1, 3]]) == [2.0, 2.0, 5.0]
    assert {found.get_markerfacecolor() for found in marks(axis)} == {style.BLUE, "white"}
    names = ["stem.bn", "blocks.0.b1.bn", "blocks.0.b3.0.bn", "blocks.0.b3.1.bn", "blocks.1.b1.bn"]
    panel = Panel("", [])
    layer_figures._add_layers(panel, "", LOOK, [({"norms": {"order": names}}, np.arange(5.0))])
    assert panel.lines[0].apart == {1, 2, 4} and panel.names == names  # b3.0 and b3.1 follow each other
    straight = [f"layers.{i}.bn{j}" for i in range(3) for j in (1, 2)]
    layer_figures._add_layers(panel, "", LOOK, [({"norms": {"order": straight}}, np.arange(6.0))])
    assert not panel.lines[1].apart


def test_a_mean_is_not_drawn_through_what_learned_and_what_did_not(tmp_path: Path) -> None:
    write_record(tmp_path, config("bn", arch="resnet32"), 1, 60.0, 60.0)
    write_record(tmp_path, config("bn", arch="resnet32"), 2, 10.0, 10.0)
    (figure,) = drawn(tmp_path, "figure4").values()
    last = sorted(
        float(line.get_ydata()[-1])
        for line in figure.axes[0].lines
        if len(line.get_ydata()) == 2 and line.get_linestyle() != "None"
    )
    assert last == [10.0, 60.0]
    write_record(tmp_path, config("bn", arch="resnet14"), 1, 60.0, 60.0)
    write_record(tmp_path, config("bn", arch="resnet14"), 2, 10.0, 10.0)
    (figure,) = drawn(tmp_path, "stat-batch").values()
    of = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "", None)]
    assert {(line.get_marker(), round(float(line.get_ydata()[0]), 2)) for line in of} == {("s", 60.0), ("x", 0.03)}


def test_lines_differ_without_colour_and_kn_is_not_gkn() -> None:
    for name in ("table7", "figure4", "stat-batch"):
        looks = style.looks([(row.name, str(row.runs["norm"])) for row in cards.read(name).rows])
        assert len({(look.marker, str(look.dashes)) for look in looks.values()}) == len(looks)
    assert style.OF_NORM["bkn"] != style.OF_NORM["gkn"] and style.tint(style.BLUE, 2) != style.SKY


def test_a_card_of_one_value_of_its_setting_is_left_out_of_the_whole_report(tmp_path: Path) -> None:
    for norm in ("bn", "bkn"):
        write_record(tmp_path, config(norm, arch="resnet14"), 1, 60.0)

    def compares(name: str) -> bool:
        return command._compares(cards.read(name), LITE, Cells(report.load(tmp_path)))

    assert not compares("stat-batch") and not compares("learning-rate")
    write_record(tmp_path, config("bn", 128, arch="resnet14"), 1, 60.0)
    assert compares("stat-batch")


def test_columns_of_a_table_differ_in_colour_and_marker(tmp_path: Path) -> None:
    card, final = cards.read("talk-ibn-transfer"), ("moving", "rgb_50", "red_50", "contrast")
    of = {**config("bn", 32, arch="resnet14"), "dataset": {"name": "cifar10_recoloured", "classes": 10}}
    path = tmp_path / "records" / f"{write_record(tmp_path, of, 1)}.json"
    record = json.loads(path.read_text())
    record["final"] = dict.fromkeys(final, record["final"]["moving"])
    path.write_text(json.dumps(record))
    cells = Cells(report.load(tmp_path))
    (group,) = command.groups(card, cells)
    (figure,) = figures.table(card, group, cells).values()
    handles = figure.legends[0].legend_handles
    assert len({handle.get_color() for handle in handles}) == len({handle.get_marker() for handle in handles}) == 4


def test_what_varies_in_a_setting_has_ticks_where_runs_are(tmp_path: Path) -> None:
    for batch in (2, 128):
        write_record(tmp_path, config("bn", batch, arch="resnet14"), 1, 60.0)
    (figure,) = drawn(tmp_path, "stat-batch").values()
    for axis in figure.axes:
        assert axis.get_xticks().tolist() == [2, 128]
        low, high = axis.get_xlim()
        assert 1 < low < 2 and 128 < high < 256


def test_quantities_of_a_table_have_axes_of_their_own(tmp_path: Path) -> None:
    of = config("bn", 2, arch="fcn_resnet14", dataset="camvid")
    of["batch"]["grad_batch"] = 8
    of["schedule"] = {**frame.resolved("camvid", "lite", "poly", "fcn_resnet14")["schedule"], "lr": 0.1}
    path = tmp_path / "records" / f"{write_record(tmp_path, of, 1)}.json"
    record = json.loads(path.read_text())
    record["final"] = {
        "moving": {"miou": 40.0, "pixel_accuracy": 80.0},
        "online": {"miou": 30.0, "pixel_accuracy": 70.0},
    }
    path.write_text(json.dumps(record))
    card, cells = cards.read("camvid"), Cells(report.load(tmp_path))
    (group,) = command.groups(card, cells)
    overlap, pixels = figures.table(card, group, cells)[""].axes
    assert [axis.get_xlabel() for axis in (overlap, pixels)] == ["mean IoU (%)", "pixel accuracy (%)"]
    means = [
        [line.get_xdata()[0] for line in axis.lines if line.get_marker() not in ("None", "|")]
        for axis in (overlap, pixels)
    ]
    assert means == [[40.0, 30.0], [80.0]]


def test_a_caption_is_as_wide_as_its_figure() -> None:
    panel = Panel("", [Line("", LOOK, [0.0, 1.0], [[1.0], [2.0]])])
    figure = plots.lines([[panel]], 3 * f"cifar10, budget lite. {figure_data.READING} ")
    (caption,) = (text for text in figure.texts if text.get_text().startswith("cifar10"))
    for dpi in (72, 150):  # of PDF and SVG, and of PNG, whose letters are narrower
        figure.set_dpi(dpi)
        with style.context():
            figure.draw_without_rendering()
        assert 0.83 * figure.bbox.width < caption.get_window_extent().x1 <= figure.bbox.width


def test_a_table_is_not_stretched_to_the_papers_values(tmp_path: Path) -> None:
    table7(tmp_path)
    (figure,) = drawn(tmp_path, "table7").values()
    low, high = figure.axes[0].get_xlim()
    assert low > 55 and high < 70  # the paper's are near 90


def test_the_first_steps_are_drawn_by_quantity_and_what_has_no_prior_says_so(tmp_path: Path) -> None:
    arrays = {name: np.full((3, 2), 2.0, np.float32) for name in layer_figures.WATCHED}
    start = Group("cifar10", "start")
    for norm in ("bn", "bkn"):
        none = {"offsets": np.full((3, 2), np.nan), "variance_ratios": np.full((3, 2), np.nan)} if norm == "bn" else {}
        identity = write_record(tmp_path, config(norm, arch="resnet32", budget="start"), 1, 10)
        np.savez(tmp_path / "records" / f"{identity}.npz", **{**arrays, **none})
    figure = drawn(tmp_path, "death", start)[""]
    axes = np.reshape([axis for axis in figure.axes if not axis.get_label()], (4, 2))
    assert [axis.get_title(loc="left") for axis in axes[0]] == ["BN", "KN\nmean 2, median 2"]
    assert [text.get_text() for axis in axes[:, 0] for text in axis.texts] == ["none", "none"]


def test_an_interval_beyond_the_picture_ends_in_arrows() -> None:
    entries = [
        plots.Entry(name, [plots.Point(1.0, style.GREY, "o", -half, half)]) for name, half in (("a", 2), ("b", 68))
    ]
    figure = plots.forest(entries, "", ["points"], {}, around=3.0)
    (axis,) = figure.axes
    arrows = [(line.get_marker(), line.get_xydata().tolist()) for line in axis.lines if line.get_marker() in ("<", ">")]
    assert arrows == [("<", [[-3.0, 1.0]]), (">", [[3.0, 1.0]])] and axis.get_xlim() == (-3.0, 3.0)


def test_a_row_whose_runs_were_lost_is_no_heading() -> None:
    entries = [
        plots.Entry("block"),
        plots.Entry("lost", note="0 of 1 learned"),
        plots.Entry("one", [plots.Point(1.0, style.GREY, "o")]),
    ]
    (axis,) = plots.forest(entries, "", ["points"], {}).axes
    assert [label.get_fontweight() for label in axis.get_yticklabels()] == ["bold", "normal", "normal"]


def test_the_conditioning_of_the_first_steps_is_drawn_step_by_step(tmp_path: Path) -> None:
    watched = config("bn", 128, arch="resnet14", budget="start")
    watched["budget"]["stop_after"], watched["schedule"]["lr"] = 300, [[400, 0.03]]
    identity = write_record(tmp_path, watched, 1, 10)
    arrays = {"condition_inputs": np.full((20, 2), [[4.0, 9.0]]), "condition_gradients": np.full((20, 2), 2.0)}
    np.savez(tmp_path / "records" / f"{identity}.npz", losses=np.arange(20.0), **arrays)
    figure = drawn(tmp_path, "talk-conditioning", Group("cifar10", "start"))[""]
    inputs, _, both, loss = (axis for axis in figure.axes if axis.get_visible() and axis.lines)
    for axis, value in ((inputs, 6.0), (both, 12.0)):  # geometric means over the two convolutions
        (line,) = axis.lines
        np.testing.assert_allclose(line.get_ydata(), value)
    np.testing.assert_allclose(loss.lines[0].get_ydata(), np.arange(4.5, 15))  # means over 10 steps


def test_what_ssn_chose_is_drawn_by_layer(tmp_path: Path) -> None:
    choices = {"a.bn1": {"chosen": ["in", "bn"], "at": [0.5, 0.8]}, "a.bn2": {"chosen": ["bn", "bn"], "at": [0.8, 0.8]}}
    file = tmp_path / "records" / f"{write_record(tmp_path, config('ssn', arch='resnet14'), 1, 60)}.json"
    record = json.loads(file.read_text())
    record["norms"] |= {"order": list(choices), "choices": choices}
    file.write_text(json.dumps(record))
    figure = drawn(tmp_path, "talk-ssn")["_choices"]
    means, variances = (axis.images[0].get_array()[3::8, 3::8].tolist() for axis in figure.axes)
    assert means == [[0], [2]] and variances == [[2], [2]]  # of IN, LN, BN; a row for each layer
