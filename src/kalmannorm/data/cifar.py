"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images of 32x32 in 10 or 100 (fine) classes.

Their archives are read after their md5 is right, in memory, and their pickles make arrays and plain values alone.
"""

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kalmannorm.data.official import File, Official, Part
from kalmannorm.errors import UserError

COUNTS = (50_000, 10_000)
ARCHIVE_BYTES = 171_000_000  # both archives are 169 to 170.5 MB


def _files(classes: int) -> list[File]:
    import torchvision.datasets

    official = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]

    def read(file: BinaryIO, path: Path) -> Iterator[Part]:
        with tarfile.open(fileobj=file) as archive:
            content = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
        for split, batches in (("train", official.train_list), ("test", official.test_list)):
            for name, _ in batches:
                pickled = io.BytesIO(content[f"{official.base_folder}/{name}"])
                batch = ArrayUnpickler(pickled, encoding="latin1").load()  # they were written by Python 2
                images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                yield split, images, np.array(batch["labels" if classes == 10 else "fine_labels"], dtype=np.int64)

    return [File(official.url, official.filename, official.tgz_md5, ARCHIVE_BYTES, read)]


CIFAR10 = Official("cifar10", 10, COUNTS, lambda: _files(10))
CIFAR100 = Official("cifar100", 100, COUNTS, lambda: _files(100))


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles what the official batches are made of, numpy arrays and plain values, and refuses any other name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the three names a pickled array needs. `numpy._core` is what newer numpy calls the same module."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.ndarray.__reduce__(np.empty(0))[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise UserError(f"CIFAR: its pickle asks for {module}.{name}, only numpy arrays are expected: refused")
