"""Processes that read files for a loader."""

import resource
import signal
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, get_worker_info

from kalmannorm.errors import UserError

T = TypeVar("T")

GRACE = 20  # seconds that a worker lives on after SIGTERM
OPEN, OPEN_EACH = 32, 20  # files that a run has open, and more for each worker: pipes, and batches that wait


def begin_worker(number: int) -> None:
    """Settle a worker's signals: what asks a run to stop reaches its workers too, and it needs them to end the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))  # also how an interpreter that ends ends its workers


def check_open_files(workers: int) -> None:
    """Let this process open the files that `workers` need, within what the system allows. UserError: it allows less."""
    needed = OPEN + OPEN_EACH * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if workers == 0 or soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{workers} processes that read images need {needed} open files, and {hard} are allowed: raise it "
            f"(ulimit -n {needed}), or pass fewer workers= (0: none)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Named(Dataset[T | str]):
    """What a data set gives, or what is wrong with a file: an exception would not leave a worker in its form."""

    def __init__(self, dataset: Dataset[T]) -> None:
        self.dataset = dataset

    def __getitem__(self, drawn: object) -> T | str:
        try:
            return self.dataset[drawn]  # type: ignore[index]
        except UserError as error:
            return str(error)


def share(batch: T) -> T:
    """Put a worker's tensors into shared memory, as torch's own `default_collate` does.

    Where there is too little of it (a container has 64 MiB), that ends the run with an error. Without this torch does
    it in a thread of the worker, whose errors nobody hears of, and the run waits forever.
    """
    return tree_map_only(Tensor, Tensor.share_memory_, batch) if get_worker_info() else batch
