"""Prepare published sets of small images from their official files, which the user provides or which are downloaded.

No file is read before its md5 is verified.
"""

import hashlib
import http.client
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from kalmannorm.data.arrays import Arrays, is_complete, partial, read_folder, write_folder
from kalmannorm.errors import UserError
from kalmannorm.files import check_free_space

Part = tuple[str, NDArray[np.uint8], NDArray[np.int64]]  # "train" or "test", images [n, 32, 32, 3], labels [n]


@dataclass(frozen=True)
class File:
    """An official file. read: (open file, path) -> its parts; raises UserError if the content is not as expected."""

    url: str
    name: str
    md5: str
    size: int  # bytes, about
    read: Callable[[BinaryIO, Path], Iterable[Part]]


@dataclass(frozen=True)
class Official:
    """A published set. counts: numbers of training and test images. files: a function, called only to prepare the set,
    since it imports torch: torchvision knows the files."""

    name: str
    classes: int
    counts: tuple[int, int]
    files: Callable[[], list[File]]

    def load(self, root: Path) -> Arrays:
        """Load the set from `root/name`, where `prepare` wrote it. UserError: it is missing or damaged."""
        return read_folder(root, self.name, classes=self.classes, official=self.counts)

    def prepare(self, root: Path, archive: Path | None = None, download: bool = True) -> Path:
        """Bring the set into `root/name` and return that folder; a complete one is checked and kept.

        archive: the official file, or a folder with all of them. None: the files in `root` or `root/name`; missing ones
        are downloaded into `root`, and stay there. UserError: a file is missing or damaged, or there is no space.
        """
        folder = root / self.name
        if is_complete(folder):
            self.load(root)
            return folder
        files = self.files()
        if archive is None:
            paths = [_find(file.name, root, folder) for file in files]
        else:
            paths = [archive / file.name if archive.is_dir() else archive for file in files]
        arrays_size = sum(self.counts) * (32 * 32 * 3 + 8)
        needed = arrays_size + sum(file.size for file, path in zip(files, paths, strict=True) if path is None)
        check_free_space(root.absolute(), needed, "give another by --root, DATA=... or KALMANNORM_DATA")
        parts: list[Part] = []
        for file, found in zip(files, paths, strict=True):
            if found is None and not download:
                raise UserError(
                    f"{file.name} is not there and downloading is off: put it (md5 {file.md5}) into "
                    f"{root.absolute()} or {folder.absolute()}"
                )
            path = found or fetch(file, root)
            remedy = f"give the official {file.name} by --archive" if archive else "delete it and run this again"
            with open_verified(path, file.md5, remedy) as stream:
                parts += file.read(stream, path)
        arrays: dict[str, NDArray[np.generic]] = {}
        for split in ("train", "test"):
            own = [part for part in parts if part[0] == split]
            arrays[f"{split}_images"] = np.concatenate([images for _, images, _ in own])
            arrays[f"{split}_labels"] = np.concatenate([labels for _, _, labels in own])
        source = {
            "dataset": self.name,
            "archive_md5": {file.name: file.md5 for file in files},
            "exact_images": {split: len(arrays[f"{split}_labels"]) for split in ("train", "test")},
            "fidelity": f"official {'archive' if len(files) == 1 else 'files'}, md5 verified",
        }
        write_folder(folder, arrays, source)
        return folder


def _find(name: str, *places: Path) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


def fetch(file: File, root: Path) -> Path:
    """Download a file into `root`; it gets its name once its md5 is right. UserError: no download, wrong md5."""
    from torchvision.datasets.utils import download_url

    with partial(root / file.name) as temporary:
        try:
            download_url(file.url, temporary, file.name, file.md5)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(
                f"could not download {file.url}: {error}; get {file.name} (md5 {file.md5}) on another way, "
                f"put it into {root.absolute()} and run this again"
            ) from error
        (temporary / file.name).replace(root / file.name)
    return root / file.name


def open_verified(path: Path, md5: str, remedy: str) -> BinaryIO:
    """Open a file after checking its md5 on the same handle, so that it cannot be exchanged in between. UserError:
    unreadable, wrong md5."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; expected the official file, md5 {md5}"
        ) from error
    found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        file.close()
        raise UserError(
            f"{path} has md5 {found}, expected {md5}: damaged, incomplete or not the official file; "
            f"nothing of it was read; {remedy}"
        )
    file.seek(0)
    return file
