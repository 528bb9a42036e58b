"""The talk's normalizers against public code's numbers (tests/golden/README.md, talk/)."""

import pytest
import torch
from helpers import error, talk_golden
from torch import Tensor, nn

from kalmannorm import set_progress
from kalmannorm.norm import InstanceBatchNorm, IterNorm, PopulationNorm, SparseSwitchableNorm, SwitchableNorm, ZCANorm
from kalmannorm.norm.modes import finish_gradients
from kalmannorm.norm.sparse import sparsestmax


def run_step(layer: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of one step, by the golden files' keys."""
    x = data["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(data["dy"])
    assert x.grad is not None
    gradients = {f"g:{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def set_parameters(layer: nn.Module, data: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in data.items():
            if key.startswith("p:"):
                parameter = layer.get_parameter(key.removeprefix("p:"))
                parameter.copy_(value.view_as(parameter))


def compare(layer: nn.Module, data: dict[str, Tensor], buffers: dict[str, str]) -> None:
    """`buffers`: theirs -> ours."""
    set_parameters(layer, data)
    found = run_step(layer, data)
    keys = [key for key in data if key in ("y", "dx") or key.startswith("g:")]
    assert set(found) == set(keys)
    for key in keys:
        expected = data[key].view_as(found[key])
        # Two equal weights of an edge that is pushed outwards have no gradient but rounding.
        size = max(expected.abs().max().item(), 1) if "_weight" in key else expected.abs().max().item()
        assert (found[key] - expected).abs().max() <= 1e-5 * size, key
    for theirs, ours in buffers.items():
        buffer = layer.get_buffer(ours)
        assert error(buffer, data[f"b:{theirs}"].view_as(buffer)) <= 1e-5, ours
    if "y_eval" in data:
        assert error(layer.eval()(data["x"]).detach(), data["y_eval"]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "options"), [("ibn_layer_resnet", {}), ("ibn_layer_densenet", {"ratio": 0.4, "first": "bn"})]
)
def test_ibn_layer(name, options):
    data = talk_golden(name)
    layer = InstanceBatchNorm(data["x"].shape[1], **options)
    theirs = [key.removeprefix("b:") for key in data if key.startswith("b:")]
    assert {key.removeprefix("p:") for key in data if key.startswith("p:")} | set(theirs) == set(layer.state_dict()) - {
        "BN.num_batches_tracked"
    }
    compare(layer, data, {key: key for key in theirs})


def test_sparsestmax_and_its_jacobian():
    data = talk_golden("sparsestmax")
    for i, radius in enumerate(data["radius"]):
        for k, z in enumerate(data["z"]):
            assert (sparsestmax(z, radius) - data["p"][i, k]).abs().max() <= 1e-6, (radius, z)
            found = torch.autograd.functional.jacobian(lambda z, radius=radius: sparsestmax(z, radius), z)
            expected = data["jacobian"][i, k]
            assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max()), (radius, z)


def test_sparsestmax_cut_differs_where_an_edge_came_first():
    data = talk_golden("sparsestmax")
    differs = 0
    for i, radius in enumerate(data["radius"]):
        for k, z in enumerate(data["z"]):
            away = (sparsestmax(z, radius, first_face="cut") - data["p"][i, k]).abs().max() > 1e-5
            assert not away or (sparsestmax(z, 0.0) == 0).sum() == 1, (radius, z)
            differs += int(away)
    assert differs == 26


@pytest.mark.parametrize(("name", "options"), [("sn2d", {"in_unbiased": True}), ("sn2d_population", {})])
def test_sn_layer(name, options):
    data = talk_golden(name)
    layer = SwitchableNorm(data["x"].shape[1], moving_unbiased=False, **options)
    assert layer.running_var is not None
    layer.running_var.zero_()  # as theirs starts
    compare(layer, data, {"running_mean": "running_mean", "running_var": "running_var"})


@pytest.mark.parametrize(
    ("name", "radius"),
    [
        ("ssn2d_radius03", 0.3),
        ("ssn2d_radius03_population", 0.3),
        ("ssn2d_radius06_population", 0.6),
        ("ssn2d_fixed_population", 0.9),
    ],
)
def test_ssn_layer(name, radius):
    data = talk_golden(name)
    unbiased = not name.endswith("population")
    layer = SparseSwitchableNorm(data["x"].shape[1], momentum=0.003, moving_unbiased=False, in_unbiased=unbiased)
    assert layer.running_var is not None
    layer.running_var.zero_()  # as theirs starts
    set_progress(layer, radius)
    set_parameters(layer, data)
    if "mean_ratios" in data:
        for kind, ratio in layer.weights.items():
            assert error(torch.tensor(ratio), data[f"{kind}_ratios"]) <= 1e-6
    fixed = "after:mean_weight" in data
    if fixed:  # zeros, which must be met exactly
        assert not data["g:mean_weight"].any() and not data["g:var_weight"].any()
    compare(layer, data, {"running_mean": "running_mean", "running_var": "running_var"})
    for key in ("mean_weight", "var_weight"):
        after = data[f"after:{key}"] if fixed else data[f"p:{key}"]
        assert torch.equal(layer.get_parameter(key).detach(), after)
    assert layer.chosen == (("ln", "bn") if fixed else (None, None))


@pytest.mark.parametrize(("name", "group", "iterations"), [("iternorm_T5_d4", 4, 5), ("iternorm_T3_d8", 8, 3)])
def test_iternorm(name, group, iterations):
    data = talk_golden(name)
    layer = IterNorm(data["x"].shape[1], group=group, iterations=iterations)
    compare(layer, data, {"running_mean": "running_mean", "running_wm": "running_whitening"})


def test_zca_in_groups_of_channels():
    data = talk_golden("zca_groups")
    group, eps = int(data["group"]), float(data["eps"])
    layer = ZCANorm(data["x"].shape[1], group=group, eps=eps, momentum=1.0)
    data = {{"weight": "p:weight", "bias": "p:bias"}.get(key, key): value for key, value in data.items()}
    data |= {"b:mean": data["mean"], "b:whitening": data["whitening"]}
    set_parameters(layer, data)
    found = run_step(layer, data)
    assert error(found["y"], data["y"]) <= 1e-5 and error(found["dx"], data["dx"]) <= 1e-5
    assert error(layer.running_mean, data["mean"]) <= 1e-5
    assert error(layer.get_buffer("running_whitening"), data["whitening"]) <= 1e-5


def test_zca_of_pooled_channel_groups():
    """Public code's form: one matrix for all groups, so ours of the groups as if they were images."""
    data = talk_golden("dbn_pooled_d4")
    channels = data["x"].shape[1]
    layer = ZCANorm(4)
    x = data["x"].clone().requires_grad_()
    y = layer(x.unflatten(1, (channels // 4, 4)).flatten(0, 1)).view_as(x) * data["p:weight"] + data["p:bias"]
    y.backward(data["dy"])
    assert error(y.detach(), data["y"]) <= 1e-5
    assert x.grad is not None and error(x.grad, data["dx"]) <= 1e-5
    assert error(layer.running_mean, data["b:running_mean"][:, 0]) <= 1e-5
    assert error(layer.get_buffer("running_whitening")[0], data["b:running_projection"]) <= 1e-5


@pytest.mark.parametrize("variant", ["talk", "fisher", "images"])
def test_gamma_decay(variant):
    data = talk_golden("gamma_decay")
    layer = PopulationNorm(3, gamma_decay=(variant, data["M"].item()), gamma_cap=None, eps=0.0)
    with torch.no_grad():
        layer.weight.copy_(data["gamma"])
        layer.bias.copy_(data["beta"])
    y = layer(data["h"])
    y.backward(data["dl"] / len(data["h"]))
    assert layer.weight.grad is not None and layer.decay is not None and layer.decay.sums is not None
    without = layer.weight.grad.clone()
    # Their tau2 and omega2 are not divided by the variance and its square yet.
    f_gamma, f_beta, tau2, omega2, fourth, sigmoid = layer.decay.sums[:-1] / layer.decay.sums[-1]
    assert error(f_gamma, data["F_gamma"]) <= 1e-5 and error(f_beta, data["F_beta"]) <= 1e-5
    assert error(tau2 * data["var"], data["tau2"]) <= 1e-5 and error(omega2 * data["var"] ** 2, data["omega2"]) <= 1e-5
    if variant != "images":
        assert error(fourth - 3, data["rho"]) <= 1e-5 and error(sigmoid, data["sigmoid"]) <= 1e-5
    finish_gradients(layer)
    assert error(layer.decay.zeta, data[f"zeta_{variant}"]) <= 1e-5
    assert error(layer.weight.grad - without, data[f"dgamma_{variant}"]) <= 1e-5
    penalty = (layer.decay.coefficients * layer.weight.detach().square()).sum()
    assert error(penalty, data[f"penalty_{variant}"].float()) <= 1e-5


def test_a_coefficient_is_held_at_the_cap():
    data = talk_golden("gamma_decay")
    layer = PopulationNorm(3, gamma_decay=("fisher", data["M"].item()), gamma_cap=2.0, eps=0.0)
    layer(data["h"]).backward(data["dl"] / len(data["h"]))
    assert layer.weight.grad is not None and layer.decay is not None
    without = layer.weight.grad.clone()
    finish_gradients(layer)
    zeta = layer.decay.zeta
    assert (zeta > 2).any() and not (zeta > 2).all() and int(layer.decay.capped) == 1
    assert error(layer.weight.grad - without, 2 * zeta.clamp(max=2)) <= 1e-5
