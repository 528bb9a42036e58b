"""Pictures of curves, settings and layers: what they draw, and what they say of the runs that they do not."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixtures import LAYERS, NUMERICS, card, config, write_record

from kalmannorm import report
from kalmannorm.errors import UserError
from kalmannorm.experiments import cards
from kalmannorm.report import accuracy, figure, layers, style

ROOT = Path(__file__).parents[1]
BN, BN_LARGE, KN, KN_OUTPUT = (row["config"] for row in card()["rows"])


def card_of(kind: str, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    made = card(kind=kind, name=kind, title=f"A picture of {kind}", columns=["moving", "online"])
    return made | ({"rows": rows} if rows else {})


def row(label: str, of: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"key": json.dumps([label, of["norm"], of["batch"], of["arch"]]), "label": label, "config": of} | more


def found(results: Path) -> report.Records:
    return report.records(results, NUMERICS)


def text(drawn: Any) -> str:
    return drawn.get_supxlabel().replace("\n", " ")


def legend(drawn: Any) -> list[str]:
    return [entry.get_text() for entry in drawn.legends[0].get_texts()]


# Curves


def test_curves_are_means_over_seeds_with_bands(tmp_path: Path) -> None:
    for seed, moving in ((1, 90.0), (2, 92.0)):
        write_record(tmp_path, BN, seed, moving=moving)
    write_record(tmp_path, KN, 1, online=95.0)
    drawn = accuracy.curves(card_of("curves"), found(tmp_path))
    assert [axis.get_title(loc="left") for axis in drawn.axes] == [
        "inception_cifar: moving statistics",
        "inception_cifar: online statistics",
    ]
    bn, kn = drawn.axes[0].lines
    assert list(bn.get_xdata()) == [11, 22] and list(bn.get_ydata()) == [50.0, 91.0]
    assert list(drawn.axes[1].lines[1].get_ydata()) == [50.0, 95.0]
    assert len(drawn.axes[0].collections) == 1  # one seed has no band
    assert legend(drawn) == ["BN (128, 2) (n = 2)", "KN (n = 1)"]
    assert bn.get_color() != kn.get_color() and bn.get_marker() != kn.get_marker()  # told apart in print


def test_what_is_missing_is_said_with_the_command(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1)
    write_record(tmp_path, KN, 1, failed="out of memory")
    said = text(accuracy.curves(card_of("curves"), found(tmp_path)))
    assert "Not run: BN (128, 128); KN, belief=output (ours). To run what is missing: make curves DATASET=" in said
    assert "KN: 1 of 1 run failed: out of memory (seed 1)" in said


def test_nothing_to_draw(tmp_path: Path) -> None:
    write_record(tmp_path, KN, 1, failed="out of memory")
    for kind in ("curves", "stat_batch", "initial_gain", "gains", "layer_errors", "mixture"):
        with pytest.raises(UserError, match=f"{kind} has nothing to draw.*all of them failed.*make {kind} DATASET"):
            report.write(card_of(kind), found(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_mixed_unnoticed(tmp_path: Path) -> None:
    """Another budget, precision or data set never enters a line; what was left out is said."""
    for seed in (1, 2):
        write_record(tmp_path, BN, seed, moving=90.0)
        write_record(tmp_path, KN, seed, precision="bf16")
    other_data = write_record(tmp_path, BN, 3, moving=10.0, sha256="e" * 64)
    write_record(tmp_path, BN | {"budget": {**BN["budget"], "epochs": 5}}, 4, moving=10.0)
    drawn = accuracy.curves(card_of("curves"), found(tmp_path))
    assert drawn.axes[0].lines[0].get_ydata()[-1] == 90.0
    said = text(drawn)
    assert f"left out, data with sha256 eeeeeeee instead of dddddddd: seed 3 ({other_data})" in said
    assert "KN: unlike the other rows: precision bf16 instead of fp32" in said


def test_curves_of_different_length(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1)
    path = tmp_path / "records" / f"{write_record(tmp_path, BN, 2)}.json"
    record = json.loads(path.read_text())
    record["curves"]["moving"].insert(0, 99.0)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"moving curves.*{path.stem}.*not of one length"):
        accuracy.curves(card_of("curves"), found(tmp_path))


# Against a setting


def stat_batch_rows() -> list[dict[str, Any]]:
    rows = [row("BN", config("bn", stat_batch)) for stat_batch in (1, 2, 128)]
    return [*rows, *(row("KN", config("bkn", s)) for s in (1, 2, 128)), row("GN", config("gn", None))]


def test_accuracy_against_the_statistics_batch(tmp_path: Path) -> None:
    rows = stat_batch_rows()
    for i, of in enumerate(rows):
        for seed in (1, 2):
            if i != 4:
                write_record(tmp_path, of["config"], seed, moving=80.0 + 2 * i + seed)
    drawn = accuracy.against(card_of("stat_batch", rows), found(tmp_path), accuracy.SETTINGS["stat_batch"])
    axis = drawn.axes[0]
    assert legend(drawn) == ["BN (n = 2)", "KN (n = 2)", "GN (n = 2)"]
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in axis.lines if line.get_linestyle() != "None"}
    assert lines[1, 2, 128] == [81.5, 83.5, 85.5] and lines[1, 128] == [87.5, 91.5] and lines[0, 1] == [93.5, 93.5]
    assert axis.get_xscale() == "log" and [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2", "128"]
    assert "Not run: KN (128, 2)." in text(drawn) and "Horizontal" in text(drawn)


def test_failed_runs_break_the_line(tmp_path: Path) -> None:
    """A line over a place where every run failed would say that they went well; a cross says that they failed."""
    rows = [row("KN", config("bkn", batch)) for batch in (1, 2, 4, 128)] + [row("GN", config("gn", None))]
    for of in rows:
        batch = of["config"]["batch"]["stat_batch"]
        write_record(tmp_path, of["config"], 1, failed="loss is nan" if batch in (2, None) else None)
        write_record(tmp_path, of["config"], 2, failed="loss is nan" if batch in (2, 4, None) else None)
    drawn = accuracy.against(card_of("stat_batch", rows), found(tmp_path), accuracy.SETTINGS["stat_batch"])
    lines = [line for line in drawn.axes[0].lines if line.get_marker() not in ("_", "x")]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 4, 128]]
    assert np.isnan(lines[0].get_ydata()).tolist() == [False, True, False, False]
    crosses = [line for line in drawn.axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[2], [4], [0]]
    assert crosses[0].get_ydata() == crosses[1].get_ydata() != crosses[2].get_ydata()
    assert legend(drawn) == ["KN (n = 1 to 2)", "GN (failed)"] and "Crosses below" in text(drawn)


def test_a_run_without_an_accuracy_is_no_point(tmp_path: Path) -> None:
    """A detector's record, or one whose accuracy is not a number."""
    rows = [row("BN", config("bn", 2)), row("KN", config("bkn", 2)), row("GN", config("gn", None))]
    for of, values in zip(rows, ({"accuracy": 80.0}, {"box_ap": 20.0}, {"accuracy": math.nan}), strict=True):
        path = tmp_path / "records" / f"{write_record(tmp_path, of['config'], 1)}.json"
        other = {"final": {"moving": values, "online": values}, "curves": {}}
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
    drawn = accuracy.against(card_of("stat_batch", rows), found(tmp_path), accuracy.SETTINGS["stat_batch"])
    assert [list(line.get_ydata()) for line in drawn.axes[0].lines] == [[80.0]]


