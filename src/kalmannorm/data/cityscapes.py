"""Cityscapes (Cordts et al. 2016), streets of German cities in nineteen classes, in the official layout

    ROOT/cityscapes/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    ROOT/cityscapes/gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png

Tested on `val`: the labels of `test` are its evaluation server's.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kalmannorm.data.scenes import Pair, Source, meanings, paired

# The classes that its benchmark evaluates, in its order, by the number (labelIds) that stands in the maps.
CLASSES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
NUMBERS = 34  # of all the kinds of things that the maps tell apart, 0 to 33
FOLDERS = {"train": "train", "test": "val"}
IMAGE, LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"


def _pairs(folder: Path, split: str) -> list[Pair]:
    images = (folder / "leftImg8bit" / FOLDERS[split]).glob(f"*/*{IMAGE}")
    labels = (folder / "gtFine" / FOLDERS[split]).glob(f"*/*{LABEL}")
    return paired(images, labels, lambda path: path.name.removesuffix(IMAGE).removesuffix(LABEL))


def numbered(numbers: int) -> NDArray[np.uint8]:
    """Return the table of maps that hold Cityscapes' numbers, and others up to `numbers` that do not count."""
    return meanings({number: i for i, number in enumerate(CLASSES.values())}, range(numbers))


CITYSCAPES = Source(
    "cityscapes",
    tuple(CLASSES),
    numbered(NUMBERS),
    _pairs,
    "get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com (free after "
    "registration) and unpack both into it",
)
SOURCES = dict.fromkeys(("cityscapes", "cityscapes_gta5"), CITYSCAPES)  # of the latter, GTA5 is tested on as well
