"""PN, gamma decay and the noise of mean and deviation apart: the talk's formula against Monte Carlo, identities."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error
from torch import nn

from kalmannorm import NORMS, convert, set_progress
from kalmannorm.norm import BatchNorm, PopulationNorm, SplitBatchNorm
from kalmannorm.norm.modes import finish_gradients

D = torch.float64


def test_the_formula_is_what_bn_costs_more_than_pn():
    """A one-layer model with loss' = softplus(hbar) - y, so loss'' = sigmoid(hbar), and the y that PN meets: E over
    batches of 32 Gaussian values of the loss under BN, minus that under PN, against zeta gamma^2."""
    m, gamma, beta = 32, 1.3, 0.2
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(400_000 // m, m, generator=generator, dtype=D)

    of_pn = gamma * h + beta
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.legendre.leggauss(12))

    def more_than_pn(mean, sd):
        """Mean of the loss at hbar minus that at PN's: the integral of its derivative between them, by quadrature."""
        hbar = gamma * (h - mean) / sd + beta
        half = (hbar - of_pn) / 2
        return sum(w * (half * (F.softplus(of_pn + half * (1 + n)) - F.softplus(of_pn))).mean()
                   for n, w in zip(nodes, weights, strict=True))  # fmt: skip

    mean, sd = h.mean(1, keepdim=True), h.var(1, keepdim=True, correction=0).sqrt()
    measured = more_than_pn(mean, sd)
    x = torch.randn(100_000, 1, generator=generator, dtype=D)
    sigmoid = torch.sigmoid(gamma * x + beta)
    f_gamma = (sigmoid * x.square()).mean()  # E[l'' h~^2]
    zeta = 2 * f_gamma / (8 * m) + sigmoid.mean() / (2 * m)
    assert abs(measured - zeta * gamma**2) < 0.1 * measured
    assert abs(zeta * gamma**2 - 0.0211) < 0.001
    of_mean = more_than_pn(mean, 1)
    assert abs(of_mean - sigmoid.mean() / (2 * m) * gamma**2) < 0.1 * of_mean


def test_images_is_fisher_on_maps_of_one_pixel():
    found = []
    for variant in ("images", "fisher"):
        torch.manual_seed(0)
        layer = PopulationNorm(5, gamma_decay=(variant, 8), gamma_cap=None, eps=0.0).double()
        layer(torch.randn(64, 5, 1, 1, dtype=D)).cos().mean().backward()
        finish_gradients(layer)
        found.append(layer.decay.zeta)
    assert error(*found) < 1e-10


def test_gamma_decay_is_one_over_the_batch():
    found = []
    for batch in (8, 16):
        torch.manual_seed(0)
        layer = PopulationNorm(5, gamma_decay=("images", batch), gamma_cap=None)
        layer(torch.randn(64, 5, 4, 4)).cos().mean().backward()
        finish_gradients(layer)
        found.append(layer.decay.zeta)
    assert error(found[0], 2 * found[1]) < 1e-6


def test_gamma_decay_of_bn_is_measured_in_its_own_groups():
    x, found = torch.randn(8, 5, 4, 4, dtype=D), []
    for decay in (("images", 8), None):
        layer = NORMS["bn"](5, stat_batch=2, gamma_decay=decay, gamma_cap=None, eps=1e-12).double()
        layer(x).cos().mean().backward()
        finish_gradients(layer)
        found.append(layer.weight.grad)
    normalized = BatchNorm(5, stat_batch=2, affine=False, eps=1e-12).double()(x)
    own = -normalized.sin() / (5 * 16)  # of each image's loss, gamma 1, beta 0
    f_gamma = (own * normalized).sum((2, 3)).square().mean(0)
    f_beta = own.sum((2, 3)).square().mean(0)
    tau2, omega2 = normalized.mean((2, 3)).square().mean(0), (normalized.square().mean((2, 3)) - 1).square().mean(0)
    zeta = omega2 * f_gamma / (8 * 8) + tau2 * f_beta / (2 * 8)
    assert error(found[0] - found[1], 2 * zeta) < 1e-9
    with pytest.raises(ValueError, match="leave out mean_batch"):
        NORMS["bn"](5, stat_batch=2, gamma_decay=("images", 8), mean_batch="whole")


