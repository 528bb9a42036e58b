"""Define the base classes of loaders: which images a step sees, in which order, and which of them this process takes.

The training loop knows loaders by these classes alone. The subclasses bring the pixels: from arrays on the device
(`loader`), from files by torchvision (`stream`), or from FFCV's file (`beton_loader`).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kalmannorm.errors import UserError

EVALUATION_SEED = 0  # of the order in `unaugmented`: the same in all runs, so that all are evaluated on the same groups

Batch = tuple[Tensor, Tensor]  # images float32 [n, 3, H, W], normalized, and labels int64 [n], on the device
Counted = tuple[Tensor, Tensor, int]  # images, labels, and how many of them count


def derive_seed(*numbers: int) -> int:
    """Mix integers to one seed of 63 bits: the first bits of the sha256 of their decimal digits joined by commas.

    The result is the same on every platform and in every version. Related arguments (seed 1, epoch 2 and seed 2,
    epoch 1) give unrelated seeds, even in the low 32 bits, which are all that torch's CPU generator uses.
    """
    digest = hashlib.sha256(",".join(str(int(number)) for number in numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def fixed_order(count: int) -> Tensor:
    """Return the indices of `count` images in a random order that is the same in every run: int64 [count].

    A test set may be sorted by class, and results depend on which images share a statistics group.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(EVALUATION_SEED)))


def choose_subset(positions: Sequence[int], count: int | None) -> list[int]:
    """Choose `count` of the images, always the same ones, in ascending order; None: all. UserError: there are fewer."""
    if count is None:
        return list(positions)
    if count > len(positions):
        raise UserError(f"a subset of {count:,} images of {len(positions):,}: expected at most as many as there are")
    return sorted(np.random.RandomState(0).permutation(positions)[:count].tolist())


class Batches(ABC):
    """Batches of one split.

    count: images in the split. batch: images per step over all devices. seed: for the order and the augmentation.
    shard: (rank, world); this rank takes the positions rank::world of every batch (docs/trust.md). UserError: `batch`
    is not a multiple of `world`.
    """

    def __init__(
        self, count: int, *, batch: int, device: torch.device | str, seed: int = 0, shard: tuple[int, int] = (0, 1)
    ) -> None:
        self.rank, self.world = shard
        if batch < 1 or batch % self.world:
            remedy = f"give a multiple of {self.world}"
            raise UserError(f"batch {batch} cannot be dealt out to {self.world} devices: {remedy}")
        self.count, self.batch, self.seed, self.device = count, batch, seed, torch.device(device)

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in an epoch; images left over are dropped. UserError: there is not even one."""
        if self.batch > self.count:
            raise UserError(f"batch {self.batch} is larger than the {self.count} training images: give a smaller batch")
        return self.count // self.batch

    @abstractmethod
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        """Yield this rank's part of each augmented batch of an epoch, from `start_step` on.

        A part is a `Batch`, or coco.Batch for a detector. It depends on (seed, epoch, step) and the shard alone.
        """


class EvaluationBatches(Batches):
    """Batches that also come without augmentation, for evaluation; a detector is tested image by image instead."""

    views: int | None = None  # clips of each video in `unaugmented`: [n, views, ...]; None for images
    at_once = 500  # images per evaluation batch, approximately; online statistics depend on it (NUMERICS)

    def unaugmented(
        self, batch: int, order: Tensor | NDArray[np.int64] | Sequence[int] | None = None, fill: int = 1
    ) -> Iterator[Counted]:
        """Yield batches without augmentation: (images, labels, counted). Every image is counted exactly once.

        batch: images per step over all devices, a multiple of `fill`.
        order: indices of the images; None: all of them, in `fixed_order`.
        fill: the statistics batch. A last batch that is not a multiple of it is filled up with the first images of the
        order; only the first `counted` images of a batch count.
        With shards, each rank gets whole statistics groups, ordered such that image i of G groups stays in group
        i mod G. If the groups do not divide evenly, some ranks get one group less, and at the end one batch less.
        """
        if fill < 1 or batch < 1 or batch % fill:
            raise UserError(f"evaluation batch {batch} is not a multiple of the statistics batch {fill}")
        indices = self.fixed_order() if order is None else order
        return self._unaugmented(self._shard(batch, torch.as_tensor(indices, dtype=torch.int64, device="cpu"), fill))

    def fixed_order(self) -> Tensor:
        return fixed_order(self.count)

    def _shard(self, batch: int, order: Tensor, fill: int) -> Iterator[tuple[Tensor, int]]:
        """Yield this rank's part of every evaluation batch: indices int64 [n], and how many of these images count."""
        for start in range(0, len(order), batch):
            real = min(batch, len(order) - start)
            groups = -(-real // fill)  # rounded up
            position = torch.arange(groups * fill)
            position = position[position % groups % self.world == self.rank]  # the groups of this rank
            if len(position) == 0:
                continue
            counted = int((position < real).sum())
            place = torch.where(position < real, start + position, (position - real) % len(order))
            yield order.index_select(0, place), counted

    @abstractmethod
    def _unaugmented(self, parts: Iterator[tuple[Tensor, int]]) -> Iterator[Counted]: ...
