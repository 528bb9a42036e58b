"""Whole runs on small image folders, the ImageNet recipes, and the cards of its tables."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import folders
import pytest
import torch
from folders import SMALL
from trainings import assert_same, assert_same_run, on_processes, only_record, place, signal_in_steps

from kalmannorm.cli import main
from kalmannorm.errors import UserError
from kalmannorm.experiments import card, cards
from kalmannorm.experiments.config import compose, conf_dir
from kalmannorm.experiments.record import run_id
from kalmannorm.report.quantities import accuracy_at
from kalmannorm.train.model import learning_rate


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    folders.write(folder / "toy")
    return folder


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_s_record_says_what_it_saw(root, tmp_path):
    assert main(["train", *SMALL, f"data={root}", *place(tmp_path)]) == 0
    record = only_record(tmp_path)
    assert record["config"]["dataset"]["classes"] == 3 and record["config"]["dataset"]["loader"] == "torchvision"
    assert "workers" not in json.dumps(record["config"])
    found = record["data"]
    assert found["name"] == "toy" and found["train_images"] == 36 and found["test_images"] == 12
    assert found["files"] == 48 and len(found["sha256"]) == 64 and "keyed by (seed, epoch, position)" in found["loader"]
    for kind in ("moving", "online", "precise"):
        assert record["final"][kind]["images"] == 12
    assert record["curves"]["step"] == [4] and record["curves"]["lr"][0] == pytest.approx(0.1 * 8 / 256 / 4)


@pytest.mark.slow
def test_going_on_in_mid_epoch_with_other_workers_ends_in_the_same_numbers(root, tmp_path, monkeypatch):
    overrides = [*SMALL, "budget.epochs=2", f"data={root}"]
    assert main(["train", *overrides, *place(tmp_path / "whole")]) == 0
    steps = signal_in_steps(monkeypatch, signal.SIGUSR1, 6)
    assert main(["train", *overrides, *place(tmp_path / "cut")]) == 128 + signal.SIGUSR1
    elsewhere = ["workers=1" if override == "workers=0" else override for override in overrides]
    assert main(["train", *elsewhere, *place(tmp_path / "cut")]) == 0
    assert len(steps) == 8
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_equal_one(root, tmp_path):
    """Of what loads files, that is; normalizers are in test_distributed.py."""
    assert_same(tmp_path, {"bkn": [*SMALL, f"data={root}"]}, partial(on_processes, 2), images=12)


@pytest.mark.slow
def test_an_unreadable_file_fails_the_run_or_is_left_out(tmp_path, capsys, monkeypatch):
    folders.write(tmp_path / "data" / "toy", val=3)
    for file in ("train/c1/2.jpg", "val/c0/1.jpg"):
        (tmp_path / "data" / "toy" / file).write_bytes(b"\xff\xd8 no more")
    overrides = [*SMALL, f"data={tmp_path / 'data'}"]
    assert main(["train", *overrides, *place(tmp_path / "fail")]) == 2
    said = capsys.readouterr().err
    assert "jpg" in said and "dataset.unreadable=skip" in said and "Traceback" not in said
    assert not (tmp_path / "fail" / "results").exists()
    skip = [*overrides, "dataset.unreadable=skip"]
    assert main(["train", *skip, *place(tmp_path / "skip")]) == 0
    record = only_record(tmp_path / "skip")
    assert record["data"]["unreadable"]["count"] == 2 and record["data"]["train_images"] == 35
    assert record["data"]["unreadable"]["left_out"][0].startswith("train/c1/2.jpg: no image")
    assert record["final"]["online"]["images"] == 8
    monkeypatch.setattr("kalmannorm.train.loaders.find_unreadable", lambda *_: pytest.fail("looked twice"))
    assert main(["train", *skip, "seed=2", *place(tmp_path / "skip")]) == 0


@pytest.mark.parametrize("how", ["no room", "killed"])
def test_a_worker_that_fails_is_one_line_and_no_hang(root, tmp_path, capsys, monkeypatch, how):
    """A container has 64 MiB of shared memory; what has too much of the other kind is killed."""

    def fail(*_):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with_workers = ["workers=1" if override == "workers=0" else override for override in SMALL]
    assert main(["train", *with_workers, f"data={root}", *place(tmp_path)]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kalmannorm:")]
    assert ("No space left" in said or how == "killed") and "--shm-size" in said


def test_a_wrong_number_of_classes_is_said(root, tmp_path, capsys):
    assert main(["train", *SMALL, "dataset.classes=4", f"data={root}", *place(tmp_path)]) == 2
    assert "toy has 3 classes, not dataset.classes = 4" in capsys.readouterr().err


def test_classes_of_a_missing_folder_cannot_be_counted(tmp_path):
    with pytest.raises(UserError, match="'toy' is not there"):
        compose([*SMALL, f"data={tmp_path}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset.loader=dali", ["dataset.loader = dali", "'torchvision' or 'ffcv'"]),
        ("dataset.unreadable=maybe", ["dataset.unreadable = maybe", "'fail' or 'skip'"]),
        ("workers=-1", ["workers = -1", "auto"]),
    ],
)
def test_wrong_values_are_named(override, words):
    with pytest.raises(UserError) as error:
        compose(["dataset=imagenet", override])
    assert all(word in str(error.value) for word in words)


# Recipes -------------------------------------------------------------------------------------------------------------


def rates(schedule: str, batch: str, at: list[float]) -> list[float]:
    """The learning rate at these parts of a run at the paper's budget."""
    config = compose(["dataset=imagenet", "budget=paper", f"schedule={schedule}", f"batch={batch}"])
    grad = config.batch.grad_batch
    total = 1_281_167 // grad * config.budget.epochs
    return [learning_rate(round(p * total), total, config.schedule, config.budget.warmup, grad) for p in at]


