"""A training's first steps, watched layer by layer (budget start)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Residual
from torch import nn

from kalmannorm import Belief, KalmanBatchNorm2d, convert
from kalmannorm.cli import main
from kalmannorm.norm.whitened import refresh, whiten_weights
from kalmannorm.train.conditioning import Conditioning, condition_number
from kalmannorm.train.first_steps import FirstSteps


def test_what_is_seen_is_what_the_layer_computed():
    torch.manual_seed(0)
    layer = KalmanBatchNorm2d(3, stat_batch=2, gain=0.25, learn_gain=False, noise=False, mixture=False, eps=1e-3)
    prior = Belief(torch.full((2, 3), 5.0), torch.full((2, 3), 4.0))
    watched = FirstSteps(nn.ModuleDict({"bn": layer}))
    with watched.watching():
        layer.probe(measured=Belief(torch.zeros(2, 3), torch.ones(2, 3)), used=prior, prior=prior)
        layer.eval()
        layer.probe(measured=Belief(torch.zeros(2, 3), torch.ones(2, 3)), used=prior, prior=None)  # evaluation
    assert layer.probe is None
    seen = watched.arrays()
    assert seen["steps"].tolist() == [1] and seen["offsets"].shape == (1, 1)
    np.testing.assert_allclose(seen["offsets"], 5 / 1.001**0.5, rtol=1e-6)
    np.testing.assert_allclose(seen["variance_ratios"], 4.001 / 1.001, rtol=1e-6)
    np.testing.assert_allclose(seen["scales"], (1 + 25) / 4.001, rtol=1e-6)


def test_gradients_are_relative_to_the_weights():
    torch.manual_seed(0)
    model = convert(Residual(), "bkn", stat_batch=2).train()
    watched = FirstSteps(model)
    with watched.watching():
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(4, 3, 6, 6)).square().sum().backward()
    seen = watched.arrays()
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert seen["gradients"].shape == (2, len(convolutions))
    expected = [(w.grad.norm() / w.norm()).item() for w in convolutions]
    np.testing.assert_allclose(seen["gradients"][1], expected, rtol=1e-5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", ["bkn", "wnn"])
def test_a_run_of_the_first_steps_alone(tmp_path: Path, norm: str):
    small = ["dataset=digits", "budget=start", "budget.stop_after=3", "arch.width=0.125", "device=cpu", f"norm={norm}"]
    assert main(["train", *small, f"results={tmp_path}", f"runs={tmp_path / 'runs'}"]) == 0
    (file,) = (tmp_path / "records").glob("*.json")
    record = json.loads(file.read_text())
    assert record["status"] == "done" and record["reason"] is None and record["curves"]["epoch"] == [1]
    arrays = np.load(file.with_suffix(".npz"))
    assert np.isfinite(arrays["gradients"]).all()
    if norm != "bkn":
        return
    layers = len(record["norms"]["order"])
    assert arrays["scales"].shape == (3, layers) and np.isfinite(arrays["scales"]).all()
    assert arrays["losses"].shape == (3,) and arrays["condition_inputs"].shape == arrays["gradients"].shape
    assert np.isnan(arrays["offsets"][:, 0]).all() and np.isfinite(arrays["offsets"][:, -1]).all()


def test_a_condition_number_is_of_the_worst_group_and_of_what_learns():
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.0]))[None]
    assert condition_number(matrix) == 4  # a channel that is never active does not count
    assert condition_number(torch.cat([matrix, torch.diag(torch.tensor([9.0, 1.0, 3.0]))[None]])) == 9
    assert condition_number(matrix, torch.diag(torch.tensor([0.5, 1.0, 1.0]))[None]) == 1
    assert condition_number(torch.zeros(1, 3, 3)) == 1


def test_a_refresh_conditions_the_inputs_of_whitened_weights():
    torch.manual_seed(0)
    mixing = torch.randn(3, 3)
    x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(64, 3, 6, 6))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(x)
    whiten_weights(model, "wnn", eps=1e-6)
    watched = Conditioning(model)
    for _ in range(2):
        with watched.watching():
            model(x).square().sum().backward()
        refresh(model, [x])
    seen = watched.arrays()
    values = torch.linalg.eigvalsh(torch.cov(x.transpose(0, 1).flatten(1)))
    np.testing.assert_allclose(seen["condition_inputs"][:, 0], [values[-1] / values[0], 1], rtol=1e-3)
    assert seen["condition_gradients"].shape == (2, 1) and (seen["condition_gradients"] > 1).all()
