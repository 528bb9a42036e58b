"""COCO's masks as label maps, in ADE20K's layout: a few real photographs for the path of ADE20K.

`prepare` paints every object's mask, and every crowd, with its category: 1 to 80, in the order of COCO's ids. Where
masks overlap the smaller one is seen. What no mask covers is unlabelled (0). Ours, of no paper.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as run_length

from kalmannorm.data import coco
from kalmannorm.data.annotations import Split
from kalmannorm.data.arrays import new_folder
from kalmannorm.data.pixels import look, turn
from kalmannorm.data.scene_sources import COCO_CLASSES

SOURCE = "coco-tiny"


def prepare(target: Path, archive: Path | None) -> Path:
    """Write the data set to `target`, from coco-tiny beside it or the folder `archive` in COCO's layout. UserError:
    that is missing or damaged; `target` is there already."""
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
                as_stored = {6: 8, 8: 6}.get(kept := look(file).orientation, kept)  # back, as scenes are read
                painted = turn(paint(split, position, found.labels), as_stored)
                Image.fromarray(painted).save(maps / f"{file.stem}.png")
    return target


def paint(split: Split, position: int, labels: dict[int, int]) -> np.ndarray:
    """Return the label map uint8 [H, W] of an image: labels[category] of the smallest mask over a pixel, else 0."""
    image = split.image(position)
    painted = np.zeros((image["height"], image["width"]), np.uint8)
    masks = sorted(split.annotations(position), key=lambda a: run_length.area(a["segmentation"]), reverse=True)
    for annotation in masks:
        painted[run_length.decode(annotation["segmentation"]) > 0] = labels[annotation["category_id"]]
    return painted
