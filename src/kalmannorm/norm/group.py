"""Group Normalization (Wu & He 2018): statistics of a group of channels of one image.

With one group it is Layer Normalization over (C, H, W), with a group for every channel Instance Normalization.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.norm import groups
from kalmannorm.norm.options import TakesOptions


def channel_groups(num_features: int, num_groups: int | None, max_groups: int = 32) -> int:
    """Return `num_groups`, or if None the largest divisor of the channels that is not above `max_groups`.

    ValueError: `num_groups` does not divide the channels.
    """
    if num_groups is None:
        return max(g for g in range(1, min(max_groups, num_features) + 1) if num_features % g == 0)
    if num_groups < 1 or num_features % num_groups:
        raise ValueError(f"{num_groups} groups do not divide {num_features} channels")
    return num_groups


def refuse_single_values(layer: nn.Module, x: Tensor, num_groups: int) -> None:
    """Raise ValueError if a group of channels of x [N, C, ...] has a single value, whose variance says nothing."""
    if x.shape[0] and math.prod(x.shape[1:]) == num_groups:  # Size.numel() fixes the sizes of graphs
        raise ValueError(
            f"{groups.name_of(layer)}: statistics of a single value ({num_groups} groups of {x.shape[1]} channels on a "
            f"feature map of {'x'.join(map(str, x.shape[2:])) or '1'}); take fewer groups or keep a larger map there"
        )


def refuse_single_pixels(layer: nn.Module, x: Tensor) -> None:
    """Raise ValueError if x [N, C, ...] has a single pixel, where an image's variance per channel says nothing."""
    if math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"{groups.name_of(layer)}: statistics of a single value (instance statistics on a feature map of "
            f"{'x'.join(map(str, x.shape[2:])) or '1'}); keep a larger map there, or take another normalizer"
        )


class GroupNorm(TakesOptions, nn.GroupNorm):
    """torch's GroupNorm with errors that name the layer: x [N, C, ...] -> y.

    At most 32 groups by default, as in its paper; the released code takes 4 on CIFAR (`max_groups=4`). ValueError:
    `num_groups` that does not divide the channels; statistics of a single value.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int | None = None,
        max_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channel_groups(num_features, num_groups, max_groups), num_features, eps, affine, device, dtype)
        groups.check(self, num_features, eps)
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        groups.check(self, self.num_channels, self.eps, input)
        refuse_single_values(self, input, self.num_groups)
        return super().forward(input)
