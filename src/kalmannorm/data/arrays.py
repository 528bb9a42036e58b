"""Keep a data set as four arrays: in memory or in a folder; resize them, take subsets.

The folder has `ROOT/NAME/{train,test}_{images,labels}.npy` and `source.json`, which says where the pixels come from.
Nothing is ever unpickled here.
"""

import dataclasses
import glob
import hashlib
import json
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kalmannorm.errors import UserError, missing_dataset, reason

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")  # also the order in which sha256 takes them
SOURCE = "source.json"
SIZE = 32  # pixels: side of the images of all sets that are kept in such folders
CHUNK = 4096  # images resized at a time: the float copies of a chunk stay within some 50 MB


@dataclasses.dataclass(frozen=True)
class Arrays:
    """One data set in memory.

    train_images, test_images: uint8 [N, H, W, 3], RGB; train_labels, test_labels: int64 [N] in [0, classes).
    provenance: {"name", "fidelity", "sha256"}, copied into every record.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: int
    provenance: dict[str, str]


def digest(*arrays: NDArray[np.generic]) -> str:
    """Return the sha256 of the arrays' bytes, one after the other, in C order and little endian."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
    return total.hexdigest()


# The folder ----------------------------------------------------------------------------------------------------------


def is_complete(folder: Path) -> bool:
    """Say whether all four arrays are there (source.json may be missing: the provenance is then unknown)."""
    return all((folder / f"{name}.npy").is_file() for name in ARRAYS)


def read_folder(root: Path, name: str, *, classes: int, official: tuple[int, int]) -> Arrays:
    """Read the set `name` from its folder under `root`, checked.

    official: numbers of training and test images of the published set; other numbers are accepted, and noted in the
    fidelity. UserError: an array is missing, unreadable, of the wrong type or shape, or inconsistent.
    """
    folder = root / name
    if not is_complete(folder):
        missing = ", ".join(f"{array}.npy" for array in ARRAYS if not (folder / f"{array}.npy").is_file())
        there = shlex.quote(str(root))
        remedy = f"get it by `make data-{name} DATA={there}` or `kalmannorm data prepare {name} --root {there}`"
        raise missing_dataset(name, f"looked in {folder.absolute()}, missing {missing}", remedy)
    arrays = {array: _read(folder / f"{array}.npy") for array in ARRAYS}
    for split in ("train", "test"):
        _check(folder, split, arrays[f"{split}_images"], arrays[f"{split}_labels"], classes)
    sha256 = digest(*arrays.values())
    counts = (len(arrays["train_labels"]), len(arrays["test_labels"]))
    fidelity = _fidelity(folder, name, counts, sha256)
    if counts != official:
        fidelity += f"; {counts[0]:,} + {counts[1]:,} images, not the published {official[0]:,} + {official[1]:,}"
    return Arrays(**arrays, classes=classes, provenance={"name": name, "fidelity": fidelity, "sha256": sha256})


def _read(path: Path) -> NDArray[Any]:
    try:
        # Mapped first, so that a header that claims more than the file holds is refused before memory is allocated.
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise UserError(
            f"cannot read {path}: {reason(error)}; expected a whole .npy file without pickled objects; "
            f"delete {path.parent} and prepare the data set again"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive of arrays, expected one array; delete it and prepare the data set again")
    return np.array(array, order="C")


def _check(folder: Path, split: str, images: NDArray[Any], labels: NDArray[Any], classes: int) -> None:
    def refuse(kind: str, found: str, expected: str) -> None:
        raise UserError(
            f"{folder / f'{split}_{kind}.npy'} has {found}, expected {expected}; "
            f"delete {folder} and prepare the data set again"
        )

    for kind, array, dtype in (("images", images, np.uint8), ("labels", labels, np.int64)):
        if array.dtype != dtype:
            refuse(kind, f"dtype {array.dtype}", f"{np.dtype(dtype)}")
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
        refuse("images", f"shape {list(images.shape)}", f"[N, {SIZE}, {SIZE}, 3]")
    if labels.ndim != 1:
        refuse("labels", f"shape {list(labels.shape)}", "[N]")
    if len(labels) == 0:
        refuse("labels", "no entries", "at least one")
    if len(images) != len(labels):
        refuse("labels", f"{len(labels):,} labels for {len(images):,} images", "as many labels as images")
    if labels.min() < 0 or labels.max() >= classes:
        refuse("labels", f"labels from {labels.min()} to {labels.max()}", f"0 to {classes - 1}")


def _fidelity(folder: Path, name: str, counts: tuple[int, int], sha256: str) -> str:
    """Return what source.json says about the pixels, in one line."""
    path = folder / SOURCE
    if not path.exists():
        return f"unknown (no {SOURCE})"
    try:
        source = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; expected JSON; delete it or prepare the set again") from error
    if not isinstance(source, dict):
        raise UserError(f"{path} holds a {type(source).__name__}, expected a JSON object with 'dataset'")
    if source.get("dataset", name) != name:
        raise UserError(
            f"{path} says dataset {source['dataset']!r}, expected {name!r}: another set lies in this folder"
        )
    if source.get("sha256", sha256) != sha256:
        raise UserError(
            f"the arrays in {folder} have sha256 {sha256[:12]}..., {path.name} says {str(source['sha256'])[:12]}...: "
            f"changed or damaged since they were prepared; delete {folder} and prepare the data set again"
        )
    if "fidelity" in source:
        return " ".join(str(source["fidelity"]).split())[:200]
    exact = source.get("exact_images")
    if exact is None:
        return f"unknown ({SOURCE} does not say)"
    numbers: list[Any] = [exact.get(split) for split in ("train", "test")] if isinstance(exact, dict) else []
    if len(numbers) != 2 or not all(type(n) is int and 0 <= n <= most for n, most in zip(numbers, counts, strict=True)):
        raise UserError(f"{path} has exact_images {exact!r}, expected {{'train': n, 'test': n}} up to {list(counts)}")
    return f"{sum(numbers):,} of {sum(counts):,} exact"


def write_folder(folder: Path, arrays: dict[str, NDArray[Any]], source: dict[str, Any]) -> None:
    """Write the four arrays and source.json; if interrupted, the folder is left incomplete, never inconsistent.

    The folder may exist and hold other files, such as the archive; arrays in it are replaced.
    """
    source = {**source, "sha256": digest(*(arrays[name] for name in ARRAYS))}
    with partial(folder) as temporary:
        for name in ARRAYS:
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, arrays[name], allow_pickle=False)
                _flush(file)
        with (temporary / SOURCE).open("w", encoding="utf-8") as file:
            json.dump(source, file, indent=1)
            _flush(file)
        folder.mkdir(exist_ok=True)
        names = [*(f"{name}.npy" for name in ARRAYS), SOURCE]
        for name in names:  # first remove all old files, so that old and new arrays never mix
            (folder / name).unlink(missing_ok=True)
        for name in reversed(names):  # source.json first: a complete folder always has it
            (temporary / name).replace(folder / name)


