"""Synchronized Batch Normalization: statistics groups that span the processes of a distributed run."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kalmannorm.norm import groups
from kalmannorm.norm.batch import BatchNorm, by_whole_groups


class _SumOverRanks(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _SumOverRanks.apply(grads[0])


class SyncBatchNorm(BatchNorm):
    """BN over groups of `stat_batch` images (None: all) of the batch that all processes have together.

    x [N, C, ...] -> y, where rank r of k has the images r, r + k, ... of k N. It is BatchNorm in evaluation, and unless
    batches are spread over processes (modes.spread_batches). torch's SyncBatchNorm refuses CPU tensors and has no
    groups. ValueError: as BatchNorm; a process without images.
    """

    spread = False  # set by modes.spread_batches

    @property
    def spans(self) -> bool:
        """Whether groups span the processes."""
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
        """Return the number of images in a group, the group [N] of each of this process's images, and the groups' mean
        and population variance [G, C]. `stat_batch=None` makes the whole batch one group."""
        if not self.spans:
            self.group_size(x)  # for its checks
        rank, world = (dist.get_rank(), dist.get_world_size()) if self.spans else (0, 1)
        images = x.shape[0]
        if images == 0:  # the other processes would wait for this one's sums
            raise ValueError(f"{self.where}: a batch of no images on one of {world} devices")
        size = stat_batch or images * world
        if images * world % size:
            raise ValueError(f"{self.where}: {images * world} images on {world} devices are no whole groups of {size}")
        number = images * world // size
        member = (torch.arange(images, device=x.device) * world + rank) % number

        mean, var = groups.image_moments(x)
        group_mean = self._over_groups(mean, member, number) / size
        # Around the group's mean: E[x^2] - E[x]^2 would cancel.
        group_var = self._over_groups(var + (mean - group_mean[member]).square(), member, number) / size
        return size, member, group_mean, group_var

    def _over_groups(self, per_image: Tensor, member: Tensor, number: int) -> Tensor:
        """Sum [N, C] over the images of each group, on all processes: [groups, C]."""
        sums = per_image.new_zeros(number, per_image.shape[1]).index_add(0, member, per_image)
        return _SumOverRanks.apply(sums) if self.spans else sums
