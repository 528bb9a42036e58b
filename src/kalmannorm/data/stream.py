"""Decode images by torchvision's transforms in worker processes, a few batches ahead; normalize on the device.

Training: random-resized crop and flip; evaluation: resize and centre crop (torchvision's ImageNet references).
Every image of an epoch has a key, drawn beforehand from (seed, epoch) by its position in the epoch, and its crop is
drawn from that key. So a step's images do not depend on the numbers of workers and processes, and a run that is resumed
within an epoch decodes only images that it has not seen.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kalmannorm.data.batches import Batch, Counted, EvaluationBatches, derive_seed
from kalmannorm.data.folder import Files
from kalmannorm.data.pixels import read_rgb
from kalmannorm.data.workers import Named, begin_worker, check_open_files, share
from kalmannorm.errors import UserError

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # area and aspect of the random-resized crop (torchvision's defaults)
RESIZE = 256 / 224  # evaluation: ratio of the resized shorter side to the side of the crop
AHEAD = 4  # batches that each worker prepares in advance
UNAUGMENTED = -1  # the key of an image that is not augmented

Sample = tuple[Tensor, int | Tensor]  # image uint8 [3, H, W]; its label, or one label per pixel
Part = tuple[Tensor, Tensor]  # indices and keys of the images of one step, int64 [n]


class Stream(EvaluationBatches):
    """Batches of images, decoded while the device works. mean, std: per channel, on the scale 0..1."""

    borrowed = False  # whether the decoder overwrites a batch some batches later

    def __init__(self, count: int, *, mean: list[float], std: list[float], **options: Any) -> None:
        super().__init__(count, **options)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) * 255 for v in (mean, std))

    def draws(self, epoch: int) -> Part:
        """Return indices and keys of this rank's images in an epoch.

        The permutation, then the keys, are drawn for all N positions; a change of that changes results (NUMERICS).
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator)
        keys = torch.randint(2**32, (self.count,), generator=generator)
        mine = slice(self.rank, self.steps_per_epoch * self.batch, self.world)
        return order[mine], keys[mine]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        order, keys = self.draws(epoch)
        local = self.batch // self.world
        parts = zip(order.split(local)[start_step:], keys.split(local)[start_step:], strict=True)
        return self._on_device(self.decoded(parts, True, local))

    def _unaugmented(self, parts: Iterator[tuple[Tensor, int]]) -> Iterator[Counted]:
        listed = list(parts)
        keyed = ((indices, torch.zeros_like(indices)) for indices, _ in listed)
        largest = max((len(indices) for indices, _ in listed), default=0)
        images = self._on_device(self.decoded(keyed, False, largest))
        for (x, labels), (_, counted) in zip(images, listed, strict=True):
            yield x, labels, counted

    @abstractmethod
    def decoded(self, parts: Iterator[Part], augment: bool, largest: int) -> Iterator[Batch]:
        """Yield for every part, in order, images uint8 [n, 3, size, size] in any memory format, and labels, on the CPU.

        Every part has `largest` images, except the last, which may have fewer.
        """

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Bring batches to the device, normalized. On a GPU a stream of its own prepares the next one meanwhile."""
        if self.device.type != "cuda":
            for images, labels in batches:
                yield self._normalized(images), labels.clone()
            return
        side, ready = torch.cuda.Stream(self.device), None
        for images, labels in batches:
            with torch.cuda.stream(side):
                x = self._normalized(self._copied(images))
                following = (x, self._copied(labels), side.record_event())
            if ready is not None:
                yield _claimed(*ready)
            ready = following
        if ready is not None:
            yield _claimed(*ready)

    def _copied(self, tensor: Tensor) -> Tensor:
        """Copy to the device without waiting, from pinned memory that stays unchanged until the copy is done."""
        if self.borrowed:
            tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        elif not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _normalized(self, images: Tensor) -> Tensor:
        return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(self.mean).div_(self.std)


def _claimed(images: Tensor, labels: Tensor, copied: torch.cuda.Event) -> Batch:
    """Hand a batch to the current stream, which waits for the copy, and keeps the memory until it has used it."""
    current = torch.cuda.current_stream(images.device)
    current.wait_event(copied)
    images.record_stream(current)
    labels.record_stream(current)
    return images, labels


class Decoding(Stream):
    """Batches of the samples that a data set makes from (index, key).

    workers: processes that decode; 0: this process does. remedy: text appended to the error for a bad file.
    """

    remedy = ""

    def __init__(self, decode: Dataset[Sample], count: int, *, workers: int = 0, **options: Any) -> None:
        super().__init__(count, **options)
        check_open_files(workers)
        self._plan = _Plan()
        self._loader = DataLoader(
            Named(decode),
            batch_sampler=self._plan,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_together,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=AHEAD if workers > 0 else None,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # else it would draw from the global one
        )

    def decoded(self, parts: Iterator[Part], augment: bool, largest: int) -> Iterator[Batch]:
        self._plan.parts, self._plan.augment = parts, augment
        for found in self._loader:
            if isinstance(found, str):
                raise UserError(found + self.remedy)
            yield found


class FolderLoader(Decoding):
    """Batches of one split of an image folder. size: side of the crops."""

    remedy = "; repair or remove it, or pass dataset.unreadable=skip to leave out what cannot be read"

    def __init__(self, files: Files, *, size: int, flip: bool, **options: Any) -> None:
        super().__init__(_Decode(files, size, flip), len(files), **options)


class _Plan:
    """The batch sampler: yields the (index, key) pairs of each step to come."""

    parts: Iterator[Part] = iter(())
    augment = True

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices, keys in self.parts:
            yield list(zip(indices.tolist(), keys.tolist() if self.augment else [UNAUGMENTED] * len(keys), strict=True))


class _Decode(Dataset[Sample]):
    """Map (index, key) to an image and its label."""

    def __init__(self, files: Files, size: int, flip: bool) -> None:
        self.files = files
        mirror = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        self.augment = v2.Compose([v2.RandomResizedCrop(size, SCALE, RATIO), mirror, v2.PILToTensor()])
        self.resize = v2.Compose([v2.Resize(round(size * RESIZE)), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitem__(self, drawn: tuple[int, int]) -> Sample:
        index, key = drawn
        image, label = read_rgb(self.files.path(index)), int(self.files.labels[index])
        if key == UNAUGMENTED:
            return self.resize(image), label
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)  # torch.manual_seed would look for GPUs
            return self.augment(image), label


def _together(samples: list[Sample | str]) -> Batch | str:
    """Stack samples to a batch; images of several sizes stay a list. If a file is bad, return its message."""
    for sample in samples:
        if isinstance(sample, str):
            return sample
    images, labels = zip(*samples, strict=True)
    if len({image.shape for image in images}) > 1:
        return share((list(images), list(labels)))  # type: ignore[return-value]
    return share((torch.stack(images), torch.stack([torch.as_tensor(label) for label in labels])))
