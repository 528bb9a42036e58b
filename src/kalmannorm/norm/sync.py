"""Synchronized Batch Normalization: statistics groups that span the processes of a distributed run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kalmannorm.norm import groups
from kalmannorm.norm.batch import BatchNorm, by_whole_groups


class _SumOverRanks(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _SumOverRanks.apply(grads[0])


class SyncBatchNorm(BatchNorm):
    """BN whose groups of `stat_batch` images (None: the whole batch) are of the batch over all processes.

    x [N, C, ...], rank r holding the images r, r + k, ... of k N, -> y. Where batches are not spread over
    processes (modes.spread_batches; always in evaluation) it is BatchNorm. torch's own refuses CPU tensors and
    knows no groups.
    """

    spread = False  # set by modes.spread_batches

    @property
    def spans(self) -> bool:
        """Whether groups are of the batch over all processes."""
        return self.spread and self.training and dist.is_initialized()

    @property
    def decides_for_batch(self) -> bool:
        return self.spans

    @by_whole_groups
    def forward(self, input: Tensor) -> Tensor:
        if not self.spans:
            return super().forward(input)
        size, member, mean, var = self.moments(input, self.group_of)
        y = groups.normalize(input, 1, mean[member], var[member], self.weight, self.bias, self.eps)
        self.record(mean.detach(), var.detach(), groups.values(input, size))
        return y

    def moments(self, x: Tensor, stat_batch: int | None) -> tuple[int, Tensor, Tensor, Tensor]:
        """Images of each group of `stat_batch`, which group [N] each of this process's is in, and the groups' mean and
        population variance [G, C]; None: the whole batch is one."""
        if not self.spans:
            self.group_size(x)  # refuses what says nothing
        rank, world = (dist.get_rank(), dist.get_world_size()) if self.spans else (0, 1)
        images = x.shape[0]
        if images == 0:  # the other processes wait for what this one has to add
            raise ValueError(f"{self.where}: a batch of no images on one of {world} devices")
        size = stat_batch or images * world
        if images * world % size:
            raise ValueError(f"{self.where}: {images * world} images on {world} devices are no whole groups of {size}")
        number = images * world // size
        member = (torch.arange(images, device=x.device) * world + rank) % number

        mean, var = groups.image_moments(x)
        group_mean = self._over_groups(mean, member, number) / size
        # Around the group's mean, not E[x^2] - E[x]^2: does not cancel.
        group_var = self._over_groups(var + (mean - group_mean[member]).square(), member, number) / size
        return size, member, group_mean, group_var

    def _over_groups(self, per_image: Tensor, member: Tensor, number: int) -> Tensor:
        """[N, C] summed over the images of each group, of all processes -> [groups, C]."""
        sums = per_image.new_zeros(number, per_image.shape[1]).index_add(0, member, per_image)
        return _SumOverRanks.apply(sums) if self.spans else sums