def test_the_step_recipe_is_90_epochs_and_scales_with_the_gradient_batch():
    assert compose(["dataset=imagenet", "budget=paper", "schedule=imagenet_step"]).budget.epochs == 90
    parts = [0, 0.33, 0.34, 0.66, 0.67, 0.88, 0.89, 0.999]
    assert rates("imagenet_step", "g256_s32", parts) == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])
    assert rates("imagenet_step", "g32_s4", [0, 0.5]) == pytest.approx([0.1 / 8, 0.01 / 8])


def test_inception_s_recipes_take_170k_steps_to_zero():
    config = compose(["dataset=imagenet", "budget=paper", "schedule=imagenet_linear", "batch=g256_s32"])
    assert round(config.budget.epochs * (1_281_167 // 256), -3) == 170_000
    assert rates("imagenet_linear", "g256_s32", [0, 0.5, 0.9]) == pytest.approx([0.1, 0.05, 0.01], rel=1e-4)
    assert rates("imagenet_cosine", "g256_s32", [0, 0.5, 1]) == pytest.approx([0.1, 0.05, 0], abs=1e-6)
    assert rates("imagenet_linear", "g64_s8", [0.5]) == pytest.approx([0.05 / 4])


def test_released_recipe_has_no_new_keys():
    assert set(compose([]).result()["schedule"]) == {"name", "lr", "momentum", "weight_decay"}


def test_batches_are_what_their_names_say():
    for file in (conf_dir() / "batch").glob("*.yaml"):
        batch = compose([f"batch={file.stem}"]).batch
        assert file.stem == f"g{batch.grad_batch}_s{batch.stat_batch}"


# Cards ---------------------------------------------------------------------------------------------------------------

PAIRS = {
    "table1": {(256, 32), (256, None)},
    "table4": {(256, 4), (256, None), (32, 4), (32, None)},
    "table5": {(256, 1)},
    "talk-resnet50": {(256, 32), (32, 4), (256, 4), (256, None), (32, None)},
    "v1-figure3": {(256, 4)},
    "v1-figure4": {(256, 1)},
    "v1-figure5": {(64, 8)},
    "v1-figure6": {(16, 4)},
    "v1-figure7": {(8, 2)},
}


@pytest.mark.parametrize("name", PAIRS)
def test_cards_have_the_papers_batches_and_recipes(name):
    loaded = cards.load(name, ["budget=paper", "seeds=1"])
    assert {(c.batch.grad_batch, c.batch.stat_batch) for c in loaded.runs} == PAIRS[name]
    assert loaded.card.devices == 8
    for config in loaded.runs:
        inception = config.arch.name == "inception_v2"
        assert config.dataset.name == "imagenet" and config.budget.size == 224
        assert config.schedule.name == ("imagenet_linear" if inception else "imagenet_step")
        assert config.budget.epochs == (34 if inception else 90)
        assert config.norm.options.get("max_groups", 32) == 32


def test_cards_share_runs():
    """Table 5 and v1's Figure 4 are of the same runs; Table 1's ResNet-50 ones are the talk's."""
    names = ("table1", "table5", "v1-figure4", "talk-resnet50")
    ids = {name: {run_id(config) for config in cards.load(name, ["seeds=1"]).runs} for name in names}
    assert ids["table5"] == ids["v1-figure4"]
    assert len(ids["table1"] & ids["talk-resnet50"]) == 3


def test_table_5_reads_accuracies_on_the_way():
    run = {"step": [100, 200, 300, 400], "curve": [10.0, 20.0, 30.0, None]}
    assert [accuracy_at(run, part) for part in (0.1, 0.5, 120 / 170)] == [10, 20, 30]
    assert accuracy_at(run, 1) is None and accuracy_at({"step": None, "curve": None}, 0.5) is None
    assert [column.at for column in card.read("table5").columns] == [(120, 170), None, None]
