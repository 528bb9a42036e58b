"""Open a run's training and test images, with the loader that the data set's configuration asks for.

Without `dataset.loader` they are arrays in memory (data/loader.py). With it they are an image folder, read by
torchvision's transforms (data/stream.py) or from FFCV's files (data/beton_loader.py).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kalmannorm import data
from kalmannorm.data.batches import EvaluationBatches
from kalmannorm.data.folder import find_unreadable
from kalmannorm.data.loader import Loader
from kalmannorm.errors import UserError
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Tree
from kalmannorm.experiments.settings import ArrayDataset, FilesDataset, FolderDataset, SegmentationDataset, VideoDataset
from kalmannorm.files import write_atomically
from kalmannorm.train.ranks import Ranks


def open_data(config: Config, ranks: Ranks) -> data.Source:
    """Open the data set. UserError: it is missing or damaged, or its number of classes is not the configured one."""
    dataset = config.dataset
    source = data.source(dataset.values(), data.root(config.data))
    if source.classes != dataset.classes:
        raise UserError(
            f"{dataset.name} has {source.classes} classes, not dataset.classes = {dataset.classes}: correct it"
        )
    if isinstance(source, data.Images):
        check_same_files(source.provenance, source.train.root.parent, ranks)
        if isinstance(dataset, FolderDataset) and dataset.unreadable == "skip":
            source = source.without(ranks.from_main(_unreadable(config, source) if ranks.main else None))
    return source


def check_same_files(provenance: Tree, folder: Path, ranks: Ranks) -> None:
    """Raise UserError if this process sees other files in the data set's folder than rank 0 does."""
    if provenance["sha256"] != ranks.from_main(provenance["sha256"]):
        raise UserError(f"the processes see different files in {folder}: give all of them the same folder")


def workers_beside_network(config: Config, ranks: Ranks) -> int:
    """Return how many processes decode images for a detector or segmenter. On a CPU the default is none, since the
    network keeps all cores busy."""
    if (config.workers, ranks.device.type) == ("auto", "cpu"):
        return 0
    return data.workers_of(config.workers, ranks.world)


def _unreadable(config: Config, images: data.Images) -> data.folder.Unreadables:
    """Return the unreadable images, from a list kept in runs/ if these files were searched before: reading all of
    ImageNet takes minutes to an hour."""
    kept = Path(config.runs) / f"unreadable-{images.provenance['sha256'][:16]}.json"
    if (found := _kept(kept, images)) is not None:
        return found
    found = find_unreadable(images, data.workers_of(config.workers, 1))
    write_atomically(kept, json.dumps(found).encode())
    return found


def _kept(file: Path, images: data.Images) -> data.folder.Unreadables | None:
    """Return the list of unreadable images in a file; None if there is no file or it is damaged."""
    try:
        listed = json.loads(file.read_text())
        found: data.folder.Unreadables = {}
        for split, files in (("train", images.train), ("val", images.test)):
            found[split] = [(index, str(reason)) for index, reason in listed[split]]
            if not all(type(index) is int and 0 <= index < len(files) for index, _ in found[split]):
                return None
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def loaders(
    config: Config, source: data.Source, ranks: Ranks, whole: bool = False
) -> tuple[EvaluationBatches, EvaluationBatches]:
    """Return loaders of the training and test images, which put them on the device at the budget's resolution. Images
    are dealt out to the ranks; with `whole` this rank gets all."""
    shard = (0, 1) if whole else ranks.shard
    test_shard = (0, 1) if whole else evaluation_shard(config, ranks)
    if isinstance(source, data.Arrays):
        return _in_memory(config, source, ranks, shard, test_shard)
    return _of_files(config, source, ranks, shard, test_shard)


def evaluation_shard(config: Config, ranks: Ranks) -> tuple[int, int]:
    """Return the shard of the test images that this rank evaluates. It is all of them with the sampling predictor or
    the guard, whose results depend on a whole batch of groups."""
    together = config.norm.predictor == "sampling" or config.norm.options.get("guard") is not None
    return (0, 1) if together else ranks.shard


