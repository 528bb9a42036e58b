"""Segmentation: a class for every pixel, two cross-entropies, mean intersection over union and pixel accuracy.

A loss is the mean over images of each image's mean over labelled pixels, so that k processes compute what one does.
Evaluation counts a confusion matrix over the pixels of whole scenes, at the resolution of their label maps, and sums it
over the processes. Segmenters are evaluated once, at the end.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm import data
from kalmannorm.conversion import belief_report
from kalmannorm.data.batches import choose_subset, fixed_order
from kalmannorm.data.scene_loader import SceneLoader, scaled
from kalmannorm.data.scenes import IGNORED, Scenes, Split, load
from kalmannorm.errors import UserError, nearest
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Evaluation, Record
from kalmannorm.experiments.settings import SegmentationDataset
from kalmannorm.norm.modes import set_statistics, shard_noise
from kalmannorm.train.evaluate import precise
from kalmannorm.train.from_data import measure_input
from kalmannorm.train.loaders import check_same_files, evaluation_shard, options_of_files, workers_beside_network
from kalmannorm.train.model import describe, network, try_out
from kalmannorm.train.pretrained import begin_with_weights
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session
from kalmannorm.train.task import Arrays, Task

AUXILIARY = 0.4  # weight of the third stage's loss (the talk's code)
SHOWN = 4  # test scenes whose predicted maps are saved beside the record
SHOWN_SIDE = 240  # most pixels of a saved map's short side


class Segmentation(Task):
    """A segmenter's run.

    record["final"][kind] holds mean intersection over union (`miou`) and pixel accuracy in percent. Kinds are moving,
    online and precise statistics; `multi_scale`, with scores averaged over `dataset.test_scales`, and the name of
    `dataset.other` for the scenes of that data set, both under moving statistics.
    """

    curves = ("train_loss", "train_accuracy")  # the head's loss, without the auxiliary one, and its pixel accuracy
    evaluates_epochs = False
    metric = "miou"
    train: SceneLoader
    test: SceneLoader

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        assert isinstance(config.dataset, SegmentationDataset)
        self.dataset = config.dataset
        if config.norm.name == "wn" or "weights" in config.norm.options:
            of_data = "weights that depend on data (wn, norm.options.weights) are for classification alone"
            raise UserError(f"norm {config.norm.name} on {config.dataset.name}: {of_data}")
        self.model = network(config)
        try_out(self.model, config, (self.dataset.crop[0], self.dataset.crop[1]))
        self.split, self.other = open_scenes(self.dataset, data.root(config.data), ranks)
        self.counts: dict[str, Tensor] = {}  # confusion matrices by kind of evaluation

    def load(self) -> None:
        config, scenes = self.config, self.split.train
        if config.budget.subset is not None:
            scenes = scenes.take(np.array(choose_subset(range(len(scenes)), config.budget.subset)))
        self.train = self._loader(scenes, self.ranks.shard, config.batch.grad_batch)
        self.test = self._loader(self.split.test, evaluation_shard(config, self.ranks))
        self.provenance = self.split.provenance | {"train_images": self.train.count, "test_images": self.test.count}
        if self.other is not None:
            self.provenance |= {"other": self.other.provenance}
        self.model.to(self.ranks.device)
        train = self.train.wholes(self.train.world)
        seen = (reduced(x, config.budget.size) for images, _, counted in train for x in images[:counted])
        measure_input(self.model, seen, self.ranks)

    def _loader(self, scenes: Scenes, shard: tuple[int, int], batch: int | None = None) -> SceneLoader:
        return SceneLoader(
            scenes,
            crop=self.dataset.crop,
            scales=self.dataset.scales,
            batch=batch or shard[1],
            shard=shard,
            workers=workers_beside_network(self.config, self.ranks),
            **options_of_files(self.config, self.ranks),
        )

    def zero_sums(self) -> dict[str, Tensor]:
        return {key: torch.zeros((), dtype=torch.float64, device=self.ranks.device) for key in ("loss", "accuracy")}

    def begin(self, session: Session, record: Record) -> None:
        begin_with_weights([self.model.get_submodule("backbone")], self.config, session.fresh, record)

    def loss(
        self, forward: nn.Module, batch: tuple[Tensor, Tensor], part: int, parts: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, classes = batch[0][part::parts], batch[1][part::parts].long()
        scores = forward(x)
        loss = mean_of_images(scores["out"].float(), classes) / parts
        auxiliary = mean_of_images(scores["aux"].float(), classes) / parts
        right = (scores["out"].detach().argmax(1) == classes).sum((1, 2)) / labelled(classes)
        return loss + AUXILIARY * auxiliary, {
            "loss": loss.detach().double() / self.ranks.world,
            "accuracy": right.double().mean() / parts / self.ranks.world,
        }

    def means(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
        return {"train_loss": sums["loss"].item() / steps, "train_accuracy": 100 * sums["accuracy"].item() / steps}

    def evaluate_under(self, statistics: str) -> Evaluation:
        return self._evaluated(statistics, self.model, self.test)

    def evaluate_all(self) -> dict[str, Evaluation]:
        """Evaluate under moving, online and precise statistics, at several scales, and on the other data set."""
        found = self.evaluate()
        # Every process measures precise statistics on whole batches, with the same result.
        batches = self._loader(self.train.scenes, (0, 1), self.train.batch)
        found["precise"] = precise(
            self.model, batches, self.config.budget.epochs, lambda m: self._evaluated("precise", m, self.test)
        )
        found["multi_scale"] = self._evaluated("multi_scale", self.model, self.test)
        if self.other is not None:
            assert self.dataset.other is not None
            other = self._loader(self.other.test, (self.test.rank, self.test.world))
            found[self.dataset.other] = self._evaluated(self.dataset.other, self.model, other)
        return found

    def _evaluated(self, kind: str, model: nn.Module, loader: SceneLoader) -> Evaluation:
        config = self.config
        counts = confusion(
            model,
            loader,
            self.dataset.classes,
            config.budget.size,
            scales=self.dataset.test_scales if kind == "multi_scale" else [1.0],
            group=config.batch.stat_batch or 1 if kind == "online" else None,
            ranks=self.ranks,
        )
        self.ranks.check_stop()
        self.counts[kind] = counts
        return summary(counts) | {"images": loader.count}

    def finish(self, record: Record, session: Session) -> Arrays:
        record["norms"] = describe(self.model, belief_report(self.model))
        record["final"] = self.evaluate_all()
        if not self.ranks.main:
            return {}
        arrays = {f"confusion_{kind}": counts.cpu().numpy() for kind, counts in self.counts.items()}
        return arrays | self._maps()

    def _maps(self) -> Arrays:
        """Return the true and predicted classes of a few test scenes, scaled down: scene_true_0 [H, W], ..."""
        arrays: Arrays = {}
        alone = self._loader(self.split.test, (0, 1))
        for number, (images, labels, _) in enumerate(alone.wholes(1, fixed_order(alone.count)[:SHOWN])):
            scores = score(self.model, images, labels, self.config.budget.size)[0]
            step = math.ceil(min(labels[0].shape) / SHOWN_SIDE)
            for name, classes in (("true", labels[0]), ("predicted", scores.argmax(0))):
                arrays[f"scene_{name}_{number}"] = classes[::step, ::step].to(torch.uint8).cpu().numpy()
        return arrays


def open_scenes(dataset: SegmentationDataset, root: Path, ranks: Ranks) -> tuple[Split, Split | None]:
    """Return the data set, and `dataset.other` if given, on which it is tested too.

    UserError: as scenes.load; unknown data sets; another number of classes than configured; different classes.
    """
    found: list[Split] = []
    for name in (dataset.name, dataset.other):
        if name is None:
            continue
        if name not in data.SCENES:
            raise UserError(nearest(name, data.SCENES, "data set of scenes"))
        source = data.SCENES[name]
        if len(source.classes) != dataset.classes:
            raise UserError(f"{name} has {len(source.classes)} classes, not dataset.classes = {dataset.classes}")
        if found and source.classes != found[0].classes:
            raise UserError(f"dataset.other = {name} has other classes than {dataset.name}: expected the same")
        published = dataset.published if name == dataset.name else None
        split = load(name, source, root / source.folder, published, ranks.shard)
        check_same_files(split.provenance, root / source.folder, ranks)
        found.append(split)
    return found[0], found[1] if len(found) > 1 else None


def mean_of_images(scores: Tensor, classes: Tensor) -> Tensor:
    """Return the mean over images of the mean cross-entropy over each image's labelled pixels (0 if it has none)."""
    losses = F.cross_entropy(scores, classes, ignore_index=IGNORED, reduction="none")
    return (losses.sum((1, 2)) / labelled(classes)).mean()


