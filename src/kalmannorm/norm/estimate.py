"""Measure, update, normalize: the arithmetic of every Kalman normalizer.

Input x [N, C, ...] in G groups, statistics per (group, channel). The same arithmetic in two forms:

- plain tensor operations, which a compiler fuses and which may be differentiated twice;
- an autograd function with torch's native batch-norm kernels, for eager mode on a CPU: it saves x once, as BN does, and
  its backward makes one reduction and one elementwise pass. Differentiable twice, then by plain operations.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kalmannorm.norm import groups
from kalmannorm.norm.belief import Belief


def normalize_by_posterior(
    x: Tensor,
    size: int,
    prior: tuple[Tensor | None, Tensor] | None,
    gain: Tensor | float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mixture: bool,
    guard: float | None,
    over_ranks: bool = False,
) -> tuple[Tensor, Belief, Belief]:
    """Measure x, update the prior (paper Eq. 7 lines 2 and 4) and normalize x by the posterior.

    x [N, C, ...] in G groups of `size` images, prior [G or 1, C] (R included) -> y like x, posterior [G, C],
    measurement [G, C], detached. Without a prior the posterior is the measurement; a prior whose mean is None predicts
    the variance alone. weight and bias are [C] or None. `over_ranks`: the batch is spread over processes, and the guard
    is decided over all of it.
    """
    shape = (x.shape[0] // size, x.shape[1])
    dtype = groups.moments_dtype(x)
    prior_mean, prior_var = (None if t is None else t.to(dtype).expand(shape) for t in prior or (None, None))
    gain = torch.as_tensor(gain, dtype=dtype, device=x.device)
    options = (size, prior_mean, prior_var, gain, weight, bias, eps, mixture, guard, over_ranks)
    if x.device.type == "cpu" and type(x) is Tensor and not groups.takes_plain_operations():
        # Not for a subclass of Tensor: it makes views of a function's results, and a view that is one of several
        # results cannot be changed in place. The native kernels need groups in contiguous memory; copies cost less than
        # plain operations would.
        y, *found = _Native.apply(x.contiguous(), *options)
        y = y.contiguous(memory_format=groups.format_of(x))
    else:  # on a GPU the composite form is compiled by default
        y, *found = _composite(x, *options)
    mean, var, measured_mean, measured_var = found
    return y, Belief(mean, var), Belief(measured_mean, measured_var)


def _effective_gain(
    gain: Tensor, prior_var: Tensor, measured_var: Tensor, guard: float | None, over_ranks: bool
) -> Tensor:
    """Return the gain, or 1 if the guard rejects the prior: one decision per layer and call, without a gradient.

    Compared so that 0 / 0 (a dead channel, predicted to be dead) keeps the measurement, as in the released code.
    """
    if guard is None:
        return gain
    ratio = (prior_var.detach() / measured_var.detach()).mean()
    if over_ranks and dist.is_initialized():
        dist.all_reduce(ratio)  # then a plain mean: every rank has the same number of groups
        ratio = ratio / dist.get_world_size()
    return torch.where(ratio < guard, gain, 1.0)


def _composite(
    x: Tensor,
    size: int,
    prior_mean: Tensor | None,
    prior_var: Tensor | None,
    gain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mixture: bool,
    guard: float | None,
    over_ranks: bool,
) -> tuple[Tensor, ...]:
    measured_mean, measured_var = groups.moments(*groups.image_moments(x), size)
    mean, var = measured_mean, measured_var
    if prior_var is not None:
        q = _effective_gain(gain, prior_var, measured_var, guard, over_ranks)
        mean, var = _posterior(prior_mean, prior_var, measured_mean, measured_var, q, mixture)
    y = groups.normalize(x, size, mean, var, weight, bias, eps)
    return y, mean, var, measured_mean.detach(), measured_var.detach()


@groups.in_graph
def _posterior(
    prior_mean: Tensor | None,
    prior_var: Tensor,
    measured_mean: Tensor,
    measured_var: Tensor,
    q: Tensor,
    mixture: bool,
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of prior and measurement weighed 1 - q to q; without the prior's mean the measured."""
    p = 1 - q
    var = p * prior_var + q * measured_var
    if prior_mean is None:
        return measured_mean, var
    if mixture:
        var = var + p * q * (measured_mean - prior_mean).square()
    return p * prior_mean + q * measured_mean, var


