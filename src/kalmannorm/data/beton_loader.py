"""Load images from FFCV's .beton files (written by `kalmannorm data ffcv`), decoded by compiled code in threads.

FFCV's own random crop and flip are not used: they draw from numba's generators, which FFCV's `seed` does not reach, so
that two runs with one seed see different images. Here an image's crop and flip are drawn from its key (data/stream.py),
which the decoder gets in the upper half of the image's index. So resuming is exact, and k processes compute what one
does, as with torchvision. The pixels differ from torchvision's: they are re-encoded in the file, and resized by area.
"""

import queue
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from kalmannorm.data.batches import Batch
from kalmannorm.data.beton import Beton
from kalmannorm.data.stream import Part, Stream


class BetonLoader(Stream):
    """Batches of one split of .beton files. size: side of the crops; workers: threads that decode."""

    borrowed = True

    def __init__(self, split: Beton, *, size: int, flip: bool, workers: int = 1, **options: Any) -> None:
        super().__init__(len(split), **options)
        self.split, self.size, self.flip, self.workers = split, size, flip, max(1, workers)
        self._compiled: dict[bool, Any] = {}

    def decoded(self, parts: Iterator[Part], augment: bool, largest: int) -> Iterator[Batch]:
        from ffcv.loader.epoch_iterator import EpochIterator

        listed = list(parts)
        if not listed:
            return
        indices, keys = (torch.cat(column).numpy() for column in zip(*listed, strict=True))
        order = self.split.indices[indices].astype(np.uint64) | (keys.astype(np.uint64) << np.uint64(32))
        loader = self._loader(augment)
        loader.batch_size = largest
        decoding = EpochIterator(loader, order)
        try:
            while (taken := _take(decoding)) is not None:
                _, (images, labels) = taken
                yield images.permute(0, 3, 1, 2), labels.flatten()
        finally:  # an epoch left early: its thread waits until its batches are taken
            decoding.close()
            while decoding.is_alive():
                with suppress(queue.Empty):
                    decoding.output_queue.get(timeout=0.1)

    def _loader(self, augment: bool) -> Any:
        """Return FFCV's loader, compiled at the first use, which takes seconds for training and for evaluation."""
        if augment not in self._compiled:
            from ffcv.loader import Loader, OrderOption
            from ffcv.transforms import ToTensor

            from kalmannorm.data.beton_decode import Crop, Label, set_threads

            set_threads(self.workers)
            crop = Crop(self.size, augment, self.flip and augment)
            pipelines = {"image": [crop, ToTensor()], "label": [Label(), ToTensor()]}
            self._compiled[augment] = Loader(
                str(self.split.file),
                batch_size=1,
                num_workers=self.workers,
                order=OrderOption.SEQUENTIAL,
                pipelines=pipelines,
                drop_last=False,
                os_cache=True,
                seed=0,
            )
        return self._compiled[augment]


def _take(decoding: Any) -> Any:
    """Return the next batch and its place in FFCV's buffers, None after the last. RuntimeError: the decoding thread has
    died, for which FFCV itself would wait forever."""
    while True:
        try:
            return decoding.output_queue.get(timeout=5)
        except queue.Empty:
            if not decoding.is_alive():
                raise RuntimeError("FFCV's decoding thread has died; its error is printed above") from None
