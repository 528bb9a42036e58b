"""Sparse Switchable Normalization (Shao et al. 2019): SN whose weights become a choice, by SparsestMax."""

import math
from typing import Any

import torch
from torch import Tensor

from kalmannorm.norm import groups
from kalmannorm.norm.switchable import SwitchableNorm

# A point closer than this to the middle of its face has no direction away from it: only rounding error.
NO_DIRECTION = 1e-6
FIRST_FACES = ("whole", "cut")


def sparsemax(z: Tensor) -> Tensor:
    """Return the point of the simplex that is nearest to z [K] (Martins & Astudillo 2016)."""
    ordered = z.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    count = torch.arange(1, len(z) + 1, device=z.device)
    support = (ordered * count > excess).sum()  # so many of the largest stay above 0
    threshold = excess.gather(0, (support - 1).view(1)) / support
    return (z - threshold).clamp(min=0)


def sparsestmax(z: Tensor, radius: Tensor | float, *, first_face: str = "whole") -> Tensor:
    """Return weights [K] from logits z [K]: those of sparsemax, pushed out of a circle around the simplex's middle.

    With `radius` 0 it is sparsemax; above sqrt(1 - 1/K) every result is a corner. If sparsemax ends on an edge, the
    circle is around the edge's middle. It then has the whole radius, as in the public code, or with `first_face="cut"`
    that of the edge's intersection with the circle around the simplex's middle, as on every later face: the paper's
    definition, from memory, and a weaker constraint.

    At ties (closer than 1e-6 to a middle), where the public code gives NaN or weights that do not sum to 1, there is no
    direction to push in: sparsemax's result stays, with its gradient. Above sqrt(1 - 1/K) the largest logit is taken,
    the first if several are equal. Both are ours. Corners have gradient 0. ValueError: an unknown `first_face`.
    """
    cut = _known_face(first_face) == "cut"
    radius = torch.as_tensor(radius, dtype=z.dtype, device=z.device)
    square = radius.square()
    w = sparsemax(z)
    middle = torch.full_like(w, 1 / len(w))
    result, done = torch.zeros_like(w), torch.zeros((), dtype=torch.bool, device=z.device)
    for step in range(len(z)):
        inside = (w > 0).to(w.dtype)  # constant for the gradient, like the middle and the radius
        before, middle = middle, inside / inside.sum()
        if step or cut:
            square = square - (middle - before).square().sum()
        remaining = square.clamp(min=0).sqrt()
        away = w - middle
        length = away.square().sum()
        no_direction = length < NO_DIRECTION**2
        length = torch.where(no_direction, torch.ones_like(length), length).sqrt()
        corner = inside.sum() == 1
        stays = corner | no_direction | (length >= remaining)
        pushed = middle + remaining * away / length
        # Corners are exact: a choice is recognized by a weight of exactly 1.
        here = torch.where(corner, inside, torch.where(stays, w, pushed))
        result = torch.where(done, result, here)
        done = done | stays | (pushed.min() >= 0)
        w = sparsemax(pushed)
    # Above the simplex's circumradius the circle contains all of it, and only a corner is left.
    return torch.where(radius > math.sqrt(1 - 1 / len(z)), _one_hot(z.argmax(), z), result)


def _known_face(first_face: str) -> str:
    if first_face not in FIRST_FACES:
        raise ValueError(f"first_face must be one of {', '.join(FIRST_FACES)}, not {first_face!r}")
    return first_face


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    return (torch.arange(len(like), device=like.device) == index).to(like.dtype)


class SparseSwitchableNorm(SwitchableNorm):
    """SSN: SN with SparsestMax instead of softmax, whose radius grows over the training until every layer has chosen
    one of IN, LN and BN for its mean, and one for its variance.

    x [N, C, H, W, ...] -> y. modes.set_progress, called before every step, sets the radius to the fraction of the
    training that is done, so that all layers have chosen by 81.65 % of it; without it the radius stays 0. A weight that
    reaches 1 in training is fixed for good: `choice` [2], for mean and variance, holds its index in `mixed`, -1 before;
    the logits become one-hot and get no gradient. `first_face` is sparsestmax's. Statistics are SN's: population
    variances, and a momentum of 0.1 (the published layer has in_unbiased=True, and 0.003, too slow for short
    trainings).

    The logits need a tenth of the learning rate, no weight decay, and clipped gradients (modes.finish_gradients), as in
    the public code. ValueError: as SwitchableNorm; an unknown `first_face`.
    """

    radius: Tensor  # scalar: the fraction of the training that is done
    choice: Tensor
    chosen_at: Tensor  # [2]: the radius at the choice, which is the fraction of the training; 0 before

    def __init__(self, num_features: int, *, first_face: str = "whole", **options: Any) -> None:
        super().__init__(num_features, **options)
        self.first_face = _known_face(first_face)
        self.register_buffer("radius", self.mean_weight.new_zeros(()))
        self.register_buffer("choice", torch.full((2,), -1, device=self.mean_weight.device))
        self.register_buffer("chosen_at", self.mean_weight.new_zeros(2))

    def set_progress(self, fraction: float) -> None:
        """Set the radius to the `fraction` of the training that is done."""
        self.radius.fill_(fraction)

    @property
    def chosen(self) -> tuple[str | None, str | None]:
        """The statistics chosen for the mean and for the variance, as names in `mixed`; None before the choice."""
        mean, var = (None if index < 0 else self.mixed[index] for index in self.choice.tolist())
        return mean, var

    def ratios(self) -> tuple[Tensor, Tensor]:
        logits = (self.mean_weight, self.var_weight)
        return self._ratio(0, logits[0]), self._ratio(1, logits[1])

    def _ratio(self, which: int, logits: Tensor) -> Tensor:
        # A copy: the logits may change below, before their gradient is taken. Half precision is too coarse for sums of
        # logits.
        weights = sparsestmax(logits.clone().to(groups.moments_dtype(logits)), self.radius, first_face=self.first_face)
        choice = self.choice[which]
        if self.training:
            with torch.no_grad():
                now = (choice < 0) & (weights.max() == 1)
                choice = torch.where(now, weights.argmax(), choice)
                self.choice[which] = choice
                self.chosen_at[which] = torch.where(now, self.radius, self.chosen_at[which])
                logits.copy_(torch.where(choice < 0, logits, _one_hot(choice, logits)))
        return torch.where(choice < 0, weights, _one_hot(choice, weights))
