"""Kalman Normalization: the update step (paper Eq. 7 lines 2 and 4) over the statistics sets of BN and GN (Eq. 8)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm.norm import groups
from kalmannorm.norm.batch import GroupedStatistics, by_whole_groups
from kalmannorm.norm.belief import Belief, Carried, Estimated, pick
from kalmannorm.norm.contract import TakesBeliefs, is_traced, unless_idle
from kalmannorm.norm.estimate import normalize_by_posterior
from kalmannorm.norm.group import channel_groups, refuse_single_values
from kalmannorm.norm.moments import channel_belief
from kalmannorm.norm.options import TakesOptions

INITIAL_NOISE = 0.02  # R's initial value: no source gives one


class Estimator(TakesBeliefs):
    """Base of the Kalman normalizers: gain and noise of the update (paper Eq. 7), and the belief that is handed on.

    The gain q in (0, 1) is one per layer, the noise R >= 0 one per channel or one for all:
    posterior mean = p prior + q measured, posterior var = p (prior + R) + q measured [+ p q (difference of means)^2],
    p = 1 - q. Options as in KalmanBatchNorm2d.
    """

    values = 1  # number of values behind each statistic of the last forward: with prior_values the gain depends on it
    on_relu = "closed"  # how a ReLU changes the belief that is handed on (belief.Carried): set by convert
    spread = False  # whether a batch is spread over processes: set by modes.spread_batches
    gain_logit: Tensor | None
    noise_raw: Tensor | None
    rows: Callable[[int], int]  # number of a prior's rows, from the number of images: each subclass has the method

    def _init_estimator(
        self,
        channels: int,
        gain: float | None,
        prior_values: float | None,
        learn_gain: bool,
        noise: bool | str,
        mixture: bool,
        guard: float | None,
        belief: str,
        predict: str,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        if (gain is None) == (prior_values is None):
            raise ValueError(f"one of gain ({gain}) and prior_values ({prior_values}) must be a number, the other None")
        if gain is not None and not 0 < gain <= 1:
            raise ValueError(f"gain must lie in (0, 1], not {gain}")
        if gain == 1 and learn_gain:
            raise ValueError(
                "gain 1 cannot be learned (its logit is infinite): pass learn_gain=False or a gain below 1"
            )
        if prior_values is not None and not 0 < prior_values < math.inf:
            raise ValueError(f"prior_values must be positive, not {prior_values}")
        if belief not in ("posterior", "output"):
            raise ValueError(f"belief must be 'posterior' or 'output', not {belief!r}")
        if predict not in ("both", "var"):
            raise ValueError(f"predict must be 'both' or 'var', not {predict!r}")
        if noise not in (True, False, "shared", "relative"):
            raise ValueError(f"noise must be True, False, 'shared' or 'relative', not {noise!r}")
        if guard is not None and guard <= 0:
            raise ValueError(f"guard must be positive or None, not {guard}")
        self.channels, self.initial_gain, self.prior_values = channels, gain, prior_values
        self.noise, self.mixture, self.guard, self.belief, self.predict = noise, mixture, guard, belief, predict
        self.gain_logit = self.noise_raw = None
        if learn_gain:  # with prior_values, an offset to the logit of n / (n + prior_values). [1]: FSDP refuses scalars
            self.gain_logit = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        if noise:
            self.noise_raw = nn.Parameter(torch.empty(1 if noise == "shared" else channels, device=device, dtype=dtype))
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Set q and R to their initial values."""
        if self.gain_logit is not None:
            self.gain_logit.fill_(math.log(self.initial_gain / (1 - self.initial_gain)) if self.initial_gain else 0.0)
        if self.noise_raw is not None:
            self.noise_raw.fill_(math.log(math.expm1(INITIAL_NOISE)))

    def estimate(self, x: Tensor, prior: Belief | None) -> tuple[Tensor, Belief]:
        """Return x normalized, and the belief to hand on."""
        raise NotImplementedError

    def forward(self, input: Tensor, beliefs: Any = None) -> Any:
        """Return y like the input; with `beliefs` (the input's, or an empty tuple) return Estimated(y, belief)."""
        prior = channel_belief(pick(beliefs, 0, "input"))
        if prior is not None and prior.mean.shape[0] not in (self.rows(input.shape[0]), 1):
            prior = None  # it comes from a normalizer with other groups: a part of the model converted by itself
        y, belief = self.estimate(input, prior)
        if beliefs is None:
            return y
        return Estimated(y, unless_idle(belief if self.on_relu == "closed" else Carried(belief, "", self.on_relu)))

    @property
    def gain(self) -> Tensor | float:
        """Return q, the weight of the measurement.

        With `prior_values` q is n / (n + prior_values), n the number of values measured last: the Kalman gain where the
        measurement's noise falls as 1 / n.
        """
        if self.prior_values is None:
            assert self.initial_gain is not None
            return self.initial_gain if self.gain_logit is None else torch.sigmoid(self.gain_logit)
        if self.gain_logit is None:
            return self.values / (self.values + self.prior_values)
        return torch.sigmoid(self.gain_logit + math.log(self.values / self.prior_values))

    @property
    def over_ranks(self) -> bool:
        """Whether the guard decides over the batches of all processes."""
        return self.spread and self.training

    @property
    def gain_value(self) -> float:
        """The gain q as a number, for records."""
        return float(torch.as_tensor(self.gain).detach())

    def predicted(self, prior: Belief) -> Belief:
        """Return the prior with R added to its variance (Eq. 7 line 3), or R times its variance if `relative`.

        ValueError: the belief's number of channels is not R's.
        """
        if self.noise_raw is None:
            return prior
        noise, channels = F.softplus(self.noise_raw), prior.var.shape[1]
        if len(noise) not in (1, channels):
            raise ValueError(
                f"{groups.name_of(self)}: a belief of {channels} channels, and R of {len(noise)}: where channels were "
                "pruned, prune kalmannorm.fold(model) and convert what is left"
            )
        return Belief(prior.mean, prior.var + (noise * prior.var if self.noise == "relative" else noise))

    def tie_idle(self, weight: Tensor | None, prior: Belief | None = None) -> Tensor | None:
        """Return `weight`, its value unchanged, with a gradient of 0 for q, R and the unused prior.

        DDP waits for the gradient of every parameter: q and R, which are idle without a prior, and those that the
        prior was computed from.
        """
        for idle in (self.gain_logit, self.noise_raw, None if prior is None else prior.mean):
            if idle is not None and idle.requires_grad:
                weight = (idle.new_ones(self.channels) if weight is None else weight) + 0 * idle.sum()
        return weight

    def hand_on(self, posterior: Belief, weight: Tensor | None, bias: Tensor | None) -> Belief:
        """Return the belief that the next layer predicts from.

        `posterior`: that of the un-normalized feature (paper, released code). `output`: N(beta, gamma^2), the
        distribution after an exact normalization (as in Normalization Propagation): one row for all groups.
        """
        if self.belief == "posterior":
            return posterior
        like = posterior.mean
        weight = like.new_ones(self.channels) if weight is None else weight
        return Belief((like.new_zeros(self.channels) if bias is None else bias)[None], weight.square()[None])

    def estimator_repr(self) -> str:
        learned = "learned" if self.gain_logit is not None else "fixed"
        gain = f"gain={self.initial_gain}" if self.prior_values is None else f"prior_values={self.prior_values}"
        return f"{gain} ({learned}), noise={self.noise}, belief={self.belief}, predict={self.predict}"


