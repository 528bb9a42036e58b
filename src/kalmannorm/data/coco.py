"""Read COCO 2017 (Lin et al. 2014), its images, boxes and masks, from the official layout

    ROOT/coco/{train2017,val2017}/*.jpg
    ROOT/coco/annotations/instances_{train2017,val2017}.json

The content of the files is checked when they are loaded (annotations.py). Crowd regions, and images without any other
object, are left out of training; both take part in evaluation, as in COCO's own evaluation.

The images of a batch have one orientation as far as possible (aspect-ratio grouping: less padding). Order and flips
depend on (seed, epoch) and on the image alone.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as run_length
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from kalmannorm.data.annotations import Split, Values, read
from kalmannorm.data.batches import Batches, derive_seed
from kalmannorm.data.pixels import read_rgb
from kalmannorm.data.workers import Named, begin_worker, check_open_files, share
from kalmannorm.errors import UserError, missing_dataset

SPLITS = ("train2017", "val2017")
OFFICIAL = (118_287, 5_000)
SMALLEST = 1.0  # pixels: objects with thinner boxes are not trained on


@dataclass(frozen=True)
class Coco:
    """Both splits. `train_images`: positions in `train.ids` of the images with an object to train on.

    `labels`: COCO's category id -> label 1..classes, in the order of the ids.
    """

    train: Split
    test: Split
    train_images: list[int]
    labels: dict[int, int]
    provenance: dict[str, str]


def load(name: str, root: Path, classes: int) -> Coco:
    """Return the data set in `root/name`, with this number of classes, checked. UserError: it is missing, damaged or
    inconsistent."""
    folder = find(name, root)
    train, test = (read(_annotations(folder, split), folder / split) for split in SPLITS)
    categories = sorted(train.coco.cats)
    if len(categories) != classes:
        raise UserError(f"{_annotations(folder, SPLITS[0])} has {len(categories)} categories, expected {classes}")
    if categories != sorted(test.coco.cats):
        raise UserError(f"the categories of {SPLITS[0]} and {SPLITS[1]} in {folder / 'annotations'} differ")
    for category in categories:
        names = [split.coco.cats[category]["name"] for split in (train, test)]
        if names[0] != names[1] and str(category) not in names:  # a missing name is replaced by the id
            which = " and ".join(f"{name!r} in {split}" for name, split in zip(names, SPLITS, strict=True))
            raise UserError(f"category {category} of {folder} is {which}: expected one name")
    for split, found, use in zip(SPLITS, (train, test), ("train on", "evaluate by"), strict=True):
        if not any(map(trainable, found.coco.anns.values())):
            raise UserError(f"{_annotations(folder, split)} has no image with an object to {use}")
    usable = [i for i, image in enumerate(train.ids) if any(map(trainable, train.coco.imgToAnns[image]))]
    counts = (len(train.ids), len(test.ids))
    fidelity = f"{counts[0]:,} + {counts[1]:,} images as they are"
    if counts != OFFICIAL:
        fidelity += f", not the published {OFFICIAL[0]:,} + {OFFICIAL[1]:,}"
    provenance = {"name": name, "fidelity": fidelity, "sha256": _digest(folder, train, test)}
    return Coco(train, test, usable, {category: i + 1 for i, category in enumerate(categories)}, provenance)


def trainable(annotation: Values) -> bool:
    """Say whether an annotation is an object to train on: no crowd, at least a pixel wide and high, with a mask."""
    thin = min(annotation["bbox"][2:]) < SMALLEST
    return not annotation["iscrowd"] and not thin and run_length.area(annotation["segmentation"]) > 0


def _annotations(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def find(name: str, root: Path) -> Path:
    """Return the folder with both splits' images and annotations. UserError: one of these is missing."""
    folder = root / name
    needed = [path for split in SPLITS for path in (_annotations(folder, split), folder / split)]
    if missing := [str(path) for path in needed if not path.exists()]:
        where = f"from cocodataset.org and unpack them into {folder.absolute()}"
        remedy = f"get train2017, val2017 and the annotations of 2017 {where}"
        raise missing_dataset(name, f"{' and '.join(missing)} missing", remedy)
    return folder


def _digest(folder: Path, *splits: Split) -> str:
    """Return the sha256 of both annotation files and of all images' names and sizes (not of 20 GB of pixels)."""
    total = hashlib.sha256()
    for split, found in zip(SPLITS, splits, strict=True):
        with _annotations(folder, split).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
        for image in sorted(found.coco.imgs.values(), key=lambda image: image["file_name"]):
            size = (folder / split / image["file_name"]).stat().st_size
            total.update(f"{image['file_name']} {size}\n".encode())
    return total.hexdigest()


