"""Detection runs, small: the record, resume, processes, evaluation by pycocotools, the recipe, Table 6."""

import contextlib
import io
import json
import math
import signal
from types import SimpleNamespace

import coco_files
import pytest
import torch
from coco_files import TINY, TINY_FPN
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from trainings import assert_same_run, last_of_each, outcome, place, signal_in_steps

from kalmannorm.cli import main
from kalmannorm.data import coco
from kalmannorm.experiments import cards
from kalmannorm.experiments.config import compose
from kalmannorm.experiments.record import run_id
from kalmannorm.report import tables
from kalmannorm.report.cells import Group
from kalmannorm.train import average_precision, checkpoint, detector, progress, task_detection
from kalmannorm.train.ranks import Ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    coco_files.write(folder)
    return folder


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    """A finished run of KN, 3 epochs of 1 step."""
    folder = tmp_path_factory.mktemp("done")
    overrides = [*TINY, "norm=bkn", "budget.epochs=3", "dataset.train_images_evaluated=2", *place(folder, root)]
    assert main(["train", *overrides]) == 0
    return folder, overrides


def test_the_record_is_whole(done):
    folder, overrides = done
    record, _ = outcome(folder)
    assert record["status"] == "done" and record["id"] == run_id(compose(overrides))
    for kind in ("moving", "online"):
        values = record["final"][kind]
        assert values["images"] == 5
        for name in ("box_ap", "mask_ap", "box_ap50", "mask_ap75"):
            assert 0 <= values[name] <= 100
    assert record["final_on_training_images"]["images"] == 2
    assert record["curves"]["step"] == [1, 2, 3] and len(record["curves"]["loss_mask"]) == 3
    parts = [record["curves"][name] for name in task_detection.LOSSES]
    assert all(
        math.isclose(sum(values), total) for *values, total in zip(*parts, record["curves"]["train_loss"], strict=True)
    )
    assert record["weights"] == {"origin": "trained from scratch", "sha256": None}
    assert record["data"]["train_images"] == 4 and record["data"]["test_images"] == 5
    assert record["norms"]["beliefs"]["body.layer1.0.bn2"] is None
    assert record["norms"]["beliefs"]["roi_heads.box_head.layer4.0.bn1"] == detector.BELIEF_ENDS
    for picture in ("detections.png", "detections-training.png"):
        assert (folder / "runs" / record["id"] / picture).stat().st_size > 1000


def test_finished_runs_are_evaluated_again(done, capsys):
    folder, overrides = done
    record, _ = outcome(folder)
    assert main(["evaluate", record["id"], *overrides[-3:], "device=cpu"]) == 0
    said = capsys.readouterr().out
    for kind in ("moving", "online"):
        values = record["final"][kind]
        shown = f"box / mask AP {values['box_ap']:.2f} / {values['mask_ap']:.2f}"
        assert f"{kind:8} {shown}  (record {shown})" in said
    assert main(["train", *overrides]) == 0 and "done already" in capsys.readouterr().out


