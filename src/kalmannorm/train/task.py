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

    Attributes:
        model: on the CPU until `load` is called.
        train: the training batches; exists once `load` was called.
        provenance: where the data come from, for the record.
    """

    # Names of the record's curves (a value per epoch), beside epoch, step and lr; train_loss is one of them.
    curves: tuple[str, ...]
    # Whether every epoch ends with an evaluation and a checkpoint. If not, checkpoints depend on the step alone.
    evaluates_epochs: bool
    # The key of an evaluation's value that the curves show.
    metric: str

    config: Config
    ranks: Ranks
    model: nn.Module
    train: Batches
    provenance: Tree

    @abstractmethod
    def load(self) -> None:
        """Move the model to the device and load the data there."""

    @property
    def total(self) -> int:
        """Steps of the run's schedule."""
        return self.config.budget.epochs * self.train.steps_per_epoch

    @property
    def end(self) -> int:
        """Steps after which the run ends: `total`, or fewer if the run ends before its schedule does."""
        return self.total

    def watching(self) -> AbstractContextManager[object]:
        """Return a context in which the loop trains, for tasks that record something of the steps."""
        return nullcontext()

    @abstractmethod
    def zero_sums(self) -> dict[str, Tensor]:
        """Return zeros for all that is summed over an epoch's steps, by name; all of one shape."""

    @abstractmethod
    def begin(self, session: Session, record: Record) -> None:
        """Prepare for the first step of a fresh run or of a resumed one (`session.fresh`)."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (from 0) of the run, by the schedule and the budget's warm-up."""
        schedule, budget = self.config.schedule, self.config.budget
        assert isinstance(schedule, Schedule)
        warmup = None if budget.warmup is None else budget.warmup / budget.epochs
        return learning_rate(step, self.total, schedule, warmup, self.config.batch.grad_batch)

    def before_step(self, session: Session, step: int) -> None:  # noqa: B027, most tasks have nothing to do
        """Do what is due before a step (from 0) of the run."""

    @abstractmethod
    def loss(self, forward: nn.Module, batch: Any, part: int, parts: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch divided by `parts`, and what the micro-batch adds to the sums.

        The micro-batch holds the images part, part + parts, ... of the process's batch. What it adds is this process's
        share: added up over micro-batches and processes it is the value of the whole batch. `forward`: the model,
        wrapped and compiled.
        """

    @abstractmethod
    def means(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, float]:
        """Return the training values of the curves, from the sums over `steps` steps and all processes."""

    @abstractmethod
    def evaluate_under(self, statistics: str) -> Evaluation:
        """Evaluate all test images under "moving" or "online" statistics. Stopped: a signal."""

    def evaluate(self) -> dict[str, Evaluation]:
        """Evaluate under moving and online statistics: once for both if no normalizer has batch statistics."""
        moving = self.evaluate_under("moving")
        return {"moving": moving, "online": self.evaluate_under("online") if normalizers(self.model) else moving}

    def ends_early(self, curves: Curves) -> bool:
        """Say whether the run ends after this epoch, whatever its budget."""
        return False

    def evaluate_all(self) -> dict[str, Evaluation]:
        """Evaluate under every kind of statistics that the task offers."""
        return self.evaluate()

    @abstractmethod
    def finish(self, record: Record, session: Session) -> Arrays:
        """Complete the record, whose `final` holds the last evaluation; return the arrays to be saved beside it."""


def arithmetic(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """Return a context with the precision (fp32, or autocast to bfloat16) in which a run is trained and evaluated."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