def test_accuracy_against_the_initial_gain(tmp_path: Path) -> None:
    preact = config("bkn", gain=0.5) | {"arch": {"name": "resnet14_preact"}}
    rows = [
        row("BN", config("bn", 2)),
        *(row("KN", config("bkn", 2, gain=gain)) for gain in (0.03, 0.5)),
        row("KN, fixed", config("bkn", 2, gain=0.5, learn_gain=False)),
        row("KN", config("bkn", 128, gain=0.5)),
        row("KN", preact),
    ]
    for of in rows[:-1]:
        write_record(tmp_path, of["config"], 1, moving=80.0)
    drawn = accuracy.against(card_of("initial_gain", rows), found(tmp_path), accuracy.SETTINGS["initial_gain"])
    titles = [axis.get_title(loc="left") for axis in drawn.axes]
    assert titles[::2] == [f"inception_cifar, stat_batch {b}: moving statistics" for b in (2, 128)]
    assert drawn.axes[0].get_xscale() == "logit"
    assert "Not run" in text(drawn) and rows[-1]["key"] in text(drawn)  # the name is another row's too
    assert figure.encode(drawn, "png").startswith(b"\x89PNG")


# Layers


def test_gains_with_their_start(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_record(tmp_path, KN, seed)
    write_record(tmp_path, KN_OUTPUT, 1)
    drawn = layers.gains(card_of("gains"), found(tmp_path))
    (axis,) = drawn.axes
    learned = [line for line in axis.lines if len(line.get_xdata()) == LAYERS]
    np.testing.assert_allclose(learned[0].get_ydata(), 0.5 + 0.01 * np.arange(LAYERS))
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[0], [0]]  # the first layer has no prior
    assert [0.5, 0.5] in [list(line.get_ydata()) for line in axis.lines if list(line.get_xdata()) == [0, 1]]
    assert "KN (n = 2)" in [entry.get_text() for entry in axis.get_legend().get_texts()]


