"""BN = PN + gamma decay (Luo et al. 2018; the talk, part 2): statistics without the batch's noise, the penalty that
this noise amounts to, and BN with the noise of the mean or of the deviation alone."""

from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.norm import groups
from kalmannorm.norm.batch import by_whole_groups
from kalmannorm.norm.checkpoints import is_recomputation, preserved
from kalmannorm.norm.renorm import WARM_UP
from kalmannorm.norm.sync import SyncBatchNorm

ESTIMATORS = ("whole", "memory", "frozen")
VARIANTS = ("talk", "fisher", "images", "constant")
KEPT = 0.9  # share of the averaged coefficient that a step keeps


class GammaDecay(nn.Module):
    """Gamma decay: the penalty sum over channels of zeta gamma^2, equal to the noise of statistics of `batch` images.

    zeta is measured at every step, averaged, and a constant for the gradient: 2 zeta gamma is added to gamma's. With
    the excess kurtosis rho, the normalized feature h~, the output hbar = gamma h~ + beta, and the gradient dl/dhbar of
    one image's loss:

    - `talk`: zeta = (rho + 2) F_gamma / (8 batch) + mean sigmoid(hbar) / (2 batch). Meant for one ReLU layer: the
      sigmoid does not scale with the loss.
    - `fisher`: F_beta in place of the mean sigmoid. F_gamma and F_beta are the empirical Fisher information, means over
      images of (sum over pixels of dl/dhbar h~)^2 and of (sum over pixels of dl/dhbar)^2.
    - `images`: omega^2 F_gamma / (8 batch) + tau^2 F_beta / (2 batch), where omega^2 and tau^2 are the variances over
      images of an image's mean h~^2 and mean h~. An image's pixels are correlated, and so say less than as many
      independent values. On maps of one pixel it is `fisher`.
    - `constant`: zeta = batch, for comparison.

    zeta can run away: as gamma shrinks, the gradient at hbar grows, and zeta with it (seen with `fisher` on
    convolutions). So it is clamped to `cap`, and `capped` counts the steps at which some channel exceeded that (ours).
    `images` and `fisher` are ours, for deep networks: the source's formula is of one layer.
    ValueError: an unknown variant; a `batch` that is no positive number.
    """

    zeta: Tensor  # [C], averaged over the steps
    steps: Tensor  # number of steps measured
    capped: Tensor  # number of steps at which some channel's zeta was above the cap

    def __init__(self, num_features: int, variant: str, batch: float, cap: float | None = 1.0) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"gamma_decay must be one of {', '.join(VARIANTS)} and a number, not {variant!r}")
        if not isinstance(batch, int | float) or batch <= 0:
            raise ValueError(f"gamma_decay: {variant} needs a number above 0, not {batch!r}")
        self.variant, self.batch, self.cap = variant, float(batch), cap
        self.micro_batches = 1  # per process and step, their gradients are added: set by modes.place_batch
        # [7, C], sums over the step's images of: (sum over pixels of dl/dhbar h~)^2, (sum over pixels of dl/dhbar)^2,
        # (mean h~)^2, (mean h~^2 - 1)^2, mean h~^4, mean sigmoid(hbar), and 1.
        self.sums: Tensor | None = None
        for name in ("steps", "capped"):
            self.register_buffer(name, torch.tensor(0))
        self.register_buffer("zeta", torch.zeros(num_features))

    @torch.no_grad()
    def see_features(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Add up the statistics of features x [N, C, ...], normalized by mean, var [N, C] of each image's group."""
        if self.variant == "constant":
            return
        var = torch.where(var > 0, var, 1)  # in a constant, dead channel h~ is 0
        own_mean, own_var = groups.image_moments(x)
        deviation = own_mean - mean
        square = (own_var + deviation.square()) / var
        unused = torch.zeros_like(mean)
        fourth, sigmoid = unused, unused
        if self.variant != "images":
            shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
            pixels = tuple(range(2, x.dim()))
            h = (x - mean.view(shape)) * var.rsqrt().view(shape)
            fourth, sigmoid = h**4, torch.sigmoid(h * weight.view(1, *shape[1:]) + bias.view(1, *shape[1:]))
            if pixels:
                fourth, sigmoid = fourth.mean(pixels), sigmoid.mean(pixels)
        parts = [
            unused,
            unused,
            deviation.square() / var,
            (square - 1).square(),
            fourth,
            sigmoid,
            torch.ones_like(mean),
        ]
        self._add(torch.stack([part.sum(0) for part in parts]))

    def watch(self, weight: Tensor, bias: Tensor, images: int) -> tuple[Tensor, Tensor]:
        """Return gamma and beta for each image, [N, C], with hooks that collect their gradients, sums over pixels."""
        weight, bias = (t.expand(images, -1).clone() for t in (weight, bias))
        if self.variant != "constant":
            for row, t in enumerate((weight, bias)):
                t.register_hook(lambda gradient, row=row: self._see_gradient(row, gradient))
        return weight, bias

    def _see_gradient(self, row: int, gradient: Tensor) -> None:
        # The gradient of each image's own loss: backward has that of the mean loss.
        own = gradient.detach() * (len(gradient) * self.micro_batches)
        sums = torch.zeros(7, gradient.shape[1], dtype=own.dtype, device=own.device)
        sums[row] = own.square().sum(0)
        self._add(sums)

    def _add(self, sums: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums

    def measured(self) -> Tensor:
        """Return zeta [C] as measured on the images since the last step."""
        assert self.sums is not None
        f_gamma, f_beta, tau2, omega2, fourth, sigmoid = self.sums[:-1] / self.sums[-1]
        if self.variant == "images":
            return (omega2 * f_gamma / 4 + tau2 * f_beta) / (2 * self.batch)
        noise = sigmoid if self.variant == "talk" else f_beta
        return ((fourth - 1) * f_gamma / 4 + noise) / (2 * self.batch)  # rho = fourth - 3

    @torch.no_grad()
    def penalize(self, weight: Tensor) -> None:
        """Add the penalty's gradient to gamma's, once a step, after its last backward."""
        if self.variant == "constant":
            self.zeta.fill_(self.batch)
        elif self.sums is not None:
            measured = self.measured().to(self.zeta.dtype)
            self.zeta.copy_(torch.where(self.steps == 0, measured, KEPT * self.zeta + (1 - KEPT) * measured))
            self.steps += 1
            if self.cap is not None:
                self.capped += (self.zeta > self.cap).any()
            self.sums = None
        if weight.grad is not None:
            weight.grad += (2 * self.coefficients * weight).to(weight.grad.dtype)

    @property
    def coefficients(self) -> Tensor:
        """The averaged zeta [C], clamped to the cap."""
        return self.zeta if self.cap is None else self.zeta.clamp(max=self.cap)

    def extra_repr(self) -> str:
        return f"{self.variant}, {self.batch:g}"


class PopulationNorm(SyncBatchNorm):
    """Population Normalization: normalizes by statistics of the training distribution under the present weights.

    x [N, C, ...] -> y. The source's estimator could not be read; `estimator` offers three:

    - `whole`: statistics of groups of `stat_batch` images over all processes; of the whole gradient batch if that is
      None, which is PN. BN with small groups at the same gradient batch then differs in the statistics' noise alone.
    - `memory`: moving averages normalize, with BN's gradients: Batch Renormalization without limits, after its warm-up.
    - `frozen`: moving averages as constants; expected to diverge, a negative control.

    `gamma_decay=(variant, batch)` adds the penalty equivalent to statistics of `batch` images (GammaDecay; with `whole`
    only), its coefficients clamped to `gamma_cap`: call modes.finish_gradients between backward and the optimizer's
    step. Evaluation is BatchNorm's. ValueError: as BatchNorm; an unknown estimator or variant; gamma_decay without a
    gamma, a beta and `whole`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        estimator: str = "whole",
        gamma_decay: tuple[str, float] | None = None,
        gamma_cap: float | None = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}")
        if gamma_decay is not None and (isinstance(gamma_decay, str) or len(gamma_decay) != 2):
            raise ValueError(f"gamma_decay must be (variant, batch), not {gamma_decay!r}")
        if gamma_decay is not None and (estimator != "whole" or self.weight is None or self.bias is None):
            raise ValueError("gamma_decay needs estimator='whole', a gamma and a beta")
        if estimator != "whole" and self.running_mean is None:
            raise ValueError(f"estimator={estimator!r} needs moving statistics: track_running_stats=True")
        self.estimator = estimator
        self.decay = None if gamma_decay is None else GammaDecay(num_features, *gamma_decay, gamma_cap)
        if self.decay is not None:
            self.decay.to(self.weight)
        self.corrects = True  # whether `memory` is past its warm-up

    def set_progress(self, fraction: float) -> None:
        """Switch `memory` from BN to the moving averages once `fraction` of the training is past BRN's warm-up."""
        self.corrects = fraction > WARM_UP

    @by_whole_groups
    def forward(self, input: Tensor) -> Tensor:
        remembers = self.estimator == "frozen" or (self.estimator == "memory" and self.corrects)
        if self.uses_moving or not (remembers or (self.decay is not None and self.training)):
            return super().forward(input)
        if not input.shape[0] and not self.spans:
            return self.of_no_images(input)
        size, member, mean, var = self.moments(input, self.group_of)
        # Not compiled: it has hooks, and averages that change before backward, where compiled code would read the new
        # ones. Not a decorator: that imports the whole compiler.
        apart = torch.compiler.disable if torch.compiler.is_compiling() else lambda function: function
        normalize = apart(self._normalize_by_memory if remembers else self._normalize_watched)
        y = normalize(input, mean[member], var[member])
        self.record(mean.detach(), var.detach(), groups.values(input, size))
        return y

    def _normalize_by_memory(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        averages = self.running_mean, self.running_var
        past_mean, past_var = (t.expand_as(mean) for t in preserved(self, lambda: [t.clone() for t in averages]))
        if self.estimator == "frozen":
            return groups.normalize(x, 1, past_mean, past_var, self.weight, self.bias, self.eps)
        # BRN's r and d without limits, constants for the gradient.
        scale = (past_var + self.eps).rsqrt()
        r = (var.detach() + self.eps).sqrt() * scale
        d = (mean.detach() - past_mean) * scale
        return groups.normalize(x, 1, mean, var, *self.corrected(r, d), self.eps)

    def _normalize_watched(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        assert self.decay is not None
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        # A checkpoint runs this twice; features count once, in its first forward if that builds a graph.
        seen = preserved(self, torch.is_grad_enabled)
        if torch.is_grad_enabled():
            if not (seen and is_recomputation()):
                self.decay.see_features(x.detach(), mean.detach(), var.detach(), weight.detach(), bias.detach())
            weight, bias = self.decay.watch(weight, bias, len(x))
        return groups.normalize(x, 1, mean, var, weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, estimator={self.estimator}"


class SplitBatchNorm(SyncBatchNorm):
    """BN with mean and deviation of different groups, so that only one of them carries the noise of small batches.

    x [N, C, ...] -> y. `mean_batch` and `var_batch` are None for groups of `stat_batch` images, or "whole" for the
    whole batch over all processes. NORMS["bn"] builds it if either is given. A group's variance is around its own mean.
    ValueError: as BatchNorm; any other value; a `ragged` other than "error".
    """

    def __init__(
        self, num_features: int, *, mean_batch: str | None = None, var_batch: str | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        for name, value in (("mean_batch", mean_batch), ("var_batch", var_batch)):
            if value not in (None, "whole"):
                raise ValueError(f"{name} must be None or 'whole', not {value!r}")
        if self.ragged != "error":
            raise ValueError(f"ragged must be 'error' with mean_batch or var_batch, not {self.ragged!r}")
        self.mean_batch, self.var_batch = mean_batch, var_batch

    def forward(self, input: Tensor) -> Tensor:
        if self.uses_moving:
            return super().forward(input)
        if not input.shape[0] and not self.spans:
            return self.of_no_images(input)
        size, member, *of_groups = self.moments(input, self.group_of)
        _, _, *of_whole = self.moments(input, None)
        mean, var = (
            (whole.expand_as(group) if chosen else group)
            for group, whole, chosen in zip(of_groups, of_whole, (self.mean_batch, self.var_batch), strict=True)
        )
        y = groups.normalize(input, 1, mean[member], var[member], self.weight, self.bias, self.eps)
        self.record(mean.detach(), var.detach(), groups.values(input, size))
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mean_batch={self.mean_batch}, var_batch={self.var_batch}"
