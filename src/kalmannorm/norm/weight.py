"""Weight Normalization (Salimans & Kingma 2016): W = g v / |v| per output channel, no activation statistics."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from kalmannorm.norm.constant import NoNorm

EPS = 1e-5  # on the variance of a pre-activation, as in the normalizers


class WeightNorm(NoNorm):
    """The layer in a normalizer's place under WN: x -> x. It is convert that parametrizes the convolutions."""


def normalize_weights(model: nn.Module) -> None:
    """Parametrize every convolution of `model` as W = g v / |v|, with W unchanged.

    This is torch's parametrization: g is `original0`, v is `original1`. Copy such a model by deepcopy or state_dict:
    torch refuses to pickle it. ValueError: a transposed convolution with groups.
    """
    for layer in list(model.modules()):
        if isinstance(layer, _ConvNd) and not is_parametrized(layer, "weight"):
            if layer.transposed and layer.groups > 1:
                raise ValueError(
                    f"a transposed convolution with {layer.groups} groups has no axis of output channels, which weight "
                    "normalization needs"
                )
            weight_norm(layer, dim=1 if layer.transposed else 0)


def is_weight_normalized(layer: nn.Module) -> bool:
    """Say whether a layer's weight has torch's weight normalization."""
    return is_parametrized(layer, "weight") and hasattr(layer.parametrizations.weight, "original1")  # type: ignore[union-attr]


@torch.no_grad()
def initialize_weight_norm(model: nn.Module, batch: Tensor) -> None:
    """Initialize g and bias from data (Salimans & Kingma, section 3): every weight-normalized convolution, in the order
    of the forward pass, then has outputs on `batch` [N, C, H, W] of mean 0 and variance 1 per channel.

    Call it once, before training. In a distributed run every process calls it with its part of the batch, of the same
    size on all; all end with the same parameters. A model without weight normalization stays as it is.
    """
    layers = [m for m in model.modules() if isinstance(m, _ConvNd) and is_weight_normalized(m)]
    done: set[nn.Module] = set()

    def initialize(layer: nn.Module, _: object, out: Tensor) -> Tensor | None:
        if layer in done:  # a shared layer, called again on other features, keeps its first initialization
            return None
        done.add(layer)
        wide = out.double()
        var, mean = torch.var_mean(wide, (0, *range(2, wide.dim())), correction=0)
        whole = _mean_over_ranks(mean)
        scale = torch.rsqrt(_mean_over_ranks(var + (mean - whole).square()) + EPS)
        g, bias = layer.parametrizations.weight.original0, layer.bias  # type: ignore[union-attr]
        assert isinstance(g, Tensor) and isinstance(bias, Tensor)
        g.mul_(scale.view_as(g))
        bias.copy_((bias - whole) * scale)
        column = (1, -1, *(1,) * (wide.dim() - 2))
        return ((wide - whole.view(column)) * scale.view(column)).to(out.dtype)

    hooks = [layer.register_forward_hook(initialize) for layer in layers]
    try:
        if layers:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()


def _mean_over_ranks(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