def _in_memory(
    config: Config, arrays: data.Arrays, ranks: Ranks, shard: tuple[int, int], test_shard: tuple[int, int]
) -> tuple[EvaluationBatches, EvaluationBatches]:
    """Make both loaders from arrays. The mean of the training images is subtracted from both."""
    budget, dataset = config.budget, config.dataset
    assert isinstance(dataset, ArrayDataset)
    images, labels = arrays.train_images, arrays.train_labels
    if budget.subset is not None:
        chosen = data.class_balanced_subset(labels, budget.subset)
        images, labels = images[chosen], labels[chosen]
    size = budget.size
    train = Loader(
        data.resize(images, size),
        labels,
        batch=config.batch.grad_batch,
        device=ranks.device,
        # The released padding of 4 is for 32 pixels, and scales with the size; no padding stays none.
        pad=max(1, round(dataset.pad * size / 32)) if dataset.pad else 0,
        flip=dataset.flip,
        seed=config.seed,
        shard=shard,
    )
    test = Loader(
        data.resize(arrays.test_images, size),
        arrays.test_labels,
        batch=shard[1],
        device=ranks.device,
        mean=train.mean,
        shard=test_shard,
    )
    return train, test


def options_of_files(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Return the options that all loaders of files share."""
    dataset = config.dataset
    assert isinstance(dataset, FilesDataset | SegmentationDataset)
    pixels = {"size": config.budget.size, "flip": dataset.flip, "mean": dataset.mean, "std": dataset.std}
    return pixels | {"device": ranks.device, "seed": config.seed}


def recoloured(
    config: Config, source: data.Source, train: EvaluationBatches, device: torch.device
) -> dict[str, EvaluationBatches]:
    """Return loaders of all test images in changed colours, by the name of the change; {} without `dataset.recolour`.

    IBN-Net's question is how accuracy depends on appearance while content stays. The sizes of the changes are ours.
    """
    if not isinstance(config.dataset, ArrayDataset) or not config.dataset.recolour:
        return {}
    if not isinstance(source, data.Arrays) or not isinstance(train, Loader):
        raise UserError("dataset.recolour = true: expected false, since only data sets in memory can be recoloured")
    images = data.resize(source.test_images, config.budget.size).astype(np.float32)
    mean = images.mean((1, 2), keepdims=True)
    changed = {
        "rgb_50": images + 50,
        "red_50": images + np.array([50, 0, 0], np.float32),
        "contrast": (images - mean) * 1.5 + mean,
    }
    labels = source.test_labels
    return {
        name: Loader(np.clip(np.rint(each), 0, 255).astype(np.uint8), labels, batch=1, device=device, mean=train.mean)
        for name, each in changed.items()
    }


def _of_files(
    config: Config, source: data.Images | data.Betons, ranks: Ranks, shard: tuple[int, int], test_shard: tuple[int, int]
) -> tuple[EvaluationBatches, EvaluationBatches]:
    """Make both loaders from files, normalized by the data set's `mean` and `std`. A test video gives several clips."""
    from kalmannorm.data.beton_loader import BetonLoader  # here: torchvision's transforms take a second to import
    from kalmannorm.data.stream import FolderLoader
    from kalmannorm.data.video import VideoLoader

    dataset, train = config.dataset, source.train
    common = options_of_files(config, ranks) | {"workers": data.workers_of(config.workers, ranks.world)}
    views = {}
    kind: Any = BetonLoader if isinstance(source, data.Betons) else FolderLoader
    if isinstance(dataset, VideoDataset):
        kind, views = VideoLoader, {"views": dataset.views}
        common |= {"frames": dataset.frames, "interval": dataset.interval}
    if config.budget.subset is not None:
        train = train.take(data.class_balanced_subset(train.labels, config.budget.subset))
    return (
        kind(train, batch=config.batch.grad_batch, shard=shard, **common),
        kind(source.test, batch=test_shard[1], shard=test_shard, **common, **views),
    )