def labelled(classes: Tensor) -> Tensor:
    """Count the labelled pixels of each image, at least 1: [N, H, W] -> [N]."""
    return (classes != IGNORED).sum((1, 2)).clamp(min=1)


@torch.no_grad()
def confusion(
    model: nn.Module,
    loader: SceneLoader,
    classes: int,
    size: int,
    *,
    scales: Sequence[float],
    group: int | None,
    ranks: Ranks,
) -> Tensor:
    """Count the labelled pixels of all scenes by class and predicted class: int64 [classes, classes].

    `size`: the short side, in pixels, at which the network sees scenes. `scales`: factors of it, over which scores are
    averaged. `group`: number of scenes that share online statistics, padded to one size; None: moving statistics, and
    scenes one by one. All ranks return the same.
    """
    shard_noise(model, (loader.rank, loader.world))
    set_statistics(model, "online" if group else "moving")
    model.eval()
    fill = group or 1
    counts = torch.zeros(classes**2, dtype=torch.int64, device=loader.device)
    for images, labels, counted in loader.wholes(loader.world * fill, fill=fill):
        scores = score(model, images, labels, size, scales)
        for each, label in list(zip(scores, labels, strict=True))[:counted]:
            pairs = label.long() * classes + each.argmax(0)
            counts += torch.bincount(pairs[label != IGNORED], minlength=classes**2)
    if loader.world > 1:
        (counts,) = ranks.sum(counts)
    return counts.long().view(classes, classes)


