"""Small sets of scenes in the layouts of CamVid, Cityscapes, ADE20K and GTA5: bands of colour, and their classes."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

TINY = [
    "dataset=camvid",
    "dataset.crop=[32,48]",
    "arch=fcn_resnet14",
    "arch.width=0.0625",
    "schedule=poly",
    "batch=g8_s2",
    "batch.grad_batch=4",
    "budget=smoke",
    "budget.subset=null",
    "budget.size=32",
    "device=cpu",
    "precision=fp32",
    "compile=false",
]
SIZES = ((48, 40), (60, 40), (48, 40), (40, 56))  # width, height


def scene(image: Path, label: Path, numbers: list[int], number: int, palette: bool = False) -> None:
    """Write an image of vertical bands and a label map with `numbers`, one a band, of which the last stands below."""
    random = np.random.RandomState(number)
    width, height = SIZES[number % len(SIZES)]
    bands = np.minimum(np.arange(width) * (len(numbers) - 1) // width, len(numbers) - 2)
    place = np.tile(bands, (height, 1))
    place[-height // 4 :] = len(numbers) - 1
    colours = np.random.RandomState(0).randint(40, 216, (len(numbers), 3))
    pixels = colours[place] + random.randint(-20, 20, (height, width, 3))
    for file in (image, label):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(image)
    labels = Image.fromarray(np.array(numbers, dtype=np.uint8)[place])
    if palette:
        labels.putpalette(list(range(256)) * 3)
    labels.save(label)


def camvid(root: Path, train: int = 8, test: int = 5) -> Path:
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            name = f"{('0001TP', '0006R0')[number % 2]}_{number:06d}.png"
            folder = root / "camvid"
            scene(folder / split / name, folder / f"{split}annot" / name, [0, 1, 8, 11, 3], number)
    return root / "camvid"


def cityscapes(root: Path) -> Path:
    for split, count in (("train", 4), ("val", 3)):
        for number in range(count):
            city, name = ("aachen", "bonn")[number % 2], f"{number:06d}_000019"
            folder = root / "cityscapes"
            image = folder / "leftImg8bit" / split / city / f"{city}_{name}_leftImg8bit.png"
            label = folder / "gtFine" / split / city / f"{city}_{name}_gtFine_labelIds.png"
            scene(image, label, [7, 11, 0, 33, 26], number)
    return root / "cityscapes"


def ade20k(root: Path) -> Path:
    for split, count in (("training", 4), ("validation", 3)):
        for number in range(count):
            folder, name = root / "ade20k", f"ADE_{split[:5]}_{number:08d}"
            image, label = folder / "images" / split / f"{name}.jpg", folder / "annotations" / split / f"{name}.png"
            scene(image, label, [0, 1, 150, 3, 21], number)
    return root / "ade20k"


def gta5(root: Path) -> Path:
    folder = root / "gta5"
    for number in (*range(1, 9), 20801):
        name = f"{number:05d}.png"
        scene(folder / "images" / name, folder / "labels" / name, [7, 11, 34, 23, 26], number, palette=True)
    Image.new("P", (3, 3)).save(folder / "labels" / "20801.png")  # of another size than its image, as published
    savemat(
        folder / "split.mat",
        {"trainIds": [[1], [2], [3], [99], [20801]], "valIds": [[4], [5]], "testIds": [[6], [7], [8]]},
    )
    return folder


WRITE = {"camvid": camvid, "cityscapes": cityscapes, "ade20k": ade20k, "gta5": gta5}