@pytest.mark.slow
def test_going_on_ends_in_the_same_numbers(root, done, tmp_path, monkeypatch):
    """Stopped by a signal in the second step, which is an epoch's last, and once more in the run's last."""
    _, overrides = done
    again = [*overrides[:-3], *place(tmp_path, root)]
    steps = signal_in_steps(monkeypatch, signal.SIGTERM, 2, 3)
    for _ in range(2):
        assert main(["train", *again]) == 128 + signal.SIGTERM
    assert main(["train", *again]) == 0
    assert len(steps) == 3
    assert_same_run(done[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [TINY, [*TINY_FPN, "arch.head_norm=bkn"]], ids=["c4", "fpn"])
def test_going_on_in_mid_epoch_ends_in_the_same_numbers(root, tmp_path, monkeypatch, tiny):
    """Two epochs of 2 steps, stopped by a signal in the third step: the second epoch's first."""
    overrides = last_of_each([*tiny, "norm=bkn", "batch.grad_batch=2", "budget.epochs=2"])
    assert main(["train", *overrides, *place(tmp_path / "whole", root)]) == 0
    steps = signal_in_steps(monkeypatch, signal.SIGUSR1, 3)
    assert main(["train", *overrides, *place(tmp_path / "cut", root)]) == 128 + signal.SIGUSR1
    identity = run_id(compose(overrides))
    saved = checkpoint.load(tmp_path / "cut" / "runs" / identity, identity)
    assert (saved["epoch"], saved["step"]) == (1, 1)
    assert main(["train", *overrides, *place(tmp_path / "cut", root)]) == 0
    assert len(steps) == 4
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    momentum = [outcome(tmp_path / name)[1]["optimizer"]["state"] for name in ("whole", "cut")]
    assert all(torch.equal(momentum[0][i]["momentum_buffer"], momentum[1][i]["momentum_buffer"]) for i in momentum[0])


def test_a_run_may_end_within_an_epoch(root, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "FILE_EVERY", 0)
    changes = ["norm=gn", "budget.epochs=2", "batch.grad_batch=2", "dataset.steps=3"]
    overrides = [*last_of_each([*TINY, *changes]), *place(tmp_path, root)]
    assert main(["train", *overrides]) == 0
    record, state = outcome(tmp_path)
    assert record["curves"]["step"] == [2, 3] and (state["epoch"], state["step"]) == (2, 0)
    assert record["final"]["moving"] == record["final"]["online"]
    assert json.loads((tmp_path / "runs" / record["id"] / progress.FILE).read_text())["part"] == 1


def test_workers_are_those_asked_for(root):
    images = coco.load("coco", root, 3)
    for asked, count in (("auto", 0), (0, 0), (3, 3)):  # a CPU is busy with the network
        config = compose([*TINY, "norm=gn", f"workers={asked}", f"data={root}"])
        assert task_detection.training_batches(config, images, Ranks(config)).workers == count


def test_frozen_constants_are_measured_once(root, tmp_path):
    """With them the first step sees what BN sees: maps of mean 0 and variance 1, about."""
    overrides = [*TINY, "norm=frozen", "schedule.lr=0.001", *place(tmp_path, root)]
    assert main(["train", *overrides]) == 0
    record, state = outcome(tmp_path)
    assert record["weights"]["constants"] == "measured once, under the initial weights, on 4 training images"
    constants = {key: value for key, value in state["model"].items() if key.endswith("running_var")}
    assert len(constants) == 17 and all((value != 1).any() for value in constants.values())
    config = compose(overrides)
    ranks = Ranks(config)
    batches = task_detection.training_batches(config, coco.load("coco", root, 3), ranks)
    model = detector.build(config)
    detector.measure_constants(model, config, batches)
    for key, value in constants.items():
        assert torch.equal(model.state_dict()[key], value)
    (batch,) = batches.epoch(0)
    seen = []
    model.body.get_submodule("layer3.0.bn2").register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    model.train()(batch.images, batch.targets, batch.canvas)
    assert seen[0].mean().abs() < 0.1 and 0.8 < seen[0].var() < 1.2


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["frozen", "gn", "bkn"])
def test_all_losses_fall(root, norm):
    config = compose(last_of_each([*TINY, f"norm={norm}", "schedule.lr=0.02", "budget.subset=4"]))
    ranks = Ranks(config)
    batches = task_detection.training_batches(config, coco.load("coco", root, 3), ranks)
    model = detector.build(config)
    if norm == "frozen":
        detector.measure_constants(model, config, batches)
    optimizer = torch.optim.SGD(model.parameters(), 0.002 if norm == "frozen" else 0.01, momentum=0.9)
    curves = []
    for epoch in range(24):
        (batch,) = batches.epoch(epoch)
        losses = model.train()(batch.images, batch.targets, batch.canvas)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        curves.append(torch.stack([losses[name].detach() for name in task_detection.LOSSES]))
    first, last = torch.stack(curves[:4]).mean(0), torch.stack(curves[-4:]).mean(0)
    # The smallest loss, of the proposals' boxes, is the noise of few positive anchors here.
    assert last.sum() < 0.7 * first.sum() and (last[:4] < first[:4]).all(), (first, last)


