"""Detection: boxes and masks of objects, the losses of Mask R-CNN or Faster R-CNN, pycocotools' average precision.

An epoch is a pass over the images; a run may end within one (`dataset.steps`). Detectors are evaluated once, at the
end.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kalmannorm import data
from kalmannorm.data import coco
from kalmannorm.data.batches import choose_subset, fixed_order
from kalmannorm.data.coco import Batch, Coco, TrainingBatches
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Evaluation, Record
from kalmannorm.experiments.settings import CocoDataset, DetectionSchedule
from kalmannorm.models.detection.parts import LOSSES
from kalmannorm.train import detector
from kalmannorm.train.average_precision import evaluate, finds_masks
from kalmannorm.train.detection_picture import draw_detections
from kalmannorm.train.loaders import workers_beside_network
from kalmannorm.train.model import describe
from kalmannorm.train.pretrained import begin_with_weights
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session
from kalmannorm.train.task import Arrays, Task

SHOWN = 4  # images in a picture


class Detection(Task):
    """A detector's run.

    record["final"][kind] holds AP in percent (average_precision.NAMES for box and mask) under moving and online
    statistics. Precise statistics are not offered, since the head's regions differ between training and evaluation.
    record["weights"] says where the weights and a frozen normalizer's constants come from.
    """

    evaluates_epochs = False
    metric = "box_ap"
    train: TrainingBatches

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.model = detector.build(config)
        self.losses = tuple(name for name in LOSSES if name != "loss_mask" or finds_masks(self.model))
        self.curves = ("train_loss", *self.losses)  # train_loss is the sum of the others
        self.full_precision = torch.autocast(ranks.device.type, enabled=False)  # for evaluation
        assert isinstance(config.dataset, CocoDataset)
        self.dataset = config.dataset
        self.images = coco.load(self.dataset.name, data.root(config.data), self.dataset.classes)

    def load(self) -> None:
        self.train = training_batches(self.config, self.images, self.ranks)
        sizes = {"train_images": self.train.count, "test_images": len(self.images.test.ids)}
        self.provenance = self.images.provenance | sizes
        self.model.to(self.ranks.device)

    @property
    def total(self) -> int:
        return min(super().total, self.dataset.steps or super().total)

    def zero_sums(self) -> dict[str, Tensor]:
        return {"losses": torch.zeros(len(self.losses), device=self.ranks.device)}

    def begin(self, session: Session, record: Record) -> None:
        """Load pretrained weights, if any; without them measure a frozen normalizer's constants. Note both in the
        record."""
        begin_with_weights(detector.pretrained_parts(self.model), self.config, session.fresh, record)
        if self.config.norm.name != "frozen":
            return
        if self.config.weights is not None:
            record["weights"]["constants"] = "of the file"
            return
        seen = min(detector.CONSTANTS_BATCHES, self.train.steps_per_epoch) * self.train.batch
        how = f"measured once, under the initial weights, on {seen} training images"
        record["weights"]["constants"] = how
        if session.fresh:
            alone = copy.copy(self.train)
            alone.rank, alone.world = 0, 1  # every rank measures on whole batches, with the same result
            detector.measure_constants(self.model, self.config, alone)

    def rate(self, step: int) -> float:
        schedule = self.config.schedule
        assert isinstance(schedule, DetectionSchedule)
        return learning_rate(step, self.total, schedule, self.train.batch)

    def loss(self, forward: nn.Module, batch: Batch, part: int, parts: int) -> tuple[Tensor, dict[str, Tensor]]:
        losses: dict[str, Tensor] = forward(batch.images[part::parts], batch.targets[part::parts], batch.canvas)
        each = torch.stack([losses[name] for name in self.losses]) / parts
        return each.sum(), {"losses": each.detach() / self.ranks.world}

    def means(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
        values = (sums["losses"] / steps).tolist()
        return {"train_loss": sum(values), **dict(zip(self.losses, values, strict=True))}

    def evaluate_under(self, statistics: str) -> Evaluation:
        images, stat_batch = self.images, self.config.batch.stat_batch
        everything = list(range(len(images.test.ids)))
        with self.full_precision:
            found = evaluate(self.model, images.test, images.labels, everything, statistics, stat_batch, self.ranks)
        self.ranks.check_stop()
        return found

    def finish(self, record: Record, session: Session) -> Arrays:
        images, ranks = self.images, self.ranks
        seen = choose_subset(self.train.positions, min(self.dataset.train_images_evaluated, self.train.count))
        pictures = {"detections": (images.test, fixed_order(len(images.test.ids))[:SHOWN].tolist())}
        record["norms"] = describe(self.model, detector.belief_report_of_parts(self.model))
        with self.full_precision:
            if seen:
                pictures["detections-training"] = (images.train, seen[:SHOWN])
                record["final_on_training_images"] = evaluate(
                    self.model, images.train, images.labels, seen, "moving", None, ranks
                )
            for name, (split, positions) in pictures.items() if ranks.main else ():
                file = session.folder / f"{name}.png"
                draw_detections(self.model, split, images.labels, positions, ranks.device, file)
        return {}


def training_batches(config: Config, images: Coco, ranks: Ranks) -> TrainingBatches:
    """Return batches of the budget's training images, dealt out to the ranks."""
    return TrainingBatches(
        images,
        choose_subset(images.train_images, config.budget.subset),
        batch=config.batch.grad_batch,
        size=(config.budget.size, config.arch.options["max_size"]),
        seed=config.seed,
        device=ranks.device,
        shard=ranks.shard,
        workers=workers_beside_network(config, ranks),
    )


def learning_rate(step: int, total: int, schedule: DetectionSchedule, batch: int) -> float:
    """Return the learning rate of a step (from 0) of a run of `total` steps, proportional to `batch`.

    The schedule's drops are scaled to the run's length. The warm-up, linear from 1/3 of the rate, has the schedule's
    number of steps, but at most a tenth of the run.
    """
    rate = schedule.lr * batch / schedule.of_batch
    warmup = min(schedule.warmup, total // 10)
    if step < warmup:
        return rate * (1 / 3 + 2 / 3 * step / warmup)
    return float(rate * 0.1 ** sum(step * schedule.of_steps >= drop * total for drop in schedule.drops))