def test_layer_errors(tmp_path: Path) -> None:
    for of in (BN, KN):
        for seed in (1, 2):
            write_record(tmp_path, of, seed, errors=True)
    write_record(tmp_path, KN, 3, arrays=True)
    write_record(tmp_path, KN_OUTPUT, 1, arrays=True)
    drawn = layers.errors(card_of("layer_errors"), found(tmp_path))
    assert len(drawn.axes) == 6
    assert legend(drawn) == [
        "BN (128, 2): measurement (n = 2)",
        "KN: measurement (n = 2)",
        "KN: prior (n = 2)",
        "KN: posterior (n = 2)",
    ]
    whole, bias, spread = (axis.lines[2].get_ydata()[1:] for axis in drawn.axes[:3])
    assert np.isnan(drawn.axes[0].lines[2].get_ydata()[0])
    assert (whole >= bias).all() and (whole >= spread).all() and (bias > spread).all()
    for axis in drawn.axes:  # no line leaves its panel below
        lowest = min(float(np.nanmin(line.get_ydata())) for line in axis.lines)
        assert axis.get_ylim()[0] <= max(layers.FLOOR, lowest)
    assert "Not recorded: KN, belief=output (ours); KN, seed 3." in text(drawn)


def test_layer_errors_not_recorded(tmp_path: Path) -> None:
    identity = write_record(tmp_path, KN, 1, arrays=True)
    with pytest.raises(UserError, match="not recorded by any of its runs"):
        layers.errors(card_of("layer_errors"), found(tmp_path))
    path = tmp_path / "records" / f"{identity}.npz"
    with np.load(path) as stored:
        np.savez(path, **dict(stored), layer_error_mean=np.zeros((2, LAYERS)))
    with pytest.raises(UserError, match="layer_error_mean has shape"):
        layers.errors(card_of("layer_errors"), found(tmp_path))


def test_mixture(tmp_path: Path) -> None:
    rows = [row("SN", config("sn", stat_batch)) for stat_batch in (1, 8)]
    for of in rows:
        path = tmp_path / "records" / f"{write_record(tmp_path, of['config'], 1)}.json"
        record = json.loads(path.read_text())
        ln = 0.6 if of["config"]["batch"]["stat_batch"] == 1 else 0.2
        weights = {"mean": [0.1, ln, 0.9 - ln], "var": [0.3, 0.3, 0.4]}
        record["norms"]["mixture"] = {"a.bn": weights, "b.bn": weights}
        path.write_text(json.dumps(record))
    drawn = layers.mixture(card_of("mixture", rows), found(tmp_path))
    by_name = {line.get_label(): list(line.get_ydata()) for line in drawn.axes[0].lines}
    assert by_name == {"IN": [0.1, 0.1], "LN": [0.6, 0.2], "BN": pytest.approx([0.3, 0.7])}
    write_record(tmp_path, BN, 1)
    with pytest.raises(UserError, match=r"norms\.mixture not recorded"):
        layers.mixture(card_of("mixture", [row("BN", BN)]), found(tmp_path))


# The whole


def test_lines_differ_without_colour() -> None:
    looks = style.looks([(str(i), config("bkn" if i % 2 else "bn")) for i in range(12)])
    assert len({look.marker for look in looks.values()}) == 12
    assert len({(look.colour, look.dashes) for look in looks.values()}) == 12


