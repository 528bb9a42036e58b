"""Errors of what normalizers estimate, against the population's statistics of the same weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Chain
from torch import Tensor, nn

from kalmannorm import Belief, convert
from kalmannorm.experiments.config import compose
from kalmannorm.norm.modes import normalizers, probing, set_statistics
from kalmannorm.train.layer_errors import ESTIMATES, Errors, Population, layer_errors
from kalmannorm.train.model import build, describe


def online(norm: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = convert(Chain(lambda chain, x: chain.relu(x)), norm, stat_batch=2, **options)
    set_statistics(model, "online")
    return model.eval()


def populations(model: nn.Module, batches: list[Tensor]) -> dict[str, Population]:
    found = {name: Population() for name in normalizers(model)}
    probes = {name: lambda *, measured, used, prior, of=of: of.add(measured) for name, of in found.items()}
    with probing(model, probes), torch.no_grad():  # type: ignore[arg-type]
        for x in batches:
            model(x)
    return found


def batches_of(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=draw) * (1 + i) for i in range(count)]


@pytest.mark.parametrize("norm", ["bn", "bkn"])
def test_population_is_that_of_the_features(norm: str) -> None:
    """Mean and pooled variance of what reaches each normalizer, while the layers before normalize as in training."""
    model, batches = online(norm), batches_of(3)
    seen: dict[str, list[Tensor]] = {name: [] for name in normalizers(model)}
    for name, layer in normalizers(model).items():
        layer.register_forward_pre_hook(lambda _, inputs, kept=seen[name]: kept.append(inputs[0].detach()))
    for name, population in populations(model, batches).items():
        features = torch.cat(seen[name]).double().transpose(0, 1).flatten(1)
        mean, var = population.belief()
        torch.testing.assert_close(mean, features.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, features.var(1, correction=0), rtol=1e-5, atol=1e-6)


def test_errors_by_hand() -> None:
    """Two groups, one channel, population N(1, 4): errors of the mean +1 and 0 sd, of the variance ln 1 and ln 4."""
    errors = Errors(Belief(torch.tensor([1.0]), torch.tensor([4.0])), eps=0.0)
    measured = Belief(torch.tensor([[3.0], [1.0]]), torch.tensor([[4.0], [16.0]]))
    errors(measured=measured, used=measured, prior=Belief(torch.tensor([[5.0]]), torch.tensor([[4.0]])))
    whole, bias, spread = errors.typical("measured")
    half = np.log(4) / 2
    np.testing.assert_allclose(whole, [np.sqrt(0.5), np.sqrt(2) * half])
    np.testing.assert_allclose(bias, [0.5, half])
    np.testing.assert_allclose(spread, [0.5, half])
    # One row for all groups: all of its error is the same everywhere.
    np.testing.assert_allclose(errors.typical("prior"), [[2, 0], [2, 0], [0, 0]], atol=1e-12)
    assert torch.isnan(Errors(Belief(torch.ones(1), torch.ones(1)), 0.0).typical("used")).all()


def test_channels_that_are_always_zero_have_no_error() -> None:
    errors = Errors(Belief(torch.zeros(3), torch.zeros(3)), eps=1e-5)
    zero = Belief(torch.zeros(2, 3), torch.zeros(2, 3))
    errors(measured=zero, used=zero, prior=None)
    assert (errors.typical("used") == 0).all()


def test_layers_of_bn_and_kn() -> None:
    batches = batches_of(4)
    for norm, options in (("bn", {}), ("bkn", {"gain": 0.3}), ("bkn", {"belief": "output"})):
        model = online(norm, **options)
        found = layer_errors(model, populations(model, batches), batches)
        assert len(found) == 6 and {array.shape for array in found.values()} == {(len(ESTIMATES), 2)}
        for moment in ("mean", "var"):
            measured, prior, used = found[f"layer_error_{moment}"]
            assert np.isfinite(measured).all() and np.isnan(prior[0])
            assert measured[0] == used[0]  # the first layer has no prior
            assert np.isnan(prior[1]) == (norm == "bn") and (measured[1] == used[1]) == (norm == "bn")
            # Over all groups the measured mean has no systematic error.
            assert (found["layer_error_mean_bias"][0] < 1e-5).all()
        assert all(layer.probe is None for layer in normalizers(model).values())


def test_record_describes_gains_and_mixtures() -> None:
    small = ["dataset=digits", "budget=smoke", "arch=resnet14", "device=cpu"]
    described = {}
    for norm in ("bn", "gkn", "sn"):
        model, _ = build(compose([*small, f"norm={norm}"]))
        described[norm] = SimpleNamespace(**{"mixture": None, **describe(model, {})})
    assert described["bn"].mixture is None and described["bn"].gains == {}
    assert described["gkn"].order == list(described["gkn"].gains) and "bn" in described["gkn"].order[0]
    assert list(described["sn"].mixture) == described["sn"].order
    for layer in described["sn"].mixture.values():
        np.testing.assert_allclose([layer["mean"], layer["var"]], 1 / 3, rtol=1e-6)