class KalmanBatchNorm2d(Estimator, GroupedStatistics):  # type: ignore[misc]
    """(Batch) Kalman Normalization, KN or BKN: BN's statistics, corrected by a prediction from the layers before.

    Args:
        num_features: channels C.
        stat_batch: images that share statistics; None: the whole batch.
        gain: weight q of the measurement, in (0, 1]; its initial value with `learn_gain`. 1 needs `learn_gain=False`.
            No source gives the initial value: 0.5 is ours.
        prior_values: instead of `gain` (None then), the number of measured values that weigh as much as the prior: the
            gain is n / (n + prior_values), n = stat_batch x pixels. With `learn_gain` a learned offset is added to its
            logit. Ours.
        noise: True learns R, one per channel (Eq. 7). `shared`: a single scalar, which convert shares between all
            layers (v1). `relative` (ours): R times the prior's variance. False: no R (released code).
        mixture: add p q (measured mean - prior mean)^2 to the variance, which makes it Cov(x - mu) as paper 3.2 defines
            it (the talk, v1's appendix, the released code). False: Eq. 7 to the letter.
        guard: use the measurement alone if the ratio of the prior's variance to the measured one, averaged over all
            groups and channels of a batch, is at least this (released code: 100). It couples the groups of a batch.
        belief: which belief to hand on, `posterior` or `output`.
        predict: `both`, or only the `var` while the mean is measured (ours).
        moving_groups: average the `mean` over all groups, or only the `first` group (released code).
        moving_unbiased: apply Bessel's correction to the moving variance, as torch's BatchNorm does.
        first_unbiased: without a prior, hand on the unbiased variance (the released code's fused first layer).
        ragged: what to do with batches that do not divide: `error`, `measure` or `drop` (GroupedStatistics).

    x [N, C, H, W] or [N, C] -> y like x; with `beliefs`, a Belief [rows, C] or an empty tuple, -> (y, Belief [rows,
    C]), one row per group or one for all. ValueError: a batch that does not divide; statistics of a single value.
    Source: paper Eq. 7; rows are groups, interleaved (norm/groups.py).
    """

    def __init__(
        self,
        num_features: int,
        *,
        stat_batch: int | None = None,
        gain: float | None = 0.5,
        prior_values: float | None = None,
        learn_gain: bool = True,
        noise: bool | str = True,
        mixture: bool = True,
        guard: float | None = None,
        belief: str = "posterior",
        predict: str = "both",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        moving_groups: str = "mean",
        moving_unbiased: bool = False,
        first_unbiased: bool = False,
        ragged: str = "error",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            stat_batch=stat_batch,
            eps=eps,
            momentum=momentum,
            affine=affine,
            bias=bias,
            track_running_stats=track_running_stats,
            moving_groups=moving_groups,
            moving_unbiased=moving_unbiased,
            ragged=ragged,
            device=device,
            dtype=dtype,
        )
        self.first_unbiased, self.one_belief = first_unbiased, belief == "output"
        self._init_estimator(
            num_features, gain, prior_values, learn_gain, noise, mixture, guard, belief, predict, device, dtype
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "initial_gain"):  # BatchNorm's constructor calls this before there is a gain
            self._start()

    def rows(self, images: int) -> int:
        return 1 if self.group_of is None else -(-images // self.group_of)

    @property
    def decides_for_batch(self) -> bool:
        return self.guard is not None and self.pending is not None

    @by_whole_groups
    def estimate(self, x: Tensor, prior: Belief | None) -> tuple[Tensor, Belief]:
        if self.uses_moving:
            assert self.running_mean is not None and self.running_var is not None
            self._check_input_dim(x)
            mean, var = self.moving()
            moving = Belief(mean[None], var[None])
            # In a frozen layer q, R and the transition are idle, and DDP waits for their gradients.
            tie = torch.is_grad_enabled() and not is_traced()
            weight = self.tie_idle(self.weight, prior) if tie else self.weight
            y = F.batch_norm(x, mean, var, weight, self.bias, False, 0.0, self.eps)
            return y, self.hand_on(moving, self.weight, self.bias)
        if not x.shape[0]:
            if self.guard is not None and self.over_ranks:  # the other processes would wait for this one in all_reduce
                raise ValueError(
                    f"{self.where}: no images on this device, but the guard averages over all: take guard=None"
                )
            y = self.of_no_images(x, *(prior or ()))
            return y, self.hand_on(groups.belief_of_no_images(x), self.weight, self.bias)
        size = self.group_size(x)
        self.values = values = groups.values(x, size)
        predicted = None if prior is None else self.predicted(prior)
        weight = self.weight if prior is not None else self.tie_idle(self.weight)
        prior_moments = predicted if predicted is None or self.predict == "both" else (None, predicted.var)
        y, posterior, measured = normalize_by_posterior(
            x, size, prior_moments, self.gain, weight, self.bias, self.eps, self.mixture, self.guard, self.over_ranks
        )
        if self.training:
            self.update_moving(*posterior, values)
        if self.probe is not None and not self.left:
            detached = (b and Belief(b.mean.detach(), b.var.detach()) for b in (posterior, predicted))
            self.probe(measured=measured, **dict(zip(("used", "prior"), detached, strict=True)))
        if prior is None and self.first_unbiased:
            posterior = Belief(posterior.mean, posterior.var * (values / (values - 1)))
        return y, self.hand_on(posterior, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.estimator_repr()}"


class KalmanGroupNorm(TakesOptions, Estimator):
    """Group Kalman Normalization, GKN (paper 3.3): GN's statistics, corrected by a prediction for the same image.

    Rows are images. An image's belief [N, C] (+ R per channel) is averaged over each group of channels, with the
    variance of that mixture: mean of variances + variance of means. Options as in KalmanBatchNorm2d. There are no
    moving statistics: training and evaluation compute the same.

    x [N, C, ...] -> y like x; with `beliefs`, a Belief [N or 1, C] or an empty tuple, -> (y, Belief [N or 1, C]).
    ValueError: statistics of a single value.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        gain: float | None = 0.5,
        prior_values: float | None = None,
        learn_gain: bool = True,
        noise: bool | str = True,
        mixture: bool = True,
        guard: float | None = None,
        belief: str = "posterior",
        predict: str = "both",
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups.check(self, num_channels, eps)
        self.num_groups, self.num_channels, self.eps = channel_groups(num_channels, num_groups), num_channels, eps
        ones, zeros = (torch.full((num_channels,), value, device=device, dtype=dtype) for value in (1.0, 0.0))
        self.weight = nn.Parameter(ones) if affine else None
        self.bias = nn.Parameter(zeros) if affine and bias else None
        self._init_estimator(
            num_channels, gain, prior_values, learn_gain, noise, mixture, guard, belief, predict, device, dtype
        )

    def reset_parameters(self) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)
        self._start()

    def rows(self, images: int) -> int:
        return images

    def estimate(self, x: Tensor, prior: Belief | None) -> tuple[Tensor, Belief]:
        groups.check(self, self.num_channels, self.eps, x)
        refuse_single_values(self, x, self.num_groups)
        images, channels = x.shape[:2]
        if images == 0:
            y = groups.of_no_images(x, *self.parameters(), *(prior or ()))
            return y, self.hand_on(groups.belief_of_no_images(x), self.weight, self.bias)
        per_group = channels // self.num_groups
        predicted = None
        if prior is not None:
            mean, var = (t.expand(images, -1).unflatten(1, (self.num_groups, per_group)) for t in self.predicted(prior))
            predicted = Belief(mean.mean(2).flatten()[None], (var.mean(2) + mean.var(2, correction=0)).flatten()[None])
        # One image whose channels are the N * num_groups sets of Eq. 8, in the statistics' dtype: with a half-precision
        # input only the result is rounded.
        sets = x.contiguous().view(1, images * self.num_groups, -1).to(groups.moments_dtype(x))
        self.values = sets.shape[2]
        prior_moments = predicted if predicted is None or self.predict == "both" else (None, predicted.var)
        y, posterior, _ = normalize_by_posterior(
            sets, 1, prior_moments, self.gain, None, None, self.eps, self.mixture, self.guard, self.over_ranks
        )
        shape = (1, channels) + (1,) * (x.dim() - 2)
        affine = (self.weight if prior is not None else self.tie_idle(self.weight), self.bias)
        weight, bias = (None if t is None else t.view(shape).to(y.dtype) for t in affine)
        y = y.view(x.shape)
        if weight is not None:
            y = y * weight if bias is None else torch.addcmul(bias, y, weight)
        y = y.to(x.dtype).contiguous(memory_format=groups.format_of(x))
        mean, var = (t.view(images, self.num_groups).repeat_interleave(per_group, 1) for t in posterior)
        return y, self.hand_on(Belief(mean, var), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, {self.estimator_repr()}"
