"""Sparse Switchable Normalization (Shao et al. 2019): SN whose weights end in a choice, by SparsestMax."""

import math
from typing import Any

import torch
from torch import Tensor

from kalmannorm.norm import groups
from kalmannorm.norm.switchable import SwitchableNorm

# Nearer to the middle of its face than this, a point has no direction away from it, only rounding.
NO_DIRECTION = 1e-6
FIRST_FACES = ("whole", "cut")


def sparsemax(z: Tensor) -> Tensor:
    """The point of the simplex that is nearest to z [K] (Martins & Astudillo 2016)."""
    ordered = z.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    count = torch.arange(1, len(z) + 1, device=z.device)
    support = (ordered * count > excess).sum()  # the first `support` ones stay above 0
    threshold = excess.gather(0, (support - 1).view(1)) / support
    return (z - threshold).clamp(min=0)


def sparsestmax(z: Tensor, radius: Tensor | float, *, first_face: str = "whole") -> Tensor:
    """Weights [K] from logits z [K]: sparsemax's, pushed out of a circle of `radius` around the middle of the simplex.

    At radius 0 it is sparsemax; from sqrt(1 - 1/K) on, every result is a corner. Where sparsemax ends on an edge, the
    circle there is around the edge's middle. It has the whole radius, as the public code computes it, or, with
    `first_face="cut"`, that of the cut of the edge with the circle around the simplex's middle, as everywhere later:
    this is the paper's definition from memory, and a weaker constraint.

    At ties, where the public code gives NaN or weights that do not sum to 1, there is no direction to push into
    (nearer than 1e-6 to a middle): sparsemax's result stays, with its gradient; beyond sqrt(1 - 1/K) the largest logit
    is taken, the first of equals. Both are ours. Corners have gradient 0. ValueError: an unknown `first_face`.
    """
    cut = _known_face(first_face) == "cut"
    radius = torch.as_tensor(radius, dtype=z.dtype, device=z.device)
    square = radius.square()
    w = sparsemax(z)
    middle = torch.full_like(w, 1 / len(w))
    result, done = torch.zeros_like(w), torch.zeros((), dtype=torch.bool, device=z.device)
    for step in range(len(z)):
        inside = (w > 0).to(w.dtype)  # a constant, as the middle and the radius are
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
        # Corners exactly: a choice is recognized by its 1.
        here = torch.where(corner, inside, torch.where(stays, w, pushed))
        result = torch.where(done, result, here)
        done = done | stays | (pushed.min() >= 0)
        w = sparsemax(pushed)
    # Beyond the circle around the whole simplex, every point of it is a corner.
    return torch.where(radius > math.sqrt(1 - 1 / len(z)), _one_hot(z.argmax(), z), result)


def _known_face(first_face: str) -> str:
    if first_face not in FIRST_FACES:
        raise ValueError(f"first_face must be one of {', '.join(FIRST_FACES)}, not {first_face!r}")
    return first_face


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    return (torch.arange(len(like), device=like.device) == index).to(like.dtype)


class SparseSwitchableNorm(SwitchableNorm):
    """SN with SparsestMax in softmax's place (SSN), whose radius grows over the training until every layer has chosen
    one of IN, LN and BN for its mean, and one for its variance.

    x [N, C, H, W, ...] -> y. modes.set_progress before every step sets the radius to the fraction done, so that all
    have chosen at 81.65 % of a training; without it the radius stays 0. A weight that becomes 1 in training
    stays so for good: `choice` [2], for mean and variance, is its index in `mixed`, -1 before; the logits become the
    choice and get no gradient. `first_face` is sparsestmax's. Statistics are SN's: population variances, averages by
    0.1 (the published layer has in_unbiased=True, and averages by 0.003, too slow for short trainings).

    In an optimizer the logits want a tenth of the rate, no weight decay, and clipped gradients
    (modes.finish_gradients), as in the public code.
    """

    radius: Tensor
    choice: Tensor
    chosen_at: Tensor  # [2]: the radius then, so the part of the training; 0 before

    def __init__(self, num_features: int, *, first_face: str = "whole", **options: Any) -> None:
        super().__init__(num_features, **options)
        self.first_face = _known_face(first_face)
        self.register_buffer("radius", self.mean_weight.new_zeros(()))
        self.register_buffer("choice", torch.full((2,), -1, device=self.mean_weight.device))
        self.register_buffer("chosen_at", self.mean_weight.new_zeros(2))

    def set_progress(self, fraction: float) -> None:
        """`fraction` of the training is done: the radius."""
        self.radius.fill_(fraction)

    @property
    def chosen(self) -> tuple[str | None, str | None]:
        """What was chosen for the mean and for the variance, of `mixed`; None before."""
        mean, var = (None if index < 0 else self.mixed[index] for index in self.choice.tolist())
        return mean, var

    def ratios(self) -> tuple[Tensor, Tensor]:
        logits = (self.mean_weight, self.var_weight)
        return self._ratio(0, logits[0]), self._ratio(1, logits[1])

    def _ratio(self, which: int, logits: Tensor) -> Tensor:
        # A copy: the logits themselves may change below, before their gradient is taken. Halves are too short for sums
        # of logits.
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
