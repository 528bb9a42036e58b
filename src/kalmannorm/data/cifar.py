"""Read CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images of 32x32 in 10 or 100 (fine) classes.

The archives are not extracted to disk, and their pickles can create numpy arrays and plain values only.
"""

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kalmannorm.data.official import File, Official, Part
from kalmannorm.errors import UserError

COUNTS = (50_000, 10_000)
ARCHIVE_BYTES = 171_000_000  # both archives are 169 to 170.5 MB


def _files(classes: int) -> list[File]:
    import torchvision.datasets

    official = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]

    def read(file: BinaryIO, path: Path) -> Iterator[Part]:
        members = _members(file, path)
        for split, batches in (("train", official.train_list), ("test", official.test_list)):
            for name, _ in batches:
                yield split, *_batch(members, f"{official.base_folder}/{name}", path, classes)

    return [File(official.url, official.filename, official.tgz_md5, ARCHIVE_BYTES, read)]


CIFAR10 = Official("cifar10", 10, COUNTS, lambda: _files(10))
CIFAR100 = Official("cifar100", 100, COUNTS, lambda: _files(100))


def _members(file: BinaryIO, path: Path) -> dict[str, bytes]:
    """Read the archive's files into memory. UserError: it is damaged, or has a member that is no plain file or leads
    outside."""
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
    """Read one pickled batch: images uint8 [n, 32, 32, 3], labels int64 [n]. UserError: missing or damaged."""
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
    """Unpickles numpy arrays and plain values, all that the official batches need, and refuses any other name."""

    def __init__(self, file: BinaryIO | io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")  # they were written by Python 2

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the three names that a pickled array needs. Newer numpy calls `numpy.core` `numpy._core`."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.ndarray.__reduce__(np.empty(0))[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise UserError(f"its pickle asks for {module}.{name}, only numpy arrays are expected: refused")
