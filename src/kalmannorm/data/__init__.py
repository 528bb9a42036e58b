"""Data sets by name: small ones as arrays in memory, large ones as folders of files.

What feeds them to a device imports torch and is not imported here: `loader` (arrays), `stream` (files through
torchvision), `beton_loader` (FFCV's files).
"""

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kalmannorm import machine
from kalmannorm.data import ade20k, beton, camvid, cifar, cityscapes, digits, folder, gta5, svhn
from kalmannorm.data.arrays import Arrays, class_balanced_subset, resize
from kalmannorm.data.beton import Betons
from kalmannorm.data.folder import Images
from kalmannorm.errors import UserError, nearest

__all__ = [
    "DATASETS",
    "PREPARE",
    "SCENES",
    "Arrays",
    "Betons",
    "Images",
    "Source",
    "class_balanced_subset",
    "load",
    "prepare",
    "resize",
    "root",
    "source",
    "workers_of",
]

Source = Arrays | Images | Betons

DATASETS: dict[str, Callable[[Path], Arrays]] = {
    "digits": digits.load,
    "cifar10": cifar.load_cifar10,
    "cifar10_few": cifar.load_few,
    "cifar10_recoloured": cifar.load_recoloured,
    "cifar100": cifar.load_cifar100,
    "svhn": svhn.load,
    "svhn_extra": svhn.load_extra,
}

SCENES = {**camvid.SOURCES, **cityscapes.SOURCES, **ade20k.SOURCES, **gta5.SOURCES}  # read by scenes.load

VARIANTS = {"cifar10_few": "cifar10", "cifar10_recoloured": "cifar10"}  # of other sets, from whose folder they are read


PREPARE = {  # by which module; digits needs no preparing
    "cifar10": "cifar",
    "cifar100": "cifar",
    "svhn": "svhn",
    "svhn_extra": "svhn",
    "playback": "playback",
    "coco-tiny-maps": "coco_maps",
}


def root(option: str | None = None) -> Path:
    """Return the folder that holds the data sets: the option, else the environment variable KALMANNORM_DATA, else
    ./data."""
    chosen = option or os.environ.get("KALMANNORM_DATA") or "data"
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise UserError(f"data={chosen}: nobody's home is known here (HOME is not set); give the whole path") from None


def source(dataset: Mapping[str, Any], root: Path) -> Source:
    """Return the data set of a run's configuration (conf/dataset). UserError as for `load`."""
    if dataset.get("frames") is not None:
        from kalmannorm.data import video  # imports torch

        return video.load(root, dataset)
    if dataset.get("loader") is None:
        return load(dataset["name"], root)
    if dataset["loader"] == "ffcv":
        return beton.load(root, dataset)
    return folder.load(root, dataset)


def workers_of(asked: int | str, world: int) -> int:
    """Return the workers of one of `world` processes: those asked for; "auto": its share of this machine's cores, up to
    16."""
    if asked != "auto":
        return int(asked)
    return max(1, min(16, machine.cores() // (machine.launch().local_world if world > 1 else 1)))


def load(name: str, root: Path) -> Arrays:
    """Return the data set `name`, checked. UserError if there is none of that name, or it is missing or damaged."""
    if name not in DATASETS:
        raise UserError(nearest(name, DATASETS, "dataset"))
    return DATASETS[name](root)


def prepare(name: str, root: Path, archive: Path | None = None, download: bool = True) -> Path:
    """Get the data set into `root/name`, from `archive`, files already there, or the network; see its module."""
    if name in PREPARE:
        module = importlib.import_module(f"kalmannorm.data.{PREPARE[name]}")  # now: some import torch
        written: Path = module.prepare(name, root, archive, download)
        return written
    if name == "digits":
        raise UserError("dataset 'digits' comes with scikit-learn: nothing to prepare, `dataset=digits` runs as it is")
    if name.startswith("coco"):
        raise UserError(
            f"dataset {name!r} is read as it is: unpack the official files into {root / name} (data/coco.py)"
        )
    if name in folder.READ_AS_IT_IS:
        how = folder.HOW_TO_GET.get(name, folder.LAYOUT)
        raise UserError(f"dataset {name!r} is read as it is, from {root / name}: {how}")
    if name in SCENES:
        source = SCENES[name]
        raise UserError(f"dataset {name!r} is read as it is, from {root / source.folder}: {source.how_to_get}")
    if name in VARIANTS:
        raise UserError(f"dataset {name!r} is read from that of {VARIANTS[name]}: prepare {VARIANTS[name]}")
    raise UserError(nearest(name, PREPARE, "dataset"))
