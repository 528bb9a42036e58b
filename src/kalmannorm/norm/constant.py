"""Layers that measure nothing: frozen Batch Normalization, and no normalization at all."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.norm import groups
from kalmannorm.norm.options import TakesOptions


class FrozenBatchNorm(TakesOptions, nn.Module):
    """Frozen BN ("BN*" in the paper's Table 6): a constant affine map, in training and evaluation.

    gamma, beta, mean and variance are buffers named as in torch's BatchNorm2d, whose checkpoints load; convert copies a
    model's. A new layer is the identity (but for eps). torchvision's FrozenBatchNorm2d is the same for images alone;
    this one takes [N, C] too, and norm/ needs torch alone.

    x [N, C, ...] -> y.
    """

    folds = True
    replaced: tuple[type[_BatchNorm], bool, bool] = (torch.nn.BatchNorm2d, True, True)  # as in GroupedStatistics
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups.check(self, num_features, eps)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum  # momentum: for fold alone
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    def forward(self, input: Tensor) -> Tensor:
        groups.check(self, self.num_features, self.eps, input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class NoNorm(TakesOptions, nn.Module):
    """No normalizer: x -> x. convert gives the convolutions biases in place of beta."""

    def __init__(self) -> None:  # for TakesOptions, to refuse options: nn.Module's __init__ takes any
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        # A copy, as from every normalizer: an in-place ReLU after it must not change x, which a shortcut may use too.
        return input.clone()