# --- evaluation ---


def detections_of(split, generator):
    """The true objects, moved a little, with scores; some of a wrong kind."""
    found = []
    for image in split.ids:
        listed = split.coco.imgs[image]
        for annotation in split.coco.imgToAnns[image]:
            x, y, w, h = annotation["bbox"]
            dx, dy = (torch.rand(2, generator=generator) * 6).tolist()
            mask = torch.zeros(1, listed["height"], listed["width"])
            mask[:, int(y + dy) : int(y + dy + h), int(x + dx) : int(x + dx + w)] = 1
            label = int(torch.randint(1, 4, (1,), generator=generator))
            labels = {1: 1, 7: 2, 44: 3}
            kept = labels[annotation["category_id"]] if float(torch.rand(1, generator=generator)) < 0.8 else label
            output = {
                "boxes": torch.tensor([[x + dx, y + dy, x + dx + w, y + dy + h]]),
                "scores": torch.rand(1, generator=generator),
                "labels": torch.tensor([kept]),
                "masks": mask[None],
            }
            found += average_precision.as_results(
                output, image, {label: category for category, label in labels.items()}
            )
    return found


def test_average_precision_is_pycocotools(root, tmp_path):
    """The same detections, written to a file as COCO asks for, and evaluated by its own few lines."""
    images = coco.load("coco", root, 3)
    found = detections_of(images.test, torch.Generator().manual_seed(0))
    values = average_precision.average_precision(images.test, images.test.ids, found)
    assert 5 < values["box_ap"] < 95 and 5 < values["mask_ap"] < 95 and values["box_ap_large"] is None
    file = tmp_path / "detections.json"
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        fields = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
        written = [{key: d[key] for key in fields} for d in found]
        for detection_ in written if kind == "segm" else []:
            code = detection_["segmentation"]
            detection_["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
        file.write_text(json.dumps(written))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(root / "coco" / "annotations" / "instances_val2017.json"))
            evaluation = COCOeval(truth, truth.loadRes(str(file)), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for key, number in zip(average_precision.NAMES, evaluation.stats[:6], strict=True):
            assert values[f"{name}_{key}"] == (None if number < 0 else pytest.approx(100 * number, abs=1e-9))


def test_no_detection_is_an_ap_of_zero(root):
    images = coco.load("coco", root, 3)
    values = average_precision.average_precision(images.test, images.test.ids, [])
    assert values["box_ap"] == values["mask_ap"] == 0 and values["detections"] == 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_image_is_counted_once(size):
    """Whole groups on every rank, filled by the first images, which do not count."""
    for world in (1, 2, 3):
        dealt = [
            list(average_precision._groups(5, size, SimpleNamespace(rank=rank, world=world))) for rank in range(world)
        ]
        groups = [group for part in dealt for group in part]
        assert all(len(group) == size for group in groups)
        assert sorted(i for group in groups for i, counted in group if counted) == list(range(5))


# --- the recipe ---


def test_the_recipe_is_280k_steps():
    config = compose(["dataset=coco", "arch=mask_rcnn_c4", "schedule=c4_280k", "batch=g8_s2", "budget=paper"])
    schedule, arch = config.schedule, config.arch.options
    assert (config.budget.size, arch["max_size"], arch["boxes"]) == (800, 1333, 256)
    assert arch["proposals"] == [2000, 1000] and arch["roi_size"] == 14 and config.compile is False
    task = object.__new__(task_detection.Detection)
    task.config, task.dataset = config, config.dataset
    task.train = SimpleNamespace(steps_per_epoch=117_266 // 8)
    steps = task.total
    assert steps == 280_000

    def rate(step):
        return task_detection.learning_rate(step, steps, schedule, 8)

    assert rate(0) == pytest.approx(0.01 / 3) and rate(500) == pytest.approx(0.01 * 2 / 3)
    assert rate(1000) == rate(149_999) == 0.01
    assert rate(150_000) == pytest.approx(0.001) and rate(230_000) == pytest.approx(0.0001)
    assert task_detection.learning_rate(1000, steps, schedule, 16) == 0.02
    # A short run: a tenth of it is warm-up, the drops are where they are in the long one.
    assert (
        task_detection.learning_rate(28, 280, schedule, 8) == 0.01 > task_detection.learning_rate(27, 280, schedule, 8)
    )
    assert task_detection.learning_rate(150, 280, schedule, 8) == pytest.approx(0.001)


def test_the_card_of_table_6():
    card = cards.load("table6", ["seeds=1"])
    norms = {row.key: row.runs["norm"] for row in card.card.rows}
    assert norms == {"frozen_bn": "frozen", "gn": "gn", "kn": "bkn", "kn_stat1": "bkn", "kn_carried": "bkn"}
    assert [run.batch.stat_batch for run in card.runs] == [None, None, 2, 1, 2]
    assert all(run.task == "detection" for run in card.runs)


def test_the_talks_tables_3_and_4():
    """Their rows, values and what one can choose; Faster R-CNN is the first one's."""
    third, fourth = (cards.load(name, ["dataset=coco", "budget=paper"]) for name in ("talk-table3", "talk-table4"))
    assert {run.arch.options.get("mask_head", True) for run in third.runs} == {False}
    assert {run.arch.options.get("mask_head", True) for run in fourth.runs} == {True}
    assert {(run.dataset.steps, run.batch.grad_batch, run.schedule.lr) for run in fourth.runs} == {(180_000, 16, 0.02)}
    assert 117_266 // 16 * fourth.runs[0].budget.epochs >= 180_000
    heads = [(run.norm.name, run.arch.options.get("head_norm", "none")) for run in fourth.runs]
    assert len(set(heads)) == 9 and {("frozen", "none"), ("gn", "sn"), ("sn", "sn"), ("bkn", "bkn")} <= set(heads)
    for experiment in (third, fourth):
        table = experiment.card
        group = Group("coco", "paper")
        values = {
            row.key: [tables.paper_value(table, row, column, group) for column in table.columns] for row in table.rows
        }
        assert all((None in found) == table.row(key).ours for key, found in values.items())
        assert values["sn_sn"][0] == {"talk-table3": 39.3, "talk-table4": 41.0}[table.name]


def test_a_faster_rcnns_run(root, tmp_path, capsys):
    changes = ["norm=gn", "norm.options.max_groups=32", "arch.head_norm=gn", "arch.mask_head=false"]
    changes.append("dataset.train_images_evaluated=2")
    assert main(["train", *last_of_each([*TINY_FPN, *changes, "schedule=fpn_180k"]), *place(tmp_path, root)]) == 0
    record, _ = outcome(tmp_path)
    assert "mask_ap" not in record["final"]["moving"] and "loss_mask" not in record["curves"]
    assert f"AP {record['final']['moving']['box_ap']:.2f} / -" in capsys.readouterr().out
    rest = [o for o in TINY if o.startswith(("dataset.", "arch.", "budget", "device"))]
    settings = [*rest, "batch.grad_batch=4", "dataset.train_images_evaluated=2"]
    assert main(["report", "talk-table3", "dataset=coco", *settings, *place(tmp_path, root)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"GN / GN {record['final']['moving']['box_ap']:.2f}" in said and "Not run" in said and "39.3" not in said


def test_table_6_shows_ap(root, done, tmp_path, capsys):
    folder, overrides = done
    settings = [
        o for o in overrides if not o.startswith(("norm", "arch=", "dataset=", "schedule", "batch=", "results"))
    ]
    assert main(["report", "table6", *settings, f"results={folder / 'results'}", "seeds=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    value = outcome(folder)[0]["final"]["moving"]["box_ap"]
    assert f"KN {value:.2f}" in said and "Not run" in said and "37.8" not in said  # the paper's are of COCO
    assert "average precision" in said and "trained from scratch" in said and "top-1" not in said
    seen = outcome(folder)[0]["final_on_training_images"]
    assert f"On training images, box / mask: bkn {seen['box_ap']:.2f} / {seen['mask_ap']:.2f}" in said
