"""Read and check data sets for segmentation: scenes, that is images with a label map each.

A source (scene_sources.py) says where images and maps lie, what the numbers in the maps mean and where to get the set.
All that a run will read is checked when the set is loaded: every image has a map of its size, and no map holds a number
without a meaning.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from kalmannorm import machine
from kalmannorm.data.pixels import Header, Unreadable, read_header, read_numbers, read_rgb, turn
from kalmannorm.errors import UserError, missing_dataset

IGNORED = 255  # class of a pixel that counts neither in training nor in evaluation
REMEDY = "; get the file again, or remove image and label map"
MEANINGLESS = 254  # in `Source.table`: no map of the source should hold this number
Pair = tuple[Path, Path]  # an image and its label map


@dataclass(frozen=True)
class Source:
    """A published data set of scenes.

    folder: under the data root. classes: their names. table: uint8 [256], number in a map -> class, IGNORED or
    MEANINGLESS. images, maps: glob patterns of the files in the folder; the text that the stars match is the scene's
    name. splits: "train" and "test" -> published names of the splits. chosen: (folder, split) -> a function that says
    whether a name belongs to the split.
    """

    folder: str
    classes: tuple[str, ...]
    table: NDArray[np.uint8]
    images: str
    maps: str
    splits: Mapping[str, Sequence[str]]
    how_to_get: str
    chosen: Callable[[Path, str], Callable[[str], bool]] = lambda folder, split: lambda name: True

    def pairs(self, folder: Path, split: str) -> list[Pair]:
        """Return a split's images with their label maps, sorted by name. UserError: an image or a map is alone."""
        chosen = self.chosen(folder, split)
        found: list[Pair] = []
        for published in self.splits[split]:
            images, maps = (_named(folder, pattern.format(split=published)) for pattern in (self.images, self.maps))
            for (kind, own), (missing, other) in permutations((("image", images), ("label map", maps))):
                if odd := sorted(filter(chosen, own.keys() - other.keys())):
                    alone = f"{len(odd)} of {len(own)} {kind}s have no {missing}, the first: {own[odd[0]]}"
                    raise UserError(f"{alone}; unpack the set again, or remove what is alone")
            found += [(images[name], maps[name]) for name in sorted(filter(chosen, images))]
        return found


def _named(folder: Path, pattern: str) -> dict[str, Path]:
    """Return the files that match a pattern, by the text that its stars match: CITY/NAME, as cities may share names."""
    top, suffix = folder / pattern.partition("*")[0], pattern.rpartition("*")[2]
    found = (path for path in folder.glob(pattern) if path.name[0] != ".")
    return {path.relative_to(top).as_posix().removesuffix(suffix): path for path in found}


@dataclass(frozen=True)
class Scenes:
    """The scenes of one split."""

    pairs: Sequence[Pair]
    table: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, indices: NDArray[np.int64]) -> "Scenes":
        return Scenes([self.pairs[i] for i in indices], self.table)

    def read(self, index: int) -> tuple[Image, NDArray[np.uint8]]:
        """Return the RGB image and its pixels' classes, uint8 [H, W], some IGNORED. UserError: one cannot be read."""
        image, numbers = self.pairs[index]
        return read_rgb(image), self._classes(numbers, read_header(image))

    def _classes(self, file: Path, image: Header) -> NDArray[np.uint8]:
        """Return the classes of the upright picture's pixels, uint8 [H, W].

        A map with the size of the picture as stored is turned like the picture: published maps were drawn, and public
        code reads them, without regard to EXIF data. UserError: the map cannot be read, or has a wrong number.
        """
        numbers = read_numbers(file)
        if numbers.shape == (image.height, image.width):
            numbers = turn(numbers, image.orientation)
        classes = self.table[numbers]
        if len(bad := np.unique(numbers[classes == MEANINGLESS])):
            expected = _ranges(np.flatnonzero(self.table != MEANINGLESS))
            raise UserError(
                f"label map {file} holds {_ranges(bad)}, expected {expected}: of another data set, or coloured; get it "
                "again"
            )
        return classes

    def check(self, index: int) -> tuple[tuple[int, int], bool]:
        """Return (width, height) of a scene, and whether any pixel of it has a class. UserError: image or map cannot be
        read, or their sizes differ."""
        image, numbers = self.pairs[index]
        try:
            header = read_header(image)
            size, classes = header.upright, self._classes(numbers, header)
        except Unreadable as error:
            raise UserError(f"{error}{REMEDY}") from None
        if size != classes.shape[::-1]:
            sizes = f"{classes.shape[1]} x {classes.shape[0]} pixels, its image {image} {size[0]} x {size[1]}"
            raise UserError(f"label map {numbers} has {sizes}: get both again, or remove both")
        return size, bool((classes != IGNORED).any())


