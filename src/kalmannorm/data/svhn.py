"""Street View House Numbers, cropped digits (Netzer et al. 2011): 73,257 + 26,032 images of 32x32, 10 classes.

`svhn_extra` trains on the 531,131 easier `extra` images too. Digits are not to be flipped (conf: flip false).
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalmannorm.data.arrays import Arrays, is_complete, read_folder, write_folder
from kalmannorm.data.official import absent, check_room, fetch, find, open_verified
from kalmannorm.errors import UserError

CLASSES = 10
SPLITS = {"svhn": ("train", "test"), "svhn_extra": ("train", "extra", "test")}
OFFICIAL = {"svhn": (73_257, 26_032), "svhn_extra": (73_257 + 531_131, 26_032)}
FILE_BYTES = {"train": 183_000_000, "test": 65_000_000, "extra": 1_330_000_000}


def load(root: Path, name: str = "svhn") -> Arrays:
    """Load SVHN from `root/svhn` (or `root/svhn_extra`), as `prepare` writes it."""
    return read_folder(root, name, classes=CLASSES, official=OFFICIAL[name])


def load_extra(root: Path) -> Arrays:
    """Load SVHN with the extra images in the training set, from `root/svhn_extra`."""
    return load(root, "svhn_extra")


def prepare(name: str, root: Path, archive: Path | None = None, download: bool = True) -> Path:
    """Bring the official .mat files into `root/name`; returns that folder. One already complete is checked and kept.

    archive: a folder with the official `{train,test,extra}_32x32.mat`; else those in `root` or `root/name`; what is
    missing is downloaded into `root` (and stays there). md5 is checked before a file is read.
    """
    folder = root / name
    if is_complete(folder):
        load(root, name)
        return folder

    import torchvision.datasets  # here, as it imports torch

    official = {split: torchvision.datasets.SVHN.split_list[split] for split in SPLITS[name]}  # url, file name, md5
    places = (archive,) if archive else (root, folder)
    paths = {split: find(entry[1], places) for split, entry in official.items()}
    array_bytes = sum(OFFICIAL[name]) * (32 * 32 * 3 + 8)
    check_room(root, array_bytes + sum(FILE_BYTES[split] for split, path in paths.items() if path is None))
    parts: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]] = {}
    for split, (url, filename, md5) in official.items():
        path = paths[split]
        if path is None:
            if archive or not download:
                raise absent(filename, md5, places)
            path = fetch(url, filename, root, md5)
        parts[split] = _mat(path, md5)
    arrays: dict[str, NDArray[Any]] = {"test_images": parts["test"][0], "test_labels": parts["test"][1]}
    training = [parts[split] for split in SPLITS[name] if split != "test"]
    for kind, pieces in zip(("images", "labels"), zip(*training, strict=True), strict=True):
        arrays[f"train_{kind}"] = np.concatenate(pieces)
    source = {
        "dataset": name,
        "archive_md5": {entry[1]: entry[2] for entry in official.values()},
        "exact_images": {split: len(arrays[f"{split}_labels"]) for split in ("train", "test")},
        "fidelity": "official files, md5 verified",
    }
    write_folder(folder, arrays, source)
    return folder


def _mat(path: Path, md5: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one .mat file: X uint8 [32, 32, 3, n], y [n, 1] with 10 for the digit 0 -> images [n, 32, 32, 3], labels
    [n]."""
    import scipy.io

    with open_verified(path, md5) as file:
        try:
            content = scipy.io.loadmat(file, variable_names=("X", "y"))
            images, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
        except Exception as error:  # scipy raises many things for a damaged file
            raise UserError(f"cannot read {path}: {error}; expected the official file with X and y") from error
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise UserError(
            f"{path} has X {images.dtype} {list(images.shape)} and {len(labels)} labels, "
            "expected uint8 [32, 32, 3, n] and n labels"
        )
    if len(labels) == 0 or labels.min() < 1 or labels.max() > 10:
        raise UserError(
            f"{path} has no labels or labels out of 1 to 10 (10 is the digit 0); expected the official file"
        )
    return images.transpose(3, 0, 1, 2), labels % 10