@pytest.mark.parametrize("variant", ["images", "fisher", "talk"])
def test_a_constant_channel_keeps_a_finite_coefficient(variant):
    layer = PopulationNorm(3, gamma_decay=(variant, 8))
    x = torch.randn(16, 3, 4, 4)
    x[:, 1] = 0
    layer(x).cos().mean().backward()
    finish_gradients(layer)
    assert torch.isfinite(layer.decay.zeta).all() and torch.isfinite(layer.weight.grad).all()


def test_coefficients_are_averaged_and_kept_in_the_state_dict():
    torch.manual_seed(0)
    layer, single = (PopulationNorm(5, gamma_decay=("images", 8)) for _ in range(2))
    batches = [torch.randn(16, 5, 4, 4) * (i + 1) + torch.randn(16, 1, 1, 1) for i in range(3)]
    expected = None
    for x in batches:
        for one in (layer, single):
            one.zero_grad()
            one(x).cos().mean().backward()
        single.decay.steps.zero_()  # each of its steps is the first
        finish_gradients(layer)
        finish_gradients(single)
        now = single.decay.zeta.clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    assert error(layer.decay.zeta, expected) < 1e-6
    fresh = PopulationNorm(5, gamma_decay=("images", 8))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.decay.zeta, layer.decay.zeta) and int(fresh.decay.steps) == 3


def test_micro_batches_of_statistics_groups_measure_one_coefficient():
    """With statistics of groups, so that micro-batches compute what the batch does."""
    torch.manual_seed(0)
    x = torch.randn(16, 5, 4, 4, dtype=D)
    found = []
    for parts in (1, 2):
        layer = PopulationNorm(5, stat_batch=4, gamma_decay=("images", 8)).double()
        layer.decay.micro_batches = parts
        for part in range(parts):
            (layer(x[part::parts]).cos().mean() / parts).backward()
        finish_gradients(layer)
        found.append((layer.decay.zeta, layer.weight.grad))
    for one, two in zip(*found, strict=True):
        assert error(two, one) < 1e-10


def test_constant_decay_is_plain_weight_decay_of_gamma():
    layer = PopulationNorm(5, gamma_decay=("constant", 0.01))
    plain = PopulationNorm(5)
    x = torch.randn(16, 5, 4, 4)
    for one in (layer, plain):
        one(x).cos().mean().backward()
        finish_gradients(one)
    assert error(layer.weight.grad - plain.weight.grad, 0.02 * layer.weight.detach()) < 1e-5
    assert error(layer.bias.grad, plain.bias.grad) < 1e-5


def test_pn_without_options_is_bn_of_the_whole_batch():
    x = torch.randn(8, 5, 4, 4)
    assert torch.equal(NORMS["pn"](5)(x), BatchNorm(5)(x))


def test_memory_normalizes_by_the_averages_with_bn_s_gradient():
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4, 4, dtype=D, requires_grad=True)
    layer = PopulationNorm(5, estimator="memory").double()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    column = (1, -1, 1, 1)
    past = (x - layer.running_mean.view(column)) / (layer.running_var + layer.eps).sqrt().view(column)
    scale = ((x.var((0, 2, 3), correction=0) + layer.eps) / (layer.running_var + layer.eps)).sqrt().detach()
    y = layer(x)
    assert error(y.detach(), past.detach()) < 1e-12
    (gradient,) = torch.autograd.grad(y.cos().sum(), x)
    # BN's, of an output that is r times as large.
    bn = BatchNorm(5).double()
    z = bn(x) * scale.view(column)
    (expected,) = torch.autograd.grad((z * -past.detach().sin()).sum(), x)
    assert error(gradient, expected) < 1e-10
    set_progress(layer, 0.01)  # the warm-up
    assert error(layer(x).detach(), BatchNorm(5).double()(x).detach()) < 1e-12


