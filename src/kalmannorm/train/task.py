"""A task: what a run learns. It brings the data, the loss and the metric; the loop (loop.py) does the rest."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kalmannorm.data.batches import Batches
from kalmannorm.experiments.config import Config
from kalmannorm.experiments.record import Curves, Evaluation, Record, Tree
from kalmannorm.experiments.settings import Schedule
from kalmannorm.norm.modes import normalizers
from kalmannorm.train.model import learning_rate
from kalmannorm.train.ranks import Ranks
from kalmannorm.train.state import Session

Arrays = dict[str, np.ndarray]


class Task(ABC):
    """One run's model and data. A subclass's constructor builds the model and opens the data, or raises UserError.

    model: on the CPU until `load`. train: there from `load` on. provenance: where the data come from, for the record.
    """

    # Per epoch, beside epoch, step and lr: the curves of the record; train_loss is among them.
    curves: tuple[str, ...]
    # An evaluation ends every epoch, and a checkpoint behind it. Else checkpoints are written by steps alone.
    evaluates_epochs: bool
    # Of an evaluation, what the curves show.
    metric: str

    config: Config
    ranks: Ranks
    model: nn.Module
    train: Batches
    provenance: Tree

    @abstractmethod
    def load(self) -> None:
        """Bring model and data to the device."""

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.config.budget.epochs * self.train.steps_per_epoch

    @property
    def end(self) -> int:
        """Steps after which the run ends, where it does not last as long as its schedule."""
        return self.total

    def watching(self) -> AbstractContextManager[object]:
        """Return a context around the training, for what is to be seen of it."""
        return nullcontext()

    @abstractmethod
    def zero_sums(self) -> dict[str, Tensor]:
        """Return what is summed over an epoch's steps, at its start; all of one shape."""

    @abstractmethod
    def begin(self, session: Session, record: Record) -> None:
        """Do what precedes the first step, in a fresh run or one that goes on (`session`)."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (from 0) of the run: a classifier's, with the budget's warm-up."""
        schedule, budget = self.config.schedule, self.config.budget
        assert isinstance(schedule, Schedule)
        warmup = None if budget.warmup is None else budget.warmup / budget.epochs
        return learning_rate(step, self.total, schedule, warmup, self.config.batch.grad_batch)

    def before_step(self, session: Session, step: int) -> None:  # noqa: B027, most tasks have nothing to do
        """Do what is due before a step (from 0) of the run."""

    @abstractmethod
    def loss(self, forward: nn.Module, batch: Any, part: int, parts: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch, images part, part + parts, ... of the process's batch, over `parts`.

        And what it adds to the sums, of this process; the sums of all processes are those of the whole batch. `forward`
        is the model, wrapped and compiled.
        """

    @abstractmethod
    def means(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
        """Return the curves' values of training from the sums over `steps` steps and all processes."""

    @abstractmethod
    def evaluate_under(self, statistics: str) -> Evaluation:
        """Return the metric under "moving" or "online" statistics, on all images of the test set. Stopped: a signal."""

    def evaluate(self) -> dict[str, Evaluation]:
        """Return the metric under both. Without batch statistics they are one, and evaluated once."""
        moving = self.evaluate_under("moving")
        return {"moving": moving, "online": self.evaluate_under("online") if normalizers(self.model) else moving}

    def ends_early(self, curves: Curves) -> bool:
        """Say whether the run ends after this epoch, whatever its budget."""
        return False

    def evaluate_all(self) -> dict[str, Evaluation]:
        """Return the metric under every kind of statistics that the task offers, in one process."""
        return self.evaluate()

    @abstractmethod
    def finish(self, record: Record, session: Session) -> Arrays:
        """Complete the record, whose `final` holds the last evaluation; return the arrays that stand beside it."""


def arithmetic(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """Return a context with the precision in which a run is trained and evaluated."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
