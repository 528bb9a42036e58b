"""Small image folders in ImageFolder's layout, in true JPEG and PNG files, for the tests of what reads them."""

from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, VAL = 12, 4  # images a class
SMALL = [
    "dataset=image_folder", "dataset.name=toy", "arch=inception_cifar", "arch.width=0.125", "norm=bkn",
    "batch.grad_batch=8", "batch.stat_batch=2", "schedule=imagenet_linear", "budget=smoke", "budget.size=16",
    "device=cpu", "workers=0", "precision=fp32", "compile=false",  # not auto: of processes of their own, too
]  # fmt: skip


def image(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """uint8 [height, width, 3]: smooth, as JPEG likes it, and another for every seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write(folder: Path, classes: int = 3, train: int = TRAIN, val: int = VAL) -> Path:
    """folder/{train,val}/c0../0.jpg..: every image has another size and other pixels."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = folder / split / f"c{label}"
            place.mkdir(parents=True)
            for number in range(count):
                seed = 1000 * label + number + (500 if split == "val" else 0)
                Image.fromarray(image(seed, 20 + number % 7, 28 + number % 5)).save(place / f"{number}.jpg", quality=95)
    return folder


def config(name: str = "toy", classes: int = 3, **options: object) -> dict:
    """A data set's configuration, as conf/dataset has it."""
    return {
        "name": name, "classes": classes, "folder": name, "published": None, "loader": "torchvision",
        "unreadable": "fail", "flip": True, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], **options,
    }  # fmt: skip
