"""How the operations between two normalizers change a belief (the predict step, paper Eq. 7 lines 1 and 3).

Every rule takes beliefs and returns the belief of the operation's output, in float32 or wider, under autocast too.
Curved activations: activations.py; the sampling predictor: sampling.py.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kalmannorm.norm.belief import Belief, Carried
from kalmannorm.norm.groups import is_transformed

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(rule: Callable[P, T]) -> Callable[P, T]:
    """In half precision, as autocast runs the small matrix products below, the prior would lose most of its digits."""

    @functools.wraps(rule)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        belief: Any = args[0]
        device = belief.mean.device.type
        if belief.mean.dtype in (torch.float16, torch.bfloat16):  # as FSDP casts what is passed to a module
            args = Belief(belief.mean.float(), belief.var.float()), *args[1:]  # type: ignore[assignment]
        with without_autocast(device):
            return rule(*args, **kwargs)

    return wrapped


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Of a type of devices; "meta", of shapes alone, knows none."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`; under transforms the operations of its forward."""
    if torch.compiler.is_compiling() or not is_transformed():
        return function.apply(*args)
    return function.forward(SimpleNamespace(save_for_backward=lambda *_: None), *args)


# --- linear operations ------------------------------------------------------------------------------------------------


@full_precision
def conv(belief: Belief, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Belief:
    """Through a convolution, in closed form: [rows, C_in] -> [rows, C_out] (paper Eq. 7; Sigma's diagonal only).

    mean' = (sum of the taps of W) mean + bias and var' = (sum of the taps of W^2) var. Exact for independent pixels in
    the interior of the map, for any stride and dilation; the border's zero padding is ignored.
    """
    mean, var = applied(_ThroughTaps, *belief, weight, groups)
    return Belief(mean if bias is None else mean + bias.to(mean.dtype), var)


class _ThroughTaps(torch.autograd.Function):
    """Sums of the taps and of their squares, made again from the weight in backward: kept, they would be most of what
    Kalman Normalization holds in memory beyond BatchNorm. Differentiable twice."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, var, weight)
        ctx.groups = groups
        taps = weight.to(mean.dtype).flatten(2)
        return _mix(mean, taps.sum(2), groups), _mix(var, taps.square().sum(2), groups)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight = ctx.saved_tensors
        taps, groups = weight.to(mean.dtype).flatten(2), ctx.groups
        dtaps = _mixed_rows(dmean, mean, groups)[:, :, None] + 2 * taps * _mixed_rows(dvar, var, groups)[:, :, None]
        return (
            _mix(dmean, _transposed(taps.sum(2), groups), groups),
            _mix(dvar, _transposed(taps.square().sum(2), groups), groups),
            dtaps.view(weight.shape).to(weight.dtype),
            None,
        )


@full_precision
def conv_transpose(
    belief: Belief,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    groups: int = 1,
    dilation: tuple[int, ...] = (1, 1),
) -> Belief:
    """Through a transposed convolution, weight [C_in, C_out / groups, taps...]: [rows, C_in] -> [rows, C_out].

    With a stride, every output pixel sees only some of the taps, those of its phase, of which there are as many as the
    stride's product, equally often (in the interior; a phase without taps is the bias alone). The map is their mixture:
    mean of means, mean of variances + variance of means. A convolution's formulas where the stride is 1.
    """
    mean, var = belief
    taps = weight.to(mean.dtype).unflatten(0, (groups, -1)).flatten(3)  # [groups, C_in / groups, C_out / groups, taps]
    phase = torch.zeros((), dtype=torch.long, device=mean.device)
    for size, step, gap in zip(weight.shape[2:], stride, dilation, strict=True):
        phase = phase[..., None] * step + torch.arange(size, device=mean.device) * gap % step
    of_phases = taps @ F.one_hot(phase.flatten(), math.prod(stride)).to(taps.dtype)
    means = torch.einsum("rgi,giop->rgop", mean.unflatten(1, (groups, -1)), of_phases).flatten(1, 2)
    spread, mean = torch.var_mean(means, 2, correction=0)
    squares = taps.square().sum(3) / math.prod(stride)
    var = torch.einsum("rgi,gio->rgo", var.unflatten(1, (groups, -1)), squares).flatten(1) + spread
    return Belief(mean if bias is None else mean + bias.to(mean.dtype), var)


@full_precision
def linear(belief: Belief, weight: Tensor, bias: Tensor | None = None) -> Belief:
    """Through a fully connected layer: [rows, C_in] -> [rows, C_out], exact for independent inputs."""
    weight = weight.to(belief.mean.dtype)
    mean = F.linear(belief.mean, weight, None if bias is None else bias.to(belief.mean.dtype))
    return Belief(mean, F.linear(belief.var, weight.square()))


def conv_covariance(covariance: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Through a convolution or linear layer, with the whole matrix: [..., groups, C_in / groups, C_in / groups] -> the
    same of the outputs, for the channels of each group.

    S' = sum over the taps of W S W^T, of which `conv` predicts the diagonal, where S is diagonal. Exact where pixels
    are independent, in the interior of the map.
    """
    taps = weight.to(covariance.dtype).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return torch.einsum("goit,...gij,gpjt->...gop", taps, covariance, taps)


def _mix(rows: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """rows [R, C_in] times matrix [C_out, C_in / groups], block-diagonal over the groups -> [R, C_out]."""
    if groups == 1:
        return F.linear(rows, matrix)
    blocks = matrix.view(groups, -1, matrix.shape[1])  # [groups, C_out / groups, C_in / groups]
    return torch.einsum("rgi,goi->rgo", rows.view(rows.shape[0], groups, -1), blocks).flatten(1)


def _transposed(matrix: Tensor, groups: int) -> Tensor:
    """Each block of a block-diagonal matrix [C_out, C_in / groups] transposed: [C_in, C_out / groups]."""
    return matrix.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _mixed_rows(out: Tensor, rows: Tensor, groups: int) -> Tensor:
    """The derivative by `matrix` of the sum of out * _mix(rows, matrix): [C_out, C_in / groups]."""
    if groups == 1:
        return out.T @ rows
    blocks = (t.unflatten(1, (groups, -1)) for t in (out, rows))
    return torch.einsum("rgo,rgi->goi", *blocks).flatten(0, 1)


class Predictor(nn.Module):
    """What a convolution predicts with beside its weight: it stands next to it in the model, and is not called by it
    when the model is run plainly. Called as one of a model's children in turn (a Sequential that is made of them), it
    hands its input on."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else super().__call__(*args, **kwargs)


class Transition(Predictor):
    """A convolution's transition matrix of its own, in place of its weight (`transition="learned"`: the talk, v1).

    mean' = A mean + bias and var' = A^2 var (the diagonal of A Sigma A^T): [rows, C_in] -> [rows, C_out]. A, learned,
    is [C_out, C_in / groups] and starts at the sum of the taps of the convolution's weight as it is then: ours.
    """

    def __init__(self, convolution: _ConvNd) -> None:
        super().__init__()
        self.matrix = nn.Parameter(convolution.weight.detach().flatten(2).sum(2))
        self.groups = convolution.groups

    def forward(self, belief: Belief, bias: Tensor | None = None) -> Belief:
        return conv(belief, self.matrix[:, :, None], bias, self.groups)


def add(a: Belief, b: Belief) -> Belief:
    """A shortcut: the sum of two independent features. Means add, variances add."""
    return Belief(a.mean + b.mean, a.var + b.var)


def subtract(a: Belief, b: Belief) -> Belief:
    """The difference of two independent features. Means subtract, variances add."""
    return Belief(a.mean - b.mean, a.var + b.var)


@full_precision
def multiply(a: Belief, b: Belief) -> Belief:
    """The product of two independent features, such as a map and its gate (squeeze-and-excitation)."""
    var = a.var * b.var + a.var * b.mean.square() + b.var * a.mean.square()
    return Belief(a.mean * b.mean, var)


@full_precision
def scale(belief: Belief, factor: float | Tensor) -> Belief:
    """Times a constant: a number, or a tensor of one value per channel in any shape."""
    factor = _per_channel(factor, belief)
    return Belief(belief.mean * factor, belief.var * factor**2)


@full_precision
def shift(belief: Belief, amount: float | Tensor) -> Belief:
    """Plus a constant: a number, or a tensor of one value per channel in any shape."""
    return Belief(belief.mean + _per_channel(amount, belief), belief.var)


def _per_channel(value: float | Tensor, belief: Belief) -> float | Tensor:
    return value.to(belief.mean.dtype).reshape(1, -1) if isinstance(value, Tensor) else value


def concat(beliefs: list[Belief]) -> Belief:
    """Channels of several branches side by side. A single row (moving statistics) stands for every row."""
    rows = max(b.mean.shape[0] for b in beliefs)
    return Belief(
        torch.cat([b.mean.expand(rows, -1) for b in beliefs], 1),
        torch.cat([b.var.expand(rows, -1) for b in beliefs], 1),
    )


def pad_channels(belief: Belief, before: int, after: int) -> Belief:
    """Zero channels on both sides (parameter-free shortcut of CIFAR ResNets): constants, mean 0 and variance 0.

    Padded per row. The released code pads all groups as one flat vector, which misaligns groups and channels.
    """
    return Belief(F.pad(belief.mean, (before, after)), F.pad(belief.var, (before, after)))


# --- channels: chosen, divided, in another order ----------------------------------------------------------------------


def channels(belief: Belief, chosen: slice) -> Belief:
    """Those of a slice."""
    return Belief(belief.mean[:, chosen], belief.var[:, chosen])


def chunk(belief: Belief, chunks: int) -> list[Belief]:
    """As torch.chunk divides the channels."""
    return [Belief(*both) for both in zip(belief.mean.chunk(chunks, 1), belief.var.chunk(chunks, 1), strict=True)]


def split(belief: Belief, sizes: int | list[int]) -> list[Belief]:
    """As torch.split divides the channels."""
    return [Belief(*both) for both in zip(belief.mean.split(sizes, 1), belief.var.split(sizes, 1), strict=True)]


def shuffle(belief: Belief, first: int, second: int) -> Belief:
    """Channels that stand in `first` rows of `second` (either may be -1), column by column instead (ShuffleNet)."""
    mean, var = (t.unflatten(1, (first, second)).transpose(1, 2).flatten(1) for t in belief)
    return Belief(mean, var)


def interleave(belief: Belief, number: int) -> Belief:
    """Each channel's pixels taken in turn from `number` channels that stand together: their mixture (pixel shuffle)."""
    mean, var = (t.unflatten(1, (-1, number)) for t in belief)
    spread, mean = torch.var_mean(mean, 2, correction=0)
    return Belief(mean, var.mean(2) + spread)


def deal(belief: Belief, number: int) -> Belief:
    """Each channel's pixels dealt out to `number` channels that stand together (the inverse)."""
    return Belief(*(t.repeat_interleave(number, 1) for t in belief))


def expand(belief: Belief, to: Tensor) -> Belief:
    """To the channels of `to` [N, C, ...], for which a single one may stand."""
    return Belief(belief.mean.expand(-1, to.shape[1]), belief.var.expand(-1, to.shape[1]))


# --- ReLU -------------------------------------------------------------------------------------------------------------


class _RectifiedMoments(torch.autograd.Function):
    """Moments of max(0, N(mean, var)) and their exact derivatives, which are shorter than what autograd would record.

    With a = mean / sd, E the new mean and V the new variance:
    dE = Phi(a) dmean + phi(a) / (2 sd) dvar and dV = 2 E Phi(-a) dmean + (Phi(a) - E phi(a) / sd) dvar.
    Differentiable twice.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, var)  # all else is made again: the posterior is kept by its normalizer too
        a, above, below, density, rectified = _rectified(mean, var)
        # E2 - E^2, written so that it does not cancel.
        share = above + a * a * above * below + a * density * (below - above) - density * density
        return rectified, var * share.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = ctx.saved_tensors
        _, above, below, density, rectified = _rectified(mean, var)
        slope = torch.where(var > 0, density * torch.where(var > 0, var, 1).rsqrt(), 0)
        dmean, dvar = grads
        return (
            dmean * above + 2 * dvar * rectified * below,
            0.5 * dmean * slope + dvar * (above - rectified * slope),
        )


def _rectified(mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    """a = mean / sd, Phi(a), Phi(-a), phi(a) and the mean of the rectified Gaussian."""
    positive = var > 0
    sd = torch.where(positive, var, 1).sqrt()
    # Beyond 30 deviations every term is 0 or exact in float64 too; unclamped, a^2 overflows for tiny variances.
    # At zero variance the distribution is a point: a of +-30 selects it.
    a = torch.where(positive, mean / sd, torch.where(mean > 0, 30.0, -30.0)).clamp(-30, 30)
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    below, above = torch.special.ndtr(-a), torch.special.ndtr(a)
    rectified = torch.where(positive, mean * above + sd * density, mean.clamp_min(0)).clamp_min(0)
    return a, above, below, density, rectified


@full_precision
def relu(belief: Belief) -> Belief:
    """Moments of the rectified Gaussian. At variance 0: max(mean, 0) and 0, with finite gradients.

    The paper's equations have no ReLU and cannot be run literally on a network that has them; the released code
    rectifies a sample instead.
    """
    return Belief(*applied(_RectifiedMoments, *belief))


def settled(carried: Carried) -> Carried:
    """With a pending ReLU done, in closed form."""
    if carried.relu != "pending":
        return carried
    return Carried(relu(carried.belief), carried.axes, "sampled")


def plain(carried: Belief | Carried | None) -> Belief | None:
    """The belief of a value whose channels are axis 1, settled; None if they are not."""
    if carried is None or isinstance(carried, Belief):
        return carried
    return settled(carried).belief if isinstance(carried, Carried) and not carried.axes else None
