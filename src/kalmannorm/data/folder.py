"""A data set as a folder of image files, as torchvision's ImageFolder has it: {train,val}/CLASS/FILE.

Only names and sizes are read here; pixels are read when a loader asks for them (`read_rgb`).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kalmannorm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val")
HOW_TO_GET = {
    "imagenet": (
        "get ILSVRC2012 from https://image-net.org (free after registration) and unpack it to one folder a class, "
        "train/n01440764/*.JPEG and val/n01440764/*.JPEG"
    )
}
READ_AS_IT_IS = ("imagenet", "tiny_imagenet_20", "image_folder")
LAYOUT = "expected torchvision's ImageFolder layout, train/CLASS/*.jpg and val/CLASS/*.jpg"
PIPELINE = "torchvision; crops and flips keyed by (seed, epoch, position)"
ELSE = "`dataset=digits` runs without any download"


@dataclass(frozen=True)
class Files:
    """The images of one split. `names` are relative to `root`: one array of bytes, not a list of strings, whose
    reference counts would copy the list into every worker that a loader forks."""

    root: Path
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])

    def take(self, indices: NDArray[Any]) -> "Files":
        return replace(self, names=self.names[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class Images:
    """A data set as files; `provenance` goes into every record."""

    train: Files
    test: Files
    classes: int
    provenance: dict[str, Any]

    def without(self, unreadable: Mapping[str, list[list[Any]]]) -> "Images":
        """Less the images that `find_unreadable` found, which the provenance then names with the reasons."""
        left = {}
        named = []
        for split, files in (("train", self.train), ("val", self.test)):
            bad = [index for index, _ in unreadable[split]]
            named += [f"{split}/{os.fsdecode(files.names[index])}: {reason}" for index, reason in unreadable[split]]
            left[split] = files.take(np.setdiff1d(np.arange(len(files)), bad))
            if len(left[split]) == 0:
                raise UserError(f"{files.root}: none of its {len(files):,} images can be read, the first: {named[-1]}")
        provenance = {**self.provenance, "unreadable": {"count": len(named), "left_out": named}}
        return replace(self, train=left["train"], test=left["val"], provenance=provenance)


# The listing ---------------------------------------------------------------------------------------------------------


def find(root: Path, dataset: Mapping[str, Any]) -> Path:
    """The folder with train/ and val/: `root/FOLDER`, or `root` itself. UserError: neither has them."""
    places = (root / dataset["folder"], root)
    for place in places:
        if all((place / split).is_dir() for split in SPLITS):
            return place
    for place in places:
        if (place / "train").is_dir():
            raise UserError(f"data set {dataset['name']!r}: {place.absolute()} has train/ but no val/; {LAYOUT}")
    raise UserError(
        f"data set {dataset['name']!r} is not there: looked for train/ and val/ in "
        f"{' and '.join(str(place.absolute()) for place in places)}; {HOW_TO_GET.get(dataset['name'], LAYOUT)}; "
        f"say where it is by DATA=... or data=...; {ELSE}"
    )


def count_classes(root: Path, dataset: Mapping[str, Any]) -> int:
    """Folders in train/, one a class. UserError as for `find`."""
    return sum(entry.is_dir() for entry in os.scandir(find(root, dataset) / "train"))


def load(root: Path, dataset: Mapping[str, Any]) -> Images:
    """The files of the data set whose configuration (conf/dataset) is given. UserError: it is missing, or not of the
    layout. `sha256` in the provenance is of the list of files and sizes: to hash 150 GB would take an hour a run."""
    folder = find(root, dataset)
    classes = {split: _classes(folder / split) for split in SPLITS}
    if classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))
        raise UserError(
            f"{folder}: train/ has {len(classes['train'])} class folders and val/ {len(classes['val'])}, of which "
            f"{len(odd)} are not in both ({', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}); {LAYOUT}"
        )
    total = hashlib.sha256()
    train, test = (_files(folder / split, classes[split], total) for split in SPLITS)
    provenance = {
        "name": dataset["name"],
        "fidelity": _fidelity((len(train), len(test)), dataset.get("published")),
        "sha256": total.hexdigest(),
        "sha256_of": "names and sizes of the files",
        "files": len(train) + len(test),
        "loader": PIPELINE,
    }
    return Images(train, test, len(classes["train"]), provenance)


def _classes(folder: Path) -> list[str]:
    """As torchvision numbers them: sorted by name."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise UserError(f"{folder} has no class folders; {LAYOUT}")
    return classes


def _files(folder: Path, classes: list[str], total: Any) -> Files:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    try:
        found = make_dataset(folder, {name: i for i, name in enumerate(classes)}, IMG_EXTENSIONS, allow_empty=True)
        for path, _ in found:
            total.update(f"{folder.name}/{os.path.relpath(path, folder)} {Path(path).stat().st_size}\n".encode())
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
    labels = np.array([label for _, label in found], dtype=np.int64)
    empty = sorted(set(range(len(classes))) - set(labels.tolist()))
    if empty:
        raise UserError(f"{folder / classes[empty[0]]} has no images ({', '.join(IMG_EXTENSIONS)}); {LAYOUT}")
    names = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in found])
    return Files(folder, names, labels)


def _fidelity(counts: tuple[int, int], published: list[int] | None) -> str:
    said = f"{counts[0]:,} + {counts[1]:,} files"
    if published is None:
        return f"{said}, content not verified"
    if list(counts) == list(published):
        return f"{said}, the published numbers; content not verified"
    return f"{said}, not the published {published[0]:,} + {published[1]:,}"


# Pixels --------------------------------------------------------------------------------------------------------------


class Unreadable(Exception):
    """An image file that cannot be decoded, with its path and the reason."""


def read_rgb(path: Path) -> "Image":
    """Any image that Pillow reads, as 8-bit RGB: grey and CMYK converted, transparency dropped, of 16 bits the upper
    eight. Unreadable: truncated, empty, no image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion saturates
                grey = np.asarray(image).astype(np.int64) >> 8
                return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many things for a damaged file
        reason = " ".join(str(error).split()).replace(str(path), "it") or type(error).__name__
        raise Unreadable(f"cannot read {path}: {reason}") from None


def find_unreadable(images: Images, workers: int) -> dict[str, list[list[Any]]]:
    """Reads every image once, in `workers` threads: {split: [[index, reason], ...]}."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    found = {}
    with ThreadPool(max(1, workers)) as pool:  # Pillow decodes without holding the interpreter
        for split, files in (("train", images.train), ("val", images.test)):
            reasons: Iterable[str] = pool.imap(_reason, _paths(files), chunksize=16)
            reasons = track(reasons, f"reading {files.root}", len(files), console=console, transient=True)
            found[split] = [[index, reason] for index, reason in enumerate(reasons) if reason]
    return found


def _paths(files: Files) -> Iterator[Path]:
    return (files.path(index) for index in range(len(files)))


def _reason(path: Path) -> str:
    try:
        read_rgb(path)
    except Unreadable as error:
        return str(error).partition(": ")[2]
    return ""
