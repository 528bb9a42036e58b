"""IBN-Net's layer (Pan et al. 2018; the talk, part 4): Instance Norm on some channels, Batch Norm on the others."""

from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.norm import groups
from kalmannorm.norm.batch import BatchNorm
from kalmannorm.norm.group import refuse_single_pixels
from kalmannorm.norm.options import TakesOptions


class InstanceBatchNorm(TakesOptions, nn.Module):
    """Instance Norm on `ratio` of the channels, Batch Norm of groups of `stat_batch` images on the rest.

    x [N, C, H, W] -> y like x. The parts are named as in the public models, whose state dicts load: `IN.weight`,
    `BN.weight`, `BN.running_mean`, ... IN takes every image's own statistics (population variance), in evaluation too,
    and keeps no averages; BN is norm.BatchNorm. A ratio of 0 is BN alone, of 1 IN alone.

    Args:
        ratio: share of IN's channels: 0.5 in the ResNets, 0.4 in the DenseNets (public code).
        first: which part has the first channels: "in" takes int(C ratio) of them (ResNets), "bn" int(C (1 - ratio))
            (DenseNets). The public ResNet layer drops channels that do not split in half; this one does not.

    ValueError: an input of one pixel, which IN cannot measure; a `ratio` outside 0 to 1; any other `first`.
    """

    folds = False
    hands_on = BatchNorm

    def __init__(
        self,
        num_features: int,
        *,
        stat_batch: int | None = None,
        ratio: float = 0.5,
        first: str = "in",
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        groups.check(self, num_features, eps)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be from 0 to 1, not {ratio}")
        if first not in ("in", "bn"):
            raise ValueError(f"first must be 'in' or 'bn', not {first!r}")
        self.num_features, self.ratio, self.first, self.eps = num_features, ratio, first, eps
        ahead = int(num_features * (ratio if first == "in" else 1 - ratio))
        self.instance = slice(0, ahead) if first == "in" else slice(ahead, num_features)
        self.batch = slice(ahead, num_features) if first == "in" else slice(0, ahead)
        of_instance = self.instance.stop - self.instance.start
        # A part without channels is None.
        place: dict[str, Any] = {key: options.get(key) for key in ("device", "dtype")}
        self.IN = nn.InstanceNorm2d(of_instance, eps, affine=affine, **place) if of_instance else None
        if self.IN is not None and not bias:
            self.IN.register_parameter("bias", None)
        if options.get("ragged", "error") != "error":
            raise ValueError("ragged: IBN measures whole groups only: leave ragged='error'")
        options |= {"stat_batch": stat_batch, "eps": eps, "affine": affine, "bias": bias}
        of_batch = num_features - of_instance
        batch = BatchNorm(max(of_batch, 1), **options)  # built even without channels, to check the options
        self.BN = batch if of_batch else None

    @property
    def parts(self) -> list[tuple[nn.Module, slice]]:
        """The parts that have channels, each with their slice, in the order of the channels. convert splits a
        BatchNorm's state by them."""
        both = [(self.IN, self.instance), (self.BN, self.batch)]
        present = [(part, channels) for part, channels in both if part is not None]
        return sorted(present, key=lambda part: part[1].start)

    def forward(self, input: Tensor) -> Tensor:
        groups.check(self, self.num_features, self.eps, input)
        if not input.shape[0]:
            return groups.of_no_images(input, *self.parameters())
        if self.IN is not None:
            refuse_single_pixels(self, input)
        # One affine map per channel and image: the feature map is read twice, and neither split nor concatenated.
        if self.BN is not None and self.BN.uses_moving:
            mean, var = groups.image_moments(input[:, self.instance])
            batch = self.BN.moving_of_images(input.shape[0])
        else:
            mean, var = groups.image_moments(input)
            batch = [t[:, self.batch] for t in (mean, var)]  # without a BN, no channels
            if self.BN is not None:
                batch = self.BN.of_images(input[:, self.batch], *batch)
            mean, var = mean[:, self.instance], var[:, self.instance]
        mean, var = (self._in_order(a, b) for a, b in zip((mean, var), batch, strict=True))
        affine = [[getattr(part, key) for part, _ in self.parts] for key in ("weight", "bias")]
        weight, bias = (None if values[0] is None else torch.cat(values) for values in affine)
        return groups.normalize(input, 1, mean, var, weight, bias, self.eps)

    def _in_order(self, instance: Tensor, batch: Tensor) -> Tensor:
        return torch.cat([instance, batch] if self.first == "in" else [batch, instance], 1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, ratio={self.ratio}, first={self.first}"
