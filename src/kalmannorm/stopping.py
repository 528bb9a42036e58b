"""Signals that ask a command to stop, in whatever phase: SIGTERM, and SIGUSR1, which Slurm sends ahead of the end.

Where nothing would be lost, as while data are loaded, a model is built, or a checkpoint holds all that an evaluation
would have to repeat, the command stops at once. What is under way within `finishing`, a step and its checkpoint or a
file, is brought to its end first; in a run of several processes, what is under way lasts until they ask each other
(train/loop.py). The exit code is 128 and the signal's number: schedulers requeue such a job.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from kalmannorm.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_asked: list[int] = []  # numbers of the signals that came, in order
_depth = 0  # of `finishing`


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` have these signals while the context lasts."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def listening() -> Iterator[None]:
    """Raise Stopped when a signal asks for it, while the context lasts. May be nested; the main thread alone can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if all(signal.getsignal(number) is not _note for number in STOP_SIGNALS):
        _asked.clear()
    with handling(STOP_SIGNALS, _note):
        yield


@contextmanager
def finishing() -> Iterator[None]:
    """Bring what is under way to its end before Stopped is raised."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _depth == 0 and _asked:
        raise Stopped(_asked[0])


def asked() -> int | None:
    """Return the number of the signal that asked this process to stop."""
    return _asked[0] if _asked else None


def _note(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    if _depth == 0:
        raise Stopped(number)
