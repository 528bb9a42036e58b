"""Data sets by name, as arrays in memory. The loader that feeds them to a device is in `loader` (it imports torch)."""

import os
from collections.abc import Callable
from pathlib import Path

from kalmannorm.data import cifar, digits, svhn
from kalmannorm.data.arrays import Arrays, class_balanced_subset, resize
from kalmannorm.errors import UserError, nearest

__all__ = ["DATASETS", "PREPARE", "Arrays", "class_balanced_subset", "load", "prepare", "resize", "root"]

DATASETS: dict[str, Callable[[Path], Arrays]] = {
    "digits": digits.load,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "svhn": svhn.load,
    "svhn_extra": svhn.load_extra,
}

PREPARE: dict[str, Callable[[str, Path, Path | None, bool], Path]] = {  # digits needs no preparing
    "cifar10": cifar.prepare,
    "cifar100": cifar.prepare,
    "svhn": svhn.prepare,
    "svhn_extra": svhn.prepare,
}


def root(option: str | None = None) -> Path:
    """The folder that holds the data sets: the option, else the environment variable KALMANNORM_DATA, else ./data."""
    return Path(option or os.environ.get("KALMANNORM_DATA") or "data").expanduser()


def load(name: str, root: Path) -> Arrays:
    """The data set `name`, checked. UserError if there is none of that name, or it is missing or damaged."""
    if name not in DATASETS:
        raise UserError(nearest(name, DATASETS, "dataset"))
    return DATASETS[name](root)


def prepare(name: str, root: Path, archive: Path | None = None, download: bool = True) -> Path:
    """Get the data set into `root/name`, from `archive`, files already there, or the network; see its module."""
    if name == "digits":
        raise UserError("dataset 'digits' comes with scikit-learn: nothing to prepare, `dataset=digits` runs as it is")
    if name.startswith("coco"):
        raise UserError(
            f"dataset {name!r} is read as it is: unpack the official files into {root / name} (data/coco.py)"
        )
    if name not in PREPARE:
        raise UserError(nearest(name, PREPARE, "dataset"))
    return PREPARE[name](name, root, archive, download)
