"""Images per second of the ImageNet loaders beside torchvision's reference loader, turn by turn in one process.

    python scripts/loaders.py dataset=imagenet data=/imagenet workers=8
    python scripts/loaders.py dataset=tiny_imagenet_20 data=DATA betons=OUT workers=1

betons=OUT: what `kalmannorm data ffcv --out OUT` wrote, if not beside the images. The reference is torchvision's
references/classification: ImageFolder, the training preset (random-resized crop, flip, to float, normalize, all in the
workers), a plain DataLoader. A turn is an epoch of `images=1280` training images in batches of 32 at the budget's size,
brought to the device; the first of `turns=9` is not counted (workers start, FFCV compiles). Ratios are of neighbouring
turns. FFCV is left out where it or its files are not there.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kalmannorm import data
from kalmannorm.data import folder
from kalmannorm.data.beton_loader import BetonLoader
from kalmannorm.data.stream import FolderLoader
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import compose

BATCH = 32

Epochs = Callable[[int], Iterator[Any]]


def reference(files: Path, chosen: np.ndarray, config: dict[str, Any], device: torch.device) -> Epochs:
    """Return a function that yields an epoch's batches from torchvision's loader, over the `chosen` images."""
    dataset, size = config.dataset, config.budget.size
    preset = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(dataset["mean"], dataset["std"]),
            v2.ToPureTensor(),
        ]
    )
    workers = data.workers_of(config.workers, 1)
    loader = DataLoader(
        Subset(ImageFolder(str(files), preset), chosen.tolist()),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
        persistent_workers=workers > 0,
    )

    def epochs(_: int) -> Iterator[Any]:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return epochs


def main(arguments: list[str]) -> None:
    own = {
        key: value for key, _, value in (a.partition("=") for a in arguments) if key in ("images", "turns", "betons")
    }
    images, turns = int(own.get("images", 1280)), int(own.get("turns", 9))
    config = compose([a for a in arguments if a.partition("=")[0] not in own])
    dataset, root = config.dataset, data.root(config.data)
    device = torch.device(config.device)
    files = folder.load(root, dataset)
    chosen = np.random.default_rng(0).permutation(len(files.train))[:images]
    common = {"size": config.budget.size, "flip": True, "mean": dataset["mean"], "std": dataset["std"]}
    common |= {"batch": BATCH, "device": device, "workers": data.workers_of(config.workers, 1)}
    sides = {
        "torchvision's reference": reference(files.train.root, chosen, config, device),
        "dataset.loader=torchvision": FolderLoader(files.train.take(chosen), **common).epoch,
    }
    try:
        betons = data.source({**dataset, "loader": "ffcv"}, Path(own["betons"]) if "betons" in own else root)
        assert isinstance(betons, data.Betons)
        sides["dataset.loader=ffcv"] = BetonLoader(betons.train.take(chosen), **common).epoch
    except UserError as error:
        print(f"without FFCV: {error}", file=sys.stderr)

    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, epochs in sides.items():
            began, seen = time.perf_counter(), 0
            for x, _ in epochs(turn):
                seen += len(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                speeds[name].append(seen / (time.perf_counter() - began))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{dataset['name']}, {common['size']} pixels, {common['workers']} workers, {len(chosen)} images a turn, {where}"
    )
    first = speeds["torchvision's reference"]
    for name, found in speeds.items():
        ratios = [a / b for a, b in zip(found, first, strict=True)]
        print(
            f"  {name:28}{statistics.median(found):8.0f} images/s  x {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}]  n = {len(found)}"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"{error}")
