"""Read Street View House Numbers, cropped digits (Netzer et al. 2011): 73,257 + 26,032 images of 32x32, 10 classes.

`svhn_extra` trains on the 531,131 easier `extra` images too. Digits must not be flipped (conf: flip false).
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from kalmannorm.data.official import File, Official, Part
from kalmannorm.errors import UserError

FILE_BYTES = {"train": 183_000_000, "test": 65_000_000, "extra": 1_330_000_000}


def _files(*splits: str) -> list[File]:
    from torchvision.datasets import SVHN

    official = [(*SVHN.split_list[split], FILE_BYTES[split]) for split in splits]
    return [File(url, name, md5, size, _read) for url, name, md5, size in official]


def _read(file: BinaryIO, path: Path) -> list[Part]:
    """Read one .mat file: X uint8 [32, 32, 3, n], y [n, 1] with 10 for the digit 0."""
    import scipy.io

    try:
        content = scipy.io.loadmat(file, variable_names=("X", "y"))
        images, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    except Exception as error:  # scipy raises many kinds for a damaged file
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
    split = "test" if path.name.startswith("test") else "train"
    return [(split, images.transpose(3, 0, 1, 2), labels % 10)]


SVHN = Official("svhn", 10, (73_257, 26_032), lambda: _files("train", "test"))
SVHN_EXTRA = Official("svhn_extra", 10, (73_257 + 531_131, 26_032), lambda: _files("train", "extra", "test"))
