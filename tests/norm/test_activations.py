"""Moments of activations: against dense numerical integration and samples, at zero variance, and their gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import error, leaves, random_belief
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from kalmannorm import Belief
from kalmannorm.norm import activations
from kalmannorm.norm import moments as belief

D = torch.float64
SLOPES = torch.tensor([0.25, -0.5, 0.0, 1.0, 2.0], dtype=D)
Rule = Callable[[Belief], Belief]
Curve = Callable[[Tensor], Tensor]

CLOSED: dict[str, tuple[Rule, Curve]] = {
    "leaky_relu": (lambda b: activations.leaky_relu(b, 0.1), lambda x: F.leaky_relu(x, 0.1)),
    "abs": (lambda b: activations.leaky_relu(b, -1.0), torch.abs),
    "relu6": (lambda b: activations.clamp(b, 0.0, 6.0), F.relu6),
    "hardtanh": (lambda b: activations.clamp(b, -1.0, 0.5), lambda x: F.hardtanh(x, -1, 0.5)),
    "min": (lambda b: activations.clamp(b, -0.3), lambda x: x.clamp(min=-0.3)),
    "max": (lambda b: activations.clamp(b, None, 0.7), lambda x: x.clamp(max=0.7)),
    "hardsigmoid": (activations.hardsigmoid, F.hardsigmoid),
}
CURVED: dict[str, tuple[Rule, Curve]] = {
    "sigmoid": (activations.sigmoid, torch.sigmoid),
    "tanh": (activations.tanh, torch.tanh),
    "silu": (activations.silu, F.silu),
    "gelu": (activations.gelu, F.gelu),
    "hardswish": (activations.hardswish, F.hardswish),
    "mish": (activations.mish, F.mish),
    "softplus": (lambda b: activations.softplus(b, 2.0), lambda x: F.softplus(x, 2)),
    "elu": (lambda b: activations.elu(b, 0.5), lambda x: F.elu(x, 0.5)),
    "selu": (activations.selu, F.selu),
}
ALL = CLOSED | CURVED
MOVING = torch.linspace(-4, 4, 17, dtype=D), torch.linspace(-7, 7, 15, dtype=D)  # in deviations, and in units of x


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def integrated(curve: Curve, b: Belief) -> Belief:
    """The trapezoidal rule on 16,001 points, in float64."""
    z = torch.arange(-8, 8 + 1e-9, 1 / 1000, dtype=D)[:, None]
    weight = torch.exp(-z * z / 2)
    weight /= weight.sum()
    value = curve(b.mean + b.var.sqrt() * z)
    mean = (weight * value).sum(0, keepdim=True)
    return Belief(mean, (weight * (value - mean) ** 2).sum(0, keepdim=True))


@pytest.mark.parametrize("sd", [1e-2, 0.3, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("name", ALL)
def test_moments(name: str, sd: float) -> None:
    """Off by at most this share of the largest standard deviation or variance that the activation leaves of such a sd.

    Wide distributions see a sigmoid as a step, which a rule with 32 nodes meets to half a percent.
    """
    rule, curve = ALL[name]
    mean = torch.cat([MOVING[0] * sd, MOVING[1]])[None]
    b = Belief(mean, torch.full_like(mean, sd**2))
    exact = integrated(curve, b)
    size = exact.var.max().sqrt()
    tolerance = 1e-5 if sd < 1 else 1e-4 if sd < 30 else 1e-2
    # In float32 the variance between two ends is a difference of variances of the size of sd^2.
    for dtype, least in ((D, 0.0), (torch.float32, max(1e-4, 4e-7 * sd**2))):
        found = rule(Belief(b.mean.to(dtype), b.var.to(dtype)))
        assert found.mean.dtype == found.var.dtype == dtype and (found.var >= 0).all()
        assert (found.mean - exact.mean).abs().max() <= max(tolerance, least) * size
        assert (found.var - exact.var).abs().max() <= max(tolerance, least) * size**2


@pytest.mark.parametrize("name", ALL)
def test_moments_are_those_of_a_sample(name: str) -> None:
    rule, curve = ALL[name]
    b = Belief(torch.tensor([[-3.0, -1.5, -0.2, 0.0, 0.7, 2.0]]), torch.tensor([[4.0, 1.0, 0.3, 2.0, 0.5, 1.5]]))
    draws = curve(b.mean + b.var.sqrt() * torch.randn(200_000, 6))
    found = rule(b)
    assert (found.mean - draws.mean(0)).abs().max() < 2e-2 and (found.var - draws.var(0)).abs().max() < 5e-2


def test_slope_per_channel() -> None:
    b = random_belief(3, 5, D)
    slope = SLOPES.clone().requires_grad_()
    found = activations.leaky_relu(b, slope)
    for i, one in enumerate(SLOPES.tolist()):
        alone = activations.leaky_relu(Belief(b.mean[:, i : i + 1], b.var[:, i : i + 1]), one)
        assert error(found.mean[:, i].detach(), alone.mean[:, 0]) < 1e-13
        assert error(found.var[:, i].detach(), alone.var[:, 0]) < 1e-12
    assert error(activations.leaky_relu(b, 0.0).var, belief.relu(b).var) < 1e-13
    single = activations.leaky_relu(b, torch.tensor([0.3], dtype=D))  # PReLU's default: one for all
    assert error(single.mean, activations.leaky_relu(b, 0.3).mean) < 1e-13


@pytest.mark.parametrize("name", ALL)
def test_gradients(name: str) -> None:
    """Finite differences; quadrature's derivatives are those of the moments, not of its nodes."""
    mean, var = leaves(2 * torch.randn(2, 5, dtype=D), 3 * torch.rand(2, 5, dtype=D) + 0.01)
    assert gradcheck(lambda m, v: tuple(ALL[name][0](Belief(m, v))), (mean, var), rtol=1e-3, atol=1e-5)