def reduced(image: Tensor, short: float) -> Tensor:
    """Resize an image [3, H, W] to [1, 3, h, w], with a short side of `short` pixels."""
    return F.interpolate(image[None], scaled(image.shape[-2:], short), mode="bilinear", antialias=True)


def score(
    model: nn.Module, images: Sequence[Tensor], labels: Sequence[Tensor], size: int, scales: Sequence[float] = (1.0,)
) -> list[Tensor]:
    """Return every image's scores [classes, h, w] at the resolution of its label map. With several scales, they are the
    mean of the scales' softmax."""
    total = [torch.zeros((), device=image.device) for image in images]
    for scale in scales:
        seen = [reduced(image, size * scale)[0] for image in images]
        sides = [image.shape[-2:] for image in seen]
        canvas = [max(side) for side in zip(*sides, strict=True)]
        x = images[0].new_zeros(len(images), 3, *canvas)
        for place, image, (height, width) in zip(x, seen, sides, strict=True):
            place[:, :height, :width] = image
        found = model(x)["out"].float()
        for i, (label, (height, width)) in enumerate(zip(labels, sides, strict=True)):
            own = F.interpolate(found[i : i + 1, :, :height, :width], label.shape, mode="bilinear")[0]
            total[i] = total[i] + (own if len(scales) == 1 else own.softmax(0) / len(scales))
    return total


def summary(counts: Tensor) -> Evaluation:
    """Return, in percent, mean intersection over union of the classes that occur or are predicted, and pixel accuracy,
    from a confusion matrix [classes, classes]; and the number of pixels."""
    both, exact = counts.double(), counts.diag().double()
    union = both.sum(0) + both.sum(1) - exact
    return {
        "miou": 100 * (exact[union > 0] / union[union > 0]).mean().item(),
        "pixel_accuracy": 100 * (exact.sum() / both.sum()).item(),
        "pixels": int(counts.sum()),
    }
