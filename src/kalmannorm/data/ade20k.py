"""ADE20K (Zhou et al. 2017), 150 classes of things and stuff, as the scene parsing benchmark deals it out

    ROOT/ade20k/images/{training,validation}/NAME.jpg
    ROOT/ade20k/annotations/{training,validation}/NAME.png    0 = unlabelled, 1 to 150

ROOT/ade20k is the benchmark's ADEChallengeData2016. Tested on `validation`.
"""

from pathlib import Path

from kalmannorm.data.scenes import Pair, Source, meanings, paired

COUNT = 150
FOLDERS = {"train": "training", "test": "validation"}


def _pairs(folder: Path, split: str) -> list[Pair]:
    images, labels = (folder / kind / FOLDERS[split] for kind in ("images", "annotations"))
    return paired(images.glob("*.jpg"), labels.glob("*.png"), lambda path: path.stem)


SOURCES = {
    "ade20k": Source(
        "ade20k",
        tuple(str(number) for number in range(1, COUNT + 1)),
        meanings({number: number - 1 for number in range(1, COUNT + 1)}, [0]),
        _pairs,
        "get ADEChallengeData2016.zip from data.csail.mit.edu/places/ADEchallenge and unpack its images/ and "
        "annotations/ into it",
    )
}
