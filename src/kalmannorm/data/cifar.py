"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images of 32x32 in 10 or 100 (fine) classes."""

import dataclasses
import io
import pickle
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kalmannorm.data.arrays import Arrays, is_complete, read_folder, write_folder
from kalmannorm.data.official import absent, check_room, fetch, find, open_verified
from kalmannorm.errors import UserError

CLASSES = {"cifar10": 10, "cifar100": 100}
OFFICIAL = (50_000, 10_000)
ARRAY_BYTES = sum(OFFICIAL) * (32 * 32 * 3 + 8)
ARCHIVE_BYTES = 171_000_000  # both archives are 169 to 170.5 MB


def load_cifar10(root: Path) -> Arrays:
    """Load CIFAR-10 from `root/cifar10`, as `prepare` (or a copy of it in the same layout) has it there."""
    return read_folder(root, "cifar10", classes=CLASSES["cifar10"], official=OFFICIAL)


def load_few(root: Path) -> Arrays:
    """Load CIFAR-10 by a name of its own, for few images and no crops (conf/dataset/cifar10_few.yaml)."""
    return _named(load_cifar10(root), "cifar10_few")


def load_recoloured(root: Path) -> Arrays:
    """Load CIFAR-10 by a name of its own, for test images in other colours too
    (conf/dataset/cifar10_recoloured.yaml)."""
    return _named(load_cifar10(root), "cifar10_recoloured")


def _named(arrays: Arrays, name: str) -> Arrays:
    return dataclasses.replace(arrays, provenance=arrays.provenance | {"name": name})


def load_cifar100(root: Path) -> Arrays:
    """Load CIFAR-100, fine labels, from `root/cifar100`."""
    return read_folder(root, "cifar100", classes=CLASSES["cifar100"], official=OFFICIAL)


def prepare(name: str, root: Path, archive: Path | None = None, download: bool = True) -> Path:
    """Bring the official archive into `root/name`; returns that folder. One already complete is checked and kept.

    archive: the official .tar.gz; else the one in `root` or `root/name`; else it is downloaded into `root` (and stays
    there). Its md5 is checked before a byte of it is interpreted, nothing of it is extracted to disk, and its pickles
    can make nothing but numpy arrays and plain values.
    """
    folder = root / name
    if is_complete(folder):
        read_folder(root, name, classes=CLASSES[name], official=OFFICIAL)
        return folder

    import torchvision.datasets  # here, as it imports torch

    official = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    places = (root, folder)
    path = archive or find(official.filename, places)
    check_room(root, ARRAY_BYTES + (0 if path else ARCHIVE_BYTES))
    if path is None:
        if not download:
            raise absent(official.filename, official.tgz_md5, places)
        path = fetch(official.url, official.filename, root, official.tgz_md5)
    with open_verified(path, official.tgz_md5) as file:
        members = _members(file, path)
    arrays: dict[str, NDArray[Any]] = {}
    for split, files in (("train", official.train_list), ("test", official.test_list)):
        names = [f"{official.base_folder}/{entry[0]}" for entry in files]
        images, labels = zip(*(_batch(members, member, path, CLASSES[name]) for member in names), strict=True)
        arrays |= {f"{split}_images": np.concatenate(images), f"{split}_labels": np.concatenate(labels)}
    source = {
        "dataset": name,
        "archive_md5": official.tgz_md5,
        "exact_images": {split: len(arrays[f"{split}_labels"]) for split in ("train", "test")},
        "fidelity": "official archive, md5 verified",
    }
    write_folder(folder, arrays, source)
    return folder


def _members(file: BinaryIO, path: Path) -> dict[str, bytes]:
    """Read the archive's regular files into memory. One member that is not a plain file or leads outside refuses it
    all."""
    members = {}
    try:
        with tarfile.open(fileobj=file, mode="r:*") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise UserError(f"{path} holds {member.name!r}, which leads outside or is no plain file: refused")
                content = tar.extractfile(member)
                if content is not None:
                    members[str(name)] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}; expected the official .tar.gz") from error
    return members


def _batch(
    members: dict[str, bytes], member: str, path: Path, classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one pickled batch: images uint8 [n, 32, 32, 3] and labels int64 [n]."""
    if member not in members:
        raise UserError(f"{path} does not hold {member}; expected the official archive")
    try:
        entry = ArrayUnpickler(io.BytesIO(members[member])).load()
        data = np.asarray(entry["data"])
        labels = np.asarray(entry["labels" if "labels" in entry else "fine_labels"], dtype=np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"data {data.dtype} {list(data.shape)} for {len(labels)} labels")
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"no labels, or labels out of 0 to {classes - 1}")
    except UserError as error:
        raise UserError(f"{path}: {member}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise UserError(f"{path}: cannot read {member}: {error}; expected uint8 [n, 3072] and n labels") from error
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles what the official batches are made of, numpy arrays and plain values, and refuses any other name."""

    def __init__(self, file: BinaryIO | io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")  # they were written by Python 2

    def find_class(self, module: str, name: str) -> Any:
        """Return the three names a pickled array needs. `numpy._core` is what newer numpy calls the same module."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.ndarray.__reduce__(np.empty(0))[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise UserError(f"its pickle asks for {module}.{name}, only numpy arrays are expected: refused")
