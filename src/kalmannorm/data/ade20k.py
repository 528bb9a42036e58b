"""ADE20K (Zhou et al. 2017), 150 classes of things and stuff, as the scene parsing benchmark deals it out

    ROOT/ade20k/images/{training,validation}/NAME.jpg
    ROOT/ade20k/annotations/{training,validation}/NAME.png    0 = unlabelled, 1 to 150

ROOT/ade20k is the benchmark's ADEChallengeData2016. Tested on `validation`. `coco-tiny-maps` has the same layout.
"""

from pathlib import Path

from kalmannorm.data.scenes import Pair, Source, meanings, paired

COCO_CLASSES = 80
FOLDERS = {"train": "training", "test": "validation"}


def _pairs(folder: Path, split: str) -> list[Pair]:
    images, labels = (folder / kind / FOLDERS[split] for kind in ("images", "annotations"))
    return paired(images.glob("*.jpg"), labels.glob("*.png"), lambda path: path.stem)


def _source(folder: str, count: int, how_to_get: str) -> Source:
    names = tuple(str(number) for number in range(1, count + 1))
    return Source(folder, names, meanings({i + 1: i for i in range(count)}, [0]), _pairs, how_to_get)


SOURCES = {
    "ade20k": _source(
        "ade20k",
        150,
        "get ADEChallengeData2016.zip from data.csail.mit.edu/places/ADEchallenge and unpack its images/ and "
        "annotations/ into it",
    ),
    "coco-tiny-maps": _source(
        "coco-tiny-maps", COCO_CLASSES, "`kalmannorm data prepare coco-tiny-maps` paints it from the masks of coco-tiny"
    ),
}
