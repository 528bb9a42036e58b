"""Batch Renormalization (Ioffe 2017): batch statistics, corrected towards the moving ones."""

from typing import Any

import torch
from torch import Tensor

from kalmannorm.norm import groups
from kalmannorm.norm.batch import BatchNorm, by_whole_groups
from kalmannorm.norm.checkpoints import preserved

# The original schedule in steps: plain BN for 5k, then linear relaxation, until 25k for d and 40k for r. To make these
# fractions of a run, we take 130k steps as the total, after which the paper compares BN and BRN. That reading, and
# scaling the schedule at all, is ours.
TOTAL = 130_000
WARM_UP, D_REACHED, R_REACHED = 5_000 / TOTAL, 25_000 / TOTAL, 40_000 / TOTAL


class BatchRenorm(BatchNorm):
    """BRN over groups of `stat_batch` images: y = gamma (r (x - mu_B) / sigma_B + d) + beta.

    r = clip(sigma_B / sigma, 1 / rmax, rmax) and d = clip((mu_B - mu) / sigma, -dmax, dmax) come from the moving
    averages mu, sigma before this step and are constants for the gradient. While rmax = 1 and dmax = 0 it is BatchNorm.

    Args beyond BatchNorm's:
        rmax, dmax: the fully relaxed limits, with which a layer also starts. For the paper's warm-up, call
            `modes.set_progress` before every step.

    Online evaluation computes what training does: the evaluation batch's statistics, corrected by r and d within the
    present limits. Moving evaluation is BatchNorm's. The moving averages have the other normalizers' momentum of 0.1
    (the original has 0.01), and are of the variance, as in torch's BatchNorm, not of the standard deviation.
    x [N, C, ...] -> y. ValueError: as BatchNorm; rmax below 1, dmax below 0.
    """

    limits: Tensor  # the present rmax and dmax
    corrects: bool  # whether the present limits allow any correction

    def __init__(self, num_features: int, *, rmax: float = 3.0, dmax: float = 5.0, **options: Any) -> None:
        super().__init__(num_features, **options)
        if rmax < 1 or dmax < 0:
            raise ValueError(f"rmax must be at least 1 and dmax at least 0, not {rmax} and {dmax}")
        self.rmax, self.dmax = rmax, dmax
        # A tensor, so that compiled code does not depend on the numbers; not saved, since it follows from the progress.
        place = {key: options.get(key) for key in ("device", "dtype")}
        self.register_buffer("limits", torch.empty(2, **place), persistent=False)
        self._reached = (0.0, 0.0)
        self.set_progress(1.0)

    def set_progress(self, fraction: float) -> None:
        """Set rmax and dmax to the schedule's values after `fraction` of the training."""
        reached = (1 + (self.rmax - 1) * _ramp(fraction, R_REACHED), self.dmax * _ramp(fraction, D_REACHED))
        if reached != self._reached:
            self._reached = reached
            self.corrects = reached != (1.0, 0.0)
            self._write_limits()

    def _write_limits(self) -> None:
        self.limits.copy_(torch.tensor(self._reached))

    # A layer made on the meta device gets its values from a checkpoint, which has no limits: they are written again.

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
        """Return r and d of groups with these statistics (population variance), all [groups, C]."""
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
        # r and d are constants for the gradient: this is BN with a gamma and beta for each group.
        r, d = preserved(self, lambda: self.correction(*groups.moments(*groups.image_moments(input.detach()), size)))
        return self._normalize_groups(input, size, *self.corrected(r, d))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rmax={self.rmax}, dmax={self.dmax}"


def _ramp(fraction: float, reached: float) -> float:
    """Return 0 until the warm-up is over, then rise linearly to 1 at `reached`."""
    return min(1.0, max(0.0, (fraction - WARM_UP) / (reached - WARM_UP)))
