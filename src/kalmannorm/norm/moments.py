"""How the operations between two normalizers change a belief (the predict step, paper Eq. 7 lines 1 and 3).

Every rule takes the beliefs about an operation's inputs and returns the belief about its output, in float32 or wider,
under autocast too. Curved activations: activations.py; the sampling predictor: sampling.py.
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
from kalmannorm.norm.groups import in_graph, is_transformed

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(rule: Callable[P, T]) -> Callable[P, T]:
    """Run `rule`, whose first argument is a belief, in float32 or wider, without autocast.

    In half precision, which autocast would choose for its small matrix products, the prior loses most of its digits.
    """

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
    """Return a context that disables autocast for a device type; "meta" has no autocast to disable."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    # A context in an exported graph whose results nobody uses, as the last beliefs, cannot be saved.
    if torch.compiler.is_exporting() and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call `function.apply`, or under torch.func's transforms the plain operations of its forward."""
    if torch.compiler.is_compiling() or not is_transformed():
        return function.apply(*args)
    return function.forward(SimpleNamespace(save_for_backward=lambda *_: None), *args)


# --- linear operations ------------------------------------------------------------------------------------------------


@full_precision
def conv(belief: Belief, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Belief:
    """Propagate a belief through a convolution in closed form, [rows, C_in] -> [rows, C_out] (paper Eq. 7).

    mean' = (sum of the taps of W) mean + bias and var' = (sum of the taps of W^2) var: of Sigma only the diagonal is
    kept. Exact for independent pixels in the interior of the map, for any stride and dilation; the border's zero
    padding is ignored.
    """
    mean, var = _through_taps(*belief, weight, groups)
    return Belief(mean if bias is None else mean + bias.to(mean.dtype), var)


@in_graph
def _through_taps(mean: Tensor, var: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return applied(_ThroughTaps, mean, var, weight, groups)  # type: ignore[no-any-return]


class _ThroughTaps(torch.autograd.Function):
    """Products with the sums of a weight's taps and of their squares.

    Backward computes these sums again: saved, they would be most of the memory that Kalman Normalization needs beyond
    BatchNorm. Differentiable twice.
    """

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
        dsums, dsquares = (_outer_sums(*pair, groups)[:, :, None] for pair in ((dmean, mean), (dvar, var)))
        dtaps = torch.addcmul(dsums, taps, dsquares, value=2)
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
    """Propagate a belief through a transposed convolution, [rows, C_in] -> [rows, C_out].

    `weight` is [C_in, C_out / groups, taps...]. With a stride, an output pixel sees only the taps of its phase. There
    are prod(stride) phases, equally frequent in the interior (one without taps is the bias alone), and the output is
    their mixture: mean of means, mean of variances + variance of means. With stride 1 these are the formulas of `conv`.
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
    """Propagate a belief through a linear layer, [rows, C_in] -> [rows, C_out]; exact for independent inputs."""
    weight = weight.to(belief.mean.dtype)
    mean = F.linear(belief.mean, weight, None if bias is None else bias.to(belief.mean.dtype))
    return Belief(mean, F.linear(belief.var, weight.square()))


def conv_covariance(covariance: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Propagate a full covariance through a convolution or linear layer, for the channels of each group:
    [..., groups, C_in / groups, C_in / groups] -> [..., groups, C_out / groups, C_out / groups].

    S' = sum over the taps of W S W^T; for a diagonal S, `conv` predicts the diagonal of S'. Exact for independent
    pixels in the interior of the map.
    """
    taps = weight.to(covariance.dtype).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return torch.einsum("goit,...gij,gpjt->...gop", taps, covariance, taps)


def _mix(rows: Tensor, matrix: Tensor, groups: int) -> Tensor:
    """Multiply rows [R, C_in] by a matrix [C_out, C_in / groups], block-diagonal over the groups: [R, C_out]."""
    if groups == 1:
        return F.linear(rows, matrix)
    blocks = matrix.view(groups, -1, matrix.shape[1])  # [groups, C_out / groups, C_in / groups]
    return torch.einsum("rgi,goi->rgo", rows.view(rows.shape[0], groups, -1), blocks).flatten(1)


def _transposed(matrix: Tensor, groups: int) -> Tensor:
    """Transpose each block of a block-diagonal matrix: [C_out, C_in / groups] -> [C_in, C_out / groups]."""
    return matrix.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _outer_sums(out: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Sum the outer products of out [R, C_out] and rows [R, C_in] in each group: [C_out, C_in / groups].

    It is the gradient of sum(out * _mix(rows, matrix)) by `matrix`.
    """
    if groups == 1:
        return out.T @ rows
    blocks = (t.unflatten(1, (groups, -1)) for t in (out, rows))
    return torch.einsum("rgo,rgi->goi", *blocks).flatten(0, 1)


class Predictor(nn.Module):
    """Base of the modules that a convolution predicts with, beside its weight.

    It stands next to the convolution in the model, and takes no part in a plain forward: called with a tensor, as by a
    Sequential made of a model's children, it returns that.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else super().__call__(*args, **kwargs)


class Transition(Predictor):
    """A learned transition matrix, used in place of a convolution's weight (`transition="learned"`: the talk, v1).

    mean' = A mean + bias and var' = A^2 var (the diagonal of A Sigma A^T): [rows, C_in] -> [rows, C_out]. A is
    [C_out, C_in / groups] and starts at the sum of the taps of the convolution's present weight (ours).
    """

    def __init__(self, convolution: _ConvNd) -> None:
        super().__init__()
        self.matrix = nn.Parameter(convolution.weight.detach().flatten(2).sum(2))
        self.groups = convolution.groups

    def forward(self, belief: Belief, bias: Tensor | None = None) -> Belief:
        return conv(belief, self.matrix[:, :, None], bias, self.groups)


def add(a: Belief, b: Belief) -> Belief:
    """Add two independent features (a shortcut): means add, variances add."""
    return Belief(a.mean + b.mean, a.var + b.var)


def subtract(a: Belief, b: Belief) -> Belief:
    """Subtract two independent features: means subtract, variances add."""
    return Belief(a.mean - b.mean, a.var + b.var)


@full_precision
def multiply(a: Belief, b: Belief) -> Belief:
    """Multiply two independent features, such as a map and its gate (squeeze-and-excitation)."""
    var = a.var * b.var + a.var * b.mean.square() + b.var * a.mean.square()
    return Belief(a.mean * b.mean, var)


@full_precision
def scale(belief: Belief, factor: float | Tensor) -> Belief:
    """Multiply by a constant: a number, or a tensor of one value per channel in any shape."""
    factor = _per_channel(factor, belief)
    return Belief(belief.mean * factor, belief.var * factor**2)


@full_precision
def shift(belief: Belief, amount: float | Tensor) -> Belief:
    """Add a constant: a number, or a tensor of one value per channel in any shape."""
    return Belief(belief.mean + _per_channel(amount, belief), belief.var)


def _per_channel(value: float | Tensor, belief: Belief) -> float | Tensor:
    return value.to(belief.mean.dtype).reshape(1, -1) if isinstance(value, Tensor) else value


def concat(beliefs: list[Belief]) -> Belief:
    """Concatenate the channels of several branches. A single row (moving statistics) stands for every row."""
    rows = max(b.mean.shape[0] for b in beliefs)
    return Belief(
        torch.cat([b.mean.expand(rows, -1) for b in beliefs], 1),
        torch.cat([b.var.expand(rows, -1) for b in beliefs], 1),
    )


def pad_channels(belief: Belief, before: int, after: int) -> Belief:
    """Pad with zero channels on both sides (parameter-free shortcut of CIFAR ResNets): mean 0 and variance 0.

    Every row is padded. The released code pads all groups as one flat vector, which misaligns groups and channels.
    """
    return Belief(F.pad(belief.mean, (before, after)), F.pad(belief.var, (before, after)))


# --- selecting, splitting and reordering channels ---------------------------------------------------------------------


def channels(belief: Belief, chosen: slice) -> Belief:
    """Select a slice of the channels."""
    return Belief(belief.mean[:, chosen], belief.var[:, chosen])


def chunk(belief: Belief, chunks: int) -> list[Belief]:
    """Split the channels as torch.chunk does."""
    return [Belief(*both) for both in zip(belief.mean.chunk(chunks, 1), belief.var.chunk(chunks, 1), strict=True)]


def split(belief: Belief, sizes: int | list[int]) -> list[Belief]:
    """Split the channels as torch.split does."""
    return [Belief(*both) for both in zip(belief.mean.split(sizes, 1), belief.var.split(sizes, 1), strict=True)]


def shuffle(belief: Belief, first: int, second: int) -> Belief:
    """Transpose the channels, seen as [first, second] (either may be -1), and flatten them again (ShuffleNet)."""
    mean, var = (t.unflatten(1, (first, second)).transpose(1, 2).flatten(1) for t in belief)
    return Belief(mean, var)


def pixel_shuffle(belief: Belief, number: int) -> Belief:
    """Merge each `number` adjacent channels, whose pixels alternate in the output: their mixture (pixel shuffle)."""
    mean, var = (t.unflatten(1, (-1, number)) for t in belief)
    spread, mean = torch.var_mean(mean, 2, correction=0)
    return Belief(mean, var.mean(2) + spread)


def pixel_unshuffle(belief: Belief, number: int) -> Belief:
    """Split each channel's pixels between `number` adjacent channels (pixel unshuffle)."""
    return Belief(*(t.repeat_interleave(number, 1) for t in belief))


def expand(belief: Belief, to: Tensor) -> Belief:
    """Expand a belief of one channel to the channels of `to` [N, C, ...]; C channels stay as they are."""
    return Belief(belief.mean.expand(-1, to.shape[1]), belief.var.expand(-1, to.shape[1]))


# --- ReLU -------------------------------------------------------------------------------------------------------------


class _RectifiedMoments(torch.autograd.Function):
    """Moments of max(0, N(mean, var)), with exact derivatives that are shorter than what autograd would record.

    With a = mean / sd, E the new mean and V the new variance:
    dE = Phi(a) dmean + phi(a) / (2 sd) dvar and dV = 2 E Phi(-a) dmean + (Phi(a) - E phi(a) / sd) dvar.
    Differentiable twice.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, var)  # no more memory: the normalizer saves them too. All else is computed again
        _, a, above, below, density, rectified = _rectified(mean, var)
        # E2 - E^2, written so that it does not cancel:
        # Phi(a) + a^2 Phi(a) Phi(-a) + a phi(a) (Phi(-a) - Phi(a)) - phi(a)^2.
        share = torch.addcmul(above, a * a, above * below)
        share = torch.addcmul(share, a * density, below - above)
        share = torch.addcmul(share, density, density, value=-1)
        return rectified, var * share.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = ctx.saved_tensors
        sd, _, above, below, density, rectified = _rectified(mean, var)
        slope = (density / sd).masked_fill(var <= 0, 0.0)
        dmean, dvar = grads
        return (
            torch.addcmul(dmean * above, dvar * rectified, below, value=2),
            torch.addcmul(dvar * torch.addcmul(above, rectified, slope, value=-1), dmean, slope, value=0.5),
        )


def _rectified(mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    """Return sd (1 at variance 0), a = mean / sd, Phi(a), Phi(-a), phi(a) and the mean of the rectified Gaussian."""
    point = var <= 0
    sd = var.masked_fill(point, 1.0).sqrt()
    # Beyond 30 standard deviations every term is 0 or exact even in float64; unclamped, a^2 overflows for tiny
    # variances. At variance 0 the distribution is a point, and a = +-30 says on which side of 0.
    a = torch.where(point, torch.where(mean > 0, 30.0, -30.0), mean / sd).clamp(-30, 30)
    density = torch.exp(a * a * -0.5) * (1 / math.sqrt(2 * math.pi))
    half = torch.erf(a * math.sqrt(0.5)) * 0.5
    below, above = 0.5 - half, 0.5 + half
    rectified = torch.where(point, mean, torch.addcmul(mean * above, sd, density)).clamp_min(0)
    return sd, a, above, below, density, rectified


@full_precision
def relu(belief: Belief) -> Belief:
    """Return the moments of the rectified Gaussian; at variance 0 max(mean, 0) and 0, with finite gradients.

    The paper's equations have no ReLU and cannot be run literally on a network that has them; the released code
    rectifies a sample instead.
    """
    return Belief(*_rectified_moments(*belief))


@in_graph
def _rectified_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    return applied(_RectifiedMoments, mean, var)  # type: ignore[no-any-return]


def relu_applied(carried: Carried) -> Carried:
    """Apply a pending ReLU in closed form."""
    if carried.relu != "pending":
        return carried
    return Carried(relu(carried.belief), carried.axes, "sampled")


def channel_belief(carried: Belief | Carried | None) -> Belief | None:
    """Return the Belief about a tensor whose channels are axis 1, a pending ReLU applied; None for other axes."""
    if carried is None or isinstance(carried, Belief):
        return carried
    return relu_applied(carried).belief if isinstance(carried, Carried) and not carried.axes else None
