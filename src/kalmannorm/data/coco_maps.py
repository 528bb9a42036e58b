"""Make label maps in ADE20K's layout from COCO's masks: a few real photographs to run the code for ADE20K on.

`prepare` paints the mask of every object and every crowd with its category: 1 to 80, in the order of COCO's ids. Where
masks overlap, the smaller one is on top. Pixels that no mask covers are unlabelled (0). The set is ours, from no paper.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as run_length

from kalmannorm.data import coco
from kalmannorm.data.annotations import Split
from kalmannorm.data.arrays import new_folder
from kalmannorm.data.pixels import read_header, turn
from kalmannorm.data.scene_sources import COCO_CLASSES

SOURCE = "coco-tiny"


def prepare(target: Path, archive: Path | None) -> Path:
    """Write the data set to `target` and return that folder. `archive`: the source, a folder in COCO's layout; None:
    coco-tiny beside `target`. UserError: the source is missing or damaged; `target` exists already."""
    folder = archive or target.parent / SOURCE
    found = coco.load(folder.name, folder.parent, COCO_CLASSES)
    with new_folder(target) as temporary:
        for split, into in zip((found.train, found.test), ("training", "validation"), strict=True):
            images, maps = (temporary / kind / into for kind in ("images", "annotations"))
            images.mkdir(parents=True)
            maps.mkdir(parents=True)
            for position in range(len(split.ids)):
                file = split.root / split.image(position)["file_name"]
                shutil.copyfile(file, images / f"{file.stem}.jpg")
                as_stored = {6: 8, 8: 6}.get(kept := read_header(file).orientation, kept)  # reading turns it back
                painted = turn(paint(split, position, found.labels), as_stored)
                Image.fromarray(painted).save(maps / f"{file.stem}.png")
    return target


def paint(split: Split, position: int, labels: dict[int, int]) -> np.ndarray:
    """Return an image's label map, uint8 [H, W]: labels[category] of the smallest mask over a pixel, else 0."""
    image = split.image(position)
    painted = np.zeros((image["height"], image["width"]), np.uint8)
    masks = sorted(split.annotations(position), key=lambda a: run_length.area(a["segmentation"]), reverse=True)
    for annotation in masks:
        painted[run_length.decode(annotation["segmentation"]) > 0] = labels[annotation["category_id"]]
    return painted
