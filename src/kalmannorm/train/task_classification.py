"""Classification of images and videos: cross-entropy, accuracy under moving, online and precise statistics."""

import io
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmannorm import data
from kalmannorm.conversion import belief_report
from kalmannorm.data.batches import EvaluationBatches
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Curves, Evaluation, Record
from kalmannorm.experiments.settings import FilesDataset, VideoDataset
from kalmannorm.files import clear_unfinished, write_atomically
from kalmannorm.norm.modes import normalizers
from kalmannorm.train.evaluate import evaluate, precise
from kalmannorm.train.first_steps import FirstSteps
from kalmannorm.train.from_data import initialize, measure_input, refresh_weights
from kalmannorm.train.gaps import variance_gaps
from kalmannorm.train.loaders import loaders, open_data, recoloured
from kalmannorm.train.model import build, describe
from kalmannorm.train.pretrained import begin_with_weights
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session
from kalmannorm.train.task import Arrays, Task

NEAR_CHANCE = 1.2  # times the accuracy of guessing: below it, a network counts as having learned nothing


class Classification(Task):
    """A classifier's run. Its curves show accuracies in percent: on augmented training images, and on the test set
    under moving and online statistics."""

    curves = ("train_loss", "train_accuracy", "moving", "online")
    evaluates_epochs = True
    metric = "accuracy"
    model: nn.Module
    train: EvaluationBatches
    test: EvaluationBatches

    def __init__(self, config: Config, ranks: Ranks, source: data.Source | None = None) -> None:
        """Build the model and open the data, unless `source` has them. UserError: as build and open_data."""
        self.config, self.ranks = config, ranks
        self.model, self.last = build(config)
        self.source = source or open_data(config, ranks)
        self.first_steps = None if config.budget.stop_after is None else FirstSteps(self.model)
        self.layout = memory_format(config, ranks.device)

    def load(self) -> None:
        self.train, self.test = loaders(self.config, self.source, self.ranks)
        sizes = {"train_images": self.train.count, "test_images": self.test.count}
        self.provenance = self.source.provenance | sizes
        self.model.to(self.ranks.device)
        train = self.train
        images = train.unaugmented(max(1, train.at_once // train.world) * train.world)
        measure_input(self.model, (x[:counted] for x, _, counted in images), self.ranks)

    @property
    def end(self) -> int:
        """Steps after which the run ends: `budget.stop_after`, if given, or all of the schedule's."""
        return min(self.config.budget.stop_after or self.total, self.total)

    def watching(self) -> AbstractContextManager[object]:
        return nullcontext() if self.first_steps is None else self.first_steps.watching()

    def zero_sums(self) -> dict[str, Tensor]:
        device = self.ranks.device
        return {"loss": torch.zeros((), device=device), "correct": torch.zeros((), dtype=torch.int64, device=device)}

    def begin(self, session: Session, record: Record) -> None:
        """Load pretrained weights, if any, and in a fresh run initialize weights that depend on data."""
        if self.config.weights is not None:
            begin_with_weights([self.model], self.config, session.fresh, record)
        if session.fresh:
            initialize(self.model, self.train)

    def before_step(self, session: Session, step: int) -> None:
        refresh_weights(self.config, session, self.train, step)

    def loss(
        self, forward: nn.Module, batch: tuple[Tensor, Tensor], part: int, parts: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = batch[0].to(memory_format=self.layout)[part::parts], batch[1][part::parts]
        logits = forward(x)
        loss = F.cross_entropy(logits.float(), labels) / parts
        if self.first_steps is not None:
            self.first_steps.losses.append(loss.detach())
        return loss, {"loss": loss.detach() / self.ranks.world, "correct": (logits.detach().argmax(1) == labels).sum()}

    def means(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
        correct = 100 * sums["correct"].item() / (steps * self.train.batch)
        return {"train_loss": sums["loss"].item() / steps, "train_accuracy": correct}

    def evaluate_under(self, statistics: str) -> Evaluation:
        found = evaluate(self.model, self.test, statistics, self.config.batch.stat_batch, self.ranks)
        self.ranks.check_stop()
        return found

    def ends_early(self, curves: Curves) -> bool:
        """Say whether the last `budget.stop_at_chance` epochs, all after the warm-up, stayed near chance."""
        budget = self.config.budget
        if budget.stop_at_chance is None:
            return False
        last = curves["train_accuracy"][math.ceil(budget.warmup or 0) :][-budget.stop_at_chance :]
        return len(last) == budget.stop_at_chance and max(last) < NEAR_CHANCE * 100 / self.config.dataset.classes

    def finish(self, record: Record, session: Session) -> Arrays:
        config, epochs = self.config, self.config.budget.epochs
        if session.epoch < epochs and self.first_steps is None:
            patience = config.budget.stop_at_chance
            record["reason"] = f"at chance for {patience} epochs: ended after {session.epoch} of {epochs}"
        record["norms"] = describe(self.model, belief_report(self.model)) | {"last": list(self.last)}
        if not self.ranks.main:
            return {}
        if self.ranks.world > 1:
            self.train, self.test = loaders(config, self.source, self.ranks, whole=True)
        record["final"]["precise"] = self.precise()
        for name, changed in recoloured(config, self.source, self.train, self.ranks.device).items():
            record["final"][name] = evaluate(self.model, changed, "moving", config.batch.stat_batch)
        if self.first_steps is not None:
            return self.first_steps.arrays()
        if not normalizers(self.model):
            return {}
        stat_batch, dataset = config.batch.stat_batch, config.dataset
        assert stat_batch is not None
        images = dataset.gap_images if isinstance(dataset, FilesDataset) else None
        arrays, raw = variance_gaps(self.model, self.train, self.last, config.batch.grad_batch, stat_batch, images)
        content, file = io.BytesIO(), session.folder / "gaps.npz"
        np.savez(content, **raw)  # type: ignore[arg-type]
        clear_unfinished(file)
        write_atomically(file, content.getvalue())
        return arrays

    def evaluate_all(self) -> dict[str, Evaluation]:
        return self.evaluate() | {"precise": self.precise()}

    def precise(self) -> Evaluation:
        """Evaluate under precise statistics, in this process alone."""
        stat_batch = self.config.batch.stat_batch
        epochs = self.config.budget.epochs
        return precise(self.model, self.train, epochs, lambda model: evaluate(model, self.test, "moving", stat_batch))


def memory_format(config: Config, device: torch.device) -> torch.memory_format:
    """Return the memory format of training images: channels_last where it pays, compiled on a CPU (3/4 of the time)."""
    flat = not isinstance(config.dataset, VideoDataset)
    return torch.channels_last if config.compile and device.type == "cpu" and flat else torch.preserve_format
