"""A small set in COCO's true format: coloured rectangles on grey; polygons, run-length codes, a crowd, no object."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as run_length

COLOURS = {7: (220, 30, 30), 1: (30, 200, 40), 44: (40, 60, 220)}  # category ids, neither consecutive nor in order
SIZES = ((64, 48), (48, 64), (80, 48), (64, 48), (64, 50), (48, 60), (64, 48), (70, 48))  # width, height
TINY = [
    "dataset=coco",
    "dataset.classes=3",
    "arch=mask_rcnn_c4",
    "arch.layers=[1,1,1,1]",
    "arch.width=0.0625",
    "schedule=c4_280k",
    "batch=g8_s2",
    "batch.grad_batch=4",
    "budget=smoke",
    "budget.subset=4",
    "device=cpu",
]
TINY_FPN = ["arch=mask_rcnn_fpn" if override.startswith("arch=") else override for override in TINY]


def write(root: Path, name: str = "coco", train: int = 8, test: int = 5) -> Path:
    """Both splits under root/name. The last training image is empty, the one before it holds a crowd alone."""
    folder = root / name
    for split, count, seed in (("train2017", train, 0), ("val2017", test, 1)):
        random = np.random.RandomState(seed)
        (folder / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            width, height = SIZES[number % len(SIZES)]
            image = {"id": 1000 + 7 * number, "file_name": f"{number:012d}.jpg", "width": width, "height": height}
            images.append(image)
            pixels = np.full((height, width, 3), 128, dtype=np.uint8)
            objects = 0 if split == "train2017" and number >= count - 2 else 2
            for kind in random.permutation(3)[:objects]:
                annotations.append(_object(pixels, image["id"], list(COLOURS)[kind], len(annotations) + 1, random))
            if number == count - 2:
                annotations.append(_crowd(width, height, image["id"], len(annotations) + 1))
            Image.fromarray(pixels).save(folder / split / image["file_name"], quality=95)
        categories = [{"id": category, "name": f"kind {category}"} for category in COLOURS]
        file = folder / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        # No `info` and no `licenses`: some sets lack them.
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder


def _object(pixels: np.ndarray, image: int, category: int, number: int, random: Any) -> dict[str, Any]:
    height, width = pixels.shape[:2]
    w, h = (int(random.randint(side // 4, side // 2)) for side in (width, height))
    x, y = int(random.randint(0, width - w)), int(random.randint(0, height - h))
    pixels[y : y + h, x : x + w] = COLOURS[category]
    annotation = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0, "area": float(w * h)}
    annotation["bbox"] = [float(x), float(y), float(w), float(h)]
    if number % 2:
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    else:
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[y : y + h, x : x + w] = 1
        code = run_length.encode(np.asfortranarray(mask))
        annotation["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    return annotation


def _crowd(width: int, height: int, image: int, number: int) -> dict[str, Any]:
    """The left half, as an uncompressed run-length code."""
    half = width // 2
    code = {"size": [height, width], "counts": [0, half * height, (width - half) * height]}
    annotation: dict[str, Any] = {"id": number, "image_id": image, "category_id": 1, "iscrowd": 1}
    return annotation | {"area": half * height, "bbox": [0, 0, half, height], "segmentation": code}
