"""GTA5 (Richter et al. 2016, "Playing for Data"), streets of a computer game with Cityscapes' classes

    ROOT/gta5/images/NNNNN.png
    ROOT/gta5/labels/NNNNN.png    Cityscapes' numbers, as colours of a palette
    ROOT/gta5/split.mat           which numbers are trained on (trainIds) and which validated on (valIds)

Tested on the validation scenes. Scenes that are not there are left out: some were never published. The
numbers' classes are as in public code (wasidennis/AdaptSegNet, dataset/gta5_dataset.py).
"""

from pathlib import Path

from kalmannorm.data.cityscapes import CLASSES, NUMBERS, numbered
from kalmannorm.data.scenes import Pair, Source, paired
from kalmannorm.errors import UserError

IDS = {"train": "trainIds", "test": "valIds"}
# Published with label maps of another size than their images, or black: public loaders leave them out.
DAMAGED = {15188, 17705, *range(20801, 20861)}


def _pairs(folder: Path, split: str) -> list[Pair]:
    chosen = _ids(folder / "split.mat", IDS[split])
    images, labels = ([p for p in (folder / kind).glob("*.png") if p.stem in chosen] for kind in ("images", "labels"))
    return paired(images, labels, lambda path: path.name)


def _ids(file: Path, key: str) -> set[str]:
    """Return the names of the images of a split, without suffix. UserError."""
    from scipy.io import loadmat

    try:
        numbers = {int(number) for number in loadmat(file)[key].ravel()}
    except Exception as error:  # whatever a damaged file makes of it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot read {key} of {file}: {reason}; it is in read_mapping.zip, where the images are"
        ) from None
    return {f"{number:05d}" for number in numbers - DAMAGED}


SOURCES = {
    "gta5": Source(
        "gta5",
        tuple(CLASSES),
        numbered(NUMBERS + 1),  # 34: licence plates
        _pairs,
        "get the ten archives of images, those of labels, and read_mapping.zip with split.mat from "
        "download.visinf.tu-darmstadt.de/data/from_games and unpack them into it",
    )
}
