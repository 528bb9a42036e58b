"""The released code's own numbers (tests/golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error, interleaved, leaves
from torch import Tensor

from kalmannorm import Belief, KalmanBatchNorm2d
from kalmannorm.norm import moments as belief
from kalmannorm.norm.sampling import sampled_conv

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = sorted(path.stem for path in GOLDEN.glob("layer_*.npz"))
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)


def load(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def kalman_norm(data: dict[str, Tensor], gamma: Tensor, beta: Tensor) -> KalmanBatchNorm2d:
    """The released code's layer: fixed gain, no R, mixture term, guard at 100."""
    layer = KalmanBatchNorm2d(
        len(gamma),
        stat_batch=len(data["x"]) // int(data["split"]),
        gain=1 - data["p_rate"].item(),
        learn_gain=False,
        noise=False,
        mixture=True,
        guard=100.0,
        eps=data["eps"].item(),
    )
    with torch.no_grad():
        layer.weight.copy_(gamma)
        layer.bias.copy_(beta)
    return layer


def test_all_files_are_there() -> None:
    kinds = ("guard", "guard_above", "guard_below", "large", "s1", "s2")
    assert tuple(f"layer_{kind}" for kind in kinds) == tuple(LAYERS)


@FORMATS
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, memory_format: torch.memory_format) -> None:
    data = load(name)
    order = interleaved(len(data["x"]), int(data["split"]))
    layer = kalman_norm(data, data["gamma"], data["beta"])
    x, mean, var = leaves(
        data["x"][order].contiguous(memory_format=memory_format), data["prior_mean"], data["prior_var"]
    )
    out, posterior = layer(x, beliefs=Belief(mean, var))
    out.backward(data["dy"][order].contiguous(memory_format=memory_format))
    found = {"out": out, "mean": posterior.mean, "var": posterior.var, "dx": x.grad}
    found |= {"dprior_mean": mean.grad, "dprior_var": var.grad, "dgamma": layer.weight.grad, "dbeta": layer.bias.grad}
    for key, value in found.items():
        expected = data[key][order] if key in ("out", "dx") else data[key]
        assert error(value.detach(), expected) <= 1e-5, key


@FORMATS
def test_moving_averages_over_steps(memory_format: torch.memory_format) -> None:
    """Three training steps, then an evaluation, of a layer without a prior and of one with priors.

    The released code's first layer hands on the unbiased variance, and averages it too (`moving_unbiased`).
    """
    data = load("steps")
    order = interleaved(len(data["x:0"]), int(data["split"]))
    for name in ("first", "later"):
        layer = kalman_norm(data | {"x": data["x:0"]}, data[f"{name}:gamma"], data[f"{name}:beta"])
        layer.moving_groups, layer.first_unbiased, layer.moving_unbiased = "first", True, name == "first"
        for step in range(3):
            x = data[f"x:{step}"][order].contiguous(memory_format=memory_format)
            prior = Belief(data[f"prior_mean:{step}"], data[f"prior_var:{step}"]) if name == "later" else ()
            out, posterior = layer(x, beliefs=prior)
            found = {"mean": posterior.mean, "var": posterior.var}
            found |= {"moving_mean": layer.running_mean, "moving_var": layer.running_var}
            for key, value in found.items():
                assert error(value.detach(), data[f"{name}:{key}:{step}"]) <= 1e-5, (name, key, step)
            assert error(out.detach(), data[f"{name}:out:{step}"][order]) <= 1e-5, (name, step)
        assert error(layer.eval()(x).detach(), data[f"{name}:evaluated"][order]) <= 1e-5, name


def test_the_guard_files_differ_in_the_guard() -> None:
    """Above: the measurement everywhere. Below: a posterior that is not the measurement, high ratios included."""
    for kind, held in (("guard", True), ("guard_above", True), ("guard_below", False)):
        data = load(f"layer_{kind}")
        measured = data["x"].view(int(data["split"]), -1, *data["x"].shape[1:]).transpose(1, 2).flatten(2)
        assert (error(data["var"], measured.var(2, correction=0)) < 1e-5) is held


@FORMATS
def test_network(memory_format: torch.memory_format) -> None:
    """The released wiring by hand, with the recorded noise: convert does not reproduce its oddities on purpose."""
    data = load("net_s2")
    order = interleaved(len(data["x"]), int(data["split"]))
    noises = iter(data[f"noise:{i}"] for i in range(4))

    def norm(name: str, x: Tensor, prior: Belief | None = None) -> tuple[Tensor, Belief]:
        return kalman_norm(data, data[f"gamma:{name}"], data[f"beta:{name}"])(x, beliefs=prior or ())

    def conv(name: str, x: Tensor, prior: Belief, stride: int = 1) -> tuple[Tensor, Belief]:
        weight = data[f"w:{name}"]
        predicted = sampled_conv(prior, next(noises), weight, None, (stride, stride), (1, 1), relu=True)
        return F.conv2d(x, weight, None, stride, 1), predicted

    x, before = norm(
        "kn0", F.conv2d(data["x"][order].contiguous(memory_format=memory_format), data["w:conv0"], padding=1)
    )
    shortcut = F.relu(x)
    x, prior = conv("res1.conv1", shortcut, before)
    x, posterior = norm("res1.kn1", x, prior)
    x, prior = conv("res1.conv2", F.relu(x), posterior)
    shortcut, before = x + shortcut, belief.add(prior, before)

    x, posterior = norm("res2.kn", shortcut, before)
    x, prior = conv("res2.conv1", F.relu(x), posterior, stride=2)
    x, posterior = norm("res2.kn1", x, prior)
    x, prior = conv("res2.conv2", F.relu(x), posterior)
    x = x + F.pad(F.avg_pool2d(shortcut, 2), (0, 0, 0, 0, 4, 4))
    prior = belief.add(prior, belief.pad_channels(before, 4, 4))
    out, last = norm("knlast", x, prior)

    found = {"last_prior_mean": prior.mean, "last_prior_var": prior.var, "last_mean": last.mean, "last_var": last.var}
    for key, value in found.items():
        assert error(value.detach(), data[key]) <= 1e-5, key
    assert error(out.detach(), data["out"][order]) <= 1e-5