def test_gradient_of_the_slope() -> None:
    mean, var, slope = leaves(*random_belief(2, 5, D), SLOPES)
    assert gradcheck(lambda m, v, s: tuple(activations.leaky_relu(Belief(m, v), s)), (mean, var, slope))


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("var", [0.0, 1e-45, 1e-38, 1e-12])
@pytest.mark.parametrize("name", ALL)
def test_at_zero_variance(name: str, var: float, dtype: torch.dtype) -> None:
    """f(mean) and next to no variance; gradients finite, with respect to the mean the slope, bends included."""
    rule, curve = ALL[name]
    points = torch.tensor([[-1e5, -3, -2, -1, -0.3, 0, 0.5, 0.7, 2, 3, 6, 1e5]], dtype=dtype)
    mean, variance = leaves(points, torch.full_like(points, var))
    found = rule(Belief(mean, variance))
    sd = var**0.5
    assert ((found.mean - curve(points)).abs() <= 2e-6 * curve(points).abs().clamp_min(1) + sd).all()
    assert (found.var <= 5 * var).all()
    (found.mean.sum() + found.var.sum()).backward()
    assert mean.grad is not None and torch.isfinite(mean.grad).all()
    assert variance.grad is not None and torch.isfinite(variance.grad).all()
    smooth = torch.tensor([0, 2, 8, 11])  # away from every bend
    (slope,) = torch.autograd.grad(curve(at := points.clone().requires_grad_()).sum(), at)
    assert (mean.grad - slope)[:, smooth].abs().max() < 2e-3


@pytest.mark.parametrize("name", ALL)
def test_second_derivatives(name: str) -> None:
    beliefs = leaves(*random_belief(2, 3, D))
    assert gradgradcheck(lambda m, v: tuple(ALL[name][0](Belief(m, v))), beliefs, rtol=1e-2, atol=1e-4)


def test_float32_under_autocast() -> None:
    b = random_belief(2, 4)
    plain = [rule(b) for rule, _ in ALL.values()]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [rule(b) for rule, _ in ALL.values()]
    for p, c in zip(plain, cast, strict=True):
        assert torch.equal(p.mean, c.mean) and torch.equal(p.var, c.var)