def _flush(file: IO[bytes] | IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def partial(folder: Path) -> Iterator[Path]:
    """Make a hidden folder beside `folder` for unfinished files, and remove it at the end. OSErrors become UserErrors.

    Hidden folders left by killed processes of this machine are removed too.
    """
    prefix = f".{folder.name}.{socket.gethostname()}."
    temporary = folder.parent / f"{prefix}{os.getpid()}.partial"
    for left in folder.parent.glob(f"{glob.escape(prefix)}*.partial"):
        number = left.name.removeprefix(prefix).removesuffix(".partial")
        if left == temporary or (number.isdecimal() and not _process_exists(int(number))):
            shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; make room, or choose another data root"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Make a folder whole or not at all: yield a temporary one, then rename it to `target`. UserError: that exists."""
    if target.exists():
        raise UserError(f"{target} is there already: remove it to write it again")
    with partial(target) as temporary:
        yield temporary
        temporary.rename(target)


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, but belongs to another user
        return True
    return True


# Smaller pictures, fewer pictures ------------------------------------------------------------------------------------


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize square images: uint8 [N, H, H, C] -> uint8 [N, size, size, C].

    Down by an integer factor: the mean over each block of pixels. Up: bilinear, between pixels' centres. Halves round
    up. Raises UserError for any other size.
    """
    height = images.shape[1]
    if size == height:
        return images
    if size < 1 or (size < height and height % size):
        raise UserError(f"size {size} does not fit {height} x {height} images: give a divisor of {height} or more")
    import torch
    import torch.nn.functional as F

    def resized(chunk: torch.Tensor) -> torch.Tensor:
        if size < height:
            return F.avg_pool2d(chunk, height // size)
        return F.interpolate(chunk, size=size, mode="bilinear")

    nchw = torch.from_numpy(images).movedim(-1, 1)
    chunks = [resized(chunk.float()).add_(0.5).byte() for chunk in nchw.split(CHUNK)]
    return torch.cat(chunks).movedim(1, -1).contiguous().numpy()


def class_balanced_subset(labels: NDArray[np.int64], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the indices, ascending, of `count` images; the numbers per class differ by at most one.

    Drawn by `RandomState`, whose stream numpy never changes. Raises UserError if the set or a class is too small.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if not len(classes) <= count <= len(labels):
        raise UserError(
            f"a subset of {count:,} images of {len(labels):,}: give {len(classes)} (one a class) or more, "
            f"and not more than there are"
        )
    random = np.random.RandomState(seed)
    extra = set(random.permutation(classes)[: count % len(classes)].tolist())  # these classes give one more
    chosen = []
    for label, available in zip(classes, sizes, strict=True):
        share = count // len(classes) + (int(label) in extra)
        if share > available:
            raise UserError(
                f"a balanced subset of {count:,} images needs {share:,} of class {label}, "
                f"there are {available:,}: take at most {available * len(classes):,}"
            )
        chosen.append(random.permutation(np.flatnonzero(labels == label))[:share])
    return np.sort(np.concatenate(chosen))
