"""Detection on two processes computes what one does."""

import coco_files
import pytest
import torch
from coco_files import TINY, TINY_FPN
from trainings import on_processes, outcome, run_all

from kalmannorm.train import task_detection


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    coco_files.write(folder)
    return folder


NORMS = {
    "gn": ["norm=gn"],
    "bkn": ["norm=bkn"],
    "bkn-carry": ["norm=bkn", "arch.roi_belief=carry"],
    "bkn-sampling": ["norm=bkn", "norm.predictor=sampling"],
    "frozen": ["norm=frozen"],
}


@pytest.mark.slow
def test_two_processes_compute_what_one_does(root, tmp_path):
    check_processes(root, tmp_path, NORMS)


@pytest.mark.slow
def test_two_processes_compute_what_one_does_with_a_pyramid(root, tmp_path):
    runs = {
        "fpn": ["norm=bkn"],
        "heads": ["norm=bkn", "arch.head_norm=bkn"],
        "faster": ["norm=gn", "arch.head_norm=sn", "arch.mask_head=false"],
    }
    check_processes(root, tmp_path, runs, TINY_FPN)


def check_processes(root, folder, norms, tiny=TINY):
    runs = {
        name: [*tiny, *norm, "budget.epochs=2", "schedule.lr=0.001", f"data={root}"] for name, norm in norms.items()
    }
    run_all(folder / "one", runs)
    on_processes(2, folder / "two", runs)
    print()
    for name in runs:
        (one, state), (two, other) = outcome(folder / "one" / name), outcome(folder / "two" / name)
        assert one["id"] == two["id"] and two["host"]["processes"] == 2
        names = [key for key in task_detection.LOSSES if key in one["curves"]]
        losses = [max(map(abs_difference, one["curves"][key], two["curves"][key])) for key in names]
        # A ReLU whose input is zero but for rounding passes a gradient or none: with other convolution kernels, one
        # process too moves biases of 2e-4 by 1e-6. Gradients that were not averaged would move them by 1e-4.
        weights = [
            ((value - other["model"][key]).abs().max() / value.abs().max().clamp_min(1e-2)).item()
            for key, value in state["model"].items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
        print(f"{name:14} losses {max(losses):.1e}  weights and moving statistics {max(weights):.1e}")
        assert max(losses) < 1e-4 and max(weights) < 2e-3
        for kind in ("moving", "online"):
            assert two["final"][kind]["images"] == 5
            assert two["final"][kind]["box_ap"] == pytest.approx(one["final"][kind]["box_ap"], abs=2)


def abs_difference(one, other):
    return abs(one - other)
