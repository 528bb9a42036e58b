"""Switchable Normalization (Luo et al. 2018; the talk, part 3): a learned mixture of IN, LN and BN statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.norm import groups
from kalmannorm.norm.batch import GroupedStatistics, by_whole_groups
from kalmannorm.norm.group import refuse_single_pixels

MIXED = ("in", "ln", "bn")  # in the order of the weights


class SwitchableNorm(GroupedStatistics):
    """y = gamma (x - sum of w_z mu_z) / sqrt(sum of w'_z var_z + eps) + beta over z = IN, LN, BN.

    w = softmax(mean_weight) and w' = softmax(var_weight) have three logits each, equal at the start. The talk's formula
    mixes deviations; the cited paper mixes variances, as here. BN's statistics are of groups of `stat_batch` images and
    have moving averages, which replace them under moving statistics; IN's and LN's are always the image's own.

    `mixed=("in", "ln")` leaves out BN and its moving averages, as the public code does where a device has a single
    image; w and w' then have two logits. `in_unbiased=True` takes the unbiased variance of an image's pixels for IN,
    and to compute LN's and BN's variances from, as the public code does.

    x [N, C, H, W, ...] -> y. ValueError: an input of one pixel, which IN cannot measure; any other `mixed`. A probe
    sees BN's statistics, those with moving averages. The layer cannot be folded into a BatchNorm.
    """

    folds = False

    def __init__(
        self, num_features: int, *, mixed: Sequence[str] = MIXED, in_unbiased: bool = False, **options: Any
    ) -> None:
        self.mixed = tuple(mixed)
        if self.mixed not in (MIXED, MIXED[:2]):
            raise ValueError(f"mixed must be ('in', 'ln', 'bn') or ('in', 'ln'), not {mixed!r}")
        if "bn" not in self.mixed:
            options["track_running_stats"] = False
        super().__init__(num_features, **options)
        self.in_unbiased = in_unbiased
        place = {key: options.get(key) for key in ("device", "dtype")}
        self.mean_weight = nn.Parameter(torch.ones(len(self.mixed), **place))
        self.var_weight = nn.Parameter(torch.ones(len(self.mixed), **place))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in ("mean_weight", "var_weight"):
            if name in self._parameters:  # BatchNorm's constructor calls this before they exist
                nn.init.ones_(self._parameters[name])  # type: ignore[arg-type]

    @property
    def weights(self) -> dict[str, list[float]]:
        """The weights of the `mixed` statistics in the mean and in the variance, as numbers, for records."""
        with torch.no_grad():
            ratios = self.ratios()
        return {key: value.tolist() for key, value in zip(("mean", "var"), ratios, strict=True)}

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the `mixed` statistics in the mean and in the variance, [3] or [2] each."""
        return torch.softmax(self.mean_weight, 0), torch.softmax(self.var_weight, 0)

    @by_whole_groups
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        refuse_single_pixels(self, input)
        if not input.shape[0]:
            return self.of_no_images(input)
        # All three follow from the moments of each channel of each image, [N, C].
        in_mean, in_var = groups.image_moments(input)
        if self.in_unbiased:
            pixels = groups.values(input, 1)
            in_var = in_var * (pixels / (pixels - 1))
        parts: list[Sequence[Tensor]] = [(in_mean, in_var), groups.pooled(in_mean, in_var, 1)]
        if "bn" in self.mixed:
            moving = self.uses_moving
            parts.append(self.moving_of_images(input.shape[0]) if moving else self.of_images(input, in_mean, in_var))
        mean, var = (_mixture(w, of_kind) for w, of_kind in zip(self.ratios(), zip(*parts, strict=True), strict=True))
        return groups.normalize(input, 1, mean, var, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mixed={'/'.join(self.mixed)}"


def _mixture(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    weights = weights.to(parts[0].dtype)
    first, *others = (weights[i] * part for i, part in enumerate(parts))
    return sum(others, first)
