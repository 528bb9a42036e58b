"""Open data sets by name: small ones as arrays in memory, large ones as folders of files.

The loaders that bring them to a device import torch, and so are not imported here: `loader` (arrays), `stream` (files,
by torchvision), `beton_loader` (FFCV's files).
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalmannorm import machine
from kalmannorm.data import beton, cifar, digits, folder, svhn
from kalmannorm.data.arrays import Arrays, class_balanced_subset, resize
from kalmannorm.data.beton import Betons
from kalmannorm.data.folder import Images
from kalmannorm.data.scene_sources import SOURCES as SCENES
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

OFFICIAL = {each.name: each for each in (cifar.CIFAR10, cifar.CIFAR100, svhn.SVHN, svhn.SVHN_EXTRA)}
VARIANTS = {"cifar10_few": "cifar10", "cifar10_recoloured": "cifar10"}  # -> the data set whose files it has
DATASETS = ("digits", *OFFICIAL, *VARIANTS)  # in memory
# Data sets made from other data -> the module that makes them.
MADE = {"playback": "kalmannorm.data.playback", "coco-tiny-maps": "kalmannorm.data.coco_maps"}
PREPARE = (*OFFICIAL, *MADE)  # digits needs no preparing


def root(option: str | None = None) -> Path:
    """Return the folder of the data sets: the option, else $KALMANNORM_DATA, else ./data. UserError: ~ is unknown."""
    chosen = option or os.environ.get("KALMANNORM_DATA") or "data"
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise UserError(f"data={chosen}: nobody's home is known here (HOME is not set); give the whole path") from None


def source(dataset: Mapping[str, Any], root: Path) -> Source:
    """Return the data set that a run's configuration (conf/dataset) describes. UserError as for `load`."""
    if dataset.get("frames") is not None:
        from kalmannorm.data import video  # imports torch

        return video.load(root, dataset)
    if dataset.get("loader") is None:
        return load(dataset["name"], root)
    if dataset["loader"] == "ffcv":
        return beton.load(root, dataset)
    return folder.load(root, dataset)


def workers_of(asked: int | str, world: int) -> int:
    """Return the number of workers for one of `world` processes; "auto": its share of the machine's cores, up to 16."""
    if asked != "auto":
        return int(asked)
    return max(1, min(16, machine.cores() // (machine.launch().local_world if world > 1 else 1)))


def load(name: str, root: Path) -> Arrays:
    """Return the data set `name`, checked. UserError: there is none of that name, or it is missing or damaged."""
    if name not in DATASETS:
        raise UserError(nearest(name, DATASETS, "dataset"))
    if name == "digits":
        return digits.load()
    arrays = OFFICIAL[VARIANTS.get(name, name)].load(root)
    return replace(arrays, provenance=arrays.provenance | {"name": name})


def prepare(name: str, root: Path, archive: Path | None = None, download: bool = True) -> Path:
    """Bring a data set into `root/name` and return that folder.

    It is read from `archive`, from files that are there already, or from the network: see the data set's module.
    UserError: the data set needs no preparing, is unknown, or its source is missing or damaged.
    """
    if name in OFFICIAL:
        return OFFICIAL[name].prepare(root, archive, download)
    if name in MADE:
        made: Path = importlib.import_module(MADE[name]).prepare(root / name, archive)  # here: it imports torch
        return made
    if name == "digits":
        raise UserError("dataset 'digits' comes with scikit-learn: nothing to prepare, `dataset=digits` runs as it is")
    if name in VARIANTS:
        raise UserError(f"dataset {name!r} is read from that of {VARIANTS[name]}: prepare {VARIANTS[name]}")
    place, how = root / name, folder.HOW_TO_GET.get(name, folder.LAYOUT)
    if name in SCENES:
        place, how = root / SCENES[name].folder, SCENES[name].how_to_get
    elif name.startswith("coco"):
        how = "unpack the official files into it (data/coco.py)"
    elif name not in folder.READ_AS_IT_IS:
        raise UserError(nearest(name, PREPARE, "dataset"))
    raise UserError(f"dataset {name!r} is read as it is, from {place}: {how}")
