"""How activations change a belief: mean and variance of f(x) for x ~ N(mean, var), per row and channel.

Piecewise linear functions are in closed form, from the moments of a rectified Gaussian (moments.relu), curved ones by
quadrature. Every function takes a belief [rows, C] and returns one, in float32 or wider, with finite gradients at
variance 0.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.norm.belief import Belief
from kalmannorm.norm.groups import in_graph
from kalmannorm.norm.moments import applied, full_precision, relu, scale, shift

# --- piecewise linear: closed form ------------------------------------------------------------------------------------


@full_precision
def leaky_relu(belief: Belief, slope: float | Tensor = 0.01) -> Belief:
    """Propagate a belief through max(0, x) + slope min(0, x); `slope` is a number, or [C] or [1] (PReLU).

    E+, V+ are the moments of max(0, x), and E-, V- those of max(0, -x). One of the two is always 0, so that their
    covariance is -E+ E-: mean = E+ - slope E-, var = V+ + slope^2 V- + 2 slope E+ E-.
    """
    if isinstance(slope, Tensor):
        slope = slope.to(belief.mean.dtype)
    above, below = relu(belief), relu(Belief(-belief.mean, belief.var))
    var = above.var + slope**2 * below.var + 2 * slope * above.mean * below.mean
    return Belief(above.mean - slope * below.mean, var.clamp_min(0))


@full_precision
def clamp(belief: Belief, low: float | None = None, high: float | None = None) -> Belief:
    """Propagate a belief through min(max(x, low), high): ReLU6, Hardtanh.

    That is low + A - B with A = max(0, x - low) and B = max(0, x - high), where A = B + high - low wherever B > 0.
    """
    if low is None and high is None:
        return belief
    if high is None:
        return shift(relu(shift(belief, -low)), low)  # type: ignore[operator, arg-type]
    if low is None:
        return scale(clamp(scale(belief, -1.0), -high), -1.0)
    width = high - low
    # Mirror means in the upper half into the lower one, where the two terms do not cancel.
    from_low = belief.mean - low
    mirrored = from_low > width / 2
    mean = torch.where(mirrored, width - from_low, from_low)
    a, b = relu(Belief(mean, belief.var)), relu(Belief(mean - width, belief.var))
    inside = (a.mean - b.mean).clamp(0, width)
    var = a.var - b.var - 2 * b.mean * (width - inside)
    return Belief(low + torch.where(mirrored, width - inside, inside), var.clamp(0, width**2 / 4))


def hardsigmoid(belief: Belief) -> Belief:
    """Propagate a belief through min(max(x + 3, 0), 6) / 6."""
    return scale(clamp(shift(belief, 3.0), 0.0, 6.0), 1 / 6)


# --- curved: quadrature -----------------------------------------------------------------------------------------------


def _gauss_legendre(number: int) -> list[tuple[float, float]]:
    """Return Gauss-Legendre nodes in (0, 1) and weights, from the eigenvalues of the Jacobi matrix (Golub & Welsch)."""
    k = torch.arange(1, number, dtype=torch.float64)
    beside = torch.diag(k / (4 * k * k - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(beside + beside.T)
    return list(zip(((1 + nodes) / 2).tolist(), vectors[0].square().tolist(), strict=True))


_NODES = _gauss_legendre(16)
_REACH = 6.0  # standard deviations to integrate over; 2e-9 of the distribution lie beyond
_NEAR = 3.0  # standard deviations within which the interval is split at a bend
_NARROW = 1e-3  # below this standard deviation, relative to max(1, |mean|), a curve is taken for a straight line


def _sigmoid(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    y = torch.sigmoid(x)
    return y, y * (1 - y)


def _tanh(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x)
    return y, 1 - y * y


def _silu(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _gelu(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    below = torch.special.ndtr(x)
    return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _hardswish(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    slope = torch.where(x < -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0)).to(x.dtype)
    return x * (x + 3).clamp(0, 6) / 6, slope


def _mish(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    t = torch.tanh(F.softplus(x))
    return x * t, t + x * (1 - t * t) * torch.sigmoid(x)


def _softplus(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
    return F.softplus(x), torch.sigmoid(x)


def _elu(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    low = x.clamp_max(0)
    return torch.where(x > 0, x, alpha * torch.expm1(low)), torch.where(x > 0, 1.0, alpha * torch.exp(low))


def _nodes(like: Tensor) -> Tensor:
    """Return nodes and weights, [16, 2, 1, 1], cached per device: copying them from the host stalls every forward."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return like.new_tensor(_NODES).view(-1, 2, 1, 1)
    where = (like.device, like.dtype)
    if where not in _nodes_on:
        _nodes_on[where] = like.new_tensor(_NODES).view(-1, 2, 1, 1)
    return _nodes_on[where]


_nodes_on: dict[tuple[torch.device, torch.dtype], Tensor] = {}

