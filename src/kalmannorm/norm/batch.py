"""Batch Normalization over groups of `stat_batch` images, and the base class of all normalizers over such groups."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.norm import groups
from kalmannorm.norm.belief import Belief
from kalmannorm.norm.checkpoints import is_recomputation, preserved
from kalmannorm.norm.contract import refuse_script, refusing_qconfig
from kalmannorm.norm.options import TakesOptions

Probe = Callable[..., None]
RAGGED = ("error", "measure", "drop")
_DROPPED = -1


def by_whole_groups(normalize: Callable[..., Any]) -> Callable[..., Any]:
    """Extend a normalizer's method on x [N, C, ...] (and a prior) to batches that do not divide into groups.

    It is called for the whole groups, then for the remaining images, which the layer's `ragged` governs.
    """

    @functools.wraps(normalize)
    def wrapped(self: "GroupedStatistics", input: Tensor, *prior: Belief | None) -> Any:
        if self.ragged == "error" or self.uses_moving or self.group_of is None or self.decides_for_batch:
            return normalize(self, input, *prior)
        left = input.shape[0] % self.group_of
        if left == 0:
            return normalize(self, input, *prior)
        whole, results = input.shape[0] - left, []
        if whole:
            results.append(normalize(self, input[:whole], *(_rows(one, slice(None, -1)) for one in prior)))
        self.left = left if self.ragged == "measure" else _DROPPED
        try:
            results.append(normalize(self, input[whole:], *(_rows(one, slice(-1, None)) for one in prior)))
        finally:
            self.left = 0
        if len(results) == 1:
            return results[0]
        return _join(results[0], results[1], self.one_belief)

    return wrapped


def _rows(prior: Belief | None, chosen: slice) -> Belief | None:
    """Return the rows of a prior that belong to a part of the groups; a single row belongs to all of them."""
    return prior if prior is None or len(prior.mean) == 1 else Belief(prior.mean[chosen], prior.var[chosen])


def _join(first: Any, second: Any, one_row: bool) -> Any:
    """Join the results for whole groups and for remaining images: y, or (y, belief), which may have one row for all."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    (y, belief), (z, other) = first, second
    if not one_row:
        belief = Belief(torch.cat([belief.mean, other.mean]), torch.cat([belief.var, other.var]))
    return torch.cat([y, z]), belief