@dataclass(frozen=True)
class Split:
    """A data set's training and test scenes; `provenance` goes into every record."""

    train: Scenes
    test: Scenes
    classes: tuple[str, ...]
    provenance: dict[str, str]


def meanings(classes: Mapping[int, int], ignored: Iterable[int]) -> NDArray[np.uint8]:
    """Make the table of a source. classes: number in a map -> class. ignored: numbers of pixels that do not count."""
    table = np.full(256, MEANINGLESS, dtype=np.uint8)
    table[list(ignored)] = IGNORED
    table[list(classes)] = list(classes.values())
    return table


def load(
    name: str, source: Source, folder: Path, published: Sequence[int] | None = None, part: tuple[int, int] = (0, 1)
) -> Split:
    """Return the data set, checked. With `part` = (i, k), this process checks every k-th scene, from the i-th on.

    UserError: the data set is missing, incomplete, damaged or inconsistent.
    """
    train, test = (find(name, source, folder, split) for split in ("train", "test"))
    sizes = check(train, part) | check(test, part)
    said = f"{len(train):,} + {len(test):,} scenes"
    if published is not None and (len(train), len(test)) != tuple(published):
        said += f", not the published {published[0]:,} + {published[1]:,}"
    if len(sizes) == 1:
        said += ", {} x {} pixels".format(*sizes.pop())
    provenance = {
        "name": name,
        "fidelity": said,
        "sha256": _digest(folder, train, test),
        "sha256_of": "the label maps, and the images' names and sizes of files",
    }
    return Split(train, test, source.classes, provenance)


def find(name: str, source: Source, folder: Path, split: str) -> Scenes:
    """Return the scenes of a split, "train" or "test", unchecked. UserError: there are none."""
    scenes = Scenes(source.pairs(folder, split), source.table) if folder.is_dir() else None
    if not scenes:
        raise missing_dataset(name, f"no {split} scenes in {folder.absolute()}", source.how_to_get)
    return scenes


def check(scenes: Scenes, part: tuple[int, int] = (0, 1)) -> set[tuple[int, int]]:
    """Check every scene of `part` and return the sizes found, (width, height). UserError: a bad scene; no pixel of any
    scene has a class."""
    with ThreadPool(machine.cores()) as pool:  # threads suffice: Pillow releases the GIL while it decodes
        found = list(pool.imap(scenes.check, range(part[0], len(scenes), part[1]), chunksize=8))
    if not any(has_class for _, has_class in found) and not any(scenes.check(i)[1] for i in range(len(scenes))):
        raise UserError(f"no pixel of any label map in {scenes.pairs[0][1].parent} has a class: get them again")
    return {size for size, _ in found}


def _digest(folder: Path, *splits: Scenes) -> str:
    total = hashlib.sha256()
    for scenes in splits:
        for image, numbers in scenes.pairs:
            total.update(f"{image.relative_to(folder)} {image.stat().st_size}\n".encode())
            total.update(numbers.read_bytes())
    return total.hexdigest()


def _ranges(numbers: NDArray[np.generic]) -> str:
    """Describe ascending numbers in words: "0 to 3, 7"."""
    runs: list[list[int]] = []
    for number in numbers.tolist():
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
