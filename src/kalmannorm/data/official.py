"""Official files of a data set: found where the user put them, or fetched, and never read before their md5 is right."""

import hashlib
import http.client
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from kalmannorm.data.arrays import partial
from kalmannorm.errors import UserError


def check_room(root: Path, need: int) -> None:
    """Make `root` if it is not there; UserError if it cannot be written to or has less than `need` bytes free."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):  # os.access says yes to root even on read-only file systems
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the data root {root.absolute()}: {error.strerror or error}; "
            "give another by --root, DATA=... or the environment variable KALMANNORM_DATA"
        ) from error
    free = shutil.disk_usage(root).free
    if free < need:
        raise UserError(
            f"not enough disk under {root.absolute()}: {free / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB needed; "
            "make room or give another root by --root, DATA=... or the environment variable KALMANNORM_DATA"
        )


def find(filename: str, places: Sequence[Path]) -> Path | None:
    """Return the first of `places` that holds the file."""
    return next((place / filename for place in places if (place / filename).is_file()), None)


def fetch(url: str, filename: str, root: Path, md5: str) -> Path:
    """Download into `root` under its final name only once it is whole and its md5 is right. UserError otherwise."""
    from torchvision.datasets.utils import download_url

    with partial(root / filename) as temporary:
        try:
            download_url(url, temporary, filename, md5)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(
                f"could not download {url}: {error}; get {filename} (md5 {md5}) on another way, "
                f"put it into {root.absolute()} and run this again"
            ) from error
        (temporary / filename).replace(root / filename)
    return root / filename


def absent(filename: str, md5: str, places: Sequence[Path]) -> UserError:
    """Return the error for a file that is nowhere, when nothing may be downloaded."""
    where = " or ".join(str(place.absolute()) for place in places)
    return UserError(f"{filename} is not there and downloading is off: put it (md5 {md5}) into {where}")


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
