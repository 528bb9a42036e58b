"""What a sweep says before it starts: its runs, their devices and hours, or why they cannot be run."""

import re

import faulty
import pytest
from sweeps import TABLE7
from trainings import place

from kalmannorm.cli import main
from kalmannorm.experiments.cards import load
from kalmannorm.experiments.predict import predictor
from kalmannorm.runs import placement


def test_dry_run_predicts_by_the_speed_of_recorded_runs(tmp_path, capsys, plan):
    plan({})
    assert main(["sweep", *TABLE7, "seeds=1", *place(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["sweep", *TABLE7, "seeds=2", "budget.epochs=90", *place(tmp_path), "devices=4", "--dry-run"]) == 0
    error = capsys.readouterr().err
    # 2 s for an epoch of 256 images: 180 device-seconds a run
    assert error.count("to run, about 45 s on 4 devices") == 4
    assert "4 of 4 runs to do, about 12 min on one device (0.20 device-hours)" in error


def test_a_run_of_a_few_steps_is_predicted_by_its_steps() -> None:
    """As those of budget=start are; their speeds, too, are those of the steps that they trained for."""
    runs = [
        {
            "status": "done",
            "config": {
                "arch": {"name": "resnet32"},
                "norm": {"name": "bn"},
                "dataset": {"name": "cifar10"},
                "batch": {"grad_batch": 100, "stat_batch": 2},
                "budget": {"size": 16, "epochs": 12, "subset": None, "stop_after": stop_after},
            },
            "data": {"train_images": 50_000},
            "host": {"device": "cpu", "seconds": seconds},
        }
        for stop_after, seconds in ((None, 600), (60, 6))
    ]
    whole, few = (run["config"] for run in runs)
    for recorded, seconds in ((runs[:1], (600, 6)), (runs[1:], (600, 6))):
        predict = predictor(recorded, "cpu")
        assert (predict(whole), predict(few)) == pytest.approx(seconds)


def test_a_dry_run_of_an_imagenet_table_on_a_machine_without_gpus(tmp_path, capsys):
    """As on a login node: (grad, stat), devices of whole groups, and that no time is known; options in any order."""
    arguments = ["budget=paper", "gpus=8", "launcher=slurm", "data=/nowhere", *place(tmp_path)]
    for name, lines in {
        "table1": [("bn resnet50", "(256,32)", 8), ("gn resnet50", "(256,-)", 8)],
        "table4": [("kn_256_4", "(256,4)", 8), ("kn_32_4", "(32,4)", 8)],
        "table5": [("kn", "(256,1)", 8)],
        "v1-figure6": [("resnet101_bkn", "(16,4)", 4)],
        "v1-figure7": [("inception_v2_bn", "(8,2)", 4)],
    }.items():
        assert main(["sweep", name, "--dry-run", *arguments]) == 0
        error = capsys.readouterr().err
        for key, pair, devices in lines:
            assert re.search(
                rf"  {key} +{re.escape(pair)} +seed 1  to run on {devices} devices, time not meas", error
            ), error
        runs = len(load(name, ["budget=paper"]).runs)
        assert f"{runs} of {runs} runs to do, device-hours not measured for {runs} of them" in error
    assert not any(tmp_path.iterdir())


NOWHERE = ["data=/nowhere", "device=cpu"]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("table4", NOWHERE, "'imagenet' is not there: looked for train/ and val/ in /nowhere/imagenet"),
        ("table4", ["batch.grad_batch=48", "batch.stat_batch=32"], "batch.grad_batch = 48: expected a multiple of"),
        ("table4", ["arch=resnet5"], "did you mean 'resnet50'"),
        ("table6", NOWHERE, "'coco' is not there: /nowhere/coco/annotations/instances_train2017.json and"),
        ("playback", NOWHERE, "'playback' is not there: looked for train/ and val/ in /nowhere/playback"),
        ("talk-pn", NOWHERE, "'cifar10' is not there: looked in /nowhere/cifar10"),
    ],
)
def test_what_cannot_be_is_refused_before_it_starts(tmp_path, capsys, plan, name, arguments, words):
    file = plan({})
    assert main(["sweep", name, "budget=paper", *arguments, *place(tmp_path)]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not faulty.attempts(file) and not (tmp_path / "runs").exists()


def test_gpus_mean_cuda_and_are_missed_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    arguments = [argument for argument in TABLE7 if argument != "device=cpu"]
    assert main(["sweep", *arguments, *place(tmp_path), "gpus=4"]) == 2
    assert "gpus=4: this machine shows 2;" in capsys.readouterr().err.splitlines()[-1]
    assert placement.split(["gpus=4", "device=cpu"])[1] == ["device=cpu"]
    assert not (tmp_path / "runs").exists()
