"""Processes that read files for a loader."""

import signal
from typing import TypeVar

from torch.utils.data import Dataset

from kalmannorm.data.pixels import Unreadable
from kalmannorm.errors import UserError

T = TypeVar("T")

GRACE = 20  # seconds that a worker lives on after SIGTERM


def begin_worker(number: int) -> None:
    """Settle a worker's signals: what asks a run to stop reaches its workers too, and it needs them to end the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))  # also how an interpreter that ends ends its workers


class Named(Dataset[T | str]):
    """What a data set gives, or what is wrong with a file: an exception would not leave a worker in its form."""

    def __init__(self, dataset: Dataset[T]) -> None:
        self.dataset = dataset

    def __getitem__(self, drawn: object) -> T | str:
        try:
            return self.dataset[drawn]  # type: ignore[index]
        except (Unreadable, UserError) as error:
            return str(error)