# Each curve's value and slope at x, and the points where it bends most.
_Curve = Callable[[Tensor, float], tuple[Tensor, Tensor]]
_CURVES: dict[str, tuple[_Curve, tuple[float, ...]]] = {
    "sigmoid": (_sigmoid, (0.0,)),
    "tanh": (_tanh, (0.0,)),
    "silu": (_silu, (0.0,)),
    "gelu": (_gelu, (0.0,)),
    "hardswish": (_hardswish, (-3.0, 3.0)),
    "mish": (_mish, (0.0,)),
    "softplus": (_softplus, (0.0,)),
    "elu": (_elu, (0.0,)),
}


class _CurvedMoments(torch.autograd.Function):
    """Mean E and variance V of f(N(mean, var)), with their derivatives: backward needs four tensors [rows, C] more.

    Uses Gauss-Legendre nodes on each side of f's bends. As many Gauss-Hermite nodes are as good for narrow
    distributions, but miss a bend that lies between two of them: at standard deviation 10 they are off by percents.
    dE = E[f'] dmean + E[f' z] / (2 sd) dvar and dV = 2 E[(f - E) f'] dmean + E[(f - E) f' z] / sd dvar. Differentiable
    twice.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, name: str, parameter: float) -> tuple[Tensor, Tensor]:
        expected, variance, *derivatives = _integrals(mean, var, name, parameter)
        ctx.save_for_backward(mean, var, *derivatives)
        ctx.curve = name, parameter
        return expected, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, *derivatives = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True wants them as functions of mean and variance
            derivatives = _integrals(mean, var, *ctx.curve)[2:]
        mean_by_mean, mean_by_var, var_by_mean, var_by_var = derivatives
        dmean, dvar = grads
        return dmean * mean_by_mean + dvar * var_by_mean, dmean * mean_by_var + dvar * var_by_var, None, None


def _integrals(mean: Tensor, var: Tensor, name: str, parameter: float) -> tuple[Tensor, ...]:
    """Return E and V, the derivatives of E by mean and by var, and those of V by mean and by var."""
    curve, bends = _CURVES[name]
    narrowest = (_NARROW * mean.abs().clamp_min(1)).square()
    straight = var < narrowest
    spread = torch.where(straight, narrowest, var)
    sd = spread.sqrt()
    ends = [torch.full_like(mean, -_REACH)]
    ends += [((bend - mean) / sd).clamp(-_NEAR, _NEAR) for bend in bends]
    ends += [torch.full_like(mean, _REACH)]
    nodes, weights = _nodes(mean).unbind(1)  # [16, 1, 1] each
    lengths = [ends[i + 1] - ends[i] for i in range(len(ends) - 1)]
    z = torch.cat([left + length * nodes for left, length in zip(ends[:-1], lengths, strict=True)])
    share = torch.cat([length * weights for length in lengths])
    share = share * torch.exp(-0.5 * z * z)
    share = share / share.sum(0)

    value, slope = curve(mean + sd * z, parameter)
    expected = (share * value).sum(0)
    off = value - expected
    pull, lift = share * slope, share * slope * off
    variance = (share * off * off).sum(0)
    # Where the curve is nearly straight, V is proportional to var, and so is E - f(mean).
    proportion = torch.where(straight, var / spread, 1.0)
    at_mean = curve(mean, parameter)[0]
    return (
        at_mean + (expected - at_mean) * proportion,
        variance * proportion,
        pull.sum(0),
        (pull * z).sum(0) / (2 * sd),
        2 * lift.sum(0) * proportion,
        torch.where(straight, variance / spread, (lift * z).sum(0) / sd),
    )


@full_precision
def _curved(belief: Belief, name: str, parameter: float = 1.0) -> Belief:
    return Belief(*_curved_moments(*belief, name, parameter))


@in_graph
def _curved_moments(mean: Tensor, var: Tensor, name: str, parameter: float) -> tuple[Tensor, Tensor]:
    return applied(_CurvedMoments, mean, var, name, parameter)  # type: ignore[no-any-return]


sigmoid = functools.partial(_curved, name="sigmoid")
tanh = functools.partial(_curved, name="tanh")
silu = functools.partial(_curved, name="silu")  # x sigmoid(x)
gelu = functools.partial(_curved, name="gelu")  # x Phi(x), also for its approximation by a tanh: off by at most 5e-4
hardswish = functools.partial(_curved, name="hardswish")  # x min(max(x + 3, 0), 6) / 6
mish = functools.partial(_curved, name="mish")  # x tanh(softplus(x))


def softplus(belief: Belief, beta: float = 1.0) -> Belief:
    """Propagate a belief through log(1 + exp(beta x)) / beta."""
    return scale(_curved(scale(belief, beta), "softplus"), 1 / beta)


def elu(belief: Belief, alpha: float = 1.0) -> Belief:
    """Propagate a belief through x for x > 0, else alpha (exp(x) - 1)."""
    return _curved(belief, "elu", alpha)


def selu(belief: Belief) -> Belief:
    """Propagate a belief through scaled ELU, with the constants of its paper (Klambauer et al. 2017)."""
    return scale(elu(belief, 1.6732632423543772), 1.0507009873554805)
