"""Segmentation runs, small: the record, resume, processes, the metric, the network."""

import signal

import numpy as np
import pytest
import scene_files
import torch
import torch.nn.functional as F
import torchvision
from scene_files import TINY
from trainings import assert_same_run, last_of_each, on_processes, outcome, place, signal_in_steps

from kalmannorm import belief_report, convert
from kalmannorm.cli import main
from kalmannorm.conversion import INPUT_BELIEF
from kalmannorm.data.scenes import IGNORED
from kalmannorm.experiments import card as cards
from kalmannorm.experiments.config import compose
from kalmannorm.models import SEGMENTERS
from kalmannorm.models.resnet import Resnet
from kalmannorm.placement import PLACEMENTS
from kalmannorm.report import tables
from kalmannorm.report.cells import Group
from kalmannorm.train import task_segmentation
from kalmannorm.train.model import learning_rate
from kalmannorm.train.pretrained import load_pretrained
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.task_segmentation import Segmentation, reduced


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    scene_files.camvid(folder)
    return folder


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    """A finished run of KN, 2 epochs of 2 steps, also tested at dusk."""
    folder = tmp_path_factory.mktemp("done")
    overrides = [*TINY, "norm=bkn", "budget.epochs=2", "+dataset.other=camvid_dusk", *place(folder, root)]
    assert main(["train", *overrides]) == 0
    return folder, overrides


def test_the_record_is_whole(done):
    record, _ = outcome(done[0])
    assert record["data"]["train_images"] == 8 and record["data"]["other"]["fidelity"].startswith("4 + 7 scenes")
    assert set(record["final"]) == {"moving", "online", "precise", "multi_scale", "camvid_dusk"}
    for kind, values in record["final"].items():
        assert 0 <= values["miou"] <= values["pixel_accuracy"] <= 100
        assert values["images"] == (7 if kind == "camvid_dusk" else 5)
    assert len(record["curves"]["train_loss"]) == 2
    beliefs = record["norms"]["beliefs"]
    assert sum(lost is None for lost in beliefs.values()) >= len(beliefs) - 2
    with np.load(done[0] / "results" / "records" / f"{record['id']}.npz") as arrays:
        counts = arrays["confusion_moving"]
        assert counts.sum() == record["final"]["moving"]["pixels"]
        assert record["final"]["moving"]["pixel_accuracy"] == pytest.approx(100 * counts.trace() / counts.sum())
        assert arrays["scene_true_0"].shape == arrays["scene_predicted_0"].shape == (40, 48)


def test_finished_runs_are_evaluated_again(done, capsys):
    record, _ = outcome(done[0])
    assert main(["evaluate", record["id"], *done[1][-3:]]) == 0
    said = capsys.readouterr().out
    for kind, values in record["final"].items():
        shown = f"mIoU / pixel accuracy {values['miou']:.2f} / {values['pixel_accuracy']:.2f}"
        assert f"{kind:8} {shown}  (record {shown})" in said


@pytest.mark.slow
def test_going_on_ends_in_the_same_numbers(root, done, tmp_path, monkeypatch):
    """Stopped by a signal in the first step, in mid-epoch, and once more in the second epoch's last."""
    again = [*done[1][:-3], *place(tmp_path, root)]
    steps = signal_in_steps(monkeypatch, signal.SIGTERM, 1, 4)
    for _ in range(2):
        assert main(["train", *again]) == 128 + signal.SIGTERM
    assert main(["train", *again]) == 0 and len(steps) == 4
    assert_same_run(done[0], tmp_path)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(root, done, tmp_path):
    on_processes(2, tmp_path, {"two": [*done[1][:-3], f"data={root}"]})
    (one, state), (two, other) = outcome(done[0]), outcome(tmp_path / "two")
    assert one["id"] == two["id"] and two["host"]["processes"] == 2
    assert one["curves"]["train_loss"] == pytest.approx(two["curves"]["train_loss"], rel=1e-4)
    for key, value in state["model"].items():
        if "extra" not in key and value.is_floating_point():
            assert torch.allclose(value, other["model"][key], rtol=1e-3, atol=1e-5), key
    for kind, values in one["final"].items():  # a pixel between two classes may fall to either
        assert values["pixels"] == two["final"][kind]["pixels"]
        assert values["miou"] == pytest.approx(two["final"][kind]["miou"], abs=0.5), kind