# Batches -------------------------------------------------------------------------------------------------------------

Target = dict[str, Any]  # torchvision's target, with `image_id` and `key` in addition
Item = tuple[Tensor, Target]


class Images(Dataset[Item]):
    """Map (position in the split, flipped, key) to the image, uint8 [3, H, W], and its Target.

    The target has the boxes [n, 4] (left, top, right, bottom, in pixels), labels [n] and masks, uint8 [n, H, W], of the
    n objects to train on.
    """

    def __init__(self, split: Split, labels: dict[int, int]) -> None:
        self.split, self.labels = split, labels

    def __getitem__(self, item: tuple[int, bool, int]) -> Item:
        position, flipped, key = item
        picture = read_rgb(self.split.root / self.split.image(position)["file_name"])
        image, annotations = pil_to_tensor(picture), self.split.annotations(position)
        height, width = image.shape[1:]
        objects = [annotation for annotation in annotations if trainable(annotation)]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        for mask, annotation in zip(masks, objects, strict=True):
            mask.copy_(torch.from_numpy(run_length.decode(annotation["segmentation"])))
        if flipped:
            image, masks = image.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        labels = torch.tensor([self.labels[a["category_id"]] for a in objects], dtype=torch.int64)
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        return image, target | {"image_id": self.split.ids[position], "key": key}


@dataclass(frozen=True)
class Batch:
    """This process's images of a step, on the device. `canvas`: (height, width) that all of the step are padded to."""

    images: list[Tensor]  # float [3, H, W] in [0, 1]
    targets: list[Target]
    canvas: tuple[int, int]


class TrainingBatches(Batches):
    """Batches of the training images at `positions`. size: the short and the long side that images are resized to."""

    def __init__(
        self, coco: Coco, positions: list[int], *, size: tuple[int, int], workers: int = 0, **options: Any
    ) -> None:
        super().__init__(len(positions), **options)
        self.images, self.positions, self.size = Images(coco.train, coco.labels), positions, size
        self.workers = workers
        listed = (coco.train.image(position) for position in positions)
        self.shapes = [(image["height"], image["width"]) for image in listed]

    def order(self, epoch: int) -> list[list[int]]:
        """Return each step's images, as indices into `positions`: of one orientation, except for the remainders."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        shuffled: list[int] = torch.randperm(self.count, generator=generator).tolist()
        wide = [i for i in shuffled if self.shapes[i][1] >= self.shapes[i][0]]
        tall = [i for i in shuffled if self.shapes[i][1] < self.shapes[i][0]]
        batches: list[list[int]] = []
        left: list[int] = []
        for group in (wide, tall):
            whole = len(group) - len(group) % self.batch
            batches += [group[start : start + self.batch] for start in range(0, whole, self.batch)]
            left += group[whole:]
        batches += [left[start : start + self.batch] for start in range(0, len(left), self.batch)]
        batches = [batch for batch in batches if len(batch) == self.batch]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches; each image is mirrored with probability 1/2. UserError: an image cannot be read."""
        order = self.order(epoch)[start_step:]
        mine = [[self._item(i, epoch) for i in batch[self.rank :: self.world]] for batch in order]
        check_open_files(self.workers)
        loader = DataLoader(
            Named(self.images),
            batch_sampler=mine,
            num_workers=self.workers,
            collate_fn=share,
            worker_init_fn=begin_worker,
        )
        for indices, items in zip(order, loader, strict=True):
            if wrong := next((item for item in items if isinstance(item, str)), None):
                raise UserError(f"{wrong}; get the image again")
            images = [image.to(self.device).float() / 255 for image, _ in items]
            targets = [
                {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in target.items()}
                for _, target in items
            ]
            shapes = [resized(*self.shapes[i], *self.size) for i in indices]
            canvas = max(height for height, _ in shapes), max(width for _, width in shapes)
            yield Batch(images, targets, canvas)

    def _item(self, index: int, epoch: int) -> tuple[int, bool, int]:
        position = self.positions[index]
        key = derive_seed(self.seed, epoch, position)
        return position, bool(key & 1), key


def resized(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """Return (height, width) as torchvision resizes an image: short side `size`, long side at most `max_size`."""
    scale = min(size / min(height, width), max_size / max(height, width))
    return math.floor(height * scale), math.floor(width * scale)
