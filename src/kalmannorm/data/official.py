"""Published sets of small images, from their official files: found where the user put them, or fetched, and never
read before their md5 is right."""

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
from kalmannorm.files import check_room

Part = tuple[str, NDArray[np.uint8], NDArray[np.int64]]  # "train" or "test", images [n, 32, 32, 3], labels [n]


@dataclass(frozen=True)
class File:
    """An official file; `read` takes it, open, and its path, and raises UserError where it is not as expected."""

    url: str
    name: str
    md5: str
    size: int  # bytes, about
    read: Callable[[BinaryIO, Path], Iterable[Part]]


@dataclass(frozen=True)
class Official:
    """A published set. counts: of its training and test images. files: asked for when the set is prepared, as
    torchvision knows them, which imports torch."""

    name: str
    classes: int
    counts: tuple[int, int]
    files: Callable[[], list[File]]

    def load(self, root: Path) -> Arrays:
        """Load the set from `root/name`, as `prepare` (or a copy of it in the same layout) has it there."""
        return read_folder(root, self.name, classes=self.classes, official=self.counts)

    def prepare(self, root: Path, archive: Path | None = None, download: bool = True) -> Path:
        """Bring the set into `root/name`; return that folder. One already complete is checked and kept.

        archive: the official file, or a folder that holds all of them; else those in `root` or `root/name`, and what is
        missing is downloaded into `root` (and stays there).
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
        check_room(root.absolute(), needed, "give another by --root, DATA=... or KALMANNORM_DATA")
        parts: list[Part] = []
        for file, found in zip(files, paths, strict=True):
            if found is None and not download:
                raise UserError(
                    f"{file.name} is not there and downloading is off: put it (md5 {file.md5}) into "
                    f"{root.absolute()} or {folder.absolute()}"
                )
            path = found or fetch(file, root)
            with open_verified(path, file.md5) as stream:
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
    """Download into `root` under its final name only once it is whole and its md5 is right. UserError otherwise."""
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


def open_verified(path: Path, md5: str) -> BinaryIO:
    """Open the file at its start; the md5 is checked on this very handle, so nobody can exchange it in between."""
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
            "nothing of it was read; delete it and run this again"
        )
    file.seek(0)
    return file
