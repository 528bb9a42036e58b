"""Set up the processes that read files for a loader."""

import resource
import signal
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, get_worker_info

from kalmannorm.errors import UserError

T = TypeVar("T")

GRACE = 20  # seconds between SIGTERM and the end of a worker
OPEN, OPEN_EACH = 32, 20  # open files of a run, and of each worker in addition: pipes, waiting batches


def begin_worker(number: int) -> None:
    """Make a worker ignore or delay signals that stop a run: the run still needs its workers to end the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))  # also sent by an exiting interpreter


def check_open_files(workers: int) -> None:
    """Raise this process's limit of open files to what `workers` need. UserError: the system allows fewer."""
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
    """Returns the data set's sample, or a UserError's message: a worker would pass the exception on in another form."""

    def __init__(self, dataset: Dataset[T]) -> None:
        self.dataset = dataset

    def __getitem__(self, drawn: object) -> T | str:
        try:
            return self.dataset[drawn]  # type: ignore[index]
        except UserError as error:
            return str(error)


def share(batch: T) -> T:
    """Put a worker's tensors into shared memory, as torch's own `default_collate` does.

    If there is too little of it (a container has 64 MiB), the run ends with an error. Otherwise torch would do it in a
    thread of the worker, whose errors are lost, and the run would wait forever.
    """
    return tree_map_only(Tensor, Tensor.share_memory_, batch) if get_worker_info() else batch