def test_frozen_has_constants():
    x = torch.randn(8, 5, 4, 4, requires_grad=True)
    layer = PopulationNorm(5, estimator="frozen")
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert error(y.detach(), x.detach() / (1 + layer.eps) ** 0.5) < 1e-6
    assert error(gradient, torch.full_like(x, (1 + layer.eps) ** -0.5)) < 1e-6
    assert layer.running_mean.any()  # averaged all the same


@pytest.mark.parametrize("part", ["mean_batch", "var_batch"])
def test_mean_and_deviation_of_different_groups(part):
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4, 4, dtype=D)
    layer = NORMS["bn"](5, stat_batch=2, **{part: "whole"}).double()
    assert isinstance(layer, SplitBatchNorm)
    y = layer(x).detach()
    for group in range(4):
        own = x[group::4]
        of_mean, of_var = (x, own) if part == "mean_batch" else (own, x)
        mean, var = of_mean.mean((0, 2, 3), keepdim=True), of_var.var((0, 2, 3), correction=0, keepdim=True)
        assert error(y[group::4], (own - mean) / (var + layer.eps).sqrt()) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mean"}, "estimator must be"),
        ({"gamma_decay": "images"}, "gamma_decay must be"),
        ({"gamma_decay": ("image", 8)}, "gamma_decay must be one of"),
        ({"gamma_decay": ("images", 0)}, "a number above 0"),
        ({"gamma_decay": ("images", 8), "estimator": "memory"}, "needs estimator='whole'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PopulationNorm(4, **options)


# --- identities of the talk's part 2 ---


def test_the_jacobian_of_bn():
    """dh^/dh = gamma / sigma (I - (h~ h~^T + 1 1^T) / M), of trace gamma (M - 2) / sigma."""
    m, gamma = 7, 1.7
    layer = BatchNorm(1, eps=1e-15).double()
    nn.init.constant_(layer.weight, gamma)
    h = torch.randn(m, 1, dtype=D)
    found = torch.autograd.functional.jacobian(lambda h: layer(h), h)[:, 0, :, 0]
    sigma = h.var(correction=0).sqrt()
    normalized = (h - h.mean()) / sigma
    expected = gamma / sigma * (torch.eye(m, dtype=D) - (normalized @ normalized.T + 1) / m)
    assert error(found, expected) < 1e-12
    assert error(found.trace(), gamma / sigma * (m - 2)) < 1e-12


def test_sums_and_squares_of_what_bn_returns():
    m, gamma, beta = 9, 0.7, -0.4
    layer = BatchNorm(1, eps=1e-15).double()
    h = torch.randn(m, 1, dtype=D)
    assert layer(h).sum().abs() < 1e-12
    nn.init.constant_(layer.weight, gamma)
    nn.init.constant_(layer.bias, beta)
    assert error(layer(h).detach().square().sum(), torch.tensor(m * (gamma**2 + beta**2), dtype=D)) < 1e-12


def test_a_converted_network_decays_every_gamma():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    model = convert(plain, "pn", gamma_decay=("images", 8))
    (10 * model(torch.randn(8, 3, 8, 8)).cos().sum((1, 2, 3)).mean()).backward()
    before = [m.weight.grad.clone() for m in model.modules() if isinstance(m, PopulationNorm)]
    finish_gradients(model)
    layers = [m for m in model.modules() if isinstance(m, PopulationNorm)]
    assert len(layers) == 2
    for layer, gradient in zip(layers, before, strict=True):
        assert (layer.decay.zeta > 0).all()
        assert error(layer.weight.grad - gradient, 2 * layer.decay.coefficients * layer.weight.detach()) < 1e-4