class GroupedStatistics(TakesOptions, nn.BatchNorm2d):
    """Base of the normalizers over groups of `stat_batch` images: parameters, moving statistics, choice of statistics.

    In training, and in evaluation with `statistics = "online"`, every group of `stat_batch` images (None: the whole
    batch) is normalized by its own statistics. In evaluation with `statistics = "moving"` the moving averages normalize
    batches of any size. It subclasses torch's BatchNorm2d, so that code which looks for such layers (to freeze them)
    finds it and state dicts keep their names; inputs of other dimensions are taken too.

    `ragged` says what happens to the last images of a batch that fill no whole group. `error`: ValueError. `measure`:
    they are a smaller group. `drop`: the moving averages normalize them. Moving averages are of whole groups alone.

    `probe`, if set, is called with the statistics of every group: probe(measured=, used=, prior=), each a detached
    Belief [groups, C] or None. Figures are made from it; it costs nothing when it is None.

    ValueError: a bad option; an input of another shape; statistics of a single value; a batch that does not divide.
    """

    statistics = "moving"
    averaged: tuple[str, ...] = ("running_mean", "running_var")  # names of the buffers that are moving averages
    # If not None, the moving averages wait for modes.flush_moving, and this row holds the sums over the groups since
    # the last flush, then the number of groups. A list of statistics would recompile compiled code for every length.
    pending: "Tensor | None" = None
    has_pending = False  # whether `pending` holds any group
    holds_first = True  # whether this process and micro-batch has the batch's first group
    probe: Probe | None = None
    left = 0  # while a batch's remaining images are normalized: their number if they measure, else _DROPPED
    one_belief = False  # whether the belief that it hands on is one row for all images
    # Appended to the error about a batch that does not divide.
    remedy = "; ragged='measure' or 'drop' says what becomes of its last images"
    folds = True  # whether a plain BatchNorm with its moving statistics computes the same
    # Class, affine and track_running_stats of the layer that it replaced: set by convert, for fold.
    replaced: tuple[type[_BatchNorm], bool, bool] = (torch.nn.BatchNorm2d, True, True)

    def __init__(
        self,
        num_features: int,
        *,
        stat_batch: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        moving_groups: str = "mean",
        moving_unbiased: bool = True,
        ragged: str = "error",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        groups.check(self, num_features, eps)
        if not bias:
            self.register_parameter("bias", None)
        if stat_batch is not None and (type(stat_batch) is not int or stat_batch < 1):
            raise ValueError(f"stat_batch must be a whole number of at least 1, or None, not {stat_batch!r}")
        if moving_groups not in ("mean", "first"):
            raise ValueError(f"moving_groups must be 'mean' or 'first', not {moving_groups!r}")
        if ragged not in RAGGED:
            raise ValueError(f"ragged must be 'error', 'measure' or 'drop', not {ragged!r}")
        if ragged == "drop" and not track_running_stats:
            raise ValueError("ragged='drop' needs moving statistics: track_running_stats=True")
        self.ragged = ragged
        self.stat_batch = stat_batch
        self.moving_groups = moving_groups
        self.moving_unbiased = moving_unbiased

    @property
    def decides_for_batch(self) -> bool:
        """Whether processes decide something together, once a batch: its last images are not normalized apart then."""
        return False

    def _check_input_dim(self, input: Tensor) -> None:
        groups.check(self, self.num_features, self.eps, input)

    @property
    def where(self) -> str:
        """The layer's name for messages."""
        return groups.name_of(self)

    @property
    def uses_moving(self) -> bool:
        by_moving = self.left == _DROPPED or (not self.training and self.statistics == "moving")
        return by_moving and self.running_mean is not None

    @property
    def group_of(self) -> int | None:
        """Number of images that share statistics. None is the whole batch: also in evaluation of a layer without
        moving statistics, as in torch's BatchNorm."""
        if self.left > 0:
            return self.left
        whole = not self.training and self.statistics == "moving" and self.running_mean is None
        return None if whole else self.stat_batch

    def group_size(self, x: Tensor) -> int:
        """Return the number of images in each statistics group of x [N, C, ...].

        ValueError: as groups.check; a batch that does not divide; statistics of a single value.
        """
        self._check_input_dim(x)
        try:
            size = groups.size(x.shape[0], self.group_of)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}{self.remedy}") from None
        if groups.values(x, size) <= 1:
            raise ValueError(
                f"{self.where}: statistics of a single value (statistics batch {size} on a feature map "
                f"of {'x'.join(map(str, x.shape[2:])) or '1'}); take a larger stat_batch or keep a larger map there"
            )
        return size

    def of_no_images(self, x: Tensor, *others: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        return groups.of_no_images(x, *self.parameters(), *others)

    def moving(self) -> list[Tensor]:
        """Return the moving averages that normalize.

        In training they normalize dropped images and change before the backward pass: then return copies, the same
        ones when a checkpoint runs the forward again.
        """
        found: list[Tensor] = [getattr(self, name) for name in self.averaged]
        return preserved(self, lambda: [average.clone() for average in found]) if self.left else found

    def of_images(self, x: Tensor, mean: Tensor, var: Tensor) -> list[Tensor]:
        """Record the groups' mean and variance, and return them for each image of x: [N, C] from the images' [N, C]."""
        size = self.group_size(x)
        mean, var = groups.moments(mean, var, size)
        self.record(mean.detach(), var.detach(), groups.values(x, size))
        return [mean.repeat(size, 1), var.repeat(size, 1)]

    def moving_of_images(self, images: int) -> list[Tensor]:
        """Return the moving averages, expanded to one row per image: [N, C]."""
        return [average.expand(images, -1) for average in self.moving()]

    def update_moving(self, mean: Tensor, var: Tensor, values: int, *more: Tensor) -> None:
        """Update the moving averages: new = (1 - momentum) old + momentum * mean over the groups.

        mean and var (population variance) are [groups, C], each of `values` values; `more` is for the other buffers of
        `averaged`. As in torch, `momentum=None` gives the cumulative average, and nothing is averaged once
        `track_running_stats` is set to False.
        """
        if self.running_mean is None or not self.track_running_stats or self.left or is_recomputation():
            return
        # No no_grad: torch.jit.trace does not see it, and torch.export cannot save a graph that has it.
        mean, var, *more_parts = (part.detach() for part in (mean, var, *more))
        parts = [mean, var * (values / (values - 1)) if self.moving_unbiased else var, *more_parts]
        if self.moving_groups == "first":
            parts = [part[: int(self.holds_first)] for part in parts]
        if self.pending is None:
            self.average_in([part.mean(0) for part in parts])
        else:
            sums = [part.sum(0).flatten() for part in parts]
            self.pending += torch.cat([*sums, mean.new_full((1,), len(parts[0]))])
            self.has_pending = True

    def average_in(self, means: Sequence[Tensor]) -> None:
        """Make one step of the moving averages, given a batch's mean for each of them, without gradients."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate: float | Tensor = 1.0 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        for name, mean in zip(self.averaged, means, strict=True):
            average: Tensor = getattr(self, name)
            average.lerp_(mean.view_as(average).to(average.dtype), rate)

    def defer_averages(self, defer: bool) -> None:
        """Let the moving averages wait for average_pending from now on, or no longer."""
        if self.running_mean is None:
            return
        averages = [getattr(self, name) for name in self.averaged]
        size, first = sum(average.numel() for average in averages), averages[0]
        self.pending = first.new_zeros(size + 1, dtype=groups.moments_dtype(first)) if defer else None
        self.has_pending = False

    @torch.no_grad()
    def average_pending(self, sums: Tensor) -> None:
        """Make the step that waited, given the sums over all processes and micro-batches."""
        assert self.pending is not None
        sizes = [getattr(self, name).numel() for name in self.averaged]
        self.average_in((sums[:-1] / sums[-1]).split(sizes))
        self.pending.zero_()
        self.has_pending = False

    def begin_precise(self) -> None:
        """Prepare for modes.precise_statistics, which sets the momentum so that every group counts the same."""

    def end_precise(self) -> None:
        """Finish the precise statistics, after the last batch."""

    def record(self, mean: Tensor, var: Tensor, values: int, *more: Tensor) -> None:
        """Pass the groups' statistics to the moving averages and the probe, in a layer that normalizes by them.

        mean and var (population variance) are [G, C], detached, each of `values` values.
        """
        if self.training:
            self.update_moving(mean, var, values, *more)
        if self.probe is not None and not self.left:
            measured = Belief(mean, var)
            self.probe(measured=measured, used=measured, prior=None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stat_batch={self.stat_batch}"

    __prepare_scriptable__ = refuse_script
    qconfig = refusing_qconfig


class BatchNorm(GroupedStatistics):
    """Batch Normalization (Ioffe & Szegedy 2015) of groups of `stat_batch` images ("ghost" batches).

    x [N, C, ...] -> y. With `stat_batch=None` it computes torch's BatchNorm bit for bit. ValueError: as
    GroupedStatistics.
    """

    @by_whole_groups
    def forward(self, input: Tensor) -> Tensor:
        if self.uses_moving:
            self._check_input_dim(input)
            mean, var = self.moving()
            return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if not input.shape[0]:
            return self.of_no_images(input)
        size = self.group_size(input)
        if size == input.shape[0] and self.probe is None and self.pending is None and self.moving_unbiased:
            return self._normalize_whole_batch(input)
        return self._normalize_groups(input, size, self.weight, self.bias)

    def corrected(self, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight and bias of each group that give y = gamma (r x + d) + beta; r, d [G, C]."""
        weight = r if self.weight is None else r * self.weight
        shift = d if self.weight is None else d * self.weight
        return weight, shift if self.bias is None else self.bias + shift

    def _normalize_groups(self, x: Tensor, size: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalize every group by its own statistics; weight and bias are [C], or [G, C] for each group."""
        if torch.compiler.is_compiling():
            mean, var = groups.moments(*groups.image_moments(x), size)
            self.record(mean.detach(), var.detach(), groups.values(x, size))
            return groups.normalize(x, size, mean, var, weight, bias, self.eps)
        # The native kernel needs groups in contiguous memory; copies cost less than plain operations would.
        split = groups.split(x, size).contiguous()
        of_groups = split.shape[1:3]
        dtype = groups.moments_dtype(x)  # the native kernel wants weight and bias in it
        weight, bias = (None if t is None else t.to(dtype).expand(of_groups).flatten() for t in (weight, bias))
        rows = split.flatten(1, 2)
        features = rows.shape[1]
        # With momentum 1 the kernel writes each group's mean and unbiased variance into these buffers, at no cost.
        mean = torch.zeros(features, device=x.device, dtype=dtype)
        var = torch.ones_like(mean)
        y = F.batch_norm(rows, mean, var, weight, bias, True, 1.0, self.eps)
        values = groups.values(x, size)
        population = var * ((values - 1) / values)
        self.record(mean.view(of_groups), population.view(of_groups), values)
        return groups.merge(y, x.shape).contiguous(memory_format=groups.format_of(x))

    def _normalize_whole_batch(self, x: Tensor) -> Tensor:
        tracks = self.training and self.track_running_stats and not self.left
        if not tracks or self.running_mean is None or self.running_var is None:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if is_recomputation():  # into copies: a checkpoint compares the number of tensors kept for the backward pass
            moving = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(x, *moving, self.weight, self.bias, True, 0.0, self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, rate, self.eps)
