"""Statistics groups: the one place that knows which images share statistics, and the moments over such groups.

Image i of a batch of G groups belongs to group i mod G (interleaved). In NCHW the groups are then a free view
[stat_batch, G * C, H, W] for the native batch-norm kernels; and k devices that are dealt the images in turn hold whole
groups, so that they compute what one device does.
"""

import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kalmannorm.norm.belief import Belief

P = ParamSpec("P")
T = TypeVar("T")

IN_GRAPH: list[Callable[..., Any]] = []  # what prepare_compiler hands to torch.compiler.allow_in_graph


def in_graph(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function of tensors and constants that a compiler need not interpret line by line.

    Interpreting these few functions is half of the time in which a network starts that was compiled before. The
    compiler's later stages see their operations all the same.
    """
    IN_GRAPH.append(function)
    return function


def size(batch: int, stat_batch: int | None) -> int:
    """Return the number of images in each group; `stat_batch=None` makes the whole batch one group.

    ValueError: the batch does not divide into groups.
    """
    if stat_batch is None:
        return batch
    if batch % stat_batch:
        raise ValueError(f"a batch of {batch} images does not divide into groups of stat_batch = {stat_batch}")
    return stat_batch


def name_of(layer: nn.Module) -> str:
    """Return a normalizer's name for messages. Call it only for an error: compiled code would depend on the layer."""
    return getattr(layer, "layer_name", "") or type(layer).__name__


def check(layer: nn.Module, channels: int, eps: float, x: Tensor | None = None) -> None:
    """Raise ValueError if eps is negative, or x is not a floating-point [N, C, ...] with `channels` channels."""
    if eps < 0:
        raise ValueError(f"{name_of(layer)}: eps must not be negative, not {eps}")
    if x is not None and x.dim() < 2:
        raise ValueError(f"{name_of(layer)}: expected an input [N, C, ...], got {tuple(x.shape)}")
    if x is not None and x.dim() not in getattr(layer, "dims", (x.dim(),)):  # set by convert, from the original layer
        axes = " or ".join(f"{dim}D" for dim in layer.dims)  # type: ignore[union-attr]
        raise ValueError(f"{name_of(layer)}: expected {axes} input, got {tuple(x.shape)}; one image is a batch x[None]")
    if x is not None and x.shape[1] != channels:
        raise ValueError(f"{name_of(layer)}: expected {channels} channels, got {tuple(x.shape)}")
    if x is not None and not x.is_floating_point():
        raise ValueError(f"{name_of(layer)}: expected an input of a floating-point type, got {x.dtype}")


def of_no_images(x: Tensor, *others: Tensor | None) -> Tensor:
    """Return a normalizer's output for x [0, C, ...], with a gradient of 0 for `others`: DDP waits for it."""
    y = x.clone()
    for other in others:
        if other is not None and other.requires_grad:
            y = y + 0 * other.sum().to(y.dtype)
    return y


def belief_of_no_images(x: Tensor) -> Belief:
    """Return the belief about x [0, C, ...]: no rows."""
    none = x.new_zeros(0, x.shape[1], dtype=moments_dtype(x))
    return Belief(none, none)


def format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of x, which a normalizer's output keeps. vmap supports the contiguous one alone."""
    if is_transformed():
        return torch.contiguous_format
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=memory_format) and not x.is_contiguous():
            return memory_format
    return torch.contiguous_format


def values(x: Tensor, size: int) -> int:
    """Return how many values of x [N, C, ...] make one statistic, with `size` images in a group."""
    return size * math.prod(x.shape[2:])


def split(x: Tensor, size: int) -> Tensor:
    """View x [N, C, ...] as [size, G, C, ...]; [:, g] are the images of group g. Free in every memory format."""
    return x.unflatten(0, (size, x.shape[0] // size))


def merge(split: Tensor, shape: torch.Size) -> Tensor:
    """Reshape a fresh tensor of groups to [N, C, ...]; not a view, on which an in-place ReLU would cost copies."""
    return torch.ops.aten._unsafe_view(split, shape)


# What follows is in plain operations, for a compiler and for any memory format. It never reshapes a feature map: with
# dynamic shapes (a compiler's, from the second batch size on) every such view costs minutes of symbolic algebra.


def is_transformed() -> bool:
    """Say whether torch.func transforms, forward-mode derivatives or torch.jit.trace are active.

    They ask more of an autograd.Function than ours provide.
    """
    is_traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or is_traced


def takes_plain_operations() -> bool:
    """Say whether to use plain operations instead of our autograd functions: a compiler makes better ones of them."""
    return torch.compiler.is_compiling() or is_transformed()


def moments_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the statistics of x: float64 for float64, else float32, under autocast too."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def image_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance over the pixels of x [N, C, ...], each [N, C]."""
    x = x.to(moments_dtype(x))
    if x.dim() == 2:
        return x, torch.zeros_like(x)
    if x.device.type == "cpu" and not takes_plain_operations():
        return _ImageMoments.apply(x)  # type: ignore[no-any-return]
    return _plain_image_moments(x)


@in_graph
def _plain_image_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, tuple(range(2, x.dim())), correction=0)
    return mean, var


class _ImageMoments(torch.autograd.Function):
    """`image_moments` in two passes, in a tenth of the time of torch.var_mean on a CPU in eager mode.

    Like it, saves x for backward. Differentiable twice.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = tuple(range(2, x.dim()))
        mean = x.mean(pixels, keepdim=True)
        return mean.flatten(1), (x - mean).square_().mean(pixels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        of_images, pixels = (*mean.shape, *(1,) * (x.dim() - 2)), math.prod(x.shape[2:])
        slope = dvar * (2 / pixels)
        return torch.addcmul((dmean / pixels - slope * mean).view(of_images), x, slope.view(of_images))


def pooled(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the union of equally large parts along `dim`, which is kept with size 1.

    Its variance is the mean of the variances + the variance of the means.
    """
    between, together = torch.var_mean(mean, dim, correction=0, keepdim=True)
    return together, var.mean(dim, keepdim=True) + between


@in_graph
def moments(mean: Tensor, var: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return mean and population variance of groups of `size` images, each [G, C], from the images' own [N, C]."""
    mean, var = pooled(split(mean, size), split(var, size), 0)
    return mean[0], var[0]


@in_graph
def normalize(
    x: Tensor, size: int, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in the dtype of x.

    x is [N, C, ...] in groups of `size` images; mean and var are [G, C]; weight and bias None, [C] or [G, C].
    """
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    of_images = (*x.shape[:2], *(1,) * (x.dim() - 2))
    scale, shift = (t.repeat(size, 1).view(of_images) for t in (scale, shift))
    return torch.addcmul(shift, x, scale).to(x.dtype)