def test_a_variant_of_kn_has_not_the_colour_of_gkn() -> None:
    _, variant, gkn = style.looks([("KN", KN), ("KN, belief=output", KN_OUTPUT), ("GKN", config("gkn"))]).values()
    shades = [[int(look.colour[i : i + 2], 16) for i in (1, 3, 5)] for look in (variant, gkn)]
    assert np.linalg.norm(np.subtract(*shades)) > 100  # of 441 from black to white


def test_files_of_every_kind(tmp_path: Path) -> None:
    """Each gives a PNG and a PDF and imports no torch; the same picture is the same bytes."""
    for of in (BN, BN_LARGE, KN, KN_OUTPUT):
        write_record(tmp_path, of, 1, errors=True)
    kinds = ("curves", "stat_batch", "layer_errors")
    (tmp_path / "cards.json").write_text(json.dumps([card_of(kind) for kind in kinds]))
    code = f"""
import json, sys
from pathlib import Path
from kalmannorm import report
root = Path({str(tmp_path)!r})
for card in json.loads((root / "cards.json").read_text()):
    report.write(card, report.records(root, {NUMERICS}), root / "out")
report.curves(report.load(root)), report.variance_gaps(report.load(root).id[0], root)
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(written) == {f"{kind}_digits_lite.{ending}" for kind in kinds for ending in ("png", "pdf")}
    again = report.write(card_of("curves"), found(tmp_path), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [written[path.name] for path in again]


def test_curves_in_long_form(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1, moving=90.0)
    write_record(tmp_path, KN, 2, failed="out of memory")
    frame = report.curves(report.load(tmp_path))
    assert list(frame.statistics) == ["moving", "moving", "online", "online"]
    assert list(frame.accuracy) == [50.0, 90.0, 50.0, 91.0] and list(frame.step) == [11, 22] * 2
    assert set(frame["norm.name"]) == {"bn"} and "curves.moving" not in frame
    assert report.curves(report.load(tmp_path / "absent")).empty


def test_failed_runs_have_no_curves(tmp_path: Path) -> None:
    write_record(tmp_path, BN, 1)
    path = tmp_path / "records" / f"{write_record(tmp_path, BN, 2, failed='loss is nan')}.json"
    empty = {"curves": {key: [] for key in ("epoch", "step", "moving", "online")}}
    path.write_text(json.dumps(json.loads(path.read_text()) | empty))
    assert set(report.curves(report.load(tmp_path))["seed"]) == {1}


def test_arrays_of_one_run(tmp_path: Path) -> None:
    identity = write_record(tmp_path, KN, 1, arrays=True)
    gaps = report.variance_gaps(identity, tmp_path)
    assert gaps.used is not None and gaps.seed == 1 and gaps.errors is None
    for other in ("absent", write_record(tmp_path, BN, 1)):
        with pytest.raises(UserError, match=other):
            report.variance_gaps(other, tmp_path)


# Cards whose rows are swept


def test_a_swept_row_stands_for_its_combinations() -> None:
    card = cards.load("initial-gain", ["budget=smoke", "device=cpu", "seeds=2", "rows=bn_*,kn_fixed_*_preact_*"]).card
    assert [row["key"] for row in card["rows"][:2]] == ["bn_resnet14_g128_s2", "bn_resnet14_g128_s128"]
    fixed = {row["key"]: row for row in card["rows"]}["kn_fixed_resnet14_preact_g128_s128_0.1"]
    options = fixed["config"]["norm"]["options"]
    assert (options["gain"], options["learn_gain"], fixed["ours"]) == (0.1, False, True)
    assert fixed["config"]["arch"]["name"] == "resnet14_preact" and fixed["config"]["batch"]["stat_batch"] == 128
    assert len(card["rows"]) == 4 + 4
    with pytest.raises(UserError, match="row"):
        cards.load("initial-gain", ["rows=bn_resnet15*"])


# Notebooks


@pytest.fixture
def ipython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that see this checkout, and leave the user's folders alone."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return


@pytest.mark.parametrize("name", ["accuracy_curves", "variance_gaps"])
def test_notebook_runs_on_the_committed_records(name: str, ipython: None) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT / "notebooks"}}
    )
    client.execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