@pytest.mark.slow
def test_the_network_learns_bands(root, tmp_path):
    overrides = last_of_each([*TINY, "norm=bn", "arch.width=0.25", "budget.epochs=20", "schedule.lr=0.1"])
    assert main(["train", *overrides, *place(tmp_path, root)]) == 0
    record, _ = outcome(tmp_path)
    assert record["curves"]["train_loss"][-1] < 0.5 * record["curves"]["train_loss"][0]
    assert record["final"]["precise"]["pixel_accuracy"] > 80


def test_the_tables_have_the_talks_values():
    """Of both data sets each, at one scale and at several; from one domain to the other."""
    card = cards.read("talk-table5")
    printed = {
        (row.key, column.key): tables.paper_value(card, row, column, Group("", "paper"))
        for row in card.rows
        for column in card.columns
    }
    assert printed["sn", "ade20k"] == 38.7 and printed["sn", "cityscapes_multi"] == 75.1
    assert printed["syncbn", "cityscapes"] == 69.7 and printed["kn", "ade20k"] is None
    card = cards.read("talk-table6-ibn")
    rows = {row.key: row for row in card.rows}
    columns = {column.key: column for column in card.columns}
    assert tables.paper_value(card, rows["ibn_b"], columns["g_c"], Group("", "paper")) == 29.6
    assert tables.paper_value(card, rows["ibn_a"], columns["c_g_pixel"], Group("", "paper")) == 71.4


def test_a_table_and_maps_come_of_the_records(root, tmp_path, capsys):
    run = last_of_each([*TINY, "batch=g8_s2", "schedule.lr=0.1", "norm=bn"])
    run = [setting for setting in run if not setting.startswith(("batch.", "dataset."))]
    assert main(["train", *run, *place(tmp_path, root)]) == 0
    record, _ = outcome(tmp_path)
    capsys.readouterr()
    assert main(["report", "camvid", f"results={tmp_path / 'results'}"]) == 0
    said = capsys.readouterr().out
    values = [record["final"][kind]["miou"] for kind in ("moving", "online", "precise", "multi_scale")]
    (line,) = [line for line in said.splitlines() if line.startswith("BN (ours)")]
    assert line.split()[2:] == [f"{v:.2f}" for v in [*values, record["final"]["moving"]["pixel_accuracy"]]]
    (maps,) = (tmp_path / "results").glob("camvid_maps_*.png")
    assert str(maps) in said and maps.stat().st_size > 10_000


def test_a_confusion_matrix_by_hand():
    """Three classes; the last is neither there nor predicted, and does not count."""
    counts = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    found = task_segmentation.summary(counts)
    assert found["miou"] == pytest.approx(100 * (6 / 9 + 3 / 6) / 2)
    assert found["pixel_accuracy"] == pytest.approx(100 * 9 / 12)


def test_mean_iou_is_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.segmentation")
    truth, predicted = torch.randint(0, 5, (2, 4, 20, 30), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(truth.flatten() * 5 + predicted.flatten(), minlength=25).view(5, 5)
    measured = metrics.MeanIoU(num_classes=5, input_format="index", per_class=False)
    whole = measured(predicted.reshape(1, -1, 30), truth.reshape(1, -1, 30))
    assert task_segmentation.summary(counts)["miou"] == pytest.approx(100 * whole.item(), rel=1e-5)


def test_the_loss_is_the_mean_over_images():
    """So that images with few labelled pixels weigh as much as others, on any number of devices."""
    scores = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(0, 4, (3, 6, 5), generator=torch.Generator().manual_seed(1))
    classes[0, :, 1:] = IGNORED
    each = [F.cross_entropy(scores[i : i + 1], classes[i : i + 1], ignore_index=IGNORED) for i in range(3)]
    found = task_segmentation.mean_of_images(scores, classes)
    assert found.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-6)
    classes[2] = IGNORED
    assert task_segmentation.mean_of_images(scores, classes).item() == pytest.approx(sum(each[:2]).item() / 3, rel=1e-6)


def test_the_network_is_torchvisions():
    """Name by name and number by number, but for dropout."""
    ours = SEGMENTERS["fcn_resnet50"](classes=21).eval()
    theirs = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 33, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(x), theirs(x)
    assert all(torch.equal(found[key], expected[key]) for key in ("out", "aux"))