def _rows(x: Tensor, size: int) -> Tensor:
    """View contiguous x [N, C, ...] as [size, G * C, pixels], groups as the native kernels take them."""
    return x.view(size, x.shape[0] // size * x.shape[1], -1)


class _Native(torch.autograd.Function):
    """`_composite` by native kernels, for contiguous x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        size: int,
        prior_mean: Tensor | None,
        prior_var: Tensor | None,
        gain: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        mixture: bool,
        guard: float | None,
        over_ranks: bool,
    ) -> tuple[Tensor, ...]:
        rows = _rows(x, size)
        dtype = groups.moments_dtype(x)
        zeros, ones = (torch.full((rows.shape[1],), value, dtype=dtype) for value in (0.0, 1.0))
        # With momentum 0 the buffers stay as they are; they only make the kernel compute in their dtype.
        moments = torch.batch_norm_update_stats(rows, zeros, ones, 0.0)
        shape = torch.Size((x.shape[0] // size, x.shape[1]))
        measured_mean, measured_var = (groups.merge(moment, shape) for moment in moments)  # FSDP warns of views
        q = deviation = None
        mean, var = measured_mean, measured_var
        if prior_var is not None:
            q = _effective_gain(gain, prior_var, measured_var, guard, over_ranks)
            var = torch.lerp(prior_var, measured_var, q)
            if prior_mean is not None:
                deviation = measured_mean - prior_mean
                mean = torch.lerp(prior_mean, measured_mean, q)
                if mixture:
                    var = torch.addcmul(var, deviation, deviation * (q * (1 - q)))
        # The native kernel takes them in the statistics' dtype: float32 even if they and x are in half precision.
        weights = None if weight is None else weight.to(mean.dtype).repeat(len(mean))
        biases = None if bias is None else bias.to(mean.dtype).repeat(len(mean))
        y = torch.native_batch_norm(rows, weights, biases, mean.flatten(), var.flatten(), False, 0.0, eps)[0]
        # Backward recovers the prior from posterior, measurement and gain. Saving the posterior takes no more memory:
        # the prediction through the next ReLU saves it too.
        ctx.save_for_backward(x, mean, var, weight, gain, q, measured_mean, measured_var)
        ctx.size, ctx.eps, ctx.mixture, ctx.predicts_mean = size, eps, mixture, prior_mean is not None
        # For probes only. Clones: without a prior the measurement is the posterior's tensor, which is differentiable.
        measurement = measured_mean.clone(), measured_var.clone()
        ctx.mark_non_differentiable(*measurement)
        return groups.merge(y, x.shape), mean, var, *measurement

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, dmean, dvar = grads[:3]
        x, mean, var, weight, gain, q, measured_mean, measured_var = ctx.saved_tensors
        rows = _rows(x, ctx.size)
        dy = dy.contiguous().view(rows.shape)
        column = (mean.numel(), 1)
        rstd = torch.rsqrt(var + ctx.eps)
        # Sums of dy * (x - mean) * rstd and of dy, per row, as if the normalizer were a constant affine.
        if torch.is_grad_enabled():  # create_graph=True: everything below must be differentiable itself
            rows, dy = rows.to(mean.dtype), dy.to(mean.dtype)
            total = dy.sum((0, 2)).view(mean.shape)
            dot = (dy * (rows - mean.reshape(column))).sum((0, 2)).view(mean.shape) * rstd
            moments = torch.var_mean(rows, (0, 2), correction=0)
            measured_var, measured_mean = (t.view(mean.shape) for t in moments)
            q = None if q is None else torch.where(q == 1, q, gain)
        else:
            ones = torch.ones_like(mean).flatten()
            _, dot, total = torch.ops.aten.native_batch_norm_backward(
                dy, rows, ones, mean.flatten(), var.flatten(), None, None, False, ctx.eps, [False, True, True]
            )
            dot, total = dot.view(mean.shape), total.view(mean.shape)
        scale = rstd if weight is None else rstd * weight
        dmean = torch.addcmul(dmean, scale, total, value=-1)
        dvar = torch.addcmul(dvar, scale * rstd, dot, value=-0.5)

        dprior_mean = dprior_var = dgain = None
        dmeasured_mean, dmeasured_var = dmean, dvar
        if q is not None:
            p = torch.where(q == 1, 1.0, 1 - q)  # no division by 0 at q = 1, where these gradients are masked below
            dmeasured_var = q * dvar
            dprior_var = dvar - dmeasured_var
            var_by_gain, mean_by_gain = (measured_var - var) / p, None
            if ctx.predicts_mean:
                mean_by_gain = (measured_mean - mean) / p  # measured mean - prior mean
                dmeasured_mean = q * dmean
                if ctx.mixture:
                    var_by_gain = torch.addcmul(var_by_gain, mean_by_gain, p * mean_by_gain)
                    dmeasured_mean = torch.addcmul(dmeasured_mean, mean_by_gain * (2 * q * p), dvar)
                dprior_mean = dmean - dmeasured_mean
            if ctx.needs_input_grad[4]:
                by_gain = dvar * var_by_gain
                if mean_by_gain is not None:
                    by_gain = torch.addcmul(by_gain, dmean, mean_by_gain)
                # If the guard rejected the prior, q is the constant 1.
                dgain = by_gain.sum().masked_fill(q == 1, 0.0).view_as(q)

        values = rows.shape[0] * rows.shape[2]
        by_x = dmeasured_var * (2 / values)
        constant = torch.addcmul(dmeasured_mean / values, by_x, measured_mean, value=-1)
        if torch.is_grad_enabled() or x.dtype != mean.dtype:
            dx = torch.addcmul(constant.reshape(column), rows, by_x.reshape(column))
        else:  # the same by the native kernel, in two thirds of the time
            zeros, ones = dot.new_zeros(mean.numel()), dot.new_ones(mean.numel())
            dx = torch.native_batch_norm(rows, by_x.flatten(), constant.flatten(), zeros, ones, False, 0.0, 0.0)[0]
        dx = dx.addcmul_(dy, scale.reshape(column)).to(x.dtype).view(x.shape)
        dweight = None if weight is None else dot.sum(0)
        dbias = total.sum(0) if ctx.needs_input_grad[6] else None
        return dx, None, dprior_mean, dprior_var, dgain, dweight, dbias, None, None, None, None
