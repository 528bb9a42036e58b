"""Open FFCV's .beton files as a data set. `beton_write` (`kalmannorm data ffcv`) writes, `beton_loader` decodes."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalmannorm.data.folder import SPLITS
from kalmannorm.errors import UserError, missing_dataset

SOURCE = "beton.json"  # beside the two files: their source, and how they were written
PIPELINE = "FFCV; crops and flips keyed by (seed, epoch, position), not FFCV's own, which ignore the seed"


@dataclass(frozen=True)
class Beton:
    """One split: the images of a file at `indices`, int64 [n]; their labels, int64 [n]."""

    file: Path
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, chosen: NDArray[np.int64]) -> "Beton":
        return replace(self, indices=self.indices[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class Betons:
    """A data set as two .beton files; `provenance` goes into every record."""

    train: Beton
    test: Beton
    classes: int
    provenance: dict[str, Any]


def require_ffcv() -> None:
    """Raise UserError where FFCV is not installed."""
    if importlib.util.find_spec("ffcv") is None:
        raise UserError("ffcv is not installed: `make setup-ffcv`, or dataset.loader=torchvision, which needs no extra")


def load(root: Path, dataset: Mapping[str, Any]) -> Betons:
    """Open the .beton files in `root/FOLDER`, or in `root` itself. UserError: these or FFCV missing; a damaged file."""
    require_ffcv()
    name = dataset["name"]
    places = (root / dataset["folder"], root)
    folder = next((place for place in places if (place / SOURCE).is_file()), None)
    if folder is None:
        looked = f"looked for {SOURCE} in {' and '.join(str(place.absolute()) for place in places)}"
        write = f"write .beton files by `kalmannorm data ffcv {name} --root FOLDER`"
        raise missing_dataset(name, looked, f"{write}, or pass dataset.loader=torchvision")
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        expected = {split: source["bytes"][split] for split in SPLITS}
        classes, provenance = int(source["classes"]), {**source["provenance"], "beton": source["written"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / SOURCE} is not usable ({error}): write the .beton files again") from None
    if provenance.get("name") not in (name, "image_folder"):
        raise UserError(f"{folder.absolute()} has the .beton files of {provenance.get('name')!r}, not of {name!r}")
    splits = []
    for split in SPLITS:
        file = folder / f"{split}.beton"
        found = file.stat().st_size if file.is_file() else 0
        if found != expected[split]:
            raise UserError(f"{file} has {found:,} bytes, expected {expected[split]:,}: write or copy it again")
        from ffcv.reader import Reader

        labels = Reader(str(file)).metadata["f1"].astype(np.int64)
        splits.append(Beton(file, np.arange(len(labels)), labels))
    return Betons(splits[0], splits[1], classes, {**provenance, "name": name, "loader": PIPELINE})