def test_ibn_stands_in_the_backbone():
    plain = SEGMENTERS["fcn_resnet14"](classes=3, layers=[1, 1, 1, 1], width=0.125)
    assert PLACEMENTS["ibn_a"](plain) == {"backbone.layer[1-3].*.bn1": "ibn", "*": "bn"}
    placed = PLACEMENTS["ibn_b"](plain)
    assert placed == {"backbone.bn1": "in", "*": "bn"}
    model = convert(plain, placed, stat_batch=2)
    new = [name for name, _ in model.named_modules() if name.endswith(".IN")]
    assert new == ["backbone.layer1.0.IN", "backbone.layer2.0.IN"]
    model(torch.zeros(2, 3, 32, 48))


@pytest.mark.parametrize(
    ("placement", "names"),
    [("ibn_a", ["layer1.0.bn1.IN.weight", "layer3.0.bn1.BN.running_mean"]), ("ibn_b", ["layer2.0.IN.bias"])],
)
def test_a_classifiers_weights_of_ibn_begin_the_backbone(tmp_path, placement, names):
    """By the names of the public code's weights."""
    plain = Resnet([1] * 4, 0.125), SEGMENTERS["fcn_resnet14"](classes=3, layers=[1] * 4, width=0.125)
    classifier, segmenter = (convert(network, PLACEMENTS[placement](network), stat_batch=2) for network in plain)
    backbone = segmenter.get_submodule("backbone")
    weights = {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in classifier.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    load_pretrained([backbone], str(tmp_path / "weights.pth"))
    found = backbone.state_dict()
    assert set(names) <= set(found) == set(weights) - {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, weights[key]) for key, value in found.items())


def test_the_rate_is_poly():
    schedule = compose(TINY).schedule
    rates = [learning_rate(step, 100, schedule, None, 16) for step in (0, 50, 99)]
    assert rates == pytest.approx([0.02, 0.02 * 0.5**0.9, 0.02 * 0.01**0.9])
    assert learning_rate(0, 100, schedule, None, 4) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arch=resnet14", ["segmentation on camvid", "unknown arch 'resnet14'", "fcn_resnet14"]),
        ("dataset.classes=7", ["camvid has 11 classes", "dataset.classes = 7"]),
        ("dataset.crop=[32]", ["dataset.crop = [32]", "at least 2 items"]),
        ("+dataset.other=cityscapes", ["cityscapes has 19 classes"]),
        ("+dataset.other=camvid_dawn", ["camvid_dawn", "camvid_dusk"]),
        ("schedule=c4_280k", ["c4_280k"]),
        ("dataset.task=segmentating", ["segmentating", "did you mean 'segmentation'"]),
        ("weights=nowhere.pth", ["nowhere.pth"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(root, tmp_path, capsys, override, words):
    tiny = TINY if "arch" not in override else [setting for setting in TINY if "arch" not in setting]
    assert main(["train", *last_of_each([*tiny, "norm=gn", override]), *place(tmp_path, root)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line


def test_the_input_belief_is_that_of_the_training_scenes_as_the_network_sees_them(root, tmp_path):
    config = compose([*TINY, "norm=bkn", "norm.preset=robust", *place(tmp_path, root)])
    task = Segmentation(config, Ranks(config))
    task.load()
    seen = [reduced(x, config.budget.size).numpy() for images, _, _ in task.train.wholes(1) for x in images]
    pixels = np.concatenate([x.reshape(3, -1) for x in seen], 1)
    for name, expected in zip(INPUT_BELIEF, (pixels.mean(1), pixels.var(1)), strict=True):
        np.testing.assert_allclose(task.model.get_buffer(name)[0], expected, rtol=1e-4)
    assert set(belief_report(task.model).values()) == {None}  # the first normalizer has a prior too


def test_weights_that_depend_on_data_are_refused(root, tmp_path, capsys):
    assert main(["train", *TINY, "norm=wn", *place(tmp_path, root)]) == 2
    assert "for classification alone" in capsys.readouterr().err


def test_classifiers_refuse_segmenters(capsys):
    assert main(["train", "dataset=digits", "arch=fcn_resnet14"]) == 2
    assert "classification on digits: unknown arch 'fcn_resnet14'" in capsys.readouterr().err
