"""Load arrays: the whole set lies on the training device, where whole batches are cropped, flipped and normalized.

The recipe is that of the released CIFAR code: zero-pad the raw image, crop at random, flip at random, subtract the
per-pixel mean, divide by 128. The mean is the training set's; the released one includes the test images.

All random numbers of an epoch are drawn beforehand on the CPU from (seed, epoch) alone, and go to the device in one
transfer. So image i of an epoch gets the same crop on any device and any number of devices, and a run that is resumed
within an epoch sees the same batches as without the interruption.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kalmannorm.data.batches import Batch, Counted, EvaluationBatches, derive_seed

SCALE = 128.0  # as in the released code
CHUNK = 8192  # images that are padded at a time, while the set is copied to the device
AHEAD = {"cuda": 16}  # batches prepared at once: launching kernels costs most there; else 1, to fit the cache


class Loader(EvaluationBatches):
    """Batches of one split, from arrays. `options`: those of Batches.

    images: uint8 [N, H, W, 3]; labels: int64 [N].
    pad: zeros on each side of the raw image, in pixels; crops move by up to that much. flip: mirror half of the images.
    mean: float [3, H, W] on the scale 0..255, that of the training set; None: the mean of these images.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        *,
        pad: int = 0,
        flip: bool = False,
        mean: Tensor | None = None,
        **options: Any,
    ) -> None:
        count, height, width, _ = images.shape
        super().__init__(count, **options)
        self.pad, self.flip, self.height, self.width = pad, flip, height, width
        if mean is None:  # exact, since float64 holds the sums of integers
            mean = torch.from_numpy(images.mean(axis=0, dtype=np.float64).transpose(2, 0, 1).astype(np.float32))
        self.mean = mean.to(self.device, torch.float32).contiguous()
        self.labels = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)).to(self.device)

        rows, columns = height + 2 * pad, width + 2 * pad
        padded = torch.zeros(count, 3, rows, columns, dtype=torch.uint8, device=self.device)
        for start in range(0, count, CHUNK):
            raw = torch.from_numpy(np.ascontiguousarray(images[start : start + CHUNK])).to(self.device)
            padded[start : start + CHUNK, :, pad : pad + height, pad : pad + width] = raw.permute(0, 3, 1, 2)
        # All three channels of a crop lie within one run of bytes; the runs of different crops overlap. `_runs` is a
        # view with a row for each run, so that one index_select copies the crops of a batch. On a CPU that is one
        # memcpy per image, 15 times faster than indexing padded.unfold(2, H, 1).unfold(3, W, 1) by image, row, column.
        self._image_stride, self._plane_stride, self._row_stride = 3 * rows * columns, rows * columns, columns
        length = 2 * rows * columns + (height - 1) * columns + width
        self._runs = padded.view(-1).as_strided((padded.numel() - length + 1, length), (1, 1))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        order, starts, flips = self._draws(epoch)
        local, ahead = self.batch // self.world, AHEAD.get(self.device.type, 1)
        for step in range(start_step, self.steps_per_epoch, ahead):
            part = slice(step * local, min(step + ahead, self.steps_per_epoch) * local)
            images = self._crops(starts[part], flips[part] if self.flip else None)
            labels = self.labels.index_select(0, order[part])
            yield from zip(images.split(local), labels.split(local), strict=True)

    def _draws(self, epoch: int) -> Tensor:
        """Draw image, start of the crop's run and flip (0 or 1): int64 [3, steps * batch / world], on the device.

        They are drawn for all N positions, in this order: permutation, row and column shifts, flips. A change of the
        order, or of `derive_seed`, changes results (NUMERICS).
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator)
        shifts = torch.randint(0, 2 * self.pad + 1, (2, self.count), generator=generator)
        flips = torch.randint(0, 2, (self.count,), generator=generator)
        starts = order * self._image_stride + shifts[0] * self._row_stride + shifts[1]
        mine = slice(self.rank, self.steps_per_epoch * self.batch, self.world)
        return torch.stack((order, starts, flips))[:, mine].to(self.device)

    def _crops(self, starts: Tensor, flips: Tensor | None = None) -> Tensor:
        """Return the normalized crops at `starts`, mirrored where `flips` is 1: float32 [n, 3, H, W], contiguous."""
        runs = self._runs.index_select(0, starts)
        strides = (runs.stride(0), self._plane_stride, self._row_stride, 1)
        crops = runs.as_strided((len(starts), 3, self.height, self.width), strides)
        if flips is not None:  # by a second index_select, since torch.where on bytes takes 4 times as long on a CPU
            both = torch.cat((crops, crops.flip(-1)))
            crops = both.index_select(0, torch.arange(len(starts), device=self.device) + flips * len(starts))
        images = crops.to(torch.float32, memory_format=torch.contiguous_format)
        return images.sub_(self.mean).mul_(1 / SCALE)

    def _unaugmented(self, parts: Iterator[tuple[Tensor, int]]) -> Iterator[Counted]:
        for indices, counted in parts:
            index = indices.to(self.device)
            starts = index * self._image_stride + self.pad * self._row_stride + self.pad
            yield self._crops(starts), self.labels.index_select(0, index), counted
