"""Batch Renormalization (Ioffe 2017): batch statistics, corrected towards the moving ones."""

from typing import Any

import torch
from torch import Tensor

from kalmannorm.norm import groups
from kalmannorm.norm.batch import BatchNorm, by_whole_groups
from kalmannorm.norm.checkpoints import once

# The original's schedule in steps: plain BN for 5k, then relaxed linearly, d to its limit at 25k and r at 40k. As
# fractions of a run it needs a total, taken to be the 130k steps after which the paper compares BN and BRN: that
# reading, and scaling the schedule at all, is ours.
TOTAL = 130_000
WARM_UP, D_REACHED, R_REACHED = 5_000 / TOTAL, 25_000 / TOTAL, 40_000 / TOTAL


class BatchRenorm(BatchNorm):
    """BRN over groups of `stat_batch` images: y = gamma (r (x - mu_B) / sigma_B + d) + beta.

    r = clip(sigma_B / sigma, 1 / rmax, rmax) and d = clip((mu_B - mu) / sigma, -dmax, dmax) come from the moving
    averages mu, sigma before this step and are constants for the gradient. While rmax = 1 and dmax = 0 it is BatchNorm.

    Args beyond BatchNorm's:
        rmax, dmax: limits once they are fully relaxed, where they also start: a training that wants the warm-up of the
            paper calls `modes.set_progress` before every step.

    Online evaluation is what training computes, on the evaluation batch: its statistics, corrected by r and d within
    the limits reached; moving evaluation is BatchNorm's. The moving averages' rate is the other normalizers' 0.1 (the
    original has 0.01), and they are of the variance, as torch's BatchNorm keeps it, not of the deviation.
    """

    limits: Tensor  # rmax and dmax as they are now
    corrects: bool  # whether they differ from those of plain BN

    def __init__(self, num_features: int, *, rmax: float = 3.0, dmax: float = 5.0, **options: Any) -> None:
        super().__init__(num_features, **options)
        if rmax < 1 or dmax < 0:
            raise ValueError(f"rmax must be at least 1 and dmax at least 0, not {rmax} and {dmax}")
        self.rmax, self.dmax = rmax, dmax
        # A tensor, so that compiled code does not depend on the numbers; follows from the progress, so not saved.
        place = {key: options.get(key) for key in ("device", "dtype")}
        self.register_buffer("limits", torch.empty(2, **place), persistent=False)
        self._reached = (0.0, 0.0)
        self.set_progress(1.0)

    def set_progress(self, fraction: float) -> None:
        """`fraction` of the training is done: rmax and dmax as the schedule has them there."""
        reached = (1 + (self.rmax - 1) * _ramp(fraction, R_REACHED), self.dmax * _ramp(fraction, D_REACHED))
        if reached != self._reached:
            self._reached = reached
            self.corrects = reached != (1.0, 0.0)
            self._write_limits()

    def _write_limits(self) -> None:
        self.limits.copy_(torch.tensor(self._reached))

    # No checkpoint has them, for a layer that gets its values after it was made on the device meta.

    def _apply(self, *args: Any, **options: Any) -> Any:
        super()._apply(*args, **options)
        self._write_limits()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.limits.is_meta and self.running_mean is not None:
            self.limits = torch.empty_like(self.limits, device=self.running_mean.device)
            self._write_limits()

    def correction(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """r and d of groups of these statistics (population variance), all [groups, C]."""
        assert self.running_mean is not None and self.running_var is not None
        sigma = (self.running_var + self.eps).sqrt()
        rmax, dmax = self.limits.to(mean.dtype)
        r = ((var + self.eps).sqrt() / sigma).clamp(1 / rmax, rmax)
        d = ((mean - self.running_mean) / sigma).clamp(-dmax, dmax)
        return r, d

    @by_whole_groups
    def forward(self, input: Tensor) -> Tensor:
        if self.uses_moving or not self.corrects or self.running_mean is None:
            return super().forward(input)
        if not input.shape[0]:
            return self.of_no_images(input)
        size = self.group_size(input)
        # Constants for the gradient, so it is BN with a gamma and beta of each group's own.
        r, d = once(self, lambda: self.correction(*groups.moments(*groups.image_moments(input.detach()), size)))
        return self._normalize_groups(input, size, *self.corrected(r, d))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rmax={self.rmax}, dmax={self.dmax}"


def _ramp(fraction: float, reached: float) -> float:
    """0 until the warm-up is over, then linearly to 1."""
    return min(1.0, max(0.0, (fraction - WARM_UP) / (reached - WARM_UP)))
